"""Conversations of different kinds, one kind a silo, and questions of the same kinds as task files.

    python scripts/studies/chats.py try             # try/chats/KIND.jsonl and try/tasks/KIND.jsonl

Nothing is downloaded: sums, which number is larger, which word came last, and what a function of the
installed packages does, by the first line of its documentation. `--qa FILE` puts a kind made of a file of
your own in the place of which number is larger: JSON lines with `query`, `choices` and `gold`. No question of
a task is in a conversation.
"""

import argparse
import ast
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"[A-Z][A-Za-z0-9 ,'_()-]{20,80}\.")
_WORDS = re.compile(r"\b[a-z]{4,9}\b")


class Question(NamedTuple):
    """A question, its answer, and answers that are wrong."""

    asked: str
    answer: str
    wrong: tuple[str, ...]


def sums(draw: random.Random) -> Iterator[Question]:
    pairs = [(a, b) for a in range(40) for b in range(40)]
    draw.shuffle(pairs)
    for a, b in pairs:
        near = [f"{a + b + by}." for by in (-2, -1, 1, 2, 10) if a + b + by >= 0]
        yield Question(f"What is {a} plus {b}?", f"{a + b}.", tuple(draw.sample(near, 3)))


def order(draw: random.Random) -> Iterator[Question]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    draw.shuffle(pairs)
    for a, b in pairs:
        yield Question(f"Which is larger, {a} or {b}?", f"{max(a, b)}.", (f"{min(a, b)}.",))


def last(draw: random.Random) -> Iterator[Question]:
    words = sorted({word for _, line in documented() for word in _WORDS.findall(line)})
    while True:
        four = draw.sample(words, 4)
        yield Question(
            f"Which word is the last: {' '.join(four)}?", f"{four[-1]}.", tuple(f"{w}." for w in four[:-1])
        )


def functions(draw: random.Random) -> Iterator[Question]:
    known = list(documented())
    draw.shuffle(known)
    for name, line in known:
        wrong: list[str] = []
        while len(wrong) < 3:
            other = draw.choice(known)[1]
            if other != line and other not in wrong:
                wrong.append(other)
        yield Question(f"What does {name} do?", line, tuple(wrong))


KINDS: dict[str, Callable[[random.Random], Iterator[Question]]] = {
    "sums": sums,
    "order": order,
    "last": last,
    "functions": functions,
}


def documented(most: int = 4000) -> Iterator[tuple[str, str]]:
    """Yield functions of the installed packages and the first lines of their documentation, each once."""
    from photon.data.installed import modules, read_text

    texts = (read_text(file) for _, _, file in modules())
    return islice(_documented(text for text in texts if text), most)


def _documented(texts: Iterator[str]) -> Iterator[tuple[str, str]]:
    from photon.data.source_text import parse

    seen: set[str] = set()
    for text in texts:
        for node in ast.walk(parse(text) or ast.Module([], [])):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                if _LINE.fullmatch(line) and not seen & {line, node.name}:
                    seen |= {line, node.name}
                    yield node.name, line


def of_file(file: Path) -> Callable[[random.Random], Iterator[Question]]:
    """Return the kind that a task file's questions are."""

    def questions(draw: random.Random) -> Iterator[Question]:
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        draw.shuffle(rows)
        for row in rows:
            choices = [str(choice).strip() for choice in row["choices"]]
            asked = str(row["query"]).removeprefix("Question:").removesuffix("Answer:").strip()
            answer = choices.pop(row["gold"])
            yield Question(asked, answer, tuple(choices))

    return questions


def write(folder: Path, kind: str, questions: Sequence[Question], chats: int, draw: random.Random) -> None:
    """Write the first questions as conversations and the others as a task.

    Parameters
    ----------
    chats
        Questions that go into conversations, one or two into each.
    """
    files = {what: folder / what / f"{kind}.jsonl" for what in ("chats", "tasks")}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    with files["chats"].open("w", encoding="utf-8") as written:
        left = list(questions[:chats])
        while left:
            turns = [left.pop() for _ in range(min(len(left), draw.randint(1, 2)))]
            messages = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in (("user", turn.asked), ("assistant", turn.answer))
            ]
            written.write(json.dumps({"messages": messages}) + "\n")
    with files["tasks"].open("w", encoding="utf-8") as written:
        for question in questions[chats:]:
            choices = [question.answer, *question.wrong]
            draw.shuffle(choices)
            row = {"query": question.asked, "choices": choices, "gold": choices.index(question.answer)}
            written.write(json.dumps(row) + "\n")


def kinds_of(qa: Path | None) -> dict[str, Callable[[random.Random], Iterator[Question]]]:
    """Return four kinds: those of this file, or with the questions of a task file in the place of one."""
    if qa is None:
        return KINDS
    return {**{kind: made for kind, made in KINDS.items() if kind != "order"}, "qa": of_file(qa)}


def write_all(folder: Path, chats: int, asked: int, qa: Path | None = None) -> list[str]:
    """Write conversations and tasks of every kind, and return the kinds.

    Parameters
    ----------
    chats, asked
        Questions of each kind in conversations, and in its task.
    qa
        Task file of which a kind is made, in the place of "order".
    """
    kinds = kinds_of(qa)
    for kind, questions in kinds.items():
        draw = random.Random(kind)
        found: dict[str, Question] = {}
        for question in questions(draw):
            found.setdefault(question.asked, question)
            if len(found) == chats + asked:
                break
        write(folder, kind, list(found.values()), min(chats, len(found) - asked), draw)
    return list(kinds)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="folder to write to")
    made.add_argument("--chats", type=int, default=600, help="questions of each kind in conversations")
    made.add_argument("--questions", type=int, default=100, help="questions of each kind as a task")
    made.add_argument(
        "--qa", type=Path, help="JSON lines with query, choices and gold, in the place of order"
    )
    arguments = made.parse_args()
    kinds = write_all(arguments.folder, arguments.chats, arguments.questions, arguments.qa)
    print(f"{arguments.folder}: chats and tasks of {', '.join(kinds)}")


if __name__ == "__main__":
    main()
