"""The golden runs are what they were; and the tool that says so notices when they are not."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.golden import drive, hashes
from tests.golden.__main__ import by_commit, compare_present
from tests.golden.compare import compare
from tests.golden.reading import digest, ending, hash_groups, read_run
from tests.golden.record import PRESENT, Recording, record
from tests.golden.table import DEFAULT, Table, read_base, read_table
from tests.golden.worktree import NoHistoryError, checkout, full_hash

#: A run that the tool's own tests change something of.
ONE = "photon-dense"


@pytest.fixture(scope="module")
def table() -> Table:
    return read_table()


@pytest.fixture(scope="module")
def changed_table(table: Table) -> Table:
    """The table with runs of which the tool must say that they are changed, and failed."""
    run = table.runs[ONE]
    seeded = run.model_copy(update={"overrides": [*run.overrides, "seed=1", "rounds=1"]})
    wrong = run.model_copy(update={"overrides": [*run.overrides, "strategy.weighting=luck"]})
    return table.model_copy(update={"runs": {**table.runs, "seeded": seeded, "wrong": wrong}})


@dataclass
class Recorded:
    """Quick runs of the present tree; where the hashes are not stored, a few, and those of BASE.

    Attributes
    ----------
    base
        What the present runs are compared with, by commit.
    problem
        Why there is no base, if there is none.
    """

    present: Recording
    base: dict[str, Recording]
    problem: str | None = None


@pytest.fixture(scope="module")
def recorded(table: Table, changed_table: Table) -> Recorded:
    known = hashes.stored(drive.machine()) is not None
    names = table.names(quick=known, bounded=not known)
    checkouts, problem = {}, None
    try:
        checkouts = {} if known else {commit: checkout(commit) for commit in by_commit(names, None)}
    except NoHistoryError as error:
        problem = str(error)
    present, *bases = record([PRESENT, *checkouts.values()], changed_table, [*names, "seeded", "wrong"])
    return Recorded(present, dict(zip(checkouts, bases, strict=True)), problem)


@pytest.fixture
def recording(recorded: Recorded) -> Recording:
    return recorded.present


def test_runs_are_what_they_were(table: Table, recorded: Recorded) -> None:
    """On a machine whose hashes are known, those of the recorded commits; elsewhere a few runs of both."""
    if recorded.problem is not None:
        pytest.fail(f"golden: hashes.json does not know this machine, and {recorded.problem}", pytrace=False)
    known = hashes.stored(recorded.present.machine)
    if known is None:
        names = table.names(bounded=True)
        different = [
            str(verdict)
            for commit, chosen in by_commit(names, None).items()
            for verdict in compare(recorded.base[commit], recorded.present, chosen, {})
            if not verdict.equal
        ]
        assert not different, "\n".join(different)
        return
    found = {name: digest(recorded.present.records[name]) for name in table.names(quick=True)}
    changed = [name for name, value in found.items() if known.get(name) != value]
    assert not changed, f"what differs is said by: python -m tests.golden compare --only {' '.join(changed)}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_runs_are_those_of_the_recorded_commits(table: Table) -> None:
    assert compare_present(table, table.names()) == 0


# --- the tool ---------------------------------------------------------------------------------------------


def test_another_seed_is_told(recording: Recording) -> None:
    other = Recording(recording.machine, {ONE: recording.records["seeded"]})
    (verdict,) = compare(recording, other, [ONE], {})
    assert not verdict.equal
    assert "first in round 0: " in verdict.text
    assert digest(recording.records[ONE]) != digest(recording.records["seeded"])


def test_a_run_that_fails_or_is_missing_is_never_equal(recording: Recording) -> None:
    assert "strategy.weighting" in recording.failed["wrong"]
    failed, missing = compare(recording, recording, ["wrong", "no-such-run"], {})
    assert (failed.equal, missing.equal) == (False, False)
    assert "FAILED with the base code" in failed.text
    assert "MISSING from the recording of the base code" in missing.text
    empty = Recording(recording.machine, {ONE: {}})
    assert not compare(empty, empty, [ONE], {})[0].equal


def test_one_bit_of_one_tensor_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "round-000002"
    folder.mkdir(parents=True)
    tensor = torch.linspace(0, 1, 8)
    records = []
    for bit in (0, 1):
        changed = tensor.clone()
        changed.view(torch.int32)[3] ^= bit
        save_file({"params/w": changed, "params/v": tensor}, folder / "params.safetensors")
        records.append(read_run(tmp_path))
    (verdict,) = compare(*(Recording("here", {"one": record}) for record in records), ["one"], {})
    assert "DIFFERS in 1 figures, first in round 2: run/checkpoints: params params: base" in verdict.text


def test_names_types_shapes_and_groups_are_hashed(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 3)
    hashed = []
    for tensors in (
        {"params/w": zeros},
        {"params/v": zeros},
        {"params/w": zeros.reshape(3, 2)},
        {"params/w": zeros.to(torch.int32)},
        {"params/w": zeros, "params/x": zeros.clone()},
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        hashed.append(hash_groups(tmp_path / "x.safetensors")["params"])
    assert len(set(hashed)) == len(hashed)


def test_the_last_bit_of_a_loss_is_told(recording: Recording) -> None:
    record = json.loads(json.dumps(recording.records[ONE]))
    figure = next(figure for figure in record["round 2"] if figure.endswith("silo_finished beta loss"))
    value = record["round 2"][figure]
    record["round 2"][figure] = (float.fromhex(value) * (1 + 2**-52)).hex()
    (verdict,) = compare(recording, Recording(recording.machine, {ONE: record}), [ONE], {})
    assert f"DIFFERS in 1 figures, first in round 2: {figure}: base {value}, present" in verdict.text


def test_ending_otherwise_than_the_other_run_is_told(recording: Recording) -> None:
    names = [ONE]
    assert compare(recording, recording, names, {ONE: ONE})[0].equal
    (verdict,) = compare(recording, recording, names, {ONE: "seeded"})
    assert "DOES NOT END AS seeded" in verdict.text
    end = ending(recording.records[ONE])
    assert {"run/checkpoints: params params", "run: weights_sha256"} <= set(end)


def test_an_absent_silo_returns(recording: Recording) -> None:
    figures = recording.records[ONE]
    cohorts = [
        {value for figure, value in figures[f"round {n}"].items() if ": round_started cohort" in figure}
        for n in (1, 2, 3)
    ]
    assert (cohorts[0] & cohorts[2]) - cohorts[1]


def test_every_preset_is_in_the_table(table: Table) -> None:
    """Links of sparse strategies and privacy=off are what presets bring by themselves.

    Sums need an objective without steps, and anchors one of their own: see tests/objective/test_statistics.py
    and tests/objective/test_anchor.py.
    Robust folds, MuLoCo, the exact SparseLoCo and DES-LOC's schedule are newer than all bases: see
    tests/strategy/test_robust.py, tests/federation/test_muloco.py and test_sparseloco.py, and
    tests/models/test_build.py. A transition without other settings is in tests/federation/test_transition.py.
    """
    said = {override for run in table.runs.values() for override in run.overrides}
    for section, implied in {
        "strategy": {"anchor", "sums", "robust", "muloco", "muloco-averaged"},
        "link": {"dense", "sparse", "sparseloco", "top64of4096", "two-bit"},
        "outer": {"fedavg", "diloco", "muloco"},
        "optimizer": {"adamw", "adamw-sparse", "qhadamw", "lordo", "muloco"},
        "transition": {"synchronous"},
        "privacy": {"off"},
        "schedule": {"cosine", "desloc"},
    }.items():
        presets = {path.stem for path in (PRESENT / "conf" / section).glob("*.yaml")}
        assert {preset for preset in presets if f"{section}={preset}" not in said} <= implied


def test_the_table_and_its_bases_hold_together(table: Table) -> None:
    assert len(table.runs) >= 30
    assert {run.ends_as for run in table.runs.values()} - {None} <= set(table.runs)
    assert set(read_base()) - {DEFAULT} <= set(table.runs)
    assert len(table.names(bounded=True)) >= 2
    # A class that moves would not be found by its old name, or not by its new one. Codecs have not moved.
    said = " ".join(override for run in table.runs.values() for override in run.overrides)
    assert said.count("_target_") == said.count("_target_: photon.link.codecs.")


def test_a_run_that_was_changed_on_purpose_says_since_when_and_why(tmp_path: Path) -> None:
    (tmp_path / "BASE").write_text("# recorded\ndefault abc\n\nsecure def masks are wider\n")
    assert read_base(tmp_path / "BASE") == {DEFAULT: "abc", "secure": "def"}
    (tmp_path / "BASE").write_text("default abc\nsecure def\n")
    with pytest.raises(ValueError, match="secure: write NAME COMMIT REASON"):
        read_base(tmp_path / "BASE")


def test_a_commit_that_is_not_there_is_told_with_what_to_run() -> None:
    with pytest.raises(NoHistoryError, match="git fetch --unshallow") as error:
        full_hash("0" * 40)
    assert len(str(error.value).splitlines()) == 1
