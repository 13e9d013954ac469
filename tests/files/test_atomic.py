"""Writes are there as a whole or not there at all."""

from pathlib import Path

import pytest

from photon.files.atomic import atomic_directory, remove_leftovers, write_text


def test_a_failed_block_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("old")

    def fail_half_way() -> None:
        with atomic_directory(target) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way()
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("a", "b"):
        with atomic_directory(target) as folder:
            (folder / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["b"]


def test_text_replaces_text_and_leftovers_go(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file", "one")
    write_text(tmp_path / "deep" / "file", "two")
    (tmp_path / "deep" / ".file.12345678.tmp").write_text("half")
    (tmp_path / "deep" / ".folder.12345678.tmp").mkdir()
    remove_leftovers(tmp_path / "deep")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "file").read_text() == "two"
