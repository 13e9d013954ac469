"""Large payloads go through a store: whole, verified, and to the place that was meant, or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
from blake3 import blake3
from flwr.app import ConfigRecord, RecordDict

from photon.config.compose import compose
from photon.errors import PhotonError
from photon.link import store as store_module
from photon.link import transport
from photon.link.encoding import pack_groups
from photon.link.pipelines import uplink_pipelines
from photon.link.records import HEADER, STORED_BYTES, count_bytes, encode_groups
from photon.link.store import FolderStore, ObjectStore, download, open_store
from photon.link.transport import TICKET, MappedTensors, ServerLink, SiloLink
from photon.state.tensors import load_groups, save_groups
from tests.link.stored import RUN, Sides, assert_equal, changed, flip_last_byte, groups, keys, nbytes, section

# --- there and back -----------------------------------------------------------------------------------


def test_round_trip_is_exact_and_counted(place: tuple[str, bool], tmp_path: Path) -> None:
    url, presigned = place
    sides = Sides(tmp_path, url, presigned=presigned)
    sent, trained = groups(0), groups(1)
    request, ticket = sides.request(sent)
    assert_equal(sides.silo.receive(request), sent)
    reply = sides.reply(trained, request)
    assert_equal(sides.server.receive(reply, ticket), trained)
    for records in (request, reply):
        assert list(records.array_records) == []
        # 64 bytes of alignment between tensors at most.
        raw = sum(t.nbytes for tensors in sent.values() for t in tensors.values())
        assert raw <= records[HEADER][STORED_BYTES] <= raw + 5 * 64
        text = sum(len(str(v)) for r in records.values() for v in r.values())
        assert abs(count_bytes(records) - text - records[HEADER][STORED_BYTES]) < 100
    assert not [path for path in tmp_path.glob("*/*") if path.is_file() and "store" not in str(path)]
    sides.server.collect(RUN, 1)
    assert sides.server._store.folders(RUN) == []  # type: ignore[union-attr]


@pytest.mark.few(1)
def test_an_object_of_many_parts_and_ranges(
    place: tuple[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(store_module, "RANGE_BYTES", 2**20 + 7)
    url, presigned = place
    sides = Sides(tmp_path, url, presigned=presigned)
    sent = {"params": {str(i): torch.full((2_000_003,), float(i)) for i in range(2)}}
    request, ticket = sides.request(sent)
    assert_equal(sides.silo.receive(request), sent)
    assert_equal(sides.server.receive(sides.reply(sent, request), ticket), sent)


def test_codecs_give_the_same_through_a_store_as_inside_messages(tmp_path: Path, folder: Path) -> None:
    sides = Sides(tmp_path, str(folder), cast=True)
    sent = groups()
    request, ticket = sides.request(sent)
    expected = {
        g: {n: t.to(torch.bfloat16).to(t.dtype) for n, t in tensors.items()} for g, tensors in sent.items()
    }
    assert_equal(sides.silo.receive(request), expected)
    assert_equal(sides.server.receive(sides.reply(sent, request), ticket), expected)


def test_the_object_is_the_tensors_bytes_one_after_another(sides: Sides, folder: Path) -> None:
    """Read back with numpy-free means, from the reference alone."""
    sent = groups()
    request, _ = sides.request(sent)
    reference = json.loads(request[HEADER]["object"])
    data = (folder / reference["key"]).read_bytes()
    for group, tensors in reference["groups"].items():
        for name, entry in tensors.items():
            raw = data[entry["offset"] : entry["offset"] + entry["nbytes"]]
            assert blake3(raw).hexdigest() == entry["blake3"]
            values = sent[group][name].contiguous().reshape(-1)
            assert raw == bytes(values.view(torch.uint8).tolist())


def test_pages_of_a_received_model_are_given_back_and_read_again(tmp_path: Path) -> None:
    size = 64 * 2**20
    sent = {"params": {"w": torch.arange(size // 4, dtype=torch.float32)}}
    sides = Sides(tmp_path, str(tmp_path / "store"))
    request, _ = sides.request(sent)
    received = sides.silo.receive(request)["params"]
    assert isinstance(received, MappedTensors)
    assert torch.equal(received["w"], sent["params"]["w"])
    with_pages = psutil.Process().memory_info().rss
    received.release()
    assert with_pages - psutil.Process().memory_info().rss > 0.9 * size
    assert torch.equal(received["w"], sent["params"]["w"])


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_with_the_tensors_is_the_object_where_the_disk_can_link(
    sides: Sides, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    if not linked:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError("no links between disks")))
    trained, kept = groups(1), tmp_path / "reply.safetensors"
    save_groups(kept, trained)
    request, ticket = sides.request(groups())
    reply = sides.reply(trained, request, kept)
    assert_equal(sides.server.receive(reply, ticket), trained)
    assert ticket is not None
    assert (folder / ticket.key).samefile(kept) is linked
    # What is cleaned up is the store's name of the file alone.
    sides.server.collect(RUN, 1)
    assert not (folder / ticket.key).exists()
    assert_equal(load_groups(kept), trained)


def test_a_shared_folder_is_mapped_and_a_write_to_a_tensor_stays_private(sides: Sides, folder: Path) -> None:
    request, _ = sides.request(groups())
    received = sides.silo.receive(request)
    received["params"]["a.weight"].zero_()
    assert_equal(sides.silo.receive(request), groups())
    assert "store" in Path("/proc/self/maps").read_text() or not Path("/proc/self/maps").exists()


# --- which way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "url", "elements", "stored"),
    [
        ("auto", "set", 2**18, False),
        ("auto", "set", 2**18 + 1, True),
        ("auto", None, 2**20, False),
        ("inline", "set", 2**20, False),
        ("store", "set", 1, True),
    ],
)
def test_transport_and_size_decide_the_way(
    tmp_path: Path, transport: str, url: str | None, elements: int, stored: bool
) -> None:
    link = section(url and str(tmp_path / "store"), transport=transport)
    server = ServerLink(link, tmp_path, 60)
    silo = SiloLink(link.store.url, tmp_path)
    sent = {"params": {"w": torch.ones(elements)}}
    request = server.send(sent, RUN, 1)
    ticket = server.admit(request, nbytes(sent), RUN, 1)
    assert (TICKET in request, ticket is not None, "params" not in request) == (stored,) * 3
    reply = silo.send(pack_groups(silo.receive(request), uplink_pipelines(link)), request)
    assert ("params" not in reply) == stored, "a reply takes the way that its request came"
    assert_equal(server.receive(reply, ticket), sent)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["link.transport=store"], "link.transport=store needs link.store.url"),
        (["link.store.url=relative/folder"], "link.store.url=relative/folder: give an absolute folder"),
        (["link.store.url=/folder", "link.store.presigned=true"], "works with link.store.url=s3://"),
        (["link.store.url=ftpp://host/x"], "link.store.url=ftpp://host/x: cannot be opened"),
    ],
)
def test_settings_that_cannot_work_end_in_one_line(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(PhotonError, match=message) as refused:
        ServerLink(compose(overrides).link, tmp_path, 60)
    assert "\n" not in str(refused.value)


def test_the_model_of_a_round_is_written_once(sides: Sides, folder: Path) -> None:
    first = sides.server.send(groups(), RUN, 2)
    again = sides.server.send(groups(), RUN, 2)
    assert first[HEADER]["object"] == again[HEADER]["object"]
    assert len(keys(folder)) == 1
    sides.server.send(groups(1), RUN, 2)
    assert len(keys(folder)) == 2, "another model is another object"


def test_a_silo_finds_the_store_where_its_operator_says(tmp_path: Path) -> None:
    (tmp_path / "seen-by-server").mkdir()
    (tmp_path / "seen-by-silo").symlink_to(tmp_path / "seen-by-server")
    server = ServerLink(section(str(tmp_path / "seen-by-server")), tmp_path, 60)
    request = server.send(groups(), RUN, 1)
    silo = SiloLink(str(tmp_path / "seen-by-silo"), tmp_path)
    assert_equal(silo.receive(request), groups())
    with pytest.raises(PhotonError, match="store-url is not set"):
        SiloLink(None, tmp_path).receive(request)


# --- what does not add up is refused ------------------------------------------------------------------


def weight(reference: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = reference["groups"]["params"]["a.weight"]
    return entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: weight(r).update(dtype="object"), "params/a.weight has the unknown type 'object'"),
        (lambda r: weight(r).update(shape=[3, 6]), r"params/a.weight has 60 bytes.* needs 72"),
        (lambda r: weight(r).update(shape=[-3, -5]), "impossible shape"),
        (lambda r: weight(r).update(shape=[0, 2**62, 2**62]), "impossible shape"),
        (lambda r: weight(r).update(nbytes=64), r"64 bytes.* needs 60"),
        (lambda r: weight(r).update(offset=r["nbytes"] - 60), "cannot begin at"),
        (lambda r: weight(r).update(offset=1), "a.weight cannot begin at 1; the tensor before it ends at 0"),
        (lambda r: weight(r).update(offset=-64), "malformed.*offset"),
        (lambda r: weight(r).update(blake3="0" * 64), "params/a.weight in .* is not what was sent"),
        (lambda r: weight(r).update(encoding={"codecs": []}), "malformed.*encoding"),
        (lambda r: weight(r).update(extra=1), "malformed.*extra"),
        (lambda r: r.update(nbytes=r["nbytes"] + 64), "its tensors end at"),
        (lambda r: r["groups"].pop("exp_avg"), "its tensors end at"),
        (lambda r: r.update(format=99), "malformed.*format"),
        (lambda r: r.update(key="../../etc/passwd"), "is not a key of the store"),
        (lambda r: r.update(key="/etc/passwd"), "is not a key of the store"),
        (lambda r: r.update(key="run0/../../secret"), "is not a key of the store"),
        (lambda r: r.update(key="run0/round-000001/absent"), "cannot read .*absent"),
    ],
)
def test_a_reference_that_does_not_add_up_is_refused(
    sides: Sides, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    request, _ = sides.request(groups())
    with pytest.raises(PhotonError, match=message) as refused:
        sides.silo.receive(changed(request, change))
    assert "\n" not in str(refused.value)


def test_what_is_not_expected_is_refused_before_it_is_read(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a silo, which downloads as much as it is told."""
    request, _ = sides.request(groups())
    shapes = {group: {name: t.shape for name, t in tensors.items()} for group, tensors in groups().items()}
    assert_equal(sides.silo.receive(request, shapes), groups())
    monkeypatch.setattr(transport, "_read", lambda *_: pytest.fail("it was read"))

    def encoded(reference: dict[str, Any], **claims: Any) -> None:
        codecs = [{"codec": "zstd", "version": 1, "arguments": {"level": 1, "width": 1}, "length": 2**40}]
        claimed = {"shape": [3, 5], "dtype": "float32", "codecs": codecs, "blake3": "0" * 64} | claims
        weight(reference).update(shape=[60], dtype="uint8", encoding=claimed)

    for change, message in (
        (lambda r: r["groups"]["params"].update(stranger=weight(r)), "params/stranger was not expected"),
        (lambda r: weight(r).update(shape=[5, 3]), r"shape \(5, 3\), expected \(3, 5\)"),
        (lambda r: encoded(r, shape=[2**20]), r"expected \(3, 5\)"),
        (encoded, "a frame of 1099511627776 bytes for 60"),
        (
            lambda r: encoded(r, codecs=[{"codec": "bitmask", "version": 1, "arguments": {}, "length": 15}]),
            "need 62",
        ),
    ):
        with pytest.raises(PhotonError, match=message):
            sides.silo.receive(changed(request, change), shapes)
    last = max(
        (t for tensors in json.loads(request[HEADER]["object"])["groups"].values() for t in tensors.values()),
        key=lambda t: t["offset"],
    )

    def far(reference: dict[str, Any]) -> None:
        for tensors in reference["groups"].values():
            for tensor in tensors.values():
                if tensor["offset"] == last["offset"]:
                    tensor["offset"] = 2**40
                    reference["nbytes"] = 2**40 + tensor["nbytes"]

    with pytest.raises(PhotonError, match=r"are no tensor's, beyond 16777216"):
        sides.silo.receive(changed(request, far), shapes)


def test_malformed_headers_are_refused(sides: Sides) -> None:
    request, _ = sides.request(groups())
    for header in (
        {"object": "{", STORED_BYTES: 3},
        {STORED_BYTES: 3},
        {"object": 7, STORED_BYTES: 3},
        {"object": request[HEADER]["object"], STORED_BYTES: 3},
    ):
        with pytest.raises(PhotonError, match=r"malformed|counts 3 bytes"):
            sides.silo.receive(RecordDict({HEADER: ConfigRecord(header)}))


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_last_byte, "exp_avg/a.weight in .* is not what was sent"),
        (lambda path: os.truncate(path, 100), "holds 100 bytes, its reference says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "its reference says"),
        (lambda path: path.unlink(), "cannot read"),
        (replace_by_link, "cannot read"),
        (replace_by_pipe, "holds 0 bytes"),
    ],
)
def test_a_damaged_object_is_refused_and_named(
    sides: Sides, folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    request, ticket = sides.request(groups())
    reply = sides.reply(groups(1), request)
    key = json.loads(reply[HEADER]["object"])["key"]
    damage(folder / key)
    with pytest.raises(PhotonError, match=message):
        sides.server.receive(reply, ticket)


@pytest.mark.parametrize("presigned", [False, True])
def test_a_damaged_object_of_s3_is_refused(tmp_path: Path, bucket: Any, presigned: bool) -> None:
    sides = Sides(tmp_path, "s3://photon/runs", presigned=presigned)
    request, _ = sides.request(groups())
    key = "runs/" + json.loads(request[HEADER]["object"])["key"]
    data = bucket.get_object(Bucket="photon", Key=key)["Body"].read()
    bucket.put_object(Bucket="photon", Key=key, Body=b"\xff" + data[1:])
    with pytest.raises(PhotonError, match=r"params/a.weight in .* is not what was sent"):
        sides.silo.receive(request)
    bucket.put_object(Bucket="photon", Key=key, Body=data[:-1])
    with pytest.raises(PhotonError, match=f"holds {len(data) - 1} bytes, its reference says {len(data)}"):
        sides.silo.receive(request)
    bucket.delete_object(Bucket="photon", Key=key)
    with pytest.raises(PhotonError, match=r"404|cannot read"):
        sides.silo.receive(request)


def test_a_folder_that_leads_out_of_the_store_is_refused(sides: Sides, folder: Path, tmp_path: Path) -> None:
    request, _ = sides.request(groups())
    reference = json.loads(request[HEADER]["object"])
    (folder / RUN).rename(tmp_path / "outside")
    (folder / RUN).symlink_to(tmp_path / "outside")
    assert (folder / reference["key"]).exists()
    with pytest.raises(PhotonError, match="leads out of the store"):
        sides.silo.receive(request)


def test_a_reply_counts_only_at_the_place_of_its_ticket(sides: Sides, tmp_path: Path) -> None:
    request, ticket = sides.request(groups())
    _, other_ticket = sides.request(groups())
    reply = sides.reply(groups(1), request)
    with pytest.raises(PhotonError, match="which it was not asked to write"):
        sides.server.receive(reply, other_ticket)
    with pytest.raises(PhotonError, match="which it was not asked to write"):
        sides.server.receive(changed(reply, lambda r: r.update(key="../outside")), ticket)
    with pytest.raises(PhotonError, match="which it was not asked to write"):
        sides.server.receive(reply, None)
    assert_equal(sides.server.receive(reply, ticket), groups(1))
    assert_equal(sides.server.receive(encode_groups(groups(1)), other_ticket), groups(1))


def test_a_reply_beyond_the_limit_is_refused_before_it_is_read(sides: Sides) -> None:
    request, ticket = sides.request({"params": {"w": torch.ones(1)}})
    assert ticket is not None
    reply = sides.reply({"params": {"w": torch.ones(2**19)}}, request)
    with pytest.raises(PhotonError, match=f"the server takes {ticket.limit}"):
        sides.server.receive(reply, ticket)


def test_a_silo_does_not_follow_every_url(tmp_path: Path) -> None:
    request = RecordDict({HEADER: ConfigRecord({"object": "", STORED_BYTES: 64})})
    reference = {"key": "run0/a", "nbytes": 4, "url": "http://internal.example.org/x", "groups": {}}
    reference["groups"] = {"params": {"w": {"dtype": "float32", "shape": [1], "offset": 0, "nbytes": 4}}}
    reference["groups"]["params"]["w"] |= {"blake3": "", "encoding": None}  # type: ignore[index]
    request[HEADER] = ConfigRecord({"object": json.dumps(reference), STORED_BYTES: 4})
    with pytest.raises(PhotonError, match="is not encrypted"):
        SiloLink(None, tmp_path).receive(request)
    with pytest.raises(PhotonError, match="store-url another place"):
        SiloLink("https://bucket.example.org", tmp_path).receive(request)


# --- what is left behind ------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_nothing(place: tuple[str, bool]) -> None:
    store = open_store(place[0])

    def fail() -> None:
        with store.writing("run0/round-000001/a") as write:
            write(memoryview(b"half"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    if isinstance(store, FolderStore):
        assert keys(Path(place[0])) == []
    with pytest.raises(PhotonError, match="cannot read"):
        store.reading("run0/round-000001/a", 4, Path(place[0]))


def test_finished_rounds_are_collected_with_late_replies_and_half_written_ones(
    place: tuple[str, bool], tmp_path: Path
) -> None:
    url, presigned = place
    sides = Sides(tmp_path, url, presigned=presigned)
    store = open_store(url)
    old, _ = sides.request(groups(), 1)
    sides.server.collect(RUN, 1)
    assert store.folders(RUN) == []
    # A straggler of round 1 answers during round 2, while round 3's model is already there.
    if presigned:
        # S3 answers 404 to the part of an upload that was given up, this server 500.
        with pytest.raises(PhotonError, match="cannot write the reply"):
            sides.reply(groups(), old)
    else:
        sides.reply(groups(), old)
    sides.request(groups(), 2)
    kept, _ = sides.request(groups(), 3)
    sides.server.collect(RUN, 2)
    assert store.folders(RUN) == ["round-000003"]
    assert_equal(sides.silo.receive(kept), groups())
    other = Sides(tmp_path, url, presigned=presigned)
    other.server.collect(RUN, None)
    assert store.folders(RUN) == []
    other.server.collect("a-run-that-left-nothing", None)


def test_uploads_that_nobody_finished_are_collected(tmp_path: Path, bucket: Any) -> None:
    sides = Sides(tmp_path, "s3://photon/runs", presigned=True)
    sides.request(groups(), 1)
    sides.request(groups(), 2)
    ObjectStore("s3://photon/runs").begin_upload("other-run/round-000001/up", 10, 60)

    def under_way() -> set[str]:
        uploads = bucket.list_multipart_uploads(Bucket="photon").get("Uploads", [])
        return {upload["Key"].rpartition("/")[0] for upload in uploads}

    assert under_way() == {"runs/run0/round-000001", "runs/run0/round-000002", "runs/other-run/round-000001"}
    sides.server.collect(RUN, 1)
    assert under_way() == {"runs/run0/round-000002", "runs/other-run/round-000001"}


def test_a_killed_download_leaves_no_file(tmp_path: Path) -> None:
    """The file has no name at any moment, so no crash can leave one behind."""
    seen = []

    def read(start: int, end: int) -> bytes:
        seen.append(list(tmp_path.iterdir()))
        return bytes(end - start)

    download(read, 10, tmp_path, "it").close()
    assert seen == [[]]


def test_small_objects_are_there_whole_or_not_at_all(place: tuple[str, bool], tmp_path: Path) -> None:
    url, _ = place
    store = open_store(url)
    assert store.small("one/thing", 8) is None
    store.discard("one/thing")
    for content in (b"12345678", b"other"):
        with store.writing("one/thing") as write:
            write(memoryview(content))
        assert store.small("one/thing", 8) == content
    with pytest.raises(PhotonError, match="4 bytes"):
        store.small("one/thing", 4)
    store.discard("one/thing")
    assert store.small("one/thing", 8) is None
    if isinstance(store, FolderStore):
        folder = Path(url) / "one"
        (folder / "link").symlink_to(tmp_path)
        (folder / "folder").mkdir()
        os.mkfifo(folder / "pipe")
        for name in ("link", "folder", "pipe"):
            with pytest.raises(PhotonError):
                store.small(f"one/{name}", 8)
