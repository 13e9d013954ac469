import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from photon.data.text_files import LONG_TEXT, PART_OF_LONG_TEXT, read_documents, split_long_text
from photon.errors import PhotonError

GOOD = "Plain text that can be read.\n"
ROWS = "".join(json.dumps({"text": f"row {i}", "lang": "de" if i % 2 else "en"}) + "\n" for i in range(4))

UNREADABLE = {
    "empty.txt": (b"", "empty"),
    "blank.md": (b" \n\n", "empty"),
    "binary.txt": (b"abc\0def", "binary"),
    "latin1.txt": ("caf\u00e9 und noch mehr".encode("latin-1"), "not UTF-8 (byte 0xe9 at offset 3)"),
    "utf16.txt": ("text".encode("utf-16"), "UTF-16"),
    "cut.txt.gz": (gzip.compress(GOOD.encode() * 500)[:-20], "truncated"),
    "not.txt.gz": (b"this is no gzip file", "damaged"),
    "flipped.txt.gz": (
        gzip.compress(GOOD.encode())[:20] + b"\xff\xff\xff" + gzip.compress(GOOD.encode())[23:],
        "damaged",
    ),
    "cut.jsonl.gz": (gzip.compress(ROWS.encode() * 500)[:-20], "truncated"),
    "nofield.jsonl": (b'{"body": "x"}\n', "no text field 'text'"),
    "numbers.jsonl": (b'{"text": 5}\n', "no text field 'text'"),
    "nojson.jsonl": (b"just text\n", "not JSON"),
    "emptylist.json": (b"[]", "holds no rows"),
    "scalar.json": (b"7", "no text field 'text'"),
    "cut.parquet": (b"PAR1\x00\x00", "not a readable parquet file"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "not valid Unicode"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_bad_file_is_named_with_its_reason_and_the_rest_is_kept(tmp_path, name):
    data, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text(GOOD)
    reading = read_documents(tmp_path)
    assert [document.text for document in reading.documents] == [GOOD]
    assert [(skip.file, reason in skip.reason) for skip in reading.skipped] == [(name, True)]


@pytest.mark.parametrize("name", UNREADABLE)
def test_nothing_readable_at_all_is_an_error_that_says_why(tmp_path, name):
    data, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PhotonError) as caught:
        read_documents(tmp_path / name)
    assert name in str(caught.value)
    assert reason in str(caught.value)


def test_a_parquet_file_damaged_in_the_middle_keeps_none_of_its_rows(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": [f"row {i} " * 50 for i in range(20_000)]}), whole, row_group_size=5000)
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1000] = b"\x7f" * 1000
    (tmp_path / "bad.parquet").write_bytes(data)
    reading = read_documents(tmp_path)
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
    (tmp_path / "k.csv").write_text("not,read")
    reading = read_documents(tmp_path)
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
    assert len(reading.skipped) == 1
    assert "1 file of other kinds (.csv)" in reading.skipped[0].reason


def test_a_file_named_itself_is_plain_text_whatever_its_suffix(tmp_path):
    (tmp_path / "code.py").write_text("print(1)\n")
    assert [document.text for document in read_documents(tmp_path / "code.py").documents] == ["print(1)\n"]


def test_bad_rows_are_counted_and_good_rows_kept(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"text": "good"}\n{"text": \n{"other": 1}\n{"text": " "}\n{"text": "too"}\n'
    )
    reading = read_documents(tmp_path / "x.jsonl")
    assert [document.text for document in reading.documents] == ["good", "too"]
    assert sorted(skip.reason for skip in reading.skipped) == [
        "1 of 5 rows: empty text",
        "1 of 5 rows: no text field 'text'; name another with --text-field",
        "1 of 5 rows: not JSON",
    ]


def test_fields_by_other_names_and_inside_other_fields(tmp_path):
    rows = [
        {"body": {"words": "hello"}, "meta": {"set": "A"}},
        {"body": {"words": "there"}, "meta": {"set": "B"}},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "y.parquet")
    for file in ("x.jsonl", "y.parquet"):
        reading = read_documents(tmp_path / file, text_field="body.words", source_field="meta.set")
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
    reading = read_documents(tmp_path / "silo")
    assert [document.text for document in reading.documents] == ["more"]
    assert [(skip.file, skip.reason.split(",")[0]) for skip in reading.skipped] == [
        ("link", "a link to a folder")
    ]


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(PhotonError, match="does not exist"):
        read_documents(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PhotonError, match="the folder is empty"):
        read_documents(tmp_path / "folder")


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
