import os

import pytest

from photon.errors import PhotonError
from photon.files.json_object import read_object

DAMAGED = {
    "cut": (b'{"a": "b', "not JSON"),
    "empty": (b"", "not JSON"),
    "binary": (bytes(range(256)), "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "list": (b"[1, 2]", "expected a JSON object, found a list"),
    "null": (b"null", "expected a JSON object, found a NoneType"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_object_is_named_in_one_line(tmp_path, kind):
    data, said = DAMAGED[kind]
    (tmp_path / "x\ny.json").write_bytes(data)
    with pytest.raises(PhotonError) as caught:
        read_object(tmp_path / "x\ny.json")
    assert f"x\\ny.json: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "loop", "pipe"):
        with pytest.raises(PhotonError, match=f"{name}: not a regular file"):
            read_object(tmp_path / name)
    with pytest.raises(PhotonError, match="cannot read it"):
        read_object(tmp_path / "nowhere")
