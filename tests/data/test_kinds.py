"""Every kind of file gives what the same rows give as JSON lines, and a bad row costs that row."""

import csv
import gzip
import hashlib
import io
import json
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

from photon.data import tables
from photon.data.documents import Chat, Document, Labelled, Pair
from photon.data.prepare import prepare
from photon.data.prepared import PreparedData
from photon.data.row_kinds import RowReader
from photon.data.text_files import SkippedFile, read_documents
from photon.errors import PhotonError

Rows = list[dict[str, Any]]


class Reading(NamedTuple):
    documents: list[Document]
    skipped: list[SkippedFile]


def read(path: Path, **options: Any) -> Reading:
    documents: list[Document] = []
    return Reading(documents, read_documents(path, documents, RowReader(**options)))


def texts(reading: Reading) -> list[str]:
    return [document.text for document in reading.documents]


def reasons(reading: Reading) -> list[str]:
    return [skip.reason for skip in reading.skipped]


# --- writers of each kind ---------------------------------------------------------------------------------


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(rows: Rows, delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def arrow(rows: Rows, new: Callable[..., Any] = pa.ipc.new_stream, **options: Any) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with new(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=7)
    return bytes(sink.getvalue().to_pybytes())


def tar(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample_tar(rows: Rows) -> bytes:
    members = []
    for number, row in enumerate(rows):
        rest = {name: value for name, value in row.items() if name != "text"}
        members += [(f"d/{number:06}.jpg", b"\xff\xd8"), (f"d/{number:06}.json", json.dumps(rest).encode())]
        if "text" in row:
            members.append((f"d/{number:06}.txt", row["text"].encode()))
    return tar(members)


def shard(samples: list[bytes], config: bytes = b'{"format": "mds"}') -> bytes:
    places = np.cumsum([0, *map(len, samples)]) + 4 * (len(samples) + 2) + len(config)
    return struct.pack("<I", len(samples)) + places.astype("<u4").tobytes() + config + b"".join(samples)


def sample(*values: bytes, fixed: tuple[int, ...] = ()) -> bytes:
    sizes = b"".join(struct.pack("<I", len(value)) for i, value in enumerate(values) if i not in fixed)
    return sizes + b"".join(values)


def mds(folder: Path, rows: Rows, packing: str | None = None, per_shard: int = 9) -> Path:
    folder.mkdir()
    columns = {name: "str" if isinstance(value, str) else "json" for name, value in rows[0].items()}
    entries = []
    for number, start in enumerate(range(0, len(rows), per_shard)):
        samples = [
            sample(*(v.encode() if isinstance(v, str) else json.dumps(v).encode() for v in row.values()))
            for row in rows[start : start + per_shard]
        ]
        data, name = shard(samples), f"shard.{number:05}.mds"
        entry = {
            "format": "mds",
            "column_names": list(columns),
            "column_encodings": list(columns.values()),
            "column_sizes": [None] * len(columns),
            "compression": packing,
            "samples": len(samples),
            "raw_data": {"basename": name, "bytes": len(data), "hashes": {}},
            "zip_data": None,
        }
        if packing:
            data = zstandard.compress(data) if packing.startswith("zstd") else gzip.compress(data)
            suffix = packing.partition(":")[0]
            entry["zip_data"] = {"basename": f"{name}.{suffix}", "bytes": len(data), "hashes": {}}
            name = f"{name}.{suffix}"
        (folder / name).write_bytes(data)
        entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def saved(folder: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder), num_shards=min(3, len(rows)))
    # What datasets itself leaves beside the data, of the same rows.
    (folder / "cache-0123.arrow").write_bytes(arrow([{"text": "a result of map"}]))
    return folder


def file(name: str, data: Callable[[Rows], bytes]) -> Callable[[Path, Rows], Path]:
    def write(folder: Path, rows: Rows) -> Path:
        folder.mkdir()
        (folder / name).write_bytes(data(rows))
        return folder / name

    return write


KINDS: dict[str, Callable[[Path, Rows], Path]] = {
    "jsonl.zst": file("x.jsonl.zst", lambda rows: zstandard.compress(lines(rows))),
    "two frames": file(
        "x.ndjson.zstd",
        lambda rows: zstandard.compress(lines(rows[:5])) + zstandard.compress(lines(rows[5:])),
    ),
    "json.zst": file("x.json.zst", lambda rows: zstandard.compress(json.dumps(rows).encode())),
    "csv": file("x.csv", separated),
    "csv with BOM": file("x.CSV", lambda rows: b"\xef\xbb\xbf" + separated(rows)),
    "csv.gz": file("x.csv.gz", lambda rows: gzip.compress(separated(rows))),
    "tsv.zst": file("x.tsv.zst", lambda rows: zstandard.compress(separated(rows, "\t"))),
    "arrow stream": file("x.arrow", arrow),
    "arrow file": file("x.arrow", lambda rows: arrow(rows, pa.ipc.new_file)),
    "arrow lz4": file(
        "x.arrow",
        lambda rows: arrow(rows, pa.ipc.new_file, options=pa.ipc.IpcWriteOptions(compression="lz4")),
    ),
    "tar": file("x.tar", sample_tar),
    "tgz": file("x.tgz", lambda rows: gzip.compress(sample_tar(rows))),
    "tar.zst": file("x.tar.zst", lambda rows: zstandard.compress(sample_tar(rows))),
    "mds": mds,
    "mds zstd": lambda folder, rows: mds(folder, rows, "zstd:7"),
    "mds gz": lambda folder, rows: mds(folder, rows, "gz"),
    "save_to_disk": saved,
}


@pytest.fixture(scope="module")
def rows() -> Rows:
    draw = np.random.default_rng(0)
    words = [f"word{n}" for n in range(200)]
    return [
        {"text": 'say "é",\n\t' + " ".join(draw.choice(words, 30)), "lang": "ab"[n % 2]} for n in range(60)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_give_the_same_prepared_data(tmp_path, rows, kind):
    places = {
        "lines": file("x.jsonl", lines)(tmp_path / "lines", rows),
        kind: KINDS[kind](tmp_path / "k", rows),
    }
    shards = {}
    shape = {"vocab_size": 300, "sequence_length": 16, "partition": "field:lang", "near_duplicates": "none"}
    for workers, (name, path) in enumerate(places.items(), 1):
        out = tmp_path / f"out {workers}"
        manifest = prepare({"s": [path]}, out, workers=workers, **shape)
        assert not manifest.sources.skipped
        PreparedData.open(out).verify()
        shards[name] = {
            silo: (entry.train.sha256, entry.validation.sha256) for silo, entry in manifest.silos.items()
        }
    assert list(shards["lines"]) == ["a", "b"]
    assert shards["lines"] == shards[kind]


def test_the_splits_of_a_saved_data_set_are_all_read_and_each_by_its_own_folder(tmp_path):
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"text": f"{name} text"}]) for name in ("train", "test")}
    )
    both.save_to_disk(str(tmp_path / "saved"))
    reading = read(tmp_path / "saved")
    assert (texts(reading), reading.skipped) == (["test text", "train text"], [])
    assert texts(read(tmp_path / "saved" / "train")) == ["train text"]


def test_a_merged_index_names_shards_in_folders_below_it(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    shards = []
    for part in ("0", "1"):
        mds(whole / part, [{"text": f"part {part}"}])
        (entry,) = json.loads((whole / part / "index.json").read_text())["shards"]
        entry["raw_data"]["basename"] = f"{part}/shard.00000.mds"
        shards.append(entry)
    (whole / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    reading = read(whole)
    assert (texts(reading), reading.skipped) == (["part 0", "part 1"], [])


# --- what kinds of documents each kind of file holds ------------------------------------------------------

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
WITH_LISTS = ["jsonl.zst", "arrow stream", "arrow file", "tar", "mds", "save_to_disk"]
WITHOUT_LISTS = ["csv", "tsv.zst"]


@pytest.mark.parametrize("kind", WITH_LISTS)
def test_conversations_are_read_where_a_row_can_hold_a_list(tmp_path, kind):
    (chat,) = read(
        KINDS[kind](tmp_path / "k", [{"messages": CHAT}]), text_field="messages", kind="chat"
    ).documents
    assert isinstance(chat, Chat)
    assert [(message.role, message.content) for message in chat.messages] == [
        ("user", "2+2?"),
        ("assistant", "4"),
    ]


@pytest.mark.parametrize("kind", WITHOUT_LISTS)
def test_a_table_of_texts_says_that_it_holds_no_conversations(tmp_path, kind):
    path = KINDS[kind](tmp_path / "k", [{"messages": json.dumps(CHAT)}])
    with pytest.raises(PhotonError, match="field 'messages' holds a text, no list of messages"):
        read(path, text_field="messages", kind="chat")


@pytest.mark.parametrize("kind", [*WITH_LISTS, *WITHOUT_LISTS])
def test_pairs_and_labels_are_read_from_every_kind(tmp_path, kind):
    pairs: Rows = [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}]
    (pair,) = read(KINDS[kind](tmp_path / "k", pairs), kind="pairs").documents
    assert isinstance(pair, Pair)
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("4", "5")
    labels: Rows = [{"text": "a text", "topic": "sums"}, {"text": "another", "topic": "order"}]
    found = read(KINDS[kind](tmp_path / "l", labels), kind="labelled", label_field="topic").documents
    assert [one.label for one in found if isinstance(one, Labelled)] == ["sums", "order"]


def test_classes_beside_texts_and_empty_cells_are_labels_and_none(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar([("a.cls", b"3"), ("a.txt", b"one"), ("b.txt", b"two")]))
    (tmp_path / "x.csv").write_text("text,topic\none,3\ntwo,\n")
    for name, field in (("x.tar", "cls"), ("x.csv", "topic")):
        found = read(tmp_path / name, kind="labelled", label_field=field).documents
        assert [one.label for one in found if isinstance(one, Labelled)] == ["3", None]


# --- what is wrong ----------------------------------------------------------------------------------------


def test_a_bad_row_of_a_table_costs_that_row(tmp_path):
    (tmp_path / "x.csv").write_bytes(
        b'text,n\none,1\n"no"quote,2\nthree\n\nfour,4,4\ncaf\xe9,5\n,6\nnul\0,7\n"never closed,8\nnine,9\n'
    )
    reading = read(tmp_path / "x.csv")
    assert texts(reading) == ["one", "nine"]
    assert reasons(reading) == [
        "1 of 9 rows: 1 cells where the first row names 2 (first: row 3)",
        "1 of 9 rows: 3 cells where the first row names 2 (first: row 4)",
        "1 of 9 rows: not a row of a table (',' expected after '\"') (first: row 2)",
        "1 of 9 rows: not a row of a table (unexpected end of data) (first: row 8)",
        "1 of 9 rows: text field 'text' holds null, no text (first: row 6)",
        "1 of 9 rows: text holds a NUL byte (first: row 7)",
        "1 of 9 rows: text is not UTF-8 (first: row 5)",
    ]


def test_a_cell_that_never_ends_costs_its_row_and_no_memory(tmp_path, monkeypatch):
    for module in ("streams", "tables"):
        monkeypatch.setattr(f"photon.data.{module}.LONGEST_ROW", 1000)
    (tmp_path / "x.csv").write_text('text\none\n"' + "open\n" * 1000 + '\ntwo\n"' + "x" * 5000 + '"\nthree\n')
    reading = read(tmp_path / "x.csv")
    assert [text for text in texts(reading) if text != "open"] == ["one", "two", "three"]
    assert sum("a row of more than 64 MiB" in reason for reason in reasons(reading)) == 1


@pytest.mark.parametrize(
    ("members", "kept", "reason"),
    [
        ([("../../x.txt", b"out")], [], "its name leads out of the archive"),
        ([("/etc/x.txt", b"out")], [], "its name leads out of the archive"),
        ([("b.json", b"{")], [], "not JSON"),
        ([("b.json", b"[1]")], [], "its .json is no object"),
        ([("b.jpg", b"\xff")], [], "a sample without .txt or .json"),
        ([("b.txt", b"caf\xe9")], [], "text is not UTF-8"),
        ([("b.txt", b"x"), ("b.txt", b"y")], [], "a sample with two .txt"),
        ([("long/" * 60 + "b.txt", b"long")], ["long"], None),
    ],
)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_bad_sample_of_an_archive_costs_that_sample(tmp_path, members, kept, reason, form):
    (tmp_path / "x.tar").write_bytes(tar([("a.txt", b"first"), *members, ("z.txt", b"last")], form))
    reading = read(tmp_path / "x.tar")
    assert texts(reading) == ["first", *kept, "last"]
    assert reasons(reading) == ([f"1 of 3 rows: {reason} (first: row 2)"] if reason else [])


def test_links_and_devices_of_an_archive_are_counted_and_not_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{number}.txt")
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            archive.addfile(info)
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("d/a.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"text"))
    (tmp_path / "x.tar").write_bytes(out.getvalue())
    reading = read(tmp_path / "x.tar")
    assert texts(reading) == ["text"]
    assert reasons(reading) == [
        "2 of 5 rows: a link in the archive, not followed (first: row 1)",
        "2 of 5 rows: no plain file in the archive, not followed (first: row 3)",
    ]


def header(size: bytes) -> bytes:
    """Return the header of a member that says it has this size."""
    info = tarfile.TarInfo("a.txt")
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


WHOLE = sample_tar([{"text": f"row {n} " * 100} for n in range(50)])
PACKED = zstandard.ZstdCompressor(write_checksum=True).compress(
    b'{"text": "x"}\n' * 100 + np.random.default_rng(0).bytes(100_000)
)
TORN = {
    "cut.tar": (WHOLE[: len(WHOLE) // 2], "the archive is truncated"),
    "no-end.tar": (WHOLE.rstrip(b"\0")[:512], "the archive is truncated"),
    "none.tar": (b"no archive" * 100, "not a readable tar archive"),
    "huge.tar": (header(b"77777777777\0") + b"x" * 512, "the archive is truncated"),
    "negative.tar": (header(b"\xff" * 12), "not a readable tar archive"),
    "cut.tar.gz": (gzip.compress(WHOLE)[:-20], "the gzip file is truncated"),
    "cut.jsonl.zst": (PACKED[:-20], "the zstd file is truncated"),
    "flipped.jsonl.zst": (PACKED[:1000] + b"\0" * 2000 + PACKED[3000:], "the zstd file is damaged"),
    "none.jsonl.zst": (b"no zstd at all", "the zstd file is damaged"),
    "tail.jsonl.zst": (PACKED + b"rest", "the zstd file is"),
    "twice.jsonl.zst": (zstandard.compress(PACKED), "it holds zstd, not text"),
    "cut.arrow": (arrow([{"text": f"row {n}"} for n in range(50)])[:-300], "not a readable Arrow file"),
    "no-end.arrow": (arrow([{"text": "x"}])[:-8], "it has no end"),
    "file.arrow": (arrow([{"text": "x"}], pa.ipc.new_file)[:-20], "not a readable Arrow file"),
    "none.arrow": (b"no arrow at all, but some text", "not a readable Arrow file"),
    "empty.arrow": (b"", "not a readable Arrow file"),
    "utf16.csv": ("text\nx\n".encode("utf-16"), "UTF-16"),
    "twice.csv": (b"text,text\na,b\n", "names a column twice"),
    "open.csv": (b'"text\na\n', "its first row names no columns"),
    "other.csv": (
        b"body;n\na;1\n",
        "no text field 'text'; name another with --text-field (first: row 1); its fields: body;n",
    ),
    "other.arrow": (arrow([{"body": "x"}]), "no field 'text'; its fields: body"),
}


@pytest.mark.parametrize("name", TORN)
def test_a_torn_file_is_one_line_and_costs_that_file(tmp_path, name):
    data, reason = TORN[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good text")
    reading = read(tmp_path)
    assert texts(reading) == ["good text"]
    assert [(skip.file, reason in skip.reason) for skip in reading.skipped] == [(name, True)], reading.skipped
    with pytest.raises(PhotonError) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["stream", "file", "parquet"])
def test_a_small_table_that_unpacks_to_gigabytes_is_left_out(tmp_path, monkeypatch, form):
    monkeypatch.setattr(tables, "LARGEST_UNPACKED", 1 << 20)
    rows = [{"text": f"{'x' * 200_000} {n}"} for n in range(20)]
    small = [{"text": f"text {n}"} for n in range(100)]
    packed = pa.ipc.IpcWriteOptions(compression="zstd")
    for name, content in (("bomb", rows), ("good", small)):
        file = tmp_path / f"{name}.{'parquet' if form == 'parquet' else 'arrow'}"
        if form == "parquet":
            # A dictionary would hold one text once.
            pq.write_table(pa.Table.from_pylist(content), file, compression="zstd", use_dictionary=False)
        else:
            new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
            file.write_bytes(arrow(content, new, options=packed))
    assert (tmp_path / file.name.replace("good", "bomb")).stat().st_size < 10_000
    reading = read(tmp_path)
    assert texts(reading) == [row["text"] for row in small]
    (skip,) = reading.skipped
    part = "row group" if form == "parquet" else "batch"
    assert skip.reason == f"more than 0 GiB come out of a {part} of it: write it in smaller ones"


def test_a_text_of_an_arrow_file_that_is_not_so_costs_that_row(tmp_path):
    raw = pa.array([b"one", b"caf\xe9", None, b"two"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    table = pa.table({"text": text})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    (tmp_path / "x.arrow").write_bytes(data)
    reading = read(tmp_path / "x.arrow")
    assert texts(reading) == ["one", "two"]
    assert [reason.split(" (")[0] for reason in reasons(reading)] == [
        "1 of 4 rows: not UTF-8",
        "1 of 4 rows: text field 'text' holds null, no text",
    ]
    # Where a text ends, far behind all of them.
    ends = struct.pack("<5i", 0, 3, 7, 7, 10)
    assert data.count(ends) == 1
    (tmp_path / "y.arrow").write_bytes(data.replace(ends, struct.pack("<5i", 0, 3, 2**30, 2**30, 10)))
    reading = read(tmp_path / "y.arrow")
    assert texts(reading) == ["one"]
    assert len(reading.skipped) == 1


@pytest.mark.parametrize(
    ("samples", "kept", "reason"),
    [
        ([b"\xff\xff\xff\xffxx"], [], "a sample that is not as long as its columns say"),
        ([b"\x01"], [], "a sample that is too short for its columns"),
        ([sample(b"caf\xe9")], [], "text is not UTF-8"),
        ([sample(b"")], [], "empty text"),
    ],
)
def test_a_bad_sample_of_a_shard_costs_that_sample(tmp_path, samples, kept, reason):
    folder = mds(tmp_path / "m", [{"text": "x"}])
    (folder / "shard.00000.mds").write_bytes(shard([sample(b"first"), *samples, sample(b"last")]))
    reading = read(folder)
    assert texts(reading) == ["first", *kept, "last"]
    assert reasons(reading) == [f"1 of 3 rows: {reason} (first: row 2)"]


def test_numbers_and_other_things_of_a_shard_are_no_texts(tmp_path):
    folder = mds(tmp_path / "m", [{"text": "x"}])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= {
        "column_names": ["n", "text", "picture", "object"],
        "column_encodings": ["int32", "str", "jpeg", "pkl"],
        "column_sizes": [4, None, None, None],
    }
    (folder / "index.json").write_text(json.dumps(index))
    one = sample(
        struct.pack("<i", -7), b"some text", b"\xff\xd8", b"cos\nsystem\n(S'exit 1'\ntR.", fixed=(0,)
    )
    (folder / "shard.00000.mds").write_bytes(shard([one]))
    (document,) = read(folder, kind="labelled", label_field="n").documents
    assert (document.text, document.label if isinstance(document, Labelled) else "") == ("some text", "-7")
    for field in ("picture", "object"):
        with pytest.raises(PhotonError, match=f"text field '{field}' holds bytes, no text"):
            read(folder, text_field=field)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the shard is truncated"),
        (b"\xff\xff\xff\xff", "it tells of 4,294,967,295 samples"),
        (struct.pack("<3I", 1, 12, 2**32 - 1), "the shard is truncated"),
        (struct.pack("<4I", 2, 16, 8, 4), "its samples do not follow each other"),
        (shard([sample(b"text")])[:-1], "the shard is truncated"),
        (shard([sample(b"text")]) + b"x", "it goes on behind its last sample"),
    ],
)
def test_a_torn_shard_costs_that_shard(tmp_path, data, reason):
    folder = mds(tmp_path / "m", [{"text": f"row {n}"} for n in range(18)])
    (folder / "shard.00000.mds").write_bytes(data)
    reading = read(folder)
    assert texts(reading) == [f"row {n}" for n in range(9, 18)]
    assert [(skip.file, reason in skip.reason) for skip in reading.skipped] == [("shard.00000.mds", True)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"raw_data": {"basename": "../other/shard.00000.mds"}}, "names a file outside its folder"),
        ({"raw_data": {"basename": "/etc/passwd"}}, "names a file outside its folder"),
        ({"raw_data": {"basename": 7}}, "something else than a name"),
        ({"format": "json"}, "shards of another format than mds"),
        ({"column_sizes": []}, "does not say what the columns"),
        ({"column_sizes": [-1]}, "has no size that can be"),
        ({"column_sizes": [10**30]}, "has no size that can be"),
        ({"column_encodings": [None]}, "no name or no encoding"),
        (
            {
                "zip_data": {"basename": "a.mds.snappy"},
                "compression": "snappy",
                "raw_data": {"basename": "a.mds"},
            },
            "compressed with snappy, which is not read",
        ),
        (
            {"raw_data": {"basename": "shard.00000.mds", "hashes": {"crc": "0"}}},
            "hashes called crc, which are not known",
        ),
        ({"raw_data": {"basename": "shard.00000.mds", "hashes": {"sha1": 1}}}, "no texts by names"),
        ({"raw_data": {"basename": "gone.mds"}}, "it is not there, though index.json names it"),
    ],
)
def test_an_index_that_cannot_be_used_is_one_line(tmp_path, change, reason):
    folder = mds(tmp_path / "m", [{"text": "x"}])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= change
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "good.txt").write_text("good text")
    reading = read(folder)
    assert texts(reading) == ["good text"]
    assert reason in " ".join(reasons(reading))


@pytest.mark.parametrize("packing", [None, "zstd"])
def test_a_shard_that_is_not_the_one_of_its_index_costs_that_shard(tmp_path, packing):
    folder = mds(tmp_path / "m", [{"text": f"row {n}"} for n in range(18)], packing)
    index = json.loads((folder / "index.json").read_text())
    key = "zip_data" if packing else "raw_data"
    for entry in index["shards"]:
        data = (folder / entry[key]["basename"]).read_bytes()
        sums = {"sha1": hashlib.sha1(data).hexdigest(), "xxh3_64": xxhash.xxh3_64(data).hexdigest().upper()}
        entry[key]["hashes"] = sums
    (folder / "index.json").write_text(json.dumps(index))
    assert texts(read(folder)) == [f"row {n}" for n in range(18)]
    # As long as before, and a good shard by itself.
    torn = folder / index["shards"][0][key]["basename"]
    data = shard([sample(b"row x"), *(sample(f"row {n}".encode()) for n in range(1, 9))])
    torn.write_bytes(zstandard.compress(data) if packing else data)
    reading = read(folder)
    assert texts(reading) == [f"row {n}" for n in range(9, 18)]
    (skip,) = reading.skipped
    assert skip.file == torn.name
    assert re.fullmatch("its (sha1|xxh3_64) is not the one in index.json: .*", skip.reason)


def test_an_index_that_is_none_is_read_as_what_it_is(tmp_path):
    (tmp_path / "index.json").write_text('[{"text": "a row"}]')
    (tmp_path / "state.json").write_text('{"text": "a state"}')
    assert texts(read(tmp_path)) == ["a row", "a state"]


@pytest.mark.parametrize(
    "state", ["[]", "{", '{"_data_files": 7}', '{"_data_files": [{"filename": "../x.arrow"}]}']
)
def test_a_saved_data_set_with_a_broken_index_is_one_line(tmp_path, state):
    folder = saved(tmp_path / "s", [{"text": f"row {n}"} for n in range(3)])
    (folder / "state.json").write_text(state)
    assert any(skip.file == "state.json" for skip in read(folder).skipped)
