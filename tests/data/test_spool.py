import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from photon.code import command, environment
from photon.data import shards
from photon.data.documents import Chat, Document, Message, Pair
from photon.data.spool import Documents, Spool, joined, sizes_of, taken
from photon.data.tokenizer import EosTokenizer, train_tokenizer
from photon.errors import PhotonError

ODD = ["plain", "", "Grüße 你好 🙂\r\n\x00", " \n"]


@pytest.fixture
def spool(tmp_path):
    with Spool.beside(tmp_path / "out") as made:
        yield made


def test_documents_come_back_as_they_went_in(spool):
    documents = [Document(f"source {text}", text) for text in ODD]
    chat = Chat("c", "user: ü\n\nassistant: b", (Message("user", "ü"), Message("assistant", "b")))
    said = (Message("user", "ü"),)
    pair = Pair("p", "user: ü", said, (Message("assistant", "a"),), (Message("assistant", "b"),))
    stored = spool.documents()
    for number, document in enumerate([*documents, chat, pair]):
        stored.append(document)
        # Reading and writing take turns.
        assert stored[number] == document
    assert list(stored) == [*documents, chat, pair]
    assert isinstance(stored[4], Chat)
    assert list(sizes_of(stored)) == [len(d.text.encode()) for d in stored]
    assert list(taken(stored, [3, 0])) == [documents[3], documents[0]]
    assert list(stored[::2]) == [documents[0], documents[2], chat]
    assert type(stored[5]) is Pair
    assert list(joined([stored[1:2], stored[:1]])) == [documents[1], documents[0]]
    del stored[2:]
    assert list(stored) == documents[:2]


def test_nothing_is_left_of_a_spool(tmp_path):
    with contextlib.suppress(ZeroDivisionError), Spool.beside(tmp_path / "new" / "out") as spool:
        spool.documents().append(Document("a", "b"))
        raise ZeroDivisionError
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with Spool.beside(tmp_path / "out") as spool:
        spool._texts.close()
        spool._texts = open("/dev/full", "wb", buffering=1 << 20)  # noqa: SIM115
        stored = spool.documents()
        with pytest.raises(PhotonError, match=r"cannot be written \(No space left.*: free some space"):
            stored.append(Document("a", "x" * 2**21))
        spool._texts = open(os.devnull, "wb")  # noqa: SIM115


@pytest.fixture
def few_bytes(monkeypatch):
    monkeypatch.setattr(shards, "ENOUGH", 2_000)


def test_encoded_documents_are_found_across_files_and_blocks(corpus, spool, few_bytes, monkeypatch):
    tokenizer = train_tokenizer([document.text for document in corpus["low"]], 300)
    stored = spool.documents()
    for document in corpus["low"]:
        stored.append(document)
    seen = []
    encoded = shards.encode(stored, tokenizer, np.dtype(np.uint16), workers=3, advance=seen.append)
    assert sum(seen) == len(stored)
    plain = [[*ids, tokenizer.eos_token_id] for ids in tokenizer.encode([d.text for d in stored])]
    for first, last in ((0, len(stored)), (3, 3), (7, 25), (29, 30)):
        for block in (1, 100, 10**6):
            found = [int(one) for part in encoded.tokens(first, last, block) for one in part]
            assert found == [one for ids in plain[first:last] for one in ids]


def test_what_a_process_cannot_do_is_one_line_and_ends_the_others(corpus, spool, few_bytes):
    whole = train_tokenizer([document.text for document in corpus["low"]], 300)
    content = json.loads(whole.tokenizer.to_str())
    # Without some of the bytes, and without a token for what is unknown.
    content["model"] = {"type": "WordLevel", "vocab": {"word": 0}, "unk_token": "missing"}
    broken = EosTokenizer(type(whole.tokenizer).from_str(json.dumps(content)), "<|endoftext|>", 0)
    stored = spool.documents()
    for document in corpus["low"]:
        stored.append(document)
    with pytest.raises(PhotonError, match="the tokenizer cannot write this text"):
        shards.encode(stored, broken, np.dtype(np.uint16), workers=3, advance=lambda _: None)


def test_a_process_that_dies_is_one_line(corpus, spool, few_bytes, monkeypatch):
    monkeypatch.setattr(shards, "command", lambda _: [sys.executable, "-c", "raise SystemExit(9)"])
    stored = spool.documents()
    for document in corpus["low"]:
        stored.append(document)
    with pytest.raises(PhotonError, match="has died"):
        shards.look_at(stored, "words", 0, workers=2, advance=lambda _: None)


def test_a_process_is_not_ended_by_an_interrupt_but_with_the_one_that_started_it(spool):
    stored = spool.documents()
    for number in range(20_000):
        stored.append(Document("d", f"some words {number} " * 200))
    (name,) = shards._shared_out(stored, "look", 1)
    job = shards.LookJob(name=name, comparison="words", seed=0).model_dump_json()
    # A parent that is killed, and one that starts it in its own process group, as a terminal has it.
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], stdin=sys.stdin); time.sleep(100)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *command("photon.data.shards"), str(spool.folder)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        parent.stdin.write(job + "\n")
        parent.stdin.flush()
        assert parent.stdout.readline().strip().isdigit()
        (child,) = psutil.Process(parent.pid).children()
        child.send_signal(signal.SIGINT)
        assert parent.stdout.readline().strip().isdigit()
        parent.kill()
        parent.wait()
        child.wait(timeout=30)
    finally:
        parent.kill()
        parent.wait()


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    process = shards._started(tmp_path, shards.LookJob(name="x", comparison="words", seed=0))
    with process:
        fault = shards._follow(process, [process], lambda _: None)
    assert "cannot be written (No such file" in fault


def test_a_documents_view_is_no_copy(spool):
    stored = spool.documents()
    stored.append(Document("a", "b"))
    assert isinstance(stored[:1], Documents)
    assert stored[:1].spool is spool
