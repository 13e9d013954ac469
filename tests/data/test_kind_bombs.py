"""What unpacks to more than the memory is one line, whatever kind of file it is in."""

import resource

import zstandard

from photon.data.streams import LONGEST_ROW
from tests.data.test_kinds import header, read, reasons, tar, texts


def zeros(mebibytes: int, begin: bytes = b"") -> bytes:
    packer = zstandard.ZstdCompressor().compressobj()
    block = b" " * (1 << 20)
    return (
        packer.compress(begin) + b"".join(packer.compress(block) for _ in range(mebibytes)) + packer.flush()
    )


def test_a_row_and_a_file_that_unpack_to_more_than_the_memory_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("photon.data.streams.LARGEST_UNPACKED", 8 << 20)
    monkeypatch.setattr("photon.data.streams.LONGEST_ROW", 4 << 20)
    bomb = zeros(512)
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress(b'{"text": "good"}\n') + zeros(512, b'{"text": "')
    )
    (tmp_path / "b.txt.zst").write_bytes(bomb)
    (tmp_path / "c.json.zst").write_bytes(zeros(512, b"["))
    (tmp_path / "d.csv.zst").write_bytes(zeros(512, b'text\ngood\n"'))
    (tmp_path / "e.tar.zst").write_bytes(bomb)
    assert len(bomb) < 1 << 18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reading = read(tmp_path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert texts(reading) == ["good", "good"]
    told = {skip.file: skip.reason for skip in reading.skipped}
    assert "a row of more than 64 MiB" in told["a.jsonl.zst"]
    assert "GiB come out of it" in told["b.txt.zst"]
    assert "GiB come out of it" in told["c.json.zst"]
    assert "a row of more than 64 MiB" in told["d.csv.zst"]
    assert "not a readable tar archive" in told["e.tar.zst"]
    assert grown < 256


def test_a_member_of_an_archive_that_is_too_long_costs_its_sample(tmp_path):
    members = header(b"%011o\0" % (LONGEST_ROW + 1)) + zeros_raw(LONGEST_ROW + 512)
    (tmp_path / "x.tar.zst").write_bytes(zstandard.compress(members + tar([("b.txt", b"good")])))
    reading = read(tmp_path / "x.tar.zst")
    assert texts(reading) == ["good"]
    assert reasons(reading) == ["1 of 2 rows: a row of more than 64 MiB (first: row 1)"]


def zeros_raw(size: int) -> bytes:
    return b"\0" * size
