"""Prepared data cut into one folder per silo."""

from pathlib import Path

import numpy as np
import pytest

from photon.data.prepared import PreparedData
from photon.data.separate import separate
from photon.errors import PhotonError
from tests.conftest import write_corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    texts = {"alpha": "abcdefgh", "beta": "ijklmnop", "gamma": "qrstuvwxyz"}
    return PreparedData.open(write_corpus(tmp_path_factory.mktemp("corpus"), texts))


def test_a_part_is_whole_prepared_data_of_one_silo(prepared: PreparedData, tmp_path: Path) -> None:
    parts = separate(prepared, tmp_path)
    assert [part.name for part in parts] == ["alpha", "beta", "gamma"]
    for part in parts:
        data = PreparedData.open(part)
        data.verify()
        assert data.silo_names == [part.name]
        assert data.manifest.silos[part.name] == prepared.manifest.silos[part.name]
        assert data.manifest.tokenizer_sha256 == prepared.manifest.tokenizer_sha256
        assert np.array_equal(data.windows(part.name, "train"), prepared.windows(part.name, "train"))
        assert {path.name for path in (part / "silos").iterdir()} == {part.name}


def test_a_part_that_is_there_is_kept_unless_told_otherwise(prepared: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(PhotonError, match="not empty and holds no prepared data"):
            separate(prepared, tmp_path, overwrite=overwrite)
    assert not (tmp_path / "alpha").exists(), "nothing is written when one part cannot be"
    (tmp_path / "beta" / "mine.txt").unlink()
    separate(prepared, tmp_path)
    with pytest.raises(PhotonError, match="--overwrite"):
        separate(prepared, tmp_path)
    separate(prepared, tmp_path, overwrite=True)
    PreparedData.open(tmp_path / "beta").verify()
