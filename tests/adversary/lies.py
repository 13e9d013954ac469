"""Lies as data: who lies × in which message × about what, and what the server is to say of it.

A lie changes a reply on its way to the server. `because` is found in the reason for which it is rejected.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from photon.link.messages import BODY
from photon.link.records import HEADER, RAW, STORED_BYTES

#: What a lie may change: the body as read from JSON, the records, and the message that they are in.
Change = Callable[[dict[str, Any], RecordDict, Message], Message | None]


@dataclass(frozen=True)
class Lie:
    """A lie of silo alpha.

    Attributes
    ----------
    name
        What it is about.
    because
        Expression that is found in the reason of the rejection.
    change
        Changes the reply, or returns another one.
    """

    name: str
    because: str
    change: Change


def read_body(records: RecordDict) -> dict[str, Any]:
    """Return the body of a message, as JSON has it."""
    body: dict[str, Any] = json.loads(str(records.config_records[BODY]["body"]))
    return body


def write_body(records: RecordDict, written: str) -> None:
    """Put a text in the place of the body."""
    records[BODY] = ConfigRecord({"body": written})


def says(because: str, **fields: Any) -> Lie:
    """Return the lie that a body holds other fields."""

    def change(body: dict[str, Any], _: RecordDict, __: Message) -> None:
        body.update(fields)

    shown = ", ".join(f"{key}={str(value)[:60]}" for key, value in fields.items())
    return Lie(shown, because, change)


def text(name: str, because: str, written: str | Callable[[str], str]) -> Lie:
    """Return the lie that is another text in the place of the body."""

    def change(body: dict[str, Any], records: RecordDict, _: Message) -> None:
        told = json.dumps(body)
        write_body(records, written if isinstance(written, str) else written(told))
        body.clear()

    return Lie(name, because, change)


def tensors(name: str, because: str, make: Callable[[str, Array], Array]) -> Lie:
    """Return the lie that each tensor of the parameters is another one."""

    def change(_: dict[str, Any], records: RecordDict, __: Message) -> None:
        records["params"] = ArrayRecord(
            {key: make(key, array) for key, array in records.array_records["params"].items()}
        )

    return Lie(name, because, change)


def filled(value: float, dtype: torch.dtype = torch.float32) -> Callable[[str, Array], Array]:
    """Return what makes every tensor one of equal values."""

    def make(_: str, array: Array) -> Array:
        tensor = torch.full(tuple(array.shape), value, dtype=dtype)
        raw = tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()
        return Array(str(dtype).removeprefix("torch."), tuple(array.shape), RAW, raw)

    return make


def scaled(factor: float) -> Callable[[str, Array], Array]:
    """Return what multiplies every trained tensor."""

    def make(_: str, array: Array) -> Array:
        tensor = torch.frombuffer(bytearray(array.data), dtype=torch.float32) * factor
        return Array(array.dtype, tuple(array.shape), RAW, tensor.numpy().tobytes())

    return make


def _records(name: str, because: str, do: Callable[[RecordDict], None]) -> Lie:
    def change(_: dict[str, Any], records: RecordDict, __: Message) -> None:
        do(records)

    return Lie(name, because, change)


def _without(key: str) -> Callable[[RecordDict], None]:
    def do(records: RecordDict) -> None:
        del records[key]

    return do


def _renamed(records: RecordDict) -> None:
    records["parameters"] = records.pop("params")


def _one_less(records: RecordDict) -> None:
    records["params"] = ArrayRecord(dict(list(records.array_records["params"].items())[1:]))


def _one_more(records: RecordDict) -> None:
    name, array = next(iter(records.array_records["params"].items()))
    records["params"] = ArrayRecord({**dict(records.array_records["params"].items()), f"{name}.more": array})


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[RecordDict], None]:
    def do(records: RecordDict) -> None:
        header = json.loads(str(records.config_records[HEADER]["header"]))
        change(header)
        records[HEADER] = ConfigRecord({"header": json.dumps(header)})

    return do


def _encoding(**fields: Any) -> Callable[[RecordDict], None]:
    """Return what gives the first tensor an encoding that it does not have."""

    def do(records: RecordDict) -> None:
        name, array = next(iter(records.array_records["params"].items()))
        encoding = {"shape": list(array.shape), "dtype": "float32", "blake3": "0" * 64, "codecs": []} | fields
        _header(lambda header: header["groups"].setdefault("params", {}).update({name: encoding}))(records)

    return do


def _stored(records: RecordDict) -> None:
    header = records.config_records[HEADER]
    records[HEADER] = ConfigRecord({**dict(header.items()), STORED_BYTES: 2**60})


def _reply(make: Callable[[Message], Message]) -> Change:
    return lambda _, __, message: make(message)


ZSTD = {"codec": "zstd", "version": 1, "arguments": {"level": 3, "width": 1}, "length": 10**15}
LONG = "x" * 1_000_000
HUGE = 10**400
ESCAPES = "\x1b]0;pwned\x07\x1b[2J\u202e<img src=x onerror=alert(1)>"

#: Silo alpha lies in its reply to a train request.
TRAIN = [
    *(
        says("update_norm|finite", update_norm=value)
        for value in (math.nan, math.inf, -math.inf, -1.0, 1e300, 1e13)
    ),
    *(says("loss", loss=value) for value in (math.nan, math.inf, 1e308, "low", HUGE)),
    says("loss that is a number", loss=None),
    says("loss_last", loss_last=-math.inf),
    says("gradient_norm", gradient_norm=-5.0),
    says("learning_rate", learning_rate=math.nan),
    *(says("steps", steps=value) for value in (0, 5, -1, HUGE, 2**62, 1.5)),
    *(says("tokens", tokens=value) for value in (0, 10**12, HUGE, -3)),
    *(says("position|window", position=value) for value in (0, 10**9, HUGE, -1)),
    *(says("leaves|asked for", leaves=value) for value in (2, 10**6, 10**300, 0)),
    says("answers round", round=1000),
    says("round", round=10**300),
    says("answers round", silo="beta"),
    *(says("silo", silo=value) for value in ("../x", "a b", "", LONG, "\u202e")),
    says("scalars", scalars={"zz": math.nan}),
    says("scalars", scalars={"zz": HUGE}),
    says("scalars", scalars={"\x1b[2J": 1.0}),
    says("scalars", scalars={str(each): 1.0 for each in range(5000)}),
    says("diagnostics", diagnostics={LONG: 1.0}),
    says("diagnostics", diagnostics={"</script><script>alert(2)</script>": 1.0}),
    says("diagnostics", diagnostics={"x": math.inf}),
    says("seconds", seconds={"total": -1.0, "training": 1.0, "load": 0.0, "save": 0.0}),
    says("seconds", seconds={"total": 1.0, "training": 0.0, "load": 0.0, "save": 0.0}),
    says("seconds", seconds={"total": 1e300, "training": 1.0, "load": 0.0, "save": 0.0}),
    says("seconds", seconds={}),
    says("privacy", privacy={"clip_norm": math.nan, "noise_multiplier": 0.0, "releases": 1}),
    *(
        says("privacy", privacy={"clip_norm": 1.0, "noise_multiplier": 0.0, "releases": each})
        for each in (0, HUGE)
    ),
    says("privacy", privacy={"clip_norm": 0.0, "noise_multiplier": 0.0, "releases": 1}),
    says("vocabulary", vocabulary="AAAA"),
    says("routed", routed=[{"slot": 10**9, "block": "h.0", "origin": "x", "round": 1}]),
    says("surprise", surprise=1),
    text("no JSON", "JSON", "{"),
    text("a list", "object", "[]"),
    text("deep", "JSON|recursion", "[" * 100_000),
    text("1e999", "scalars", lambda told: told.replace('"scalars": {', '"scalars": {"z": 1e999, ')),
    _records("no body", "no photon body", _without(BODY)),
    _records("no header", "no header", _without(HEADER)),
    _records("no tensors", "lacks the group", _without("params")),
    _records("another group", "lacks the group", _renamed),
    _records("a tensor less", "missing or unknown", _one_less),
    _records("a tensor more", "not expected", _one_more),
    _records("a group in the header", "lacks the group", _header(lambda h: h["groups"].update(more={}))),
    _records("format", "format", _header(lambda h: h.update(format=10**30))),
    _records("a store of 2^60 bytes", "reference", _stored),
    _records("no codecs", "codecs", _encoding()),
    _records(
        "an unknown codec", "decoded", _encoding(codecs=[{"codec": "x", "version": 1, "arguments": {}}])
    ),
    _records("an enormous length", "decoded|bytes", _encoding(codecs=[ZSTD, ZSTD])),
    _records("an impossible shape", "shape", _encoding(shape=[2**40, 2**40], codecs=[ZSTD])),
    tensors("1e30", "enormous|usual", filled(1e30)),
    tensors("1e10", "enormous|usual", filled(1e10)),
    tensors("3e38", "enormous", filled(3e38)),
    tensors("NaN", "not finite", filled(math.nan)),
    tensors("infinity", "not finite", filled(-math.inf)),
    tensors("float64 1e300", "enormous", filled(1e300, torch.float64)),
    tensors("integers", "floating point", filled(1, torch.int32)),
    tensors("bytes", "floating point", filled(1, torch.uint8)),
    tensors("times 1000", "times as large", scaled(1000.0)),
    tensors("times -1000", "times as large", scaled(-1000.0)),
    tensors("flat", "shape", lambda _, a: Array(a.dtype, (math.prod(a.shape),), RAW, a.data)),
    tensors("too few bytes", "bytes", lambda _, a: Array(a.dtype, tuple(a.shape), RAW, a.data[:-4])),
    tensors("a pickle", "encoding", lambda _, a: Array(a.dtype, tuple(a.shape), "pickle", a.data)),
    tensors("a strange type", "encoding", lambda _, a: Array("object", tuple(a.shape), RAW, a.data)),
    says("none of its own", before_merge={"beta": {"loss": 1.0, "tokens": 10}}),
    says("it has described", before_merge={"alpha": {"loss": 1.0, "tokens": 2**40}}),
    says("before_merge.alpha.loss", before_merge={"alpha": {"loss": 1e9, "tokens": 10}}),
    says("before_merge.alpha.loss", before_merge={"alpha": {"loss": None, "tokens": 10}}),
    says("before_merge.alpha.tokens", before_merge={"alpha": {"loss": 1.0, "tokens": 0}}),
    Lie("an error of 5 MB", "pwned", _reply(lambda m: Message(Error(2, ESCAPES + 5 * LONG), reply_to=m))),
    Lie("nothing", "no photon body", _reply(lambda m: Message(RecordDict(), reply_to=m))),
    Lie(
        "a refusal",
        "pwned",
        _reply(lambda m: Message(RecordDict({BODY: ConfigRecord({"refused": ESCAPES + LONG})}), reply_to=m)),
    ),
]

#: Silo alpha lies in its evaluation.
EVALUATE = [
    *(says("loss", loss=value) for value in (math.nan, math.inf, 1e308, 800.0, -5.0, None, "low")),
    *(says("tokens", tokens=value) for value in (0, -1, 10**15, HUGE, 10**6, 1.5)),
    says("evaluation is not one of", round=99),
    says("evaluation is not one of", silo="beta"),
    says("silo", silo="<b>"),
    says("none of its own", per_node={"beta": {"loss": 0.0, "tokens": 1}}),
    says("per_node", per_node={"a" * 2000: {"loss": 0.0, "tokens": 1}}),
    says("per_node", per_node={"alpha": {"loss": math.nan, "tokens": 1}}),
    says("tokens", per_node={"alpha": {"loss": 1.0, "tokens": 10**9}}),
    says("per_node", per_node={f"n{each}": {"loss": 0.0, "tokens": 1} for each in range(3000)}),
    says("surprise", surprise=1),
    text("no JSON", "JSON", "NaN,"),
    Lie("an error", "pwned", _reply(lambda m: Message(Error(2, ESCAPES), reply_to=m))),
]

#: Silo alpha lies in what it says of itself before it may take part: fields of its description.
DESCRIBE: list[tuple[str, dict[str, Any]]] = [
    *(("name", {"name": each}) for each in ("a/b", "../x", "", "a b", "x" * 5000, "<b>", "\u202e", "a\n")),
    *(("train_tokens", {"train_tokens": each}) for each in (HUGE, -1, math.nan, "many")),
    *(("validation_tokens", {"validation_tokens": each}) for each in (HUGE, -1)),
    *(("unigram_loss", {"unigram_loss": each}) for each in (math.nan, math.inf, -1.0, 1e9)),
    *(("roofline_flops", {"roofline_flops": each}) for each in (math.nan, -1.0, 0.0, 1e300)),
    *(("device", {"device": each}) for each in ("\x1b[31mX", "x" * 10_000, "a\nb", 7)),
    *(("vocab_size", {"vocab_size": each}) for each in (10**9, 0, 299)),
    *(("sequence_length", {"sequence_length": each}) for each in (10**9, 1, 15)),
    *(("tokenizer_sha256", {"tokenizer_sha256": each}) for each in ("x", "0" * 64)),
    *(("leaves", {"federation": True, "leaves": each}) for each in (0, 10**6)),
    *(("pace", {"federation": True, "pace": each}) for each in (0, 10**6)),
    ("surprise", {"surprise": 1}),
]
