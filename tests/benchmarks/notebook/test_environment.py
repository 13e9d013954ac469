"""The tools of an agent."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from photon.benchmarks.notebook.environment import (
    MOST_CELLS,
    MOST_CODE,
    NotebookEnvironment,
    Observation,
    as_arguments,
)
from photon.benchmarks.notebook.sandbox import Limits, Shut

pytest.importorskip("ipykernel")

LIMITS = Limits(cell_seconds=20, disk=8 << 20)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("capsule")
    (folder / "x.csv").write_text("a\n1\n")
    (folder / "more").mkdir()
    (folder / "more" / "y").write_text("12345")
    return {"x.csv": folder / "x.csv", "more": folder / "more"}


@pytest.fixture(scope="module")
def environment(shut: Shut, data: dict[str, Path]) -> Iterator[NotebookEnvironment]:
    with NotebookEnvironment(data, LIMITS, shut, rerun="cell") as environment:
        yield environment


def test_files_are_listed(environment: NotebookEnvironment) -> None:
    assert json.loads(environment.call("list_workdir", {}).text) == {"more": {"y": 5}, "x.csv": 4}


def test_a_cell_is_written_replaced_and_run(shut: Shut, data: dict[str, Path]) -> None:
    with NotebookEnvironment(data, LIMITS, shut) as environment:
        first = environment.call("edit_cell", {"contents": "n = open('x.csv').read()", "idx": None})
        assert first.fault is None
        assert "'a\\n1\\n'" in environment.call("edit_cell", {"contents": "n"}).text
        # The first cell is another one, and the second sees it: the whole notebook has run.
        assert (
            "### Output 1\n```\n7\n```" in environment.call("edit_cell", {"contents": "n = 7", "idx": 0}).text
        )
        assert environment.notebook.sources == ["n = 7", "n"]
        # Nothing is left of what no cell says any more.
        gone = environment.call("edit_cell", {"contents": "pass", "idx": 0}).text
        assert "NameError" in gone
        # After a lost kernel the cells below are not run on one that knows nothing.
        lost = environment.call("edit_cell", {"contents": "import os; os._exit(1)", "idx": 0}).text
        assert "the kernel ended" in lost
        assert "not run, for the kernel is gone" in lost


def test_only_the_cell_is_run_where_that_is_asked(environment: NotebookEnvironment) -> None:
    environment.call("edit_cell", {"contents": "count = 0"})
    environment.call("edit_cell", {"contents": "count += 1\ncount"})
    told = environment.call("edit_cell", {"contents": "count += 1\ncount", "idx": 1}).text
    assert "### Output 1\n```\n2\n```" in told


@pytest.mark.parametrize(
    ("name", "arguments", "fault", "told"),
    [
        ("run_cell", {}, "unknown tool", "There is no tool run_cell; use one of list_workdir, edit_cell"),
        ("\x1b[31m", {}, "unknown tool", "There is no tool \\x1b[31m"),
        ("edit_cell", None, "wrong arguments", "a JSON object"),
        ("edit_cell", {}, "wrong arguments", "edit_cell needs a text contents"),
        ("edit_cell", {"contents": 3}, "wrong arguments", "edit_cell needs a text contents"),
        ("edit_cell", {"contents": "", "index": 1}, "wrong arguments", "edit_cell has no argument index"),
        ("edit_cell", {"contents": "", "idx": 99}, "wrong arguments", "There is no cell 99"),
        ("edit_cell", {"contents": "", "idx": -1}, "wrong arguments", "There is no cell -1"),
        ("edit_cell", {"contents": "", "idx": True}, "wrong arguments", "the number of a cell"),
        ("edit_cell", {"contents": "x" * (MOST_CODE + 1)}, "too much", "characters at most"),
        ("submit_answer", {"answer": None}, "wrong arguments", "submit_answer needs a text answer"),
    ],
)
def test_what_cannot_be_done_is_told(
    environment: NotebookEnvironment, name: str, arguments: Any, fault: str, told: str
) -> None:
    seen = environment.call(name, arguments)
    assert seen.fault == fault
    assert told in seen.text
    assert not seen.done
    assert environment.answer is None


def test_a_notebook_has_a_last_cell(
    environment: NotebookEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_run", lambda place: None)
    for _ in range(MOST_CELLS - len(environment.notebook)):
        assert environment.call("edit_cell", {"contents": "pass"}).fault is None
    assert environment.call("edit_cell", {"contents": "pass"}).fault == "too much"


def test_half_a_character_is_replaced(shut: Shut, data: dict[str, Path]) -> None:
    with NotebookEnvironment(data, LIMITS, shut) as environment:
        environment._run = lambda edited: None  # type: ignore[method-assign]
        environment.call("edit_cell", {"contents": "'\ud800'"})
        environment.notebook.text().encode()
        assert environment.call("submit_answer", {"answer": "\ud800 x"}) == Observation(
            "The answer was taken.", done=True
        )
        assert environment.answer == "? x"


def test_arguments_are_json() -> None:
    assert as_arguments('{"answer": "3"}') == {"answer": "3"}
    assert as_arguments("") == {}
    assert as_arguments("{") is None
    assert as_arguments("[" * 100_000) is None
