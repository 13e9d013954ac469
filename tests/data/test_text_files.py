import gzip
import json
import os
import socket
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from photon.data.documents import Document
from photon.data.row_kinds import RowReader
from photon.data.text_files import LONG_TEXT, PART_OF_LONG_TEXT, SkippedFile, read_documents, split_long_text
from photon.errors import PhotonError


class Reading(NamedTuple):
    documents: list[Document]
    skipped: list[SkippedFile]


def read(path, **options):
    documents: list[Document] = []
    return Reading(documents, read_documents(path, documents, RowReader(**options)))


GOOD = "Plain text that can be read.\n"
ROWS = "".join(json.dumps({"text": f"row {i}", "lang": "de" if i % 2 else "en"}) + "\n" for i in range(4))

UNREADABLE = {
    "empty.txt": (b"", "empty"),
    "blank.md": (b" \n\n", "empty"),
    "binary.txt": (b"abc\0def", "a NUL byte (first: byte 0x00 at offset 3)"),
    "latin1.txt": ("caf\u00e9 und noch mehr".encode("latin-1"), "not UTF-8 (first: byte 0xe9 at offset 3)"),
    "utf16.txt": ("text".encode("utf-16"), "UTF-16"),
    "cut.txt.gz": (gzip.compress(GOOD.encode() * 500)[:-20], "truncated"),
    "not.txt.gz": (b"this is no gzip file", "damaged"),
    "flipped.txt.gz": (
        gzip.compress(GOOD.encode())[:20] + b"\xff\xff\xff" + gzip.compress(GOOD.encode())[23:],
        "damaged",
    ),
    "cut.jsonl.gz": (gzip.compress(ROWS.encode() * 500)[:-20], "truncated"),
    "nofield.jsonl": (b'{"body": "x"}\n', "no text field 'text'"),
    "numbers.jsonl": (b'{"text": 5}\n', "text field 'text' holds a number"),
    "nojson.jsonl": (b"just text\n", "not JSON"),
    "emptylist.json": (b"[]", "holds no rows"),
    "scalar.json": (b"7", "not an object with fields"),
    "cut.parquet": (b"PAR1\x00\x00", "not a readable parquet file"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "not valid Unicode"),
    "rows.txt": (ROWS.encode(), "holds JSON"),
    "packed.jsonl": (gzip.compress(ROWS.encode()), "it holds gzip"),
    "twice.txt.gz": (gzip.compress(gzip.compress(GOOD.encode())), "it holds gzip"),
    "table.jsonl": (b"PAR1\x15\x04\x15", "it holds parquet"),
    "plain.parquet": (GOOD.encode(), "not a readable parquet file"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_bad_file_is_named_with_its_reason_and_the_rest_is_kept(tmp_path, name):
    data, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text(GOOD)
    reading = read(tmp_path)
    assert [document.text for document in reading.documents] == [GOOD]
    assert [(skip.file, reason in skip.reason) for skip in reading.skipped] == [(name, True)]


@pytest.mark.parametrize("name", UNREADABLE)
def test_nothing_readable_at_all_is_an_error_that_says_why(tmp_path, name):
    data, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PhotonError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert reason in str(caught.value)


def test_a_parquet_file_damaged_in_the_middle_keeps_none_of_its_rows(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": [f"row {i} " * 50 for i in range(20_000)]}), whole, row_group_size=5000)
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1000] = b"\x7f" * 1000
    (tmp_path / "bad.parquet").write_bytes(data)
    reading = read(tmp_path)
    assert len(reading.documents) == 20_000
    assert [skip.file for skip in reading.skipped] == ["bad.parquet"]


def test_every_format_is_read_and_folders_recursively_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("secret")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b" / "c.md").write_text("three")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"four"))
    (tmp_path / "e.jsonl").write_text('{"text": "five"}\n\n{"text": "six"}')
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "seven"}\n'))
    (tmp_path / "g.json").write_text('[{"text": "eight"}, {"text": "nine"}]')
    (tmp_path / "h.json").write_text('{"text": "ten"}\n{"text": "eleven"}\n')
    (tmp_path / "i.json").write_text('{"text": "twelve"}')
    pq.write_table(pa.table({"text": ["thirteen"], "n": [1]}), tmp_path / "j.parquet")
    (tmp_path / "k.psv").write_text("not|read")
    reading = read(tmp_path)
    assert [document.text for document in reading.documents] == [
        "one\ntwo",
        *["three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"],
    ]
    assert [document.source for document in reading.documents][:5] == [
        "a.txt",
        "b/c.md",
        "d.txt.gz",
        "e.jsonl:1",
        "e.jsonl:3",
    ]
    assert [skip.reason.split(":")[0] for skip in reading.skipped] == [
        "1 hidden file or folder (.name) left alone",
        "1 file of other kinds (.psv) that is not read",
    ]


def test_a_file_named_itself_is_plain_text_whatever_its_suffix(tmp_path):
    (tmp_path / "code.py").write_text("print(1)\n")
    assert [document.text for document in read(tmp_path / "code.py").documents] == ["print(1)\n"]


def test_bad_rows_are_counted_and_good_rows_kept(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"text": "good"}\n{"text": \n\n{"other": 1}\n{"text": " "}\n{"text": "too"}\n{"other": 2}\n'
    )
    reading = read(tmp_path / "x.jsonl")
    assert [document.text for document in reading.documents] == ["good", "too"]
    assert sorted(skip.reason for skip in reading.skipped) == [
        "1 of 6 rows: empty text (first: row 5)",
        "1 of 6 rows: not JSON (first: row 2)",
        "2 of 6 rows: no text field 'text'; name another with --text-field (first: row 4)",
    ]


BAD = {
    "bad byte": (b'{"text": "caf\xe9"}', "text is not UTF-8"),
    "NUL": (b'{"text": "a\x00b"}', "text holds a NUL byte"),
    "escaped NUL": (b'{"text": "a\\u0000b"}', "text holds a NUL byte"),
    "surrogate": (b'{"text": "\\udfff"}', "text is not valid Unicode (a lone surrogate)"),
    "null": (b'{"text": null}', "text field 'text' holds null, no text"),
    "missing": (b'{"id": 1}', "no text field 'text'; name another with --text-field"),
    "number": (b'{"text": 1.5}', "text field 'text' holds a number, no text"),
    "huge number": (b'{"text": ' + b"1" * 5000 + b"}", "text field 'text' holds a number, no text"),
    "truth": (b'{"text": true}', "text field 'text' holds true or false, no text"),
    "list": (b'{"text": ["a"]}', "text field 'text' holds a list, no text"),
    "object": (b'{"text": {"a": "b"}}', "text field 'text' holds an object, no text"),
    "blank": (b'{"text": " \\n"}', "empty text"),
    "no object": (b'["text"]', "not an object with fields"),
}
BROKEN = {
    "no JSON": (b'{"text": "a', "not JSON"),
    "deep": (b'{"text": "a", "b": ' + b"[" * 100_000 + b"}", "JSON that is nested too deeply"),
}
FORMS = {
    "x.jsonl": b"\n".join,
    "x.ndjson": b"\n".join,
    "x.JSONL.GZ": lambda rows: gzip.compress(b"\n".join(rows)),
    "lines.json": b"\r\n".join,
    "list.json": lambda rows: b"[\n" + b",\n".join(rows) + b"\n]\n",
    "one-line.json": lambda rows: b"[" + b", ".join(rows) + b"]",
}
GOOD_ROWS = [b'{"text": "one", "id": ' + b"7" * 5000 + b"}", b'{"text": "two", "other": "\xff\x00"}']


@pytest.mark.parametrize(
    ("form", "fault"),
    [(form, fault) for form in FORMS for fault in (*BAD, *BROKEN)],
)
def test_what_is_wrong_in_a_row_costs_that_row(tmp_path, form, fault):
    row, reason = {**BAD, **BROKEN}[fault]
    (tmp_path / form).write_bytes(FORMS[form]([GOOD_ROWS[0], row, GOOD_ROWS[1]]))
    reading = read(tmp_path)
    assert [document.text for document in reading.documents] == ["one", "two"]
    number = 3 if (form, fault in BROKEN) == ("list.json", True) else 2  # a row of the list, or a line
    assert [(skip.file, skip.reason) for skip in reading.skipped] == [
        (form, f"1 of 3 rows: {reason} (first: row {number})")
    ]


@pytest.mark.parametrize(
    ("data", "texts", "told"),
    [
        (
            b'[{"text": "a"}, {"text": "b}, {"text": "c"},{"text": "d"}]',
            "acd",
            "1 of 4 rows: not JSON (first: row 2)",
        ),
        (b'[{"text": "a"},\n{"text": b},\n{"text": "c"}]', "ac", "1 of 3 rows: not JSON (first: row 2)"),
        (b'\n\n[{"text": "a"}, {"text": b},\n{"text": "c"}]', "ac", "1 of 3 rows: not JSON (first: row 3)"),
        (b'[{"text": "a"}{"text": "b"}, {"text": "c"', "ab", "1 of 3 rows: not JSON (first: row 3)"),
        (b'[nonsense, {"text": "a"}, {"text": "b"}]', "ab", "1 of 3 rows: not JSON (first: row 1)"),
    ],
)
def test_rows_that_share_a_line_with_a_bad_one_are_read(tmp_path, data, texts, told):
    (tmp_path / "x.json").write_bytes(data)
    reading = read(tmp_path)
    assert "".join(document.text for document in reading.documents) == texts
    assert [skip.reason for skip in reading.skipped] == [told]


def test_a_bad_row_of_a_parquet_file_costs_that_row(tmp_path):
    raw = pa.array([b"one", b"caf\xe9", None, b"nul\0", b" ", b"two"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 6, raw.buffers())
    inner = pa.StructArray.from_arrays([text], names=["words"])
    pq.write_table(pa.table({"text": text, "meta": inner, "n": range(6)}), tmp_path / "x.parquet")
    for field in ("text", "meta.words"):
        reading = read(tmp_path, text_field=field)
        assert [(document.source, document.text) for document in reading.documents] == [
            ("x.parquet:1", "one"),
            ("x.parquet:6", "two"),
        ]
        assert [skip.reason for skip in reading.skipped] == [
            "1 of 6 rows: empty text (first: row 5)",
            "1 of 6 rows: not UTF-8 (first: row 2)",
            f"1 of 6 rows: text field {field!r} holds null, no text (first: row 3)",
            "1 of 6 rows: text holds a NUL byte (first: row 4)",
        ]
    for field, reason in (("n", "holds a number"), ("none", "no field 'none'; its fields: text, meta, n")):
        with pytest.raises(PhotonError, match=reason):
            read(tmp_path, text_field=field)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([5, None], "field 'lang' holds null"),
        (["x", {"a": "b"}], "field 'lang' holds an object"),
        (["x", ["a"]], "field 'lang' holds a list"),
        (["x", ""], "field 'lang' is empty, or no valid text"),
        (["x", "\ud800"], "field 'lang' is empty, or no valid text"),
        ([1.5, float("inf")], "field 'lang' holds no finite number"),
    ],
)
def test_a_silo_that_a_row_does_not_name_costs_that_row(tmp_path, values, reason):
    rows = [{"text": f"row {n}", "lang": value} for n, value in enumerate(values)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read(tmp_path, source_field="lang")
    assert [document.source for document in reading.documents] == [str(values[0])]
    assert [skip.reason for skip in reading.skipped] == [f"1 of 2 rows: {reason} (first: row 2)"]


def test_a_bad_byte_in_a_book_costs_its_part(tmp_path):
    book = "\n\n".join(f"Paragraph {i}. " + "All work and no play. " * 20 for i in range(1000)).encode()
    bad = book[:200_000] + b"\xff" + book[200_000:]
    (tmp_path / "book.txt").write_bytes(bad)
    reading = read(tmp_path)
    parts = split_long_text(book.decode())
    lost = [part for part in parts if part not in {document.text for document in reading.documents}]
    assert len(lost) == 1
    assert len(reading.documents) == len(parts) - 1
    assert [skip.reason for skip in reading.skipped] == [
        f"1 of {len(parts)} parts: text is not UTF-8 (first: byte 0xff at offset 200,000)"
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("x.psv", "x.TAB", "part-00000", "x.txt.bz2", "x.xz", "x.psv.gz", "x.psv.1", "x.gz", "x.pdf", "1"),
        *("x.jsonl.bak", "x.csv.bak", "x.parquet.gz", "x.arrow.zst", "x.txt.gz.gz", "x.mds", "x.tar.xz"),
    ],
)
def test_a_name_that_says_another_kind_is_refused_and_never_read_as_plain_text(tmp_path, name):
    (tmp_path / name).write_text("a,b\n1,2\n")
    suffix = (
        "no suffix" if name in {"part-00000", "1", "x.gz"} else "." + name.split(".", 1)[1].split(".")[-1]
    )
    with pytest.raises(PhotonError) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    told = {"x.psv.gz": ".psv", "x.psv.1": ".psv", "x.txt.gz.gz": ".gz", "x.mds": "MDS"}.get(
        name, suffix.lower()
    )
    assert told in str(caught.value)
    (tmp_path / "good.txt").write_text(GOOD)
    reading = read(tmp_path)
    assert [document.text for document in reading.documents] == [GOOD]
    assert len(reading.skipped) == 1


@pytest.mark.parametrize(
    "name", ["x.jsonl.1", "x.jsonl.gz.1", "x.jsonl.2.gz", "x.JSONL", "x.ndjson", "x.ndjson.GZ"]
)
def test_numbers_and_case_of_a_suffix_do_not_count(tmp_path, name):
    data = ROWS.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if ".gz" in name.lower() else data)
    for path in (tmp_path, tmp_path / name):
        assert [document.text for document in read(path).documents] == [f"row {i}" for i in range(4)]


def test_a_code_file_that_holds_rows_is_named_and_not_trained_as_their_syntax(tmp_path):
    (tmp_path / "rows.log").write_text(ROWS)
    with pytest.raises(PhotonError, match=r"holds JSON, a row on each line: name it \.jsonl"):
        read(tmp_path / "rows.log")


def test_fields_by_other_names_and_inside_other_fields(tmp_path):
    rows = [
        {"body": {"words": "hello"}, "meta": {"set": "A"}},
        {"body": {"words": "there"}, "meta": {"set": "B"}},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "y.parquet")
    for file in ("x.jsonl", "y.parquet"):
        reading = read(tmp_path / file, text_field="body.words", source_field="meta.set")
        assert [(document.source, document.text) for document in reading.documents] == [
            ("A", "hello"),
            ("B", "there"),
        ]


def test_a_link_to_a_folder_is_named_and_not_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("text")
    (tmp_path / "silo").mkdir()
    (tmp_path / "silo" / "b.txt").write_text("more")
    (tmp_path / "silo" / "link").symlink_to(tmp_path / "real")
    reading = read(tmp_path / "silo")
    assert [document.text for document in reading.documents] == ["more"]
    assert [(skip.file, skip.reason.split(",")[0]) for skip in reading.skipped] == [
        ("link", "a link to a folder")
    ]


def test_pipes_sockets_loops_and_broken_links_are_named_and_nothing_waits(tmp_path):
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(GOOD)
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "gone.md").symlink_to("nowhere")
    (folder / "sub" / "up").symlink_to(folder)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket may have some hundred bytes
        server.bind("sock.txt")
        os.chdir(here)
        reading = read(folder)
    assert [document.text for document in reading.documents] == [GOOD]
    assert {skip.file: skip.reason for skip in reading.skipped} == {
        "pipe.txt": "a pipe, not a regular file",
        "sock.txt": "a socket, not a regular file",
        "loop.jsonl": "Too many levels of symbolic links",
        "gone.md": "No such file or directory",
        "sub/up": "a link to a folder, not followed; give the folder itself to read it",
    }
    with pytest.raises(PhotonError, match=r"pipe\.txt cannot be read \(a pipe, not a regular file\)"):
        read(folder / "pipe.txt")


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text(GOOD)
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", closed)
    assert [(skip.file, skip.reason) for skip in read(tmp_path).skipped] == [("locked", "Permission denied")]


def test_names_that_no_terminal_can_show_are_escaped(tmp_path):
    for name in (b"caf\xe9.txt", b"line\nend.txt", b"\x1b[31mred.txt", b"[bold]x.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    (tmp_path / "a.txt").write_text(GOOD)
    skipped = [skip.file for skip in read(tmp_path).skipped]
    assert sorted(skipped) == [
        "[bold]x.txt",
        "\\x1b[31mred.txt",
        "caf\\udce9.txt",
        "line\\nend.txt",
    ]


def test_a_folder_of_a_thousand_levels_is_read(tmp_path):
    deepest = tmp_path.joinpath(*["d"] * 1050)
    os.makedirs(tmp_path.joinpath(*["d"] * 400))
    os.makedirs(tmp_path.joinpath(*["d"] * 800))
    os.makedirs(deepest)
    (deepest / "deep.txt").write_text(GOOD)
    try:
        assert [document.text for document in read(tmp_path).documents] == [GOOD]
    finally:  # what clears temporary folders away goes down by recursion
        (deepest / "deep.txt").unlink()
        os.removedirs(deepest)


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(PhotonError, match="does not exist"):
        read(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PhotonError, match="the folder is empty"):
        read(tmp_path / "folder")


def test_a_book_becomes_parts_cut_at_blank_lines_that_join_to_the_book():
    book = "\n\n".join(f"Paragraph {i}. " + "All work and no play. " * (i % 40) for i in range(1000))
    parts = split_long_text(book)
    assert "".join(parts) == book
    assert all(part.endswith("\n\n") for part in parts[:-1])
    sizes = [len(part) for part in parts]
    assert all(PART_OF_LONG_TEXT <= size < PART_OF_LONG_TEXT + 1000 for size in sizes[:-1])
    assert sizes[-1] >= PART_OF_LONG_TEXT // 2


def test_short_texts_stay_whole_and_lines_are_the_last_resort():
    short = "line\n\n" * (LONG_TEXT // 6)
    assert split_long_text(short) == [short]
    verse = "a line of a poem without stanzas\n" * 5000
    assert len(split_long_text(verse)) > 5
    assert "".join(split_long_text(verse)) == verse
    one_line = "x" * (3 * LONG_TEXT)
    assert split_long_text(one_line) == [one_line]
