"""The pipeline of codecs: what happens to a tensor before it travels, and what undoes it.

A codec turns a floating-point tensor into *values*, which the next codec of the list works on, and *side
information* (scales, indices, a mask), which goes along as it is. A codec of bytes (lossless compression)
takes all that has been made so far. So a payload is::

    side of the first codec | side of the second | ... | values of the last

The receiver knows the shapes it expects. From a shape and the codecs' arguments every length in a payload
follows, so all of it is checked before anything of that size is allocated. No codec comes twice, and one of
bytes comes last: so no payload stands for more than a small multiple of its tensor, and decoding takes no
more than three and a half times the tensor in float32.
"""

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field

from photon.components import nearest
from photon.config.expression import Expression
from photon.errors import PhotonError
from photon.files.hashing import hash_of
from photon.link.messages import Body

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}

#: Name on the wire to codec; `photon.link.codecs` fills it in.
CODECS: dict[str, type["Codec"]] = {}

#: No tensor has more elements; what a header multiplies stays far from overflow.
MAX_ELEMENTS = 2**48
#: Nor has it more dimensions, or more codecs applied to it.
MAX_DIMENSIONS, MAX_CODECS = 16, 16


def is_possible(shape: Sequence[int]) -> bool:
    """Return whether a shape is one of a tensor, however little memory its elements would take."""
    return all(size >= 0 for size in shape) and math.prod(max(1, size) for size in shape) <= MAX_ELEMENTS


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that records use for ``dtype``."""
    return str(dtype).removeprefix("torch.")


class CodecEntry(Body):
    """A codec that was applied: its name, version and arguments, so that decoding needs no configuration.

    ``length`` is the one length that may depend on the values, such as how many are not zero.
    """

    codec: str
    version: int
    arguments: dict[str, Any]
    length: int | None = Field(default=None, ge=0)


class Encoding(Body):
    """How a payload of bytes becomes a tensor again.

    Attributes
    ----------
    shape, dtype
        Of the tensor.
    codecs
        In the order in which they were applied.
    blake3
        Hash of the payload.
    """

    shape: list[int] = Field(max_length=MAX_DIMENSIONS)
    dtype: str
    codecs: list[CodecEntry] = Field(min_length=1, max_length=MAX_CODECS)
    blake3: str


@dataclass(frozen=True)
class Packed:
    """A tensor as it travels: itself, or a payload of bytes (uint8, one dimension) and its encoding."""

    data: torch.Tensor
    encoding: Encoding | None = None


#: Places of a sparse tensor that are used at a time.
_SLICE = 2**17


@dataclass(frozen=True)
class SparseTensor:
    """A tensor that is zero but for some entries.

    Parameters
    ----------
    shape
        Of the tensor.
    indices
        Places in the flattened tensor, int64 or int32 of shape (n,), each at most once.
    values
        What is there, of shape (n,).
    """

    shape: torch.Size
    indices: torch.Tensor
    values: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.values.dtype

    def dense(self) -> torch.Tensor:
        """Return it as an ordinary tensor."""
        out = torch.zeros(math.prod(self.shape), dtype=self.values.dtype)
        # torch indexes with int64: of each slice alone there is a copy.
        for places, values in zip(self.indices.split(_SLICE), self.values.split(_SLICE), strict=True):
            out[places] = values
        return out.view(self.shape)


PackedGroups = Mapping[str, Mapping[str, Packed]]


class Layout(NamedTuple):
    """What a codec makes of a tensor of a known shape: shape and type of its values, bytes beside them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    side: int = 0


class Encoded(NamedTuple):
    """What a codec made of a tensor.

    Attributes
    ----------
    values
        For the next codec.
    side
        Bytes that go along, of shape (n,), or None.
    count
        As in :class:`CodecEntry`.
    feedback
        What the codec wants to see again when it encodes this tensor in the next round.
    """

    values: torch.Tensor
    side: torch.Tensor | None = None
    length: int | None = None
    feedback: torch.Tensor | None = None


class Codec(ABC):
    """One step of the link: a frozen dataclass whose fields are its arguments, as JSON values.

    A tensor that is not floating point, or to which the codec does not apply, passes as it is.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    #: Whether it takes bytes, not values, and everything that was made before.
    on_bytes: ClassVar[bool] = False
    #: Whether its values are floating point, so that another codec of values may follow.
    gives_values: ClassVar[bool] = False

    def applies(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape is worth encoding."""
        return True

    @property
    def contracts(self) -> bool:
        """Whether what is lost is smaller than what is sent, as error feedback needs it."""
        return True

    @abstractmethod
    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Encode ``values``.

        Parameters
        ----------
        draw
            Source of all randomness, seeded from run, round, participant and name of the tensor.
        feedback
            What this codec returned for this tensor in the round before; None at first.
        """

    @abstractmethod
    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return what :meth:`encode` makes of a tensor of this shape.

        Raises
        ------
        ValueError
            If ``length`` cannot be.
        """

    @abstractmethod
    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor | SparseTensor:
        """Undo :meth:`encode`; ``values`` and ``side`` agree with the layout.

        Raises
        ------
        ValueError
            If what they say cannot be.
        """


#: What the names of groups begin with that travel as they are.
EXACT = "fixed/"


@dataclass(frozen=True)
class Pipelines:
    """The codecs of one direction.

    Attributes
    ----------
    params
        For the parameters, or their update.
    states
        For the values of all other state groups.
    named
        For parameters in whose names an expression is found, in place of ``params``; the first counts.
    """

    params: Sequence[Codec] = ()
    states: Sequence[Codec] = ()
    named: Sequence[tuple[Expression, Sequence[Codec]]] = ()

    def of(self, group: str, name: str) -> Sequence[Codec]:
        """Return the codecs of a tensor of a state group."""
        if group.startswith(EXACT):
            return ()
        if group != "params":
            return self.states
        return next((codecs for names, codecs in self.named if names.search(name)), self.params)


def generator(text: str) -> np.random.Generator:
    """Return a source of randomness that depends on ``text`` alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.SFC64(seed))


def check_pipeline(codecs: Sequence[Codec], where: str) -> None:
    """Check that every codec can take what the one before it gives, and that none comes twice.

    Raises
    ------
    PhotonError
        For the first that cannot.
    """
    names = [codec.name for codec in codecs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PhotonError(f"{where}: {twice[0]} comes more than once; once does what can be done")
    for before, after in itertools.pairwise(codecs):
        if not after.on_bytes and not before.gives_values:
            raise PhotonError(
                f"{where}: {after.name} works on values, and {before.name} leaves none; put it before"
            )


def pack(
    tensor: torch.Tensor,
    codecs: Sequence[Codec],
    draw: np.random.Generator | None = None,
    feedback: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Packed, dict[str, torch.Tensor]]:
    """Apply ``codecs`` in order.

    Returns
    -------
    tuple
        What travels, and what the codecs want to see again, by codec.
    """
    if not codecs:
        return Packed(tensor), {}
    draw, feedback = draw or generator(""), feedback or {}
    entries: list[CodecEntry] = []
    kept: dict[str, torch.Tensor] = {}
    values = tensor
    sides: list[torch.Tensor] = []
    for codec in codecs if tensor.is_floating_point() and tensor.numel() else ():
        if not codec.on_bytes and not codec.applies(values.shape):
            continue
        if codec.on_bytes:
            values, sides = _join(sides, values), []
        encoded = codec.encode(values, draw, feedback.get(codec.name))
        values = encoded.values
        if encoded.side is not None:
            sides.append(encoded.side)
        if encoded.feedback is not None:
            kept[codec.name] = encoded.feedback
        entries.append(
            CodecEntry(
                codec=codec.name,
                version=codec.version,
                arguments=asdict(codec),  # type: ignore[call-overload]
                length=encoded.length,
            )
        )
    if not entries:
        return Packed(tensor), {}
    data = _join(sides, values)
    encoding = Encoding(
        shape=list(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        codecs=entries,
        blake3=hash_of(data.numpy().data),
    )
    return Packed(data, encoding), kept


def pack_groups(groups: Mapping[str, Mapping[str, torch.Tensor]], pipelines: Pipelines) -> PackedGroups:
    """Apply to every tensor its codecs."""
    return {
        group: {name: pack(tensor, pipelines.of(group, name))[0] for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }


def payloads_of(groups: PackedGroups) -> dict[str, dict[str, torch.Tensor]]:
    """Return what travels of every tensor, without the encodings."""
    return {
        group: {name: packed.data for name, packed in tensors.items()} for group, tensors in groups.items()
    }


def unpack(packed: Packed, where: str, expected: Sequence[int] | None = None) -> torch.Tensor | SparseTensor:
    """Undo the codecs of a payload, last first.

    Parameters
    ----------
    where
        Name of the tensor, for error messages.
    expected
        The shape that the tensor must have; None if the sender is trusted.

    Raises
    ------
    PhotonError
        If a codec is unknown, or shape, lengths, hash or content do not add up, or it does not fit in memory.
    """
    check_claim(packed.data.shape, packed.data.dtype, packed.encoding, where, expected)
    if packed.encoding is None:
        return packed.data
    try:
        return _unpack(packed.data, packed.encoding)
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        # Arguments and content come from elsewhere: what a codec refuses is the sender's fault.
        why = str(error) or "there is not enough memory for it"
        raise PhotonError(f"link: {where} cannot be decoded ({why})") from error


def check_claim(
    shape: Sequence[int],
    dtype: torch.dtype,
    encoding: Encoding | None,
    where: str,
    expected: Sequence[int] | None,
) -> None:
    """Check what is said of a tensor that travels, before there is any of it.

    Parameters
    ----------
    shape, dtype
        Of what travels: the tensor itself, or a payload.
    encoding, where, expected
        As in `unpack`.

    Raises
    ------
    PhotonError
        If the tensor would not have the expected shape, or the payload not the length that this needs.
    """
    claimed = shape if encoding is None else encoding.shape
    if expected is not None and list(claimed) != list(expected):
        raise PhotonError(f"link: {where} has shape {tuple(claimed)}, expected {tuple(expected)}")
    if encoding is None:
        return
    try:
        needed = _needed(_steps(encoding))
        if dtype != torch.uint8 or len(shape) != 1:
            raise ValueError("the payload is not made of bytes")
        if shape[0] != needed:
            raise ValueError(f"it has {shape[0]} bytes, its codecs and its shape need {needed}")
    except (TypeError, ValueError, OverflowError) as error:
        raise PhotonError(f"link: {where} cannot be decoded ({error})") from error


def encoded_bytes(codecs: Sequence[Codec], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Return the exact length of the payload of a tensor, headers not included.

    Raises
    ------
    ValueError
        If it depends on the values.
    """
    layout, total = Layout(tuple(shape), dtype), 0
    for codec in codecs:
        if codec.applies(layout.shape):
            layout = codec.layout(layout.shape, layout.dtype, None)
            total += layout.side
    return total + _nbytes(layout)


class _Step(NamedTuple):
    codec: Codec
    before: Layout
    after: Layout


def _unpack(data: torch.Tensor, encoding: Encoding) -> torch.Tensor | SparseTensor:
    steps = _steps(encoding)
    if hash_of(data.numpy().data) != encoding.blake3:
        raise ValueError("its BLAKE3 hash is not the one that was sent; it was damaged on its way")
    if steps[-1].codec.on_bytes:
        step = steps.pop()
        undone = step.codec.decode(data, data[:0], step.before.shape, torch.uint8)
        assert isinstance(undone, torch.Tensor)
        data = undone
        del undone
    sides = sum(step.after.side for step in steps)
    pieces = list(data.split([*(step.after.side for step in steps), data.numel() - sides]))
    final = steps[-1].after if steps else Layout(tuple(encoding.shape), DTYPES[encoding.dtype])
    last = _view(pieces.pop(), final)
    if last.data_ptr() != data.data_ptr() + sides:
        # They were copied; what was decompressed is not kept for the rest of it.
        pieces = [piece.clone() for piece in pieces]
    del data
    values: torch.Tensor | SparseTensor = last
    del last
    for step in reversed(steps):
        if isinstance(values, SparseTensor):
            values = values.dense()
        values = step.codec.decode(values, pieces.pop(), step.before.shape, step.before.dtype)
    return values


def _needed(steps: Sequence[_Step]) -> int:
    """Return the length of what codecs leave."""
    last = steps[-1]
    sides = 0 if last.codec.on_bytes else sum(step.after.side for step in steps)
    return _nbytes(last.after) + sides


def _steps(encoding: Encoding) -> list[_Step]:
    """Follow the shapes through the codecs, and check them, without touching the payload."""
    dtype = DTYPES.get(encoding.dtype)
    if dtype is None or not dtype.is_floating_point:
        raise ValueError(f"its type {encoding.dtype!r} is none that is encoded")
    if 0 in encoding.shape or not is_possible(encoding.shape):
        raise ValueError(f"its shape {encoding.shape} is impossible")
    layout = Layout(tuple(encoding.shape), dtype)
    pending = 0
    steps: list[_Step] = []
    for entry in encoding.codecs:
        codec = _codec(entry)
        if any(step.codec.name == codec.name for step in steps):
            raise ValueError(f"{codec.name} comes twice")
        if codec.on_bytes:
            layout, pending = Layout((_nbytes(layout) + pending,), torch.uint8), 0
        elif not layout.dtype.is_floating_point:
            raise ValueError(f"{codec.name} comes where there are no values left")
        after = codec.layout(layout.shape, layout.dtype, entry.length)
        steps.append(_Step(codec, layout, after))
        layout, pending = after, pending + after.side
    return steps


#: What a header may have for an argument of a type; 1 is no truth value, and 1.0 no whole number.
_JSON_TYPES: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}


def _codec(entry: CodecEntry) -> Codec:
    kind = CODECS.get(entry.codec)
    if kind is None:
        raise ValueError(f"unknown codec {entry.codec!r}{nearest(entry.codec, CODECS)}; update photon")
    if entry.version != kind.version:
        raise ValueError(
            f"codec {entry.codec} of version {entry.version}, this photon has {kind.version}; update photon"
        )
    for one in fields(kind):  # type: ignore[arg-type]
        types = _JSON_TYPES.get(one.type)
        if types and one.name in entry.arguments and type(entry.arguments[one.name]) not in types:
            raise ValueError(f"{entry.codec}: {one.name} is of another type")
    return kind(**entry.arguments)


def _join(sides: Iterable[torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    parts = [*sides, as_bytes(values)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor, row-major, as uint8 of shape (n,)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _view(data: torch.Tensor, layout: Layout) -> torch.Tensor:
    # Side information of odd length comes before the values; a view of another type must be aligned.
    if data.storage_offset() % layout.dtype.itemsize or data.data_ptr() % layout.dtype.itemsize:
        data = data.clone()
    return data.view(layout.dtype).reshape(layout.shape)


def _nbytes(layout: Layout) -> int:
    return math.prod(layout.shape) * layout.dtype.itemsize
