"""How far it is: files of ours on the stack from a command to a message, and from a message to the loss."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import photon
from photon.cli import main
from photon.config.schema import RunConfig
from photon.engine.inprocess import InProcessGrid
from photon.objective import causal_lm

PACKAGE = Path(photon.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"

MOST_FILES = 7


class Arrived(BaseException):
    """Ends the run where the stack was taken; nobody catches it."""


def files_on_the_stack() -> list[str]:
    """Return the files of the package on the stack, outermost first, each once."""
    files = (Path(frame.filename) for frame in traceback.extract_stack())
    ours = [file.relative_to(PACKAGE).as_posix() for file in files if file.is_relative_to(PACKAGE)]
    return list(dict.fromkeys(ours))


@pytest.fixture
def stack_at(monkeypatch: pytest.MonkeyPatch, small_config: Callable[..., RunConfig]) -> Callable[..., Any]:
    """Train from the command line until an attribute is called with some argument, and return the stack."""

    def taken(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> list[str]:
        found: list[str] = []
        original = getattr(owner, name)

        def stop(*args: Any, **kwargs: Any) -> Any:
            if not when(*args):
                return original(*args, **kwargs)
            found.extend(files_on_the_stack())
            raise Arrived

        config = small_config()
        file = Path(str(config.run_dir)).parent / "config.yaml"
        file.write_text(config.text)
        monkeypatch.setattr(owner, name, stop)
        monkeypatch.setattr(sys, "argv", ["photon", "train", "--config", str(file)])
        with pytest.raises(Arrived):
            main()
        return found

    return taken


def test_from_the_command_to_a_message(stack_at: Callable[..., list[str]]) -> None:
    def trains(_grid: Any, messages: Any) -> bool:
        return any(message.metadata.message_type == "train" for message in messages)

    files = stack_at(InProcessGrid, "push_messages", trains)
    assert files[0] == "cli.py"
    assert len(files) <= MOST_FILES, files
    assert _as_told(files), "docs/architecture.md shows another stack"


def test_from_the_answer_to_the_loss(stack_at: Callable[..., list[str]]) -> None:
    files = stack_at(causal_lm, "causal_losses")
    files = files[files.index("node.py") :]
    assert len(files) <= MOST_FILES, files
    assert _as_told(files), "docs/architecture.md shows another stack"


def _as_told(files: list[str]) -> bool:
    return " → ".join(f"`photon/{file}`" for file in files) in " ".join(PAGE.read_text().split())
