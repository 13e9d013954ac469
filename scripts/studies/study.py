"""What a study is, and its two commands: ``run`` does what is missing, ``table`` writes the page anew.

``table`` empties nothing. Without any line the page stays as it is. A section of the page that nothing
known makes stays as it is, and so does the plot, which may show it. In both cases the command says so and
fails.
"""

import argparse
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import Results, Runs, has_line, known, load
from tables import MARK

WIDTH = 110
FOOTNOTE = (
    f"{MARK} No line in the repository: measured earlier, on a machine that is gone. Means over seeds are of "
    "those that have a line, if one has."
)


def nothing(_: argparse.ArgumentParser) -> None:
    """Add no option."""


@dataclass(frozen=True)
class Study:
    """One study.

    Parameters
    ----------
    script
        Its file.
    description
        Of the script: its docstring.
    page
        What ``table`` writes if ``--output`` does not say. Lines are beside it, as ``.jsonl``, if
        ``--results`` does not say.
    title
        Of the page.
    about
        What stands on the page after who wrote it: a paragraph.
    run
        Do what is missing, as the options of ``run`` say.
    sections
        The rest of the page, line by line. Each section has a heading of its own.
    options
        Add options of ``run``.
    plot
        Write the plot of the page.
    plotted
        What it shows, if the page has it in its text.
    figure
        Of a result: the one that is printed when it is there.
    marks
        The tables mark figures of runs that have no line. Otherwise they are made of lines alone.
    """

    script: str
    description: str | None
    page: str
    title: str
    about: Callable[[Results], str]
    run: Callable[[Runs, argparse.Namespace], None]
    sections: Callable[[Results], Iterable[str]]
    options: Callable[[argparse.ArgumentParser], None] = nothing
    plot: Callable[[Results, Path], None] | None = None
    plotted: str = ""
    figure: str = "perplexity"
    marks: bool = False

    def main(self, words: Sequence[str] | None = None) -> None:
        """Do what the command line says."""
        arguments = self._parser().parse_args(words)
        if arguments.command == "run":
            self.run(Runs(arguments.results, arguments.minutes, self.figure), arguments)
        else:
            self.write_page(arguments.results, arguments.output)

    def _parser(self) -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        commands = made.add_subparsers(dest="command", required=True)
        run = commands.add_parser("run", help="do runs that are missing")
        run.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
        table = commands.add_parser("table", help="write the page, and the plot if there is one")
        table.add_argument("--output", type=Path, default=Path(self.page))
        for command in (run, table):
            results = Path(self.page).with_suffix(".jsonl")
            command.add_argument("--results", type=Path, default=results, help="a line for each run")
        self.options(run)
        return made

    def write_page(self, file: Path, page: Path) -> None:
        """Write the page and the plot from what is known; keep sections of which nothing is."""
        results = known(file) if self.marks else load(file)
        lines = sum(map(has_line, results))
        if not lines:
            raise SystemExit(f"{file}: no run has a line, so {page} stays as it is; `run` comes first")
        text = self._text(results, lines, page.with_suffix(".svg").name)
        kept: list[str] = []
        if page.exists():
            text, kept = with_sections_of(page.read_text(), text)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
        earlier = f", earlier figures of {len(results) - lines} more" if len(results) > lines else ""
        print(f"{page}: {lines} runs{earlier}")
        if kept:
            raise SystemExit(
                f"{file}: no line for {len(kept)} sections of {page}, which stay as they are, with the plot; "
                f"delete from the page what should go: {'; '.join(kept)}"
            )
        if self.plot is not None:
            self.plot(results, page.with_suffix(".svg"))

    def _text(self, results: Results, lines: int, plot: str) -> str:
        body = [f"![{self.plotted}]({plot})", ""] if self.plotted else []
        body += self.sections(results)
        written = f"Written by `python scripts/studies/{Path(self.script).name} table` from {lines} runs."
        text = f"{written} {self.about(results)}"
        head = [f"# {self.title}", "", *paragraph(text), ""]
        if any(MARK in line for line in body):
            head += [*paragraph(FOOTNOTE), ""]
        return "\n".join([*head, *body]).rstrip() + "\n"


def paragraph(text: str) -> list[str]:
    """Break a text into lines, but for its links and code."""
    whole = re.sub(r"\[[^]]*\]|`[^`]*`", lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(whole, WIDTH, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def with_sections_of(old: str, new: str) -> tuple[str, list[str]]:
    """Return ``new`` with the sections that it lacks and ``old`` has, at their place, and their headings."""
    made, kept, before = sections_of(new), [], ""
    order = list(made)
    for heading, section in sections_of(old).items():
        if heading not in made:
            kept.append(heading)
            made[heading] = section
            order.insert(order.index(before) + 1, heading)
        before = heading
    return "\n\n".join(made[heading] for heading in order) + "\n", kept


def sections_of(page: str) -> dict[str, str]:
    """Return the sections of a page by heading, what comes before them under an empty one."""
    found: dict[str, list[str]] = {"": []}
    for line in page.splitlines():
        if line.startswith("##"):
            found[line] = []
        found[next(reversed(found))].append(line)
    return {heading: "\n".join(lines).strip() for heading, lines in found.items()}
