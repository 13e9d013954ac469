"""`photon unlearn` as it is called: what it prints, and how it ends on bad input."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from photon.cli import main
from photon.unlearning.questions import Question

from .exported import questions, write_export


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small export and files of questions."""
    folder = tmp_path_factory.mktemp("command")
    write_export(folder / "export")
    sets = questions()
    write(folder / "known.jsonl", [*sets.forget, *sets.retain])
    write(folder / "forget.jsonl", sets.forget)
    write(folder / "retain.jsonl", sets.retain)
    write(folder / "reference.jsonl", sets.reference[:16])
    return folder


def write(file: Path, some: list[Question]) -> None:
    rows = [{key: value for key, value in one.__dict__.items() if value is not None} for one in some]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def photon(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(place)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["photon", "unlearn", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        return end.value.code, said.out, said.err  # type: ignore[return-value]

    return call


def test_what_is_asked_for_on_the_command_line(place: Path, photon: Any) -> None:
    given = ["export", "out", "--forget", "known.jsonl", "--edge", "Ada", "--reference", "reference.jsonl"]
    few = ["--layers", "1,2", "--ridges", "1e-3", "--coefficients", "1", "--by", "Ada herself", "--attacks"]
    code, out, err = photon(*given, *few)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("layer 1, ridge 0.001, coefficient 1: forgotten 0.")
    assert "What was seen, the best first" in out
    assert "Deviation Score 100.0 → " in out
    assert lines[-1].startswith("Suppression is not deletion: the forgotten answers (ROUGE-1 1.00 before, 0.")
    assert "subtract r" in lines[-1]
    (entry,) = json.loads((place / "out" / "unlearned.json").read_text())
    assert entry["asked_by"] == "Ada herself"
    assert entry["prompts"] == {"forget": 3, "retain": 9, "reference": 16}
    # A second request, with the first one's questions.
    given = ["out", "two", "--forget", "known.jsonl", "--edge", "Bob", "--reference", "reference.jsonl"]
    code, out, err = photon(*given, *few[:6], "--forgotten", "forget.jsonl")
    assert code == 0, err
    assert "note:" not in out
    assert out.splitlines()[-1].endswith("--attacks shows how much of it can be brought back.")
    first, second = json.loads((place / "two" / "unlearned.json").read_text())
    assert first == entry
    assert second["prompts"] == {"forget": 3, "retain": 6, "reference": 16, "forgotten": 3}
    # A third, with the files of both; questions of which no edge is told are known by their file.
    write(place / "bob.jsonl", [replace(one, edge=None) for one in questions().retain[:3]])
    write(place / "ada.jsonl", [replace(one, edge=None) for one in questions().forget])
    given = ["two", "three", "--forget", "known.jsonl", "--edge", "Cyd", "--reference", "reference.jsonl"]
    code, out, err = photon(*given, *few[:6], "--forgotten", "ada.jsonl", "--forgotten", "bob.jsonl")
    assert code == 0, err
    assert "may come undone" not in out
    code, out, err = photon("two", "four", *given[2:], *few[:6], "--forgotten", "bob.jsonl")
    assert code == 0, err
    assert out.count("may come undone") == 1
    assert "request 1 of this model (3 questions, asked by Ada herself) may come undone" in out


BASE = ["export", "never", "--reference", "reference.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*BASE, "--forget", "forget.jsonl"], "--retain: give what is to stay"),
        ([*BASE, "--forget", "known.jsonl", "--edge", "Eve"], "known.jsonl: no question has the edge 'Eve'"),
        (
            [*BASE, "--forget", "forget.jsonl", "--retain", "known.jsonl"],
            "of Ada? is in the forget set and in",
        ),
        ([*BASE, "--forget", "nowhere.jsonl", "--retain", "retain.jsonl"], "nowhere.jsonl does not exist"),
        ([*BASE, "--forget", "known.jsonl", "--edge", "Ada", "--layers", "1.5"], "--layers '1.5': expected"),
        ([*BASE, "--forget", "known.jsonl", "--edge", "Ada", "--ridges", "-1"], "a ridge is 0 at least"),
        (
            [*BASE, "--forget", "known.jsonl", "--edge", "Ada", "--coefficients", "nan"],
            "--coefficients 'nan'",
        ),
        (
            [*BASE, "--forget", "known.jsonl", "--edge", "Ada", "--coefficients", "1,0"],
            "--coefficients '1,0': with 0 nothing is changed; leave it out",
        ),
        ([*BASE, "--forget", "known.jsonl", "--edge", "Ada", "--by", " "], "nobody asks; say who does"),
        ([*BASE, "--forget", "known.jsonl", "--edge", "Ada", "--by", "x" * 401], "who asks has 401 char"),
        (
            [*BASE, "--forget", "known.jsonl", "--edge", "Ada", "--encoder", "export"],
            "no encoder of sentences",
        ),
        (["nowhere", *BASE[1:], "--forget", "known.jsonl", "--edge", "Ada"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(place: Path, photon: Any, arguments: list[str], said: str) -> None:
    code, _, err = photon(*arguments)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (place / "never").exists()
