"""Conversations in the terminal: what is kept, what is forgotten, and how they end."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.commands.app import app
from photon.errors import PhotonError
from photon.serving.chat import Conversation, converse, shown
from photon.serving.model import PromptError, ServedModel, Settings

GREEDY = Settings(most=20, temperature=0)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that models are given, as text."""
    given: list[str] = []
    answer = ServedModel.answer

    def noted(self: ServedModel, prompt: list[int], settings: Settings) -> object:
        given.append(self.tokenizer.decode(prompt))
        return answer(self, prompt, settings)

    monkeypatch.setattr(ServedModel, "answer", noted)
    return given


def test_a_conversation_is_kept_and_its_oldest_turns_are_forgotten(
    talker: ServedModel, prompts: list[str]
) -> None:
    said: list[str] = []
    conversation = Conversation(talker, GREEDY, "be kind", said.append)
    told = ["".join(conversation.answer(f"abc {number}")) for number in range(2)]
    assert prompts == [
        "s be kind\nu abc 0\na ",
        f"s be kind\nu abc 0\na {told[0]}\nu abc 1\na ",
    ]
    assert not said
    while not said:
        told.append("".join(conversation.answer("abc " * 6)))
    # By whole pairs, and never what the system said.
    assert prompts[-1].startswith("s be kind\nu ")
    assert prompts[-1].count("\nu ") < len(told)
    assert prompts[-1].endswith("\na ")
    assert "older turns no longer fit" in said[0]


def test_what_cannot_be_taken_leaves_the_conversation_as_it_was(
    talker: ServedModel, prompts: list[str]
) -> None:
    conversation = Conversation(talker, GREEDY, None, lambda _: None)
    first = "".join(conversation.answer("abc"))
    with pytest.raises(PromptError, match="say less"):
        list(conversation.answer("abc " * 400))
    list(conversation.answer("d"))
    assert prompts[-1] == f"u abc\na {first}\nu d\na "


def test_a_base_model_continues_the_text(base: ServedModel, prompts: list[str]) -> None:
    conversation = Conversation(base, GREEDY, None, lambda _: None)
    first = "".join(conversation.answer("abc"))
    second = "".join(conversation.answer(""))
    list(conversation.answer("d"))
    assert prompts == ["abc", f"abc{first}", f"abc{first}{second}\nd"]
    # Of a text that is too long, the end.
    list(conversation.answer("abcdefgh " * 300))
    assert prompts[-1].endswith("abcdefgh ")
    assert len(base.encode(prompts[-1])) <= (base.positions or 0) - 20
    with pytest.raises(PhotonError, match="--system needs a chat template"):
        Conversation(base, GREEDY, "be kind", lambda _: None)


def asking(*lines: str | type[BaseException]) -> Callable[[], str]:
    left = iter([*lines, EOFError])

    def ask() -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    return ask


def test_an_interruption_ends_the_answer_alone(talker: ServedModel, prompts: list[str]) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    converse(Conversation(talker, GREEDY, None, say), asking("abc", "d"), say)
    # What was told of the answer belongs to the conversation.
    assert prompts[1] == f"u abc\na {''.join(said[:3])}\nu d\na "
    with pytest.raises(KeyboardInterrupt):
        converse(Conversation(talker, GREEDY, None, say), asking(KeyboardInterrupt), say)


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert shown("a\x1b[2Jb\tc\nd\re\x07é世") == "a\\x1b[2Jb\tc\nd\\re\\x07é世"


def test_the_command_reads_lines_to_their_end(chat_export: Path, export: Path) -> None:
    arguments = ["--temperature", "0", "--max-new-tokens", "5", "--device", "cpu"]
    runner = CliRunner()
    result = runner.invoke(
        app, ["chat", str(chat_export), "--system", "be kind", *arguments], input="abc\nd\n"
    )
    assert result.exception is None
    assert len(result.output) > 4
    again = runner.invoke(app, ["chat", str(export), *arguments], input="abc\n" + "abc " * 400 + "\n")
    assert again.exception is None
    refused = runner.invoke(app, ["chat", str(export), "--system", "be kind"], input="abc\n")
    assert "--system" in str(refused.exception)
    (chat_export / "tokenizer.json").unlink()
    assert "no tokenizer.json" in str(runner.invoke(app, ["chat", str(chat_export)]).exception)
