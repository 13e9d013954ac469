import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from photon.data import prepared
from photon.data.prepare import prepare_documents
from photon.data.prepared import PreparedData, is_prepared
from photon.errors import PhotonError


@pytest.fixture
def folder(corpus, tmp_path) -> Path:
    prepare_documents(corpus, tmp_path / "data", vocab_size=300, sequence_length=16, validation_fraction=0.2)
    return tmp_path / "data"


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def pickled(file: Path) -> None:
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


TRAIN = Path("silos/low/train.npy")

BROKEN_AT_OPEN = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "no json": (lambda d: cut(d / "manifest.json", 100), "is not a photon-data/2 manifest"),
    "binary manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    "later format": (
        lambda d: edit(d, format="photon-data/3"),
        r"\(format: Input .*'photon-data/2'",
    ),
    "unknown key": (lambda d: edit(d, extra=1), r"\(extra: Extra inputs"),
    "no silos": (lambda d: edit(d, silos={}), r"\(silos: "),
    "silo outside": (lambda d: edit(d, silos={"../x": {}}), r"\(silos"),
    "no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer.json is missing"),
    "no train": (lambda d: (d / TRAIN).unlink(), "train.npy is missing"),
    "no unigram": (lambda d: (d / "silos/low/unigram.npy").unlink(), "unigram.npy is missing"),
    "cut short": (lambda d: cut(d / TRAIN, 2000), "train.npy is damaged or cut short"),
    "empty": (lambda d: cut(d / TRAIN, 0), "train.npy is damaged or cut short"),
    "no array": (lambda d: (d / TRAIN).write_bytes(b"text" * 50), "train.npy is damaged or cut short"),
    "pickle": (lambda d: pickled(d / TRAIN), "train.npy is damaged or cut short"),
    "other shape": (lambda d: np.save(d / TRAIN, np.zeros((2, 16), np.uint16)), r"holds uint16 \(2, 16\)"),
    "other dtype": (lambda d: np.save(d / TRAIN, np.load(d / TRAIN).astype(np.int32)), "holds int32"),
    "other length": (lambda d: edit(d, sequence_length=32), "the manifest says uint16"),
}


@pytest.mark.parametrize("kind", BROKEN_AT_OPEN)
def test_a_broken_folder_is_refused_by_name_of_the_file_with_a_mend(folder, kind):
    damage, message = BROKEN_AT_OPEN[kind]
    damage(folder)
    with pytest.raises(PhotonError, match=message) as caught:
        PreparedData.open(folder)
    assert "photon data prepare" in str(caught.value)
    assert "\n" not in str(caught.value)


def change_one_token(file: Path, value: int) -> None:
    array = np.load(file)
    array[3, 5] = value
    np.save(file, array)


def rehash(folder: Path) -> None:
    """Make the manifest agree with a changed file, as a wrong writer would have."""
    from photon.data.prepared import file_sha256

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["silos"]["low"]["train"]["sha256"] = file_sha256(folder / TRAIN)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def outside_vocabulary(folder: Path) -> None:
    change_one_token(folder / TRAIN, 300)
    rehash(folder)


def other_counts(folder: Path) -> None:
    counts = np.load(folder / "silos/low/unigram.npy")
    counts[[7, 8]] += [1, -1]
    np.save(folder / "silos/low/unigram.npy", counts)


OVERWRITTEN = {
    "one token": (lambda d: change_one_token(d / TRAIN, 1), r"train.npy has changed"),
    "validation": (
        lambda d: change_one_token(d / "silos/high/validation.npy", 1),
        r"validation.npy has changed",
    ),
    "counts": (other_counts, "unigram.npy does not count"),
    "tokenizer": (lambda d: (d / "tokenizer/tokenizer.json").write_text("{}"), "is not the tokenizer"),
}


@pytest.mark.parametrize("kind", OVERWRITTEN)
def test_what_was_overwritten_since_the_manifest_is_found(folder, kind):
    PreparedData.open(folder).verify()
    data = PreparedData.reopen(folder)
    damage, message = OVERWRITTEN[kind]
    damage(folder)
    # A time that a program has set back hides nothing.
    for file in [*folder.rglob("*.npy"), folder / "tokenizer/tokenizer.json"]:
        os.utime(file, (0, 0))

    def use():
        again = PreparedData.reopen(folder)
        for silo in again.silo_names:
            again.windows(silo, "train"), again.windows(silo, "validation"), again.unigram(silo)

    for look in (lambda: PreparedData.open(folder), use, use, data.verify):
        with pytest.raises(PhotonError, match=message):
            look()


def test_what_was_touched_and_is_the_same_is_read_once(folder, monkeypatch):
    data = PreparedData.reopen(folder)
    (folder / TRAIN).touch()
    read = []
    hashed = prepared.file_sha256
    monkeypatch.setattr(prepared, "file_sha256", lambda file: read.append(file) or hashed(file))
    for _ in range(2):
        PreparedData.reopen(folder).windows("low", "train")
    assert read == [folder / TRAIN]
    assert PreparedData.reopen(folder) is data


def test_another_silo_is_not_looked_at(folder, monkeypatch):
    """A round with four of a thousand silos looks at the files of four."""
    data = PreparedData.reopen(folder)
    looked = []
    changed = prepared._changed
    monkeypatch.setattr(prepared, "_changed", lambda file: looked.append(file) or changed(file))
    PreparedData.reopen(folder).windows("low", "train")
    assert looked == [folder / "tokenizer/tokenizer.json", folder / TRAIN]
    assert data.manifest.silos.keys() > {"low"}


def test_what_was_not_touched_since_the_manifest_is_not_read(folder, monkeypatch):
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text())
    read = []
    monkeypatch.setattr("photon.data.prepared.file_sha256", read.append)
    assert PreparedData.reopen(folder) is PreparedData.reopen(folder)
    assert not read


def test_verify_finds_what_agrees_with_a_manifest_that_was_written_anew(folder):
    PreparedData.open(folder).verify()
    outside_vocabulary(folder)
    data = PreparedData.open(folder)
    with pytest.raises(PhotonError, match="holds token 300, outside the vocabulary of 300"):
        data.verify()


def test_arrays_are_memory_mapped_and_read_only(folder):
    data = PreparedData.open(folder)
    assert data.silo_names == ["high", "low"]
    assert data.tokenizer_path == folder / "tokenizer"
    for array in (data.windows("low", "train"), data.windows("low", "validation"), data.unigram("low")):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


def test_a_vocabulary_is_of_the_training_text_of_some_silos_or_of_a_share(folder):
    data = PreparedData.open(folder)

    def of(*windows: np.ndarray) -> list[int]:
        return sorted(set(np.concatenate([array.ravel() for array in windows]).tolist()))

    low, high = data.windows("low", "train"), data.windows("high", "train")
    assert np.flatnonzero(data.vocabulary(["low"])).tolist() == of(low)
    assert np.flatnonzero(data.vocabulary(["low", "high"])).tolist() == of(low, high)
    share = data.dealt(2, 3)
    assert np.flatnonzero(share.vocabulary(["low-2"])).tolist() == of(low[1::3])
    assert data.dealt(2, 3) is share, "it counts its tokens once"


def test_a_silo_that_is_not_there_is_an_error_that_names_those_that_are(folder):
    with pytest.raises(PhotonError, match=r"has no silo 'middle': it has high, low"):
        PreparedData.open(folder).windows("middle", "train")


def test_what_is_no_folder_of_prepared_data(folder, tmp_path):
    assert is_prepared(folder)
    assert not is_prepared(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "some web app"}')
    assert not is_prepared(tmp_path)
    with pytest.raises(PhotonError, match="is not a folder"):
        PreparedData.open(tmp_path / "nowhere")


def test_reopening_reads_a_manifest_again_only_when_it_has_changed(folder, tmp_path):
    first = PreparedData.reopen(folder)
    assert PreparedData.reopen(folder) is first
    edit(folder, seed=17)
    assert PreparedData.reopen(folder).manifest.seed == 17
    (folder / "manifest.json").unlink()
    with pytest.raises(PhotonError, match=r"manifest\.json is missing"):
        PreparedData.reopen(folder)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json", "silos/low/train.npy"])
def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(corpus, tmp_path, name):
    prepare_documents(corpus, tmp_path / "data", vocab_size=300, sequence_length=16)
    (tmp_path / "data" / name).unlink()
    os.mkfifo(tmp_path / "data" / name)
    with pytest.raises(PhotonError, match=r"is not a regular file|is missing"):
        PreparedData.open(tmp_path / "data")
