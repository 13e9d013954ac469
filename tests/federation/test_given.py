"""Labels beside a silo's windows, and runs that read some of the windows by them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from photon.commands.app import app
from photon.data.given import Choice, given_files, read_given, write_given
from photon.data.prepared import MANIFEST_NAME, PreparedData, file_sha256, silo_file
from photon.errors import PhotonError, RunError
from tests.conftest import SMALL, composed

Run = Callable[..., dict[str, Any]]
CLASSES = ["good", "noise", "rare"]


@pytest.fixture
def given(corpus: Path, tmp_path: Path) -> Path:
    """Prepared data of which each silo's windows have labels, by turns; few are rare."""
    folder = tmp_path / "given"
    shutil.copytree(corpus, folder)
    data = PreparedData.open(folder)
    for silo in data.silo_names:
        places = np.arange(len(data.windows(silo, "train")))
        write_given(data, silo, np.where(places % 10 == 9, 2, places % 2), CLASSES, "a test")
    return folder


def only(given: Path, folder: Path, choice: Choice) -> Path:
    """Write data that has the chosen windows, and no others."""
    shutil.copytree(given, folder)
    whole = PreparedData.open(given)
    silos = {}
    for silo, entry in whole.manifest.silos.items():
        windows = whole.windows(silo, "train")
        chosen = windows[choice.windows(silo, *labels_of(whole, silo))]
        np.save(silo_file(folder, silo, "train"), chosen)
        counts = np.bincount(chosen.flatten(), minlength=whole.manifest.vocab_size)
        np.save(silo_file(folder, silo, "unigram"), counts.astype(np.int64))
        sha = file_sha256(silo_file(folder, silo, "train"))
        part = {
            "sequences": len(chosen),
            "tokens": len(chosen) * whole.manifest.sequence_length,
            "sha256": sha,
        }
        silos[silo] = entry.model_copy(update={"train": entry.train.model_copy(update=part)})
    manifest = whole.manifest.model_copy(update={"silos": silos})
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return folder


def labels_of(data: PreparedData, silo: str) -> tuple[np.ndarray, list[str]]:
    labels, known = read_given(data, silo)
    return labels, known.classes


def test_a_run_reads_what_is_left_as_if_there_were_nothing_else(
    run_small: Run, given: Path, tmp_path: Path
) -> None:
    choice = Choice(("noise",), (("rare", 0.5),), 0)
    chosen = only(given, tmp_path / "only", choice)
    overrides = ("data.filter=[noise]", "data.mixture={rare: 0.5}", "rounds=2", "cohort=null")
    found = run_small(*overrides, data=given)
    expected = run_small("rounds=2", "cohort=null", data=chosen, name="only")
    everything = run_small("rounds=2", "cohort=null", data=given, name="all")
    assert found["weights_sha256"] == expected["weights_sha256"] != everything["weights_sha256"]
    # What is told of the silos is of what is read.
    started = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    plain = PreparedData.open(chosen).manifest.silos
    assert {one["name"]: one["train_tokens"] for one in started["silos"]} == {
        name: entry.train.tokens for name, entry in plain.items()
    }
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "round-000002")
    (tmp_path / "run" / "summary.json").unlink()
    again = run_small(*overrides, data=given, resume=True)
    assert again["weights_sha256"] == found["weights_sha256"]


def test_weights_are_relative_to_the_largest_and_no_window_comes_twice() -> None:
    labels, seed = np.arange(30_000) % 3, 7
    choice = Choice((), (("good", 4.0), ("rare", 2.0)), seed)
    found = choice.windows("alpha", labels, CLASSES)
    assert len(np.unique(found)) == len(found)
    assert np.bincount(labels[found]) / 10_000 == pytest.approx([1.0, 0.25, 0.5], abs=0.02)
    assert np.array_equal(found, choice.windows("alpha", labels, CLASSES))
    assert not np.array_equal(found, choice.windows("beta", labels, CLASSES))
    assert np.array_equal(
        Choice(("noise", "rare"), (), seed).windows("alpha", labels, CLASSES), np.arange(0, 30_000, 3)
    )


def test_counts_and_hashes_are_those_of_what_is_read(given: Path) -> None:
    data = PreparedData.open(given)
    chosen = Choice(("noise", "rare"), (), 0).of(data)
    for silo in data.silo_names:
        windows = chosen.windows(silo, "train")
        labels, _ = read_given(data, silo)
        assert np.array_equal(windows, data.windows(silo, "train")[labels == 0])
        assert chosen.manifest.silos[silo].train.sequences == len(windows)
        assert chosen.unigram(silo).sum() == windows.size
        assert chosen.manifest.silos[silo].train.tokens == len(windows) * data.manifest.sequence_length
        assert np.array_equal(chosen.windows(silo, "validation"), data.windows(silo, "validation"))
        assert chosen.text_sha256([silo]) != data.text_sha256([silo])
        # Islands are dealt what is left.
        assert np.array_equal(chosen.dealt(2, 2).windows(f"{silo}-2", "train"), windows[1::2])


def test_labels_that_do_not_fit_are_one_line(given: Path, corpus: Path) -> None:
    data = PreparedData.open(given)
    with pytest.raises(PhotonError, match=r"alpha: its text in .* has no labels; label the text with"):
        read_given(PreparedData.open(corpus), "alpha")
    for choice, told in (
        (Choice(("nois",), (), 0), "data.filter: alpha has no label 'nois'; did you mean 'noise'"),
        (Choice((), (("goods", 2.0),), 0), "data.mixture: alpha has no label 'goods'; did you mean 'good'"),
        (Choice(tuple(CLASSES), (), 0), "leave no window of alpha"),
    ):
        with pytest.raises(PhotonError, match=told):
            choice.of(data)
    file, about = given_files(given, "alpha")
    whole = np.load(file)
    np.save(file, whole[::-1])
    with pytest.raises(PhotonError, match=r"given\.npy: not what was written"):
        read_given(data, "alpha")
    write_given(data, "alpha", np.full_like(whole, 5), CLASSES, "a test")
    with pytest.raises(PhotonError, match="a label is of none of the 3 classes"):
        read_given(data, "alpha")
    values = json.loads(about.read_text())
    about.write_text(json.dumps({**values, "text_sha256": "0" * 64}))
    with pytest.raises(PhotonError, match="these labels are of other text than alpha has now"):
        read_given(data, "alpha")
    about.write_text("{")
    with pytest.raises(PhotonError, match=r"given\.json: cannot be read"):
        read_given(data, "alpha")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.mixture={noise: 0}"], r"data\.mixture\.noise=0\.0: expected a number above 0"),
        (["data.mixture={noise: 2}", "data.filter=[noise]"], "noise has a weight in data.mixture, too"),
        (["data.filters=[noise]"], "data.filters: unknown key; did you mean 'data.filter'"),
    ],
)
def test_settings_that_cannot_be(overrides: list[str], told: str) -> None:
    with pytest.raises(PhotonError, match=told):
        composed(*SMALL, "data.path=none", *overrides)


def test_a_run_without_labels_or_in_a_group_ends_in_one_line(
    run_small: Run, corpus: Path, given: Path
) -> None:
    with pytest.raises((PhotonError, RunError), match=r"its text in .* has no labels"):
        run_small("data.filter=[noise]", data=corpus)
    with pytest.raises(
        (PhotonError, RunError), match=r"data\.filter and data\.mixture choose windows in one process"
    ):
        run_small("data.filter=[noise]", "training.processes=2", "cohort=1", data=given, name="group")


def test_a_policy_counts_the_windows_that_are_left(small_config: Callable[..., Any], given: Path) -> None:
    from photon.link.messages import TrainRequest
    from photon.silo.service import SiloNode
    from photon.silo.site import find_site, read_settings

    node = {"data-dir": str(given), "state-dir": str(given / "state")}
    for filtered in ([], ["good", "noise"]):
        config = small_config(f"data.filter=[{','.join(filtered)}]", data=given)
        site, carried = find_site(node, config)
        request = TrainRequest(
            run_id="r", model_id="m", round=1, silo="alpha", members=["alpha"], global_step=0, steps=100,
            batch_size=4, last_round=0, position=0, cohort=3,
        )  # fmt: skip
        cost = SiloNode(read_settings(node), site, carried).cost(request)["alpha"]
        labels, _ = read_given(PreparedData.open(given), "alpha")
        assert cost.behind == min(400, len(labels) if not filtered else int((labels == 2).sum()))


def test_the_command_labels_by_what_a_run_has_learnt(run_small: Run, labelled: Path, tmp_path: Path) -> None:
    from photon.data.prepare import prepare
    from tests.labelled_texts import LETTERS, NAMES
    from tests.objective.test_anchor import ANCHORED

    run_small(
        *ANCHORED, "rounds=2", "local_steps=20", "objective.threshold=0.5", "optimizer.lr=1e-2", data=labelled
    )
    texts = {}
    for name, letters in (("low", "abcdefgh"), ("high", "qrstuvwxyz")):
        texts[name] = tmp_path / name
        texts[name].mkdir()
        draw = np.random.default_rng(len(name))
        for number in range(20):
            words = ["".join(draw.choice(list(letters), 4)) for _ in range(60)]
            (texts[name] / f"{number}.txt").write_text(" ".join(words))
    assert set(LETTERS) == set(NAMES)
    plain = tmp_path / "plain"
    prepare(
        {name: [path] for name, path in texts.items()},
        plain,
        tokenizer=labelled / "tokenizer",
        sequence_length=40,
        validation_fraction=0.2,
    )
    command = ["data", "label", str(plain), "--with", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    data = PreparedData.open(plain)
    for name in texts:
        labels, known = read_given(data, name)
        assert known.classes == NAMES
        assert known.by == "run, round 2"
        assert np.mean(labels == NAMES.index(name)) > 0.9
    # Of other kinds, with other tokenizers, and by runs that have learnt none.
    for arguments, told in (
        (["data", "label", str(labelled), "--with", str(tmp_path / "run")], "holds labelled"),
        (["data", "label", str(plain), "--with", str(plain)], "neither a run with checkpoints"),
    ):
        failed = CliRunner().invoke(app, arguments)
        assert told in str(failed.exception or failed.output)


def test_labels_that_were_written_anew_hold_where_the_text_is_open(given: Path) -> None:
    data, choice = PreparedData.reopen(given), Choice(("noise",), (), 0)
    before = choice.of(data)
    # Nothing is read again as long as nothing has changed.
    assert choice.of(PreparedData.reopen(given)) is before
    silo = data.silo_names[0]
    labels, _ = read_given(data, silo)
    turned = np.where(labels == 1, 0, np.where(labels == 0, 1, labels))
    write_given(data, silo, turned, CLASSES, "another run")
    after = choice.of(PreparedData.reopen(given))
    assert np.array_equal(after.windows(silo, "train"), data.windows(silo, "train")[turned != 1])
    assert after.text_sha256([silo]) != before.text_sha256([silo])
    given_files(given, silo)[1].unlink()
    with pytest.raises(PhotonError, match="has no labels"):
        choice.of(PreparedData.reopen(given))
