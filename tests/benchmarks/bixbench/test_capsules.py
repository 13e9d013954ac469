"""Capsules are unpacked without what would give the answer away, and never outside their folder."""

import os
import random
import stat
import zipfile
from pathlib import Path

import pytest

from photon.benchmarks.bixbench.capsules import capsule_files, unpacked
from photon.errors import PhotonError


def pack(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, text in files.items():
            packed.writestr(name, text)
    return path


FILES = {
    "CapsuleData-1/counts.csv": "1",
    "CapsuleData-1/more/x.txt": "2",
    "CapsuleData-1/Data/y.txt": "3",
    "CapsuleData-1/analysis.ipynb": "answer",
    "CapsuleNotebook-1/solution.ipynb": "answer",
    "CapsuleNotebook-1/notes.txt": "answer",
    "solution.IPYNB": "answer",
    "readme.txt": "4",
    "__MACOSX/._readme.txt": "",
}


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_data_is_at_the_top_and_solutions_are_gone(tmp_path: Path) -> None:
    folder = unpacked(pack(tmp_path / "c.zip", FILES), tmp_path / "home")
    assert contents(folder) == {"counts.csv": "1", "more/x.txt": "2", "Data/y.txt": "3", "readme.txt": "4"}
    assert sorted(capsule_files(folder)) == ["Data", "counts.csv", "more", "readme.txt"]


def test_a_folder_is_as_good_as_an_archive(tmp_path: Path) -> None:
    for name, text in FILES.items():
        file = tmp_path / "c" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    folder = unpacked(tmp_path / "c", tmp_path / "home")
    assert "counts.csv" in contents(folder)
    assert "answer" not in contents(folder).values()
    assert (tmp_path / "c" / "CapsuleNotebook-1" / "solution.ipynb").exists()


def test_an_archive_is_unpacked_once_and_anew_when_it_has_changed(tmp_path: Path) -> None:
    archive = pack(tmp_path / "c.zip", {"Data/x": "1"})
    first = unpacked(archive, tmp_path / "home")
    assert unpacked(archive, tmp_path / "home") == first
    pack(archive, {"Data/x": "2"})
    assert contents(unpacked(archive, tmp_path / "home")) == {"x": "2"}


def test_a_folder_in_which_a_file_became_an_older_one_is_unpacked_anew(tmp_path: Path) -> None:
    capsule = tmp_path / "c"
    capsule.mkdir()
    for name in ("a.csv", "b.csv"):
        (capsule / name).write_text("1")
    assert contents(unpacked(capsule, tmp_path / "home")) == {"a.csv": "1", "b.csv": "1"}
    (capsule / "a.csv").write_text("2")
    os.utime(capsule / "a.csv", (1, 1))
    assert contents(unpacked(capsule, tmp_path / "home")) == {"a.csv": "2", "b.csv": "1"}


@pytest.mark.parametrize(
    "packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_damaged_archives_are_named(tmp_path: Path, packing: int) -> None:
    archive = tmp_path / "c.zip"
    draw = random.Random(packing)
    with zipfile.ZipFile(archive, "w", packing) as packed:
        packed.writestr("Data/counts.csv", "1,2\n" * 200)
        packed.writestr("Data/noise.bin", draw.randbytes(500))
    whole = archive.read_bytes()
    told = set()
    for number in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
        archive.write_bytes(damaged)
        try:
            unpacked(archive, tmp_path / "home" / str(number))
        except PhotonError as error:
            told.add(str(error))
    assert told
    assert all("c.zip: the capsule cannot be unpacked" in one for one in told)


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("Data/passwd")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../up.txt", "leads out of the archive"),
        ("/etc/passwd", "leads out of the archive"),
        ("Data\\..\\..\\up.txt", "leads out of the archive"),
        ("C:/windows/x", "leads out of the archive"),
        ("Data/a\nb", "characters that no name has"),
    ],
)
def test_a_path_that_leads_out_is_refused(tmp_path: Path, name: str, why: str) -> None:
    archive = pack(tmp_path / "c.zip", {"Data/x": "1", name: "2"})
    with pytest.raises(PhotonError, match=why):
        unpacked(archive, tmp_path / "home")
    assert list((tmp_path / "home").iterdir()) == []
    assert not (tmp_path / "up.txt").exists()


def test_a_link_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as packed:
        packed.writestr(link(), "/etc/passwd")
    with pytest.raises(PhotonError, match="neither a file nor a folder"):
        unpacked(tmp_path / "c.zip", tmp_path / "home")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(PhotonError, match="is a link"):
        unpacked(tmp_path / "f", tmp_path / "home")


def test_an_archive_that_grows_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(tmp_path / "c.zip", {"Data/x": "0" * 5_000})
    monkeypatch.setattr("photon.benchmarks.bixbench.capsules._MOST_BYTES", 4_000)
    with pytest.raises(PhotonError, match="more than 4000 bytes"):
        unpacked(archive, tmp_path / "home")
    monkeypatch.setattr("photon.benchmarks.bixbench.capsules._MOST_FILES", 0)
    with pytest.raises(PhotonError, match="more than 0 files"):
        unpacked(archive, tmp_path / "home")


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.zip").write_text("no zip")
    with pytest.raises(PhotonError, match=r"c\.zip: the capsule cannot be unpacked"):
        unpacked(tmp_path / "c.zip", tmp_path / "home")
    with pytest.raises(PhotonError, match="the capsule's archive is not there"):
        unpacked(tmp_path / "d.zip", tmp_path / "home")
