"""What a federation keeps of its replies: whole or not there, and only what may be asked for again."""

from pathlib import Path

import pytest
import torch

from photon.errors import PhotonError
from photon.files.atomic import name_beside
from photon.subfederation.kept import KeptReplies

LEFT = {"residual": {"a": torch.arange(6.0), "b": torch.ones(2, 3)}}
PARAMS = {"a": torch.arange(4.0)}


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def test_what_is_kept_comes_back_and_what_nobody_asks_for_goes(tmp_path: Path) -> None:
    kept = KeptReplies(tmp_path)
    assert kept.left(1) is None
    kept.keep_left(1, LEFT, 0)
    kept.keep_left(2, {}, 1)
    # The replies of rounds 2 to 4 were rejected: the next one still goes on from round 1.
    for server_round in (3, 4):
        kept.keep_left(server_round, LEFT, 1)
    assert folders(tmp_path) == ["left-000001", "left-000003", "left-000004"]
    read = kept.left(1)
    assert read is not None
    assert {name: tensor.tolist() for name, tensor in read["residual"].items()} == {
        name: tensor.tolist() for name, tensor in LEFT["residual"].items()
    }
    for server_round in (5, 6, 7):
        kept.keep_released(server_round, PARAMS)
    kept.forget(7)
    assert folders(tmp_path)[-1] == "released-000006"
    kept.forget(0)
    assert folders(tmp_path) == []


def test_a_crash_in_the_middle_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptReplies(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("photon.subfederation.kept.seal", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.keep_released(1, PARAMS)
    assert kept.released(1) is None
    # A process that is killed tidies nothing up; who comes next does.
    beside = name_beside(tmp_path / "released-000001")
    beside.mkdir()
    (beside / "groups.safetensors").write_bytes(b"half of it")
    kept.keep_released(1, PARAMS)
    assert folders(tmp_path) == ["released-000001"]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    kept = KeptReplies(tmp_path)
    kept.keep_left(1, LEFT, 0)
    kept.keep_released(1, PARAMS)
    for folder in ("left-000001", "released-000001"):
        for file in (tmp_path / folder).iterdir():
            whole = file.read_bytes()
            for at in range(len(whole)):
                file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                if folder.startswith("left"):
                    assert kept.left(1) is None, (file.name, at)
                else:
                    with pytest.raises(PhotonError, match=r"damaged .* is not sent again"):
                        kept.released(1)
            file.write_bytes(whole)
    assert kept.left(1) is not None
    assert kept.released(1) is not None
