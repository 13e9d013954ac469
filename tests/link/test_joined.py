"""All arrays of a message in one, and back; what does not add up is refused."""

import json
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from photon.errors import PhotonError
from photon.link import BODY
from photon.link.codecs import Cast
from photon.link.encoding import Pipelines
from photon.link.joined import JOINED, PARTS, Joiner, crosses_superlink, part
from photon.link.records import count_bytes, decode_groups, encode_groups


def message() -> RecordDict:
    generator = torch.Generator().manual_seed(0)
    groups = {
        "params": {
            "a.weight": torch.randn(3, 4, generator=generator),
            "b": torch.randn(5, generator=generator).to(torch.bfloat16),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
        },
        "exp_avg": {"a.weight": torch.randn(3, 4, generator=generator)},
        "shared/none": {},
    }
    content = encode_groups(groups, Pipelines([Cast("float16")]))
    content[BODY] = ConfigRecord({"engine": "deployment", "body": "{}"})
    return content


def test_one_array_crosses_and_all_come_out_again() -> None:
    sent = message()
    joined = Joiner().join(sent)
    assert sum(len(record) for record in joined.values() if isinstance(record, ArrayRecord)) == 1
    (array,) = joined[JOINED].values()
    assert len(array.data) == sum(len(a.data) for r in sent.array_records.values() for a in r.values())
    received = part(joined)
    assert set(received) == set(sent)
    for name, record in sent.array_records.items():
        assert list(received[name]) == list(record)
        for key, one in record.items():
            other = received[name][key]
            assert (other.dtype, tuple(other.shape), other.stype) == (one.dtype, tuple(one.shape), one.stype)
            assert other.data == one.data
    assert count_bytes(received) == count_bytes(sent)
    for group, tensors in decode_groups(sent).items():
        assert all(torch.equal(decode_groups(received)[group][name], one) for name, one in tensors.items())


def test_what_has_no_arrays_stays_as_it_is() -> None:
    content = RecordDict({BODY: ConfigRecord({"engine": "deployment"})})
    assert Joiner().join(content) is content
    assert part(content) is content
    assert crosses_superlink(content)
    assert not crosses_superlink(RecordDict({BODY: ConfigRecord({"engine": "simulation"})}))
    assert not crosses_superlink(RecordDict({BODY: ArrayRecord({})}))


def test_those_who_are_sent_the_same_share_it() -> None:
    sent = message()
    joiner = Joiner()
    one, two = (joiner.join(RecordDict({**sent, BODY: ConfigRecord({"body": name})})) for name in "ab")
    assert one[JOINED] is two[JOINED]
    assert one[BODY]["body"] != two[BODY]["body"]
    other = RecordDict({**sent, "exp_avg": ArrayRecord(dict(sent["exp_avg"]))})
    assert joiner.join(other)[JOINED] is not one[JOINED]


ENTRY = ["w", "float32", [1], "photon.raw", 4]


@pytest.mark.parametrize(
    "listed",
    [
        "[",
        "[" * 10**5,
        3,
        [],
        {"params": 3},
        {"params": [3]},
        {"params": [ENTRY[:4]]},
        {"params": [[*ENTRY[:4], 3]]},
        {"params": [[*ENTRY[:4], 2**70]]},
        {"params": [[*ENTRY[:4], True]]},
        {"params": [[*ENTRY[:4], 4.0]]},
        {"params": [[*ENTRY[:4], -4], [*ENTRY[:4], 8]]},
        {"params": [["w", "float32", [-1], "photon.raw", 4]]},
        {"params": [["w", "float32", "1", "photon.raw", 4]]},
        {"params": [["w", 3, [1], "photon.raw", 4]]},
        {"params": [ENTRY, [*ENTRY[:4], 0]]},
        {"params": [ENTRY], BODY: []},
        {"params": []},
    ],
    ids=lambda listed: str(listed)[:40],
)
def test_a_list_that_does_not_add_up_is_refused(listed: Any) -> None:
    text = listed if isinstance(listed, str) else json.dumps(listed)
    content = RecordDict(
        {
            BODY: ConfigRecord({"body": "{}"}),
            JOINED: ArrayRecord({"bytes": Array("uint8", (4,), "photon.joined", b"1234")}),
            PARTS: ConfigRecord({"parts": text}),
        }
    )
    with pytest.raises(PhotonError, match="cannot be told apart"):
        part(content)


@pytest.mark.parametrize(
    "records",
    [
        {JOINED: ConfigRecord({})},
        {PARTS: ArrayRecord({})},
        {PARTS: ConfigRecord({"parts": 3})},
        {PARTS: ConfigRecord({})},
        {JOINED: ArrayRecord({"other": Array("uint8", (1,), "photon.joined", b"1")})},
    ],
)
def test_records_of_other_kinds_are_refused(records: dict[str, Any]) -> None:
    with pytest.raises(PhotonError, match="cannot be told apart"):
        part(RecordDict({**Joiner().join(message()), **records}))
    joined = Joiner().join(message())
    del joined[PARTS]
    with pytest.raises(PhotonError, match="cannot be told apart"):
        part(joined)
