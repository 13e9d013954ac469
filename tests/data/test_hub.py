import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from photon.config.schema import DataSection, HubSection
from photon.data.hub import CORPORA, ensure_hub, hub_documents
from photon.data.prepared import PreparedData, is_prepared
from photon.data.row_kinds import RowReader
from photon.data.text_files import read_documents
from photon.errors import PhotonError


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    # The libraries read HF_DATASETS_OFFLINE and HF_HUB_OFFLINE once, at import.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_lines(file, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


def c4_rows(language, count):
    return [
        {"text": f"{language} {i}", "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for i in range(count)
    ]


def streamed(rows):
    """Return what ``datasets`` streams."""
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def texts(silos):
    return {name: [document.text for document in documents] for name, documents in silos.silos.items()}


def test_c4_in_its_own_file_format(tmp_path):
    write_lines(tmp_path / "c4-train.00000-of-01024.json.gz", c4_rows("en", 4))
    write_lines(tmp_path / "c4-train.00001-of-01024.json.gz", c4_rows("EN", 4))
    silos = hub_documents("c4", data_files=[str(tmp_path / "c4-train.*.json.gz")], limit=6)
    assert texts(silos) == {"c4": ["en 0", "en 1", "en 2", "en 3", "EN 0", "EN 1"]}
    assert silos.silos["c4"][0].source == "c4:en:1"


def test_mc4_makes_a_silo_of_each_language(tmp_path):
    for language in ("de", "ja"):
        write_lines(tmp_path / f"c4-{language}.tfrecord-00000.json.gz", c4_rows(language, 5))
    files = [str(tmp_path / "c4-{config}.*.json.gz")]
    silos = hub_documents("mc4", configs=["de", "ja"], data_files=files, limit=2)
    assert texts(silos) == {"de": ["de 0", "de 1"], "ja": ["ja 0", "ja 1"]}


def test_the_pile_makes_a_silo_of_each_component(tmp_path):
    names = ["Pile-CC", "Pile-CC", "USPTO Backgrounds", "Pile-CC", "Github"]
    rows = [{"text": f"{i}", "meta": {"pile_set_name": names[i % 5]}} for i in range(20)]
    write_lines(tmp_path / "00.jsonl", rows)
    silos = hub_documents("the-pile", data_files=[str(tmp_path / "00.jsonl")], limit=3)
    assert texts(silos) == {
        "Pile-CC": ["0", "1", "3"],
        "USPTO-Backgrounds": ["2", "7", "12"],
        "Github": ["4", "9", "14"],
    }


def test_fineweb_edu_from_parquet_up_to_a_number_of_bytes(tmp_path):
    table = pa.table({"text": ["é" * 50] * 3 + [" ", "last"], "id": list("abcde"), "score": [3.0] * 5})
    pq.write_table(table, tmp_path / "000_00000.parquet")
    files = [str(tmp_path / "*.parquet")]
    assert texts(hub_documents("fineweb-edu", data_files=files, limit_bytes=150)) == {
        "fineweb-edu": ["é" * 50] * 2
    }
    assert len(hub_documents("fineweb-edu", data_files=files).silos["fineweb-edu"]) == 4


def test_files_of_ones_own_with_other_columns(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"body": f"{i}", "lang": "ab"[i % 2]} for i in range(4)])
    files = [str(tmp_path / "x.jsonl")]
    bodies, by_lang = RowReader("body"), RowReader("body", "lang")
    assert texts(hub_documents("json", data_files=files, reader=bodies)) == {"json": ["0", "1", "2", "3"]}
    assert texts(hub_documents("json", data_files=files, reader=by_lang)) == {
        "a": ["0", "2"],
        "b": ["1", "3"],
    }


def test_a_rare_silo_does_not_keep_the_stream_open_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("photon.data.hub.SCAN_FACTOR", 5)
    rows = [
        {"text": f"{i}", "meta": {"pile_set_name": "rare" if i in (3, 60) else "common"}} for i in range(100)
    ]
    write_lines(tmp_path / "x.jsonl", rows)
    silos = hub_documents("the-pile", data_files=[str(tmp_path / "x.jsonl")], limit=2)
    assert texts(silos) == {"common": ["0", "1"], "rare": ["3"]}


@pytest.mark.parametrize("name", ["c4", "the-pile", "mc4", "fineweb-edu"])
def test_the_hub_is_asked_for_the_corpus_by_its_name_and_configuration(monkeypatch, name):
    asked = []

    def load_dataset(path, name=None, *, split, streaming):
        asked.append((path, name, split, streaming))
        return streamed([{"text": f"text of {name}", "meta": {"pile_set_name": "Github"}}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    silos = hub_documents(name)
    corpus = CORPORA[name]
    assert asked == [(corpus.path, config, "train", True) for config in corpus.configs or (None,)]
    assert list(silos.silos) == (
        ["Github"] if name == "the-pile" else list(corpus.configs) if name == "mc4" else [name]
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("c5", {}, "corpus 'c5' is not known: use one of c4, the-pile"),
        ("json", {}, "needs files: name them with --hub-files"),
        ("c4", {}, "allenai/c4 cannot be streamed .*check the network, or give local copies"),
        ("c4", {"data_files": ["{folder}/nothing-*.json"]}, "cannot be streamed .*check the files"),
        ("c4", {"data_files": ["{folder}/bad.jsonl"]}, r"gave no text \(not JSON \(first: row 1\)"),
        ("c4", {"configs": ["a/b"]}, "'a/b' cannot be a folder name"),
        ("c4", {"data_files": ["{folder}/cut.json.gz"]}, "cut.json.gz cannot be streamed"),
        (
            "c4",
            {"data_files": ["{folder}/x.jsonl"], "reader": RowReader("body")},
            r"gave no text \(no text field 'body'; name another with --text-field .*its fields: text\)",
        ),
        ("c4", {"data_files": ["{folder}/blank.jsonl"]}, "gave no text"),
        ("c4", {"limit": 0}, "takes none"),
    ],
)
def test_what_cannot_be_streamed_is_one_clear_error(tmp_path, name, options, message):
    write_lines(tmp_path / "x.jsonl", [{"text": "x"}])
    write_lines(tmp_path / "blank.jsonl", [{"text": " "}])
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b'{"text": "some text"}\n' * 9000)[:-30])
    options = dict(options)
    if "data_files" in options:
        options["data_files"] = [file.replace("{folder}", str(tmp_path)) for file in options["data_files"]]
    with pytest.raises(PhotonError, match=message) as caught:
        hub_documents(name, **options)
    assert "\n" not in str(caught.value)


ROWS = [
    {"text": "good", "lang": "zh"},
    {"text": None, "lang": "zh"},
    {"lang": "zh"},
    {"text": 5, "lang": "zh"},
    {"text": "no silo"},
    {"text": "null silo", "lang": None},
    {"text": "blank silo", "lang": " "},
    {"text": "also good", "lang": "de"},
]
LEFT_OUT = [
    "1 of 8 rows: field 'lang' holds null (first: row 6)",
    "1 of 8 rows: field 'lang' is empty, or no valid text (first: row 7)",
    "1 of 8 rows: no field 'lang' (first: row 5)",
    "1 of 8 rows: no text field 'text'; name another with --text-field (first: row 3)",
    "1 of 8 rows: text field 'text' holds a number, no text (first: row 4)",
    "1 of 8 rows: text field 'text' holds null, no text (first: row 2)",
]


def test_a_row_without_text_or_silo_costs_that_row_as_in_files(tmp_path):
    write_lines(tmp_path / "x.jsonl", ROWS)
    reader = RowReader(source_field="lang")
    text = hub_documents("json", data_files=[str(tmp_path / "x.jsonl")], reader=reader)
    assert texts(text) == {"zh": ["good"], "de": ["also good"]}
    assert [(skip.name, skip.reason) for skip in text.skipped] == [("json", reason) for reason in LEFT_OUT]
    skipped = read_documents(tmp_path / "x.jsonl", [], reader)
    assert [skip.reason for skip in skipped] == LEFT_OUT


def test_a_streamed_row_without_text_or_in_another_encoding_costs_that_row(tmp_path, monkeypatch):
    raw = pa.array([b"good", b"caf\xe9", None, b"also good"], pa.binary())
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 4, raw.buffers())}), tmp_path / "x.parquet"
    )
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *_, **__: load_dataset(
            "parquet", data_files=[str(tmp_path / "x.parquet")], split="train", streaming=True
        ),
    )
    for text in (hub_documents("c4"), hub_documents("parquet", data_files=[str(tmp_path / "x.parquet")])):
        assert list(texts(text).values()) == [["good", "also good"]]
        assert [skip.reason for skip in text.skipped] == [
            "1 of 4 rows: not UTF-8 (first: row 2)",
            "1 of 4 rows: text field 'text' holds null, no text (first: row 3)",
        ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json.gz"])
def test_a_line_that_is_no_json_costs_that_line_elsewhere_too(tmp_path, name):
    data = b'{"text": "good"}\n{"text": \n{"text": "caf\xe9"}\n{"text": "also good"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    text = hub_documents("json", data_files=[f"file://{tmp_path}/*{name[1:]}"])
    assert texts(text) == {"json": ["good", "also good"]}
    assert [skip.reason for skip in text.skipped] == [
        "1 of 4 rows: not JSON (first: row 2)",
        "1 of 4 rows: text is not UTF-8 (first: row 3)",
    ]


def test_two_values_that_would_give_one_silo_are_an_error(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"text": "a", "lang": "zh/CN"}, {"text": "b", "lang": "zh CN"}])
    with pytest.raises(PhotonError, match="'zh/CN' and 'zh CN' give the same silo name 'zh-CN'"):
        hub_documents("json", data_files=[str(tmp_path / "x.jsonl")], reader=RowReader(source_field="lang"))


def test_a_field_that_no_row_has_ends_the_stream_early(monkeypatch):
    drawn = []

    def rows():
        for number in range(10**9):
            drawn.append(number)
            yield {"body": "x"}

    monkeypatch.setattr("photon.data.hub.PATIENCE", 1000)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    with pytest.raises(PhotonError, match=r"no text field .text.*its fields: body"):
        hub_documents("c4")
    assert len(drawn) < 2000


def test_a_run_prepares_its_corpus_once_and_another_configuration_apart(make_text, tmp_path, monkeypatch):
    streams = []

    def load_dataset(path, name=None, *, split, streaming):
        streams.append(path)
        return streamed([{"text": make_text(number)} for number in range(100)])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = DataSection(
        source="hub",
        path=None,
        vocab_size=300,
        tokenizer=None,
        partition="iid:2",
        hub=HubSection(corpus="c4", documents_per_silo=40),
    )
    first = ensure_hub(tmp_path, data, 16, 0)
    assert ensure_hub(tmp_path, data, 16, 0) == first
    assert streams == ["allenai/c4"]
    manifest = PreparedData.open(first).manifest
    assert sum(silo.train.documents + silo.validation.documents for silo in manifest.silos.values()) == 40
    assert (list(manifest.silos), manifest.vocab_size) == (["silo-0", "silo-1"], 300)
    others = [
        ensure_hub(tmp_path, data, 32, 0),
        ensure_hub(tmp_path, data, 16, 1),
        ensure_hub(tmp_path, data.model_copy(update={"partition": "by-source"}), 16, 0),
        ensure_hub(tmp_path, data.model_copy(update={"tokenizer": str(first / "tokenizer")}), 16, 0),
    ]
    assert len({first, *others}) == 5
    streams.clear()
    for wrong in ({"partition": "iid:0"}, {"tokenizer": "/nowhere"}):
        with pytest.raises(PhotonError, match=r"iid:0|nowhere"):
            ensure_hub(tmp_path, data.model_copy(update=wrong), 16, 0)
    assert not streams, "what is wrong is told before a download"
    with pytest.raises(PhotonError, match=r"data\.hub is not set"):
        ensure_hub(tmp_path, data.model_copy(update={"hub": None}), 16, 0)


@pytest.fixture
def any_data_set(tmp_path, monkeypatch):
    """Stand for OWNER/NAME on the hub: a folder of that name, of which ``datasets`` streams the files."""
    folder = tmp_path / "lab" / "talks"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def write(rows):
        write_lines(folder / "train.jsonl", rows)

    return write


def test_any_name_on_the_hub_is_streamed_and_gives_a_silo_of_its_name(any_data_set):
    any_data_set([{"text": "one"}, {"text": None}, {"text": "two"}])
    text = hub_documents("lab/talks")
    assert texts(text) == {"talks": ["one", "two"]}
    assert [skip.reason for skip in text.skipped] == [
        "1 of 3 rows: text field 'text' holds null, no text (first: row 2)"
    ]


def test_conversations_and_labels_are_streamed_too(any_data_set):
    said = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    any_data_set([{"messages": said, "text": "a text", "topic": 3}])
    chats = hub_documents("lab/talks", reader=RowReader("messages", kind="chat"))
    assert [message.content for message in chats.silos["talks"][0].messages] == ["2+2?", "4"]
    labelled = hub_documents("lab/talks", reader=RowReader(kind="labelled", label_field="topic"))
    assert labelled.silos["talks"][0].label == "3"


@pytest.mark.parametrize(
    "name", ["../etc", "lab/talks/more", "lab//talks", "/lab/talks", "lab/", "file://x/y"]
)
def test_what_is_no_name_on_the_hub_is_refused_before_it_is_asked(name):
    with pytest.raises(PhotonError, match=r"is not known: use one of c4.* or OWNER/NAME of a data set"):
        hub_documents(name)


def test_a_run_may_name_any_data_set_with_its_configuration(make_text, tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, name=None, *, split, streaming):
        asked.append((path, name))
        return streamed([{"text": make_text(number)} for number in range(60)])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = DataSection(
        source="hub",
        path=None,
        vocab_size=300,
        tokenizer=None,
        partition="iid:2",
        hub=HubSection(corpus="lab/talks:german", documents_per_silo=40),
    )
    assert is_prepared(ensure_hub(tmp_path, data, 16, 0))
    assert asked == [("lab/talks", "german")]
