"""Codecs: what arrives is what was sent, to the codec's rounding; sizes are exact; nonsense is refused."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from photon.errors import PhotonError
from photon.link.bits import pack_bits, packed_bytes, unpack_bits
from photon.link.codecs import (
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
from photon.link.encoding import (
    Codec,
    Packed,
    Pipelines,
    SparseTensor,
    check_pipeline,
    encoded_bytes,
    generator,
    pack,
    unpack,
)
from photon.link.records import HEADER, decode_groups, encode_groups

PIPELINES: dict[str, list[Codec]] = {
    "bf16": [Cast("bfloat16")],
    "fp16": [Cast("float16")],
    "e4m3": [Float8("float8_e4m3fn")],
    "e5m2": [Float8("float8_e5m2")],
    "int8": [Int(8)],
    "int8 stochastic": [Int(8, rounding="stochastic")],
    "int4": [Int(4, block=128)],
    "e3m0": [E3M0()],
    "sign": [Sign(block=100)],
    "two_bit": [TwoBit()],
    "topk": [TopK()],
    "topk_tiles": [TopKTiles(k=5, tile=16)],
    "sparseloco": [TopKTiles(), TwoBit()],
    "top64of4096": [TopK(), TwoBit()],
    "top1of32": [TopK(k=1, chunk=32), TwoBit()],
    "topk int8": [TopK(k=7, chunk=100), Int(8, block=64)],
    "randomk": [RandomK(stride=8)],
    "randomk bf16": [RandomK(stride=5, scaled=False), Cast("bfloat16")],
    "bitmask": [Bitmask()],
    "bitmask zstd": [Bitmask(), Zstd(width=4)],
    "powersgd": [PowerSGD(rank=3), Cast("bfloat16")],
    "zstd": [Zstd(width=4)],
    "bf16 zstd": [Cast("bfloat16"), Zstd(width=2)],
}
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (256,), (4096,), (4097,), (64, 64), (3, 5, 7), (100, 333)]


def values(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=source) * 1e-3).to(dtype)


def dense(tensor: torch.Tensor | SparseTensor) -> torch.Tensor:
    return tensor.dense() if isinstance(tensor, SparseTensor) else tensor


def sent(tensor: torch.Tensor, codecs: list[Codec], seed: str = "") -> torch.Tensor:
    return dense(unpack(pack(tensor, codecs, generator(seed))[0], "w", tensor.shape))


# --- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_shape_arrives_with_its_type_and_its_exact_length(
    pipeline: str, shape: tuple[int, ...]
) -> None:
    codecs = PIPELINES[pipeline]
    for dtype in (torch.float32, torch.bfloat16):
        tensor = values(shape, dtype=dtype)
        before = tensor.clone()
        packed, _ = pack(tensor, codecs, generator("x"))
        assert torch.equal(tensor, before), "encoding only reads"
        received = unpack(packed, "w", shape)
        assert (received.shape, received.dtype) == (tensor.shape, dtype)
        assert torch.isfinite(dense(received)).all()
        if not any(isinstance(codec, Bitmask | Zstd) for codec in codecs):
            assert packed.data.nbytes == encoded_bytes(codecs, shape, dtype)


@pytest.mark.parametrize("pipeline", ["bitmask", "bitmask zstd", "zstd"])
def test_lossless_chains_lose_nothing(pipeline: str) -> None:
    tensor = values((300, 77))
    tensor[tensor.abs() < 1e-3] = 0
    assert torch.equal(sent(tensor, PIPELINES[pipeline]), tensor)
    assert torch.equal(sent(torch.zeros(9), PIPELINES[pipeline]), torch.zeros(9))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_zeros_stay_zeros(pipeline: str) -> None:
    assert torch.equal(sent(torch.zeros(50, 60), PIPELINES[pipeline]), torch.zeros(50, 60))


@pytest.mark.parametrize(
    ("pipeline", "of_value", "of_largest"),
    [
        ("bf16", 2**-8, 0),
        ("fp16", 2**-11, 2**-16),  # subnormal numbers
        ("e4m3", 2**-4, 2**-10 / 448),
        ("e5m2", 2**-3, 2**-17 / 57344),
        ("int8", 0, 0.5 / 127),
        ("int4", 0, 0.5 / 7),
        ("e3m0", 1 / 3, 0.75 * 2**-6),
    ],
)
def test_errors_stay_within_half_a_step(pipeline: str, of_value: float, of_largest: float) -> None:
    """Half a step of the value's own power of two, and where numbers end, of the largest that scales it."""
    tensor = values((64, 256))
    largest = tensor.abs().amax() if pipeline in ("e4m3", "e5m2") else tensor.abs().amax(1, keepdim=True)
    if pipeline == "int4":
        largest = tensor.view(-1, 128).abs().amax(1).repeat_interleave(128).view(64, 256)
    error = (sent(tensor, PIPELINES[pipeline]) - tensor).abs()
    assert (error <= 1.001 * (of_value * tensor.abs() + of_largest * largest)).all()
    assert (error > 0).any()


@pytest.mark.parametrize(
    "pipeline", [name for name, codecs in PIPELINES.items() if all(c.contracts for c in codecs)]
)
def test_what_is_lost_is_less_than_what_was_there(pipeline: str) -> None:
    """A contraction: with error feedback, what is lost cannot grow without bound."""
    tensor = values((128, 256))
    residual, total = torch.zeros_like(tensor), torch.zeros_like(tensor)
    for turn in range(30):
        accumulated = tensor + residual
        decoded = sent(accumulated, PIPELINES[pipeline], str(turn))
        residual = accumulated - decoded
        total += decoded
        assert residual.norm() <= accumulated.norm()
    # Everything that was put in has arrived or is still held.
    torch.testing.assert_close(total + residual, 30 * tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("pipeline", ["int8 stochastic", "randomk"])
def test_unbiased_codecs_are(pipeline: str) -> None:
    """The mean of many draws lies within six standard errors of the value, and one on the whole."""
    tensor, draws = values((40, 25)), 3000
    seen = torch.stack([sent(tensor, PIPELINES[pipeline], str(turn)) for turn in range(draws)]).double()
    error = (seen.mean(0) - tensor).abs()
    # Events that are rarer than one in all draws do not show in the spread.
    unseen = tensor.abs().max() / 127 / math.sqrt(draws)
    deviations = error / ((seen.std(0) + unseen) / math.sqrt(draws))
    assert deviations.max() < 6
    assert deviations.square().mean() < 1.2
    assert (seen.std(0) > 0).double().mean() > 0.9


def test_topk_takes_the_largest_of_every_chunk() -> None:
    tensor = values((3, 5000))
    received = unpack(pack(tensor, [TopK(k=50, chunk=1000)])[0], "w", tensor.shape)
    assert isinstance(received, SparseTensor)
    for row, kept in zip(tensor.view(-1, 1000), received.dense().view(-1, 1000), strict=True):
        best = row.abs().topk(50).indices
        assert torch.equal(kept.nonzero().flatten(), best.sort().values)
        assert torch.equal(kept[best], row[best])


@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [
        ((96, 80), 48, 40),  # the largest divisors up to 64, not up to the root
        ((128, 192), 64, 64),
        ((30, 67), 30, 1),  # a prime length is cut into single columns
        ((3, 40, 70), 60, 35),
        ((200,), 1, 50),
        ((67,), 1, 1),
        ((), 1, 1),
    ],
    ids=str,
)
def test_tiles_are_squares_of_the_matrix(shape: tuple[int, ...], height: int, width: int) -> None:
    tensor = values(shape)
    received = unpack(pack(tensor, [TopKTiles(k=7)])[0], "w", tensor.shape)
    assert isinstance(received, SparseTensor)
    columns = shape[-1] if shape else 1
    matrix, kept = tensor.reshape(-1, columns), received.dense().reshape(-1, columns)
    for top in range(0, len(matrix), height):
        for left in range(0, columns, width):
            tile = matrix[top : top + height, left : left + width].flatten()
            of_tile = kept[top : top + height, left : left + width].flatten()
            best = tile.abs().topk(min(7, tile.numel())).indices
            expected = torch.zeros_like(tile)
            expected[best] = tile[best]
            assert torch.equal(of_tile, expected)


def test_a_small_tile_sends_all() -> None:
    tensor = values((12, 5))
    assert torch.equal(sent(tensor, [TopKTiles()]), tensor)


def test_of_equal_magnitudes_topk_takes_the_first() -> None:
    tensor = torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0, 2.0] * 2)
    received = sent(tensor, [TopK(k=4, chunk=6)])
    assert received.tolist() == [1.0, -2.0, 2.0, 0.0, 0.0, 2.0] * 2
    assert sent(tensor, [TopK(k=1, chunk=6)]).tolist() == [0.0, -2.0, 0.0, 0.0, 0.0, 0.0] * 2


@pytest.mark.parametrize("pipeline", ["sparseloco", "top64of4096", "top1of32"])
def test_sparseloco_takes_0_219_bits_a_parameter(pipeline: str) -> None:
    tensor = values((2048, 4096))
    packed, _ = pack(tensor, PIPELINES[pipeline])
    bits = 8 * packed.data.nbytes / tensor.numel()
    assert bits == pytest.approx(64 * 14 / 4096, abs=1e-4)
    assert 32 / bits > 146


def test_powersgd_finds_a_matrix_of_low_rank_and_goes_on_from_its_basis() -> None:
    source = torch.Generator().manual_seed(1)
    exact = torch.randn(80, 3, generator=source) @ torch.randn(3, 60, generator=source)
    packed, feedback = pack(exact, [PowerSGD(rank=3)])
    torch.testing.assert_close(dense(unpack(packed, "w")), exact, rtol=1e-3, atol=1e-3)
    noisy = torch.linalg.svd(torch.randn(80, 60, generator=source))
    matrix = noisy.U[:, :60] @ torch.diag(0.8 ** torch.arange(60.0)) @ noisy.Vh
    best = (0.64 ** torch.arange(3.0, 60)).sum().sqrt()
    feedback, errors = {}, []
    for _ in range(20):
        packed, feedback = pack(matrix, [PowerSGD(rank=3)], feedback=feedback)
        errors.append(float((dense(unpack(packed, "w")) - matrix).norm() / best))
    assert errors[0] > errors[-1]
    assert errors[-1] == pytest.approx(1, abs=0.01)
    assert pack(torch.ones(5), [PowerSGD()])[0].encoding is None, "a vector passes as it is"


# --- an independent decoder ---------------------------------------------------------------------------


def number(data: bytes, index: int, bits: int) -> int:
    whole = int.from_bytes(data, "little")
    return (whole >> (index * bits)) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 11, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 33])
def test_packed_numbers_are_a_little_endian_number(bits: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(0, 2**bits, count)
    packed = pack_bits(torch.from_numpy(codes).to(torch.int32 if bits > 8 else torch.uint8), bits)
    assert len(packed) == packed_bytes(count, bits)
    assert [number(bytes(packed.tolist()), i, bits) for i in range(count)] == codes.tolist()
    assert unpack_bits(packed, bits, count).tolist() == codes.tolist()


def decode_by_hand(packed: Packed) -> list[float]:
    """Decode a payload from its bytes and its encoding alone, without torch and one value at a time."""
    assert packed.encoding is not None
    data, count = bytes(packed.data.tolist()), math.prod(packed.encoding.shape)
    entry = packed.encoding.codecs[0]
    arguments = entry.arguments
    if entry.codec == "topk":
        chunk, k = arguments["chunk"], arguments["k"]
        places = [
            (start // chunk * chunk, -(-k * min(chunk, count - start) // chunk))
            for start in range(0, count, chunk)
        ]
        total, width = sum(n for _, n in places), len(f"{chunk - 1:b}")
        side = -(-total * width // 8)
        low, high = np.frombuffer(data[side : side + 8], dtype="<f4")
        out, at = [0.0] * count, 0
        for start, n in places:
            for _ in range(n):
                code = number(data[side + 8 :], at, 2)
                size = high if code & 1 else low
                out[start + number(data[:side], at, width)] = float(-size if code & 2 else size)
                at += 1
        return out
    block = arguments["block"]
    scales = np.frombuffer(data[: 4 * -(-count // block)], dtype="<f4")
    codes = data[4 * len(scales) :]
    out = []
    for i in range(count):
        scale = scales[i // block]
        if entry.codec == "int":
            levels = 2 ** (arguments["bits"] - 1) - 1
            code = number(codes, i, arguments["bits"])
            value = (code - levels if arguments["bits"] == 4 else (code ^ 128) - 128) * scale
        elif entry.codec == "sign":
            value = -scale if number(codes, i, 1) else scale
        else:
            code = number(codes, i, 4)
            value = (0.0 if code % 8 == 0 else 2.0 ** (code % 8 - 7)) * scale * (-1 if code >= 8 else 1)
        out.append(float(np.float32(value)))
    return out


@pytest.mark.parametrize(
    "codecs",
    [
        [Int(8, block=64)],
        [Int(4, block=50)],
        [E3M0(block=30)],
        [Sign(block=40)],
        [TopK(k=9, chunk=128), TwoBit()],
        [TopK(k=3, chunk=20), TwoBit()],
        [TopK(k=1, chunk=1), TwoBit()],
        [TopK(k=2, chunk=4096), TwoBit()],
    ],
    ids=lambda codecs: codecs[0].name,
)
def test_a_decoder_written_from_the_description_agrees(codecs: list[Codec]) -> None:
    tensor = values((3, 101))
    packed, _ = pack(tensor, codecs)
    expected = dense(unpack(packed, "w")).reshape(-1).tolist()
    np.testing.assert_allclose(decode_by_hand(packed), expected, rtol=1e-6)


def test_randomks_places_are_splitmix64s() -> None:
    packed, _ = pack(values((67,)), [RandomK(stride=10, scaled=False)])
    received = unpack(packed, "w")
    assert isinstance(received, SparseTensor)
    seed, places = int.from_bytes(bytes(packed.data[:8].tolist()), "little"), []
    for run in range(7):
        z = (seed + (run + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        places.append(10 * run + (((z ^ z >> 31) >> 32) * (10 if run < 6 else 7) >> 32))
    assert received.indices.tolist() == places


# --- nonsense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cast("int8"),
        lambda: Float8("bfloat16"),
        lambda: Int(3),
        lambda: Int(8, block=0),
        lambda: Int(8, rounding="up"),  # type: ignore[arg-type]
        lambda: TopK(k=0),
        lambda: TopK(chunk=5000),
        lambda: TopK(k=20, chunk=10),
        lambda: RandomK(stride=0),
        lambda: PowerSGD(rank=0),
        lambda: Zstd(level=40),
        lambda: Zstd(width=3),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Codec]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


def test_codecs_in_an_impossible_order_are_refused() -> None:
    check_pipeline([TopK(), Cast("bfloat16"), Zstd()], "link.uplink")
    with pytest.raises(PhotonError, match=r"link.uplink: zstd comes more than once"):
        check_pipeline([TopK(), Zstd(), Zstd(level=5)], "link.uplink")
    with pytest.raises(PhotonError, match="topk works on values, and int leaves none"):
        check_pipeline([Int(8), TopK()], "link.uplink")


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_random_and_mutated_messages_end_in_clean_errors_only(pipeline: str) -> None:
    """Bytes, header and both are changed at random; what is not refused has the expected shapes."""
    source = random.Random(pipeline)
    tensors = {"w": values((60, 50)), "b": values((33,))}
    expected = {"params": {name: tensor.shape for name, tensor in tensors.items()}}
    whole = encode_groups({"params": tensors}, Pipelines(PIPELINES[pipeline]))
    lines = []
    for _ in range(150):
        try:
            received = decode_groups(mutated(whole, source), expected)
        except PhotonError as error:
            lines.append(str(error))
            continue
        for name, tensor in received.get("params", {}).items():
            assert dense(tensor).shape == tensors[name].shape
    assert len(lines) > 75
    assert not any("\n" in line for line in lines)


def mutated(records: RecordDict, source: random.Random) -> RecordDict:
    arrays = dict(records["params"].items())  # type: ignore[union-attr]
    text = str(records[HEADER]["header"])
    if source.random() < 0.5:
        name = source.choice(list(arrays))
        array = arrays[name]
        data = bytearray(array.data)
        kind = source.randrange(3)
        if kind == 0:
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        elif kind == 1:
            data = data[: source.randrange(len(data))]
        else:
            data = bytearray(source.randbytes(source.randrange(2 * len(data))))
        arrays[name] = type(array)(array.dtype, (len(data),), array.stype, bytes(data))
        if source.random() < 0.5:
            # The hash of what is there now: the codec itself has to notice.
            header = json.loads(text)
            if name in header["groups"]["params"]:
                header["groups"]["params"][name]["blake3"] = blake3(bytes(data)).hexdigest()
            text = json.dumps(header)
    else:
        header = json.loads(text)
        change_somewhere(header, source)
        text = json.dumps(header)
    return RecordDict({"params": ArrayRecord(arrays), HEADER: ConfigRecord({"header": text})})


def change_somewhere(tree: Any, source: random.Random) -> None:
    nonsense = [None, -1, 0, 1, 2**62, 2**70, 0.5, "", "topk", [], {}, [2**40, 2**40], True]
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
        return
    key = source.choice(keys)
    if isinstance(tree[key], dict | list) and tree[key] and source.random() < 0.85:
        change_somewhere(tree[key], source)
    elif source.random() < 0.2:
        del tree[key]
    else:
        tree[key] = source.choice(nonsense)


def test_a_payload_claims_no_more_memory_than_is_expected() -> None:
    """A few bytes that stand for terabytes are refused by the expected shape."""
    packed, _ = pack(values((60, 50)), [RandomK(stride=2**20)])
    assert packed.encoding is not None
    grown = Packed(packed.data, packed.encoding.model_copy(update={"shape": [2**20, 1]}))
    with pytest.raises(PhotonError, match="expected"):
        unpack(grown, "w", (60, 50))


def test_a_zstd_frame_claims_no_more_memory_than_is_expected() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(2**24))
    with pytest.raises(ValueError, match="does not hold"):
        Zstd().decode(
            torch.frombuffer(bytearray(bomb), dtype=torch.uint8), torch.empty(0), (64,), torch.uint8
        )
