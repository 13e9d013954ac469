"""A server and a silo with a store between them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict

from photon.config.schema import CodecSection, LinkSection, StoreSection
from photon.link.encoding import pack_groups
from photon.link.pipelines import uplink_pipelines
from photon.link.records import HEADER, STORED_BYTES
from photon.link.transport import ServerLink, SiloLink, Ticket

RUN = "run0"
Groups = dict[str, dict[str, torch.Tensor]]


def groups(seed: int = 0) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    return {
        "params": {
            "a.weight": torch.randn(3, 5, generator=generator),
            "b": torch.randn(7, generator=generator).to(torch.bfloat16),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
        },
        "exp_avg": {"a.weight": torch.randn(5, 3, generator=generator).T},
    }


def nbytes(sent: Groups) -> int:
    return sum(tensor.nbytes for tensors in sent.values() for tensor in tensors.values())


def assert_equal(received: Any, sent: Groups) -> None:
    assert {g: list(t) for g, t in received.items()} == {g: list(t) for g, t in sent.items()}
    for group, tensors in sent.items():
        for name, tensor in tensors.items():
            assert received[group][name].dtype == tensor.dtype
            assert torch.equal(received[group][name], tensor), f"{group}/{name}"


def section(url: str | None, *, presigned: bool = False, transport: str = "store", cast: bool = False) -> Any:
    codecs = [CodecSection.model_validate({"_target_": "photon.link.codecs.Cast", "dtype": "bfloat16"})]
    return LinkSection(
        uplink=codecs if cast else [],
        uplink_by_name=[],
        uplink_payload="parameters",
        error_feedback=False,
        downlink=codecs if cast else [],
        downlink_payload="parameters",
        states=codecs if cast else [],
        transport=transport,  # type: ignore[arg-type]
        inline_limit_mb=1.0,
        store=StoreSection(url=url, presigned=presigned),
    )


class Sides:
    """Server and silo with their own spool folders, and a message between them."""

    def __init__(self, tmp_path: Path, url: str, *, presigned: bool = False, cast: bool = False) -> None:
        link = section(url, presigned=presigned, cast=cast)
        self.server = ServerLink(link, tmp_path / "server", 600)
        self.silo = SiloLink(None if presigned else url, tmp_path / "silo")
        self._up = uplink_pipelines(link)

    def request(self, sent: Groups, server_round: int = 1) -> tuple[RecordDict, Ticket | None]:
        records = RecordDict(dict(self.server.send(sent, RUN, server_round)))
        return records, self.server.admit(records, nbytes(sent), RUN, server_round)

    def reply(self, groups: Groups, request: RecordDict, kept: Path | None = None) -> RecordDict:
        return self.silo.send(pack_groups(groups, self._up), request, kept)


def keys(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def changed(records: RecordDict, change: Callable[[dict[str, Any]], Any]) -> RecordDict:
    """Return ``records`` with a changed reference."""
    reference = json.loads(records[HEADER]["object"])
    change(reference)
    header = ConfigRecord({"object": json.dumps(reference), STORED_BYTES: reference["nbytes"]})
    return RecordDict({**records, HEADER: header})


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
