"""Payloads that a liar sends: a clean error or a tensor of the expected shape, in little memory and time.

What is changed keeps to what is checked first, the length that the codecs need and the hash of what is there,
so that most payloads get to the codec that they are meant for.
"""

import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
import zstandard
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon.errors import PhotonError
from photon.link import encoding as link
from photon.link.codecs import (
    CODECS,
    E3M0,
    Bitmask,
    Cast,
    Float8,
    Int,
    PowerSGD,
    RandomK,
    Sign,
    TopK,
    TopKTiles,
    TwoBit,
    Zstd,
)
from photon.link.encoding import Codec, CodecEntry, Encoding, Packed, SparseTensor, generator, pack, unpack

#: Payloads of the long test, and processes that share them.
LONG, PROCESSES = 1_000_000, 2
#: Bytes that decoding may take for each element of a tensor, 3 times float32, and besides.
EACH, BESIDES = 12, 8 * 2**20
SHAPES = [(1,), (7,), (33, 5), (60, 50), (4100,), (3, 5, 7)]
PIPELINES: list[list[Codec]] = [
    [Cast("bfloat16")],
    [Float8("float8_e4m3fn"), Zstd()],
    [Int(8), Zstd(width=4)],
    [Int(4, block=50)],
    [E3M0(block=30)],
    [Sign(block=100)],
    [TwoBit()],
    [TopK(k=9, chunk=128), TwoBit(), Zstd(level=1)],
    [TopK(k=64, chunk=4096)],
    [TopKTiles(k=9, tile=16), TwoBit()],
    [TopKTiles(k=4096, tile=64)],
    [RandomK(stride=8), Cast("float16")],
    [Bitmask(), Zstd(width=2)],
    [PowerSGD(rank=2), Int(8, block=64)],
    [Bitmask(), TopK(k=2, chunk=4), E3M0(block=1)],
]
#: Argument values that a header may claim.
CLAIMS = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    64,
    128,
    4096,
    2**20,
    2**31,
    2**62,
    2**70,
    -1,
    0.5,
    True,
    None,
    "",
    "bfloat16",
]
CLAIMS += ["float16", "float8_e5m2", "stochastic", [], {}]


def payloads(source: random.Random) -> tuple[Packed, tuple[int, ...]]:
    """Return a payload that no honest sender sends (or, rarely, one that does), and the expected shape."""
    shape = source.choice(SHAPES)
    dtype = source.choice([torch.float32, torch.float32, torch.bfloat16])
    honest = _honest(source.randrange(len(PIPELINES)), shape, dtype)
    assert honest.encoding is not None
    data, encoding = bytes(honest.data.numpy().data), honest.encoding
    how = source.randrange(8)
    if how == 0:
        data = _changed(data, source)
    elif how == 1 and encoding.codecs[-1].codec == "zstd":
        # Within the frame: the codecs before it are what reads this.
        within = _changed(zstandard.ZstdDecompressor().decompress(data), source)
        data = zstandard.ZstdCompressor(level=1).compress(within)
        encoding = _with_length(encoding, len(data))
    elif how == 2:
        encoding = encoding.model_copy(update={"dtype": source.choice([*link.DTYPES, "complex64"])})
    elif how == 3:
        claimed = source.choice([[], [0], [-1], [2**40, 2**40], [10**9], list(shape[::-1]), [*shape, 0]])
        encoding = encoding.model_copy(update={"shape": claimed})
    elif how == 4:
        encoding = _with_length(encoding, source.choice([None, 0, 1, len(data) + 1, 2**33, 2**62]))
    else:
        count = source.choice([0, 0, 1, 2, 3, 16])
        entries = [_entry(source) for _ in range(count)] or [
            _claiming(entry, source, 0.2) for entry in encoding.codecs
        ]
        encoding = encoding.model_copy(update={"codecs": entries})
    if how >= 2 and source.random() < 0.9:
        data = _fitted(data, encoding, source)
    if source.random() < 0.97:
        encoding = encoding.model_copy(update={"blake3": blake3(data).hexdigest()})
    return Packed(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8), encoding), shape


def _honest(
    number: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    known: dict[tuple[int, tuple[int, ...], torch.dtype], Packed] = {},  # noqa: B006  what was made is kept
) -> Packed:
    key = (number, shape, dtype)
    if key not in known:
        made = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        made[1:][made[1:].abs() < 0.3] = 0
        packed, _ = pack(made, PIPELINES[number], generator(str(key)))
        known[key] = packed if packed.encoding else pack(made, [TwoBit()])[0]
    return known[key]


def _changed(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    if source.random() < 0.3:
        return source.randbytes(len(data))
    for _ in range(source.choice([1, 1, 2, 8])):
        changed[source.randrange(len(changed))] = source.choice([0, 1, 127, 128, 255, source.randrange(256)])
    return bytes(changed)


ENTRIES = [
    CodecEntry(codec=codec.name, version=codec.version, arguments=asdict(codec))  # type: ignore[call-overload]
    for codec in [
        *(Cast("bfloat16"), Float8("float8_e5m2"), Int(), E3M0(), Sign(), TwoBit()),
        *(TopK(), TopKTiles(), RandomK()),
        *(Bitmask(), PowerSGD(), Zstd()),
    ]
]


def _entry(source: random.Random) -> CodecEntry:
    length = source.choice([None, 1, 3, 20, 4000, 2**40]) if source.random() < 0.5 else None
    return _claiming(source.choice(ENTRIES).model_copy(update={"length": length}), source, 0.3)


def _claiming(entry: CodecEntry, source: random.Random, share: float) -> CodecEntry:
    arguments = {
        name: source.choice(CLAIMS) if source.random() < share else value
        for name, value in entry.arguments.items()
    }
    if source.random() < 0.02:
        arguments["another"] = 1
    return entry.model_copy(update={"arguments": arguments})


def _with_length(encoding: Encoding, length: int | None) -> Encoding:
    *before, last = encoding.codecs
    return encoding.model_copy(update={"codecs": [*before, last.model_copy(update={"length": length})]})


def _fitted(data: bytes, encoding: Encoding, source: random.Random) -> bytes:
    """Return as many bytes as an encoding needs, if it is one and these are few."""
    try:
        needed = link._needed(link._steps(encoding))
    except (ValueError, TypeError, OverflowError):
        return data
    if not 0 < needed <= 2**17:
        return data
    return (data + source.randbytes(max(0, needed - len(data))))[:needed]


class Reached:
    """Counts what becomes of payloads, and which codecs they got to."""

    def __init__(self) -> None:
        self.payloads = self.decoded = self.inside = 0
        self.of_codec: Counter[str] = Counter()
        self.slowest = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count calls of the codecs' decoders."""
        before = {kind: kind.decode for kind in CODECS.values()}
        for kind, decode in before.items():
            kind.decode = self._counted(kind.name, decode)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for kind, decode in before.items():
                kind.decode = decode  # type: ignore[method-assign]

    def _counted(self, name: str, decode: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.of_codec[name] += 1
            return decode(*args)

        return counted

    def see(self, packed: Packed, shape: tuple[int, ...]) -> None:
        """Decode a payload; whatever is raised but a clean error is the test's to show."""
        self.payloads += 1
        before, begin = self.of_codec.total(), time.perf_counter()
        refused: PhotonError | None = None
        try:
            received = unpack(packed, "w", shape)
        except PhotonError as error:
            refused = error
        if refused is None:
            tensor = received.dense() if isinstance(received, SparseTensor) else received
            assert tensor.shape == shape
            assert tensor.dtype.is_floating_point
            self.decoded += 1
        else:
            assert "\n" not in str(refused)
            # Refused before it asks for memory, not because there is none.
            assert not isinstance(refused.__cause__, MemoryError), packed.encoding
            assert "allocate" not in str(refused), packed.encoding
        self.slowest = max(self.slowest, time.perf_counter() - begin)
        self.inside += self.of_codec.total() > before

    def __str__(self) -> str:
        shares = ", ".join(
            f"{name} {count / self.payloads:.1%}" for name, count in self.of_codec.most_common()
        )
        return (
            f"{self.payloads} payloads: {self.inside / self.payloads:.1%} got to a decoder ({shares}), "
            f"{self.decoded / self.payloads:.1%} were tensors; slowest {self.slowest * 1000:.0f} ms"
        )


def test_a_few_hundred_payloads_of_liars() -> None:
    seen = Reached()

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**64))
    def fuzz(seed: int) -> None:
        seen.see(*payloads(random.Random(seed)))

    with seen.watching():
        fuzz()
    print(seen)  # noqa: T201
    assert seen.inside > seen.payloads / 3
    assert set(seen.of_codec) == set(CODECS), "every decoder was reached"
    assert 0 < seen.decoded < seen.payloads
    assert seen.slowest < 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_payloads_of_liars_in_little_memory() -> None:
    """In processes of their own, which may not take 256 MB more than they begin with."""
    script = "from tests.link.test_fuzz import long_run; long_run({})"
    running = [
        subprocess.Popen([sys.executable, "-c", script.format(seed)], stdout=PIPE, stderr=PIPE, text=True)
        for seed in range(PROCESSES)
    ]
    for process in running:
        told, error = process.communicate()
        print(told)  # noqa: T201
        assert process.returncode == 0, error[-3000:]


def long_run(seed: int, count: int = LONG // PROCESSES) -> None:
    """Decode many payloads within a limit of memory; print how many a second, and where they got to."""
    torch.set_num_threads(1)
    seen, source = Reached(), random.Random(seed)
    for number in range(len(PIPELINES)):
        _honest(number, SHAPES[0], torch.float32)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    begin = time.perf_counter()
    with seen.watching():
        for _ in range(count):
            seen.see(*payloads(source))
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{seen}; {count / seconds:.0f} a second; {peak} MB at most")  # noqa: T201
    assert seen.inside > seen.payloads / 3
    assert set(seen.of_codec) == set(CODECS)


# --- memory -------------------------------------------------------------------------------------------


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    """Check that a block takes no more bytes at any time than before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield
    assert _status("VmHWM") - before <= most, f"{(_status('VmHWM') - before) / 2**20:.1f} MB were taken"


def _status(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    """Some kilobytes that stand for 256 MB, in a frame and in a frame within a frame."""
    size = 2**28
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    bomb = b"".join(compressor.compress(bytes(2**20)) for _ in range(size // 2**20)) + compressor.flush()
    assert len(bomb) < 2**16
    twice = zstandard.ZstdCompressor().compress(bomb)

    def claim(data: bytes, *lengths: int) -> Packed:
        arguments = {"level": 3, "width": 1}
        entries = [CodecEntry(codec="zstd", version=1, arguments=arguments, length=n) for n in lengths]
        claimed = Encoding(shape=[60, 50], dtype="float32", codecs=entries, blake3=blake3(data).hexdigest())
        return Packed(torch.frombuffer(bytearray(data), dtype=torch.uint8), claimed)

    with little_memory(2**24):
        for packed, message in (
            (claim(bomb, size, len(bomb)), "a frame of 268435456 bytes for 12000"),
            (claim(twice, len(bomb), len(twice)), "comes twice"),
            (claim(bomb, len(bomb)), "cannot be decoded"),
            (claim(twice, len(twice)), "does not hold 12000 bytes"),
        ):
            with pytest.raises(PhotonError, match=message):
                unpack(packed, "w", (60, 50))


def test_a_frame_of_a_large_window_or_with_something_behind_it_is_refused() -> None:
    tensor = torch.zeros(64)
    packed, _ = pack(tensor, [Zstd()])
    assert packed.encoding is not None
    wide = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True)
    streamed = zstandard.ZstdCompressor(compression_params=wide).compressobj(size=256)
    window = streamed.compress(bytes(256)) + streamed.flush()
    for data in (bytes(packed.data.tolist()) + b"more", window):
        entry = packed.encoding.codecs[0].model_copy(update={"length": len(data)})
        changed = packed.encoding.model_copy(update={"codecs": [entry], "blake3": blake3(data).hexdigest()})
        received = Packed(torch.frombuffer(bytearray(data), dtype=torch.uint8), changed)
        if data is window and zstandard.get_frame_parameters(data).window_size <= 1024:
            assert torch.equal(unpack(received, "w", (64,)), tensor)  # type: ignore[arg-type]
            continue
        with pytest.raises(PhotonError, match="cannot be decoded"):
            unpack(received, "w", (64,))


@pytest.mark.slow
def test_decoding_takes_a_few_times_the_tensor_at_most() -> None:
    """With the arguments that send most, in a process that gives back what it frees."""
    script = "from tests.link.test_fuzz import measure; measure()"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    print(done.stdout)  # noqa: T201
    assert done.returncode == 0, done.stderr[-3000:]


LARGEST: list[Sequence[Codec]] = [
    *PIPELINES,
    [Int(8, block=1), Zstd(width=8)],
    [Int(4, block=2**20)],
    [Int(8, block=2**20 - 1)],
    [E3M0(block=2**20)],
    [Sign(block=3)],
    [TopK(k=4096, chunk=4096)],
    [TopK(k=1, chunk=1)],
    [TopK(k=2000, chunk=2000), Zstd(width=4)],
    [RandomK(stride=1)],
    [Bitmask()],
    [Bitmask(), Zstd()],
    [PowerSGD(rank=400)],
]


def measure() -> None:
    """Decode large tensors; print the bytes that each pipeline takes for an element, the result included."""
    torch.set_num_threads(1)
    shape = (1000, 3001)
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(shape).to(dtype)
        for codecs in LARGEST:
            packed, _ = pack(tensor, codecs, generator("x"))
            unpack(packed, "w", shape)  # what is loaded at first use
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            received = unpack(packed, "w", shape)
            each = (_status("VmHWM") - before) / tensor.numel()
            names = " ".join(codec.name for codec in codecs)
            told = [asdict(codec) for codec in codecs]  # type: ignore[call-overload]
            print(f"{each:5.1f} bytes an element: {dtype} {names} {told}")  # noqa: T201
            assert each <= EACH + BESIDES / tensor.numel(), names
            del received
