"""Packed weights become the numbers that were packed, exactly, for every format."""

import ml_dtypes
import numpy as np
import packing
import pytest
from packing import BF16, E2M1, F8, NF4

from jaxarith.hub import quantised, stored
from jaxarith.hub.quantised import bits, blocks, gptq

X = "model.layers.0.proj"
E8M0 = ml_dtypes.float8_e8m0fnu


def read(method, arrays, settings=None, dtype=np.float32, name=X):
    """The one weight that a reader finds, and how many tensors it is made from."""
    tensors = {
        f"{name}{end}": stored.Stored.made(x.dtype, x.shape, lambda x=x: x)
        for end, x in arrays.items()
    }
    found = quantised.READERS[method](tensors, settings or {}, np.dtype(dtype))
    [(weight, leaf)] = found.weights.items()
    assert found.parts <= tensors.keys()
    value = leaf.read()
    assert (value.dtype, value.shape) == (leaf.dtype, leaf.shape)
    np.testing.assert_array_equal(leaf.rows(2).read(), value[:2])
    return weight, value


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Every tensor is unpacked in several pieces."""
    monkeypatch.setattr(bits, "_PIECE", 600)


def by_loops(shape, function):
    found = np.empty(shape, np.float32)
    for index in np.ndindex(*shape):
        found[index] = function(*index)
    return found


@pytest.mark.parametrize("width", [2, 3, 4, 5, 8])
def test_fields_come_back_from_a_stream_of_bits(width, rng):
    fields = rng.integers(0, 2**width, (3, 70))
    words = packing.rows(fields, width)
    assert words.shape == (3, -(-70 * width // 32))
    np.testing.assert_array_equal(bits.fields(words, width, 70), fields)


@pytest.mark.parametrize("scale_type", ["f32", "e8m0", "u8"])
@pytest.mark.parametrize("shape", [(192, 130), (576, 64), (128, 128), (3, 130, 257)])
def test_fp8_blocks_at_the_edges_are_partial(shape, scale_type, rng):
    packed = rng.normal(size=shape).astype(F8)
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    if scale_type == "f32":
        scales = rng.normal(size=grid).astype(np.float32)
        factors = scales
    else:
        exponents = rng.integers(100, 140, grid).astype(np.uint8)
        scales = exponents if scale_type == "u8" else exponents.view(E8M0)
        factors = np.float32(2.0) ** (exponents.astype(np.float32) - 127)
    expected = by_loops(
        shape,
        lambda *at: (
            np.float32(packed[at]) * factors[(*at[:-2], at[-2] // 128, at[-1] // 128)]
        ),
    )
    ends = ("", "_scale_inv") if len(shape) == 3 else (".weight", ".weight_scale_inv")
    arrays = dict(zip(ends, (packed, scales), strict=True))
    _, value = read("fp8", arrays, {"weight_block_size": [128, 128]})
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("scales", [(), (1,), (1, 1), (6,), (6, 1)])
def test_fp8_may_have_one_scale_for_a_tensor_or_for_each_row(scales, end, rng):
    packed = rng.normal(size=(6, 130)).astype(F8)
    factors = np.asarray(rng.normal(size=scales), np.float32)
    arrays = {".weight": packed, f".weight{end}": factors}
    _, value = read("fp8", arrays, {"weight_block_size": None})
    each = np.broadcast_to(factors.reshape(-1, 1), (6, 1))
    np.testing.assert_array_equal(value, packed.astype(np.float32) * each)


def test_fp8_experts_may_be_fp4(rng):
    codes = rng.integers(0, 16, (6, 64))
    packed = packing.halves(codes.reshape(-1), low_first=True).reshape(6, 32)
    exponents = rng.integers(120, 130, (6, 2)).astype(np.uint8)
    arrays = {".weight": packed.view(np.int8), ".scale": exponents.view(E8M0)}
    _, value = read("fp8", arrays)
    expected = by_loops(
        (6, 64),
        lambda i, j: E2M1[codes[i, j]] * 2.0 ** (int(exponents[i, j // 32]) - 127),
    )
    np.testing.assert_array_equal(value, expected)


def test_scales_that_fit_no_block_are_refused():
    with pytest.raises(ValueError, match=r"fit none of the blocks .* \(64 x 64\)"):
        blocks.size("w", (5, 1), (576, 64), [(64, 64)])
    with pytest.raises(ValueError, match="fit several"):
        blocks.size("w", (2, 1), (192, 64), [(128, 64), (96, 64)])


def test_mxfp4_has_exponents_for_32_numbers_and_is_turned(rng):
    codes = rng.integers(0, 16, (3, 10, 64))
    exponents = rng.integers(0, 250, (3, 10, 2))
    _, value = read("mxfp4", packing.mxfp4(codes, exponents), dtype=BF16)
    expected = by_loops(
        (3, 64, 10),
        lambda e, i, o: (
            E2M1[codes[e, o, i]] * 2.0 ** (int(exponents[e, o, i // 32]) - 127)
        ),
    )
    np.testing.assert_array_equal(value.astype(np.float32), expected)


@pytest.mark.parametrize("order", ["groups", "act-order", "without g_idx"])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_gptq(width, v2, order, rng):
    inputs, out, size = 64, 32, 16
    q = rng.integers(0, 2**width, (inputs, out))
    zeros = rng.integers(0, 2**width, (inputs // size, out))
    zeros[0, :2] = 0, 2**width - 1  # stored as a field that is full, in version 1
    scales = rng.normal(size=zeros.shape).astype(np.float16)
    groups = np.arange(inputs) // size
    if order == "act-order":
        groups = rng.permutation(groups)
    arrays = packing.gptq(q, zeros, scales, groups, width, v2=v2)
    if order == "without g_idx":
        del arrays["g_idx"]
    settings = {"bits": width, "group_size": size, "desc_act": order == "act-order"}
    settings |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    arrays = {f".{end}": x for end, x in arrays.items()}
    weight, value = read("gptq", arrays, settings)
    assert weight == f"{X}.weight"
    expected = by_loops(
        (out, inputs),
        lambda o, i: (
            np.float32(scales[groups[i], o]) * (int(q[i, o]) - int(zeros[groups[i], o]))
        ),
    )
    np.testing.assert_array_equal(value, expected)


def test_one_is_added_to_each_zero_of_gptq_without_a_carry():
    word = packing.stream([15, 3, 15, 15, 0, 1, 2, 14], 4)[None]
    found = gptq.zeros(word, 4, 8, less_one=True)
    np.testing.assert_array_equal(found, [[0, 4, 0, 0, 1, 2, 3, 15]])


def test_awq(rng):
    q = rng.integers(0, 16, (64, 40))
    zeros = rng.integers(0, 16, (4, 40))
    scales = rng.normal(size=(4, 40)).astype(np.float16)
    arrays = {
        ".qweight": packing.awq_words(q),
        ".qzeros": packing.awq_words(zeros),
        ".scales": scales,
    }
    _, value = read("awq", arrays, {"bits": 4, "version": "gemm"})
    expected = by_loops(
        (40, 64),
        lambda o, i: (
            np.float32(scales[i // 16, o]) * (int(q[i, o]) - int(zeros[i // 16, o]))
        ),
    )
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("storage", [np.uint8, BF16])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4_bits(nested, storage, rng):
    shape, size = (12, 100), 64
    count = -(-1200 // size)
    codes = rng.integers(0, 16, 1200)
    scales = rng.random(count).astype(np.float32)
    given, inner = scales, None
    if nested:
        table = np.sort(rng.normal(size=256)).astype(np.float32)
        outer = rng.random(-(-count // 8)).astype(np.float32)
        given = rng.integers(0, 256, count).astype(np.uint8)
        inner = table, outer, 8, 0.25
        scales = [
            table[code] * outer[i // 8] + np.float32(0.25)
            for i, code in enumerate(given)
        ]
    packed = packing.nf4(codes, given, shape, nested=inner, dtype=storage)
    arrays = {f".weight{end}": x for end, x in packed.items()}
    _, value = read("bitsandbytes", arrays)
    expected = by_loops(
        shape, lambda i, j: NF4[codes[100 * i + j]] * scales[(100 * i + j) // size]
    )
    np.testing.assert_array_equal(value, expected)


def test_bitsandbytes_8_bits(rng):
    packed = rng.integers(-127, 128, (30, 50)).astype(np.int8)
    scales = rng.random(30).astype(np.float32)
    arrays = {
        ".weight": packed,
        ".SCB": scales,
        ".weight_format": np.zeros((), np.uint8),
    }
    _, value = read("bitsandbytes", arrays)
    expected = by_loops(
        (30, 50), lambda i, j: np.float32(packed[i, j]) * scales[i] / 127
    )
    np.testing.assert_array_equal(value, expected)


def scheme(**weights):
    return {"config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}


# By name: the shape of the scales of 40 x 96 weights, the scheme, and the blocks.
STRATEGIES = {
    "tensor": ((1,), {}, (40, 96)),
    "channel": ((40, 1), {}, (1, 96)),
    "group": ((40, 3), {"group_size": 32}, (1, 32)),
    "partial groups": ((40, 2), {"group_size": 64}, (1, 64)),
    "block": ((2, 3), {"block_structure": [32, 32]}, (32, 32)),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [F8, np.int8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compressed_tensors_of_8_bits(strategy, dtype, symmetric, rng):
    grid, weights, (high, wide) = STRATEGIES[strategy]
    packed = rng.integers(-100, 100, (40, 96)).astype(dtype)
    scales = rng.normal(size=grid).astype(BF16)
    zeros = rng.integers(-9, 9, grid).astype(dtype)
    arrays = {".weight": packed, ".weight_scale": scales}
    arrays |= {} if symmetric else {".weight_zero_point": zeros}
    _, value = read("compressed-tensors", arrays, scheme(num_bits=8, **weights))
    columns = -(-96 // wide)

    def at(found, i, j):
        return np.float32(found.reshape(-1, columns)[i // high, j // wide])

    expected = by_loops(
        (40, 96),
        lambda i, j: (
            (np.float32(packed[i, j]) - (0 if symmetric else at(zeros, i, j)))
            * at(scales, i, j)
        ),
    )
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("order", [None, "unused", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [3, 4, 8])
def test_compressed_tensors_packed_in_words(width, symmetric, order, rng):
    half = 2 ** (width - 1)
    q = rng.integers(-half, half, (40, 96))
    zeros = rng.integers(-half, half, (40, 3))
    scales = rng.normal(size=(40, 3)).astype(BF16)
    groups = np.arange(96) // 32
    arrays = {
        ".weight_packed": packing.rows(q + half, width),
        ".weight_scale": scales,
        ".weight_shape": np.array([40, 96]),
    }
    if not symmetric:
        arrays[".weight_zero_point"] = packing.rows((zeros + half).T, width).T.copy()
    if order == "act-order":
        groups = rng.permutation(groups)
    if order is not None:
        given = groups if order == "act-order" else np.full(96, -1)
        arrays[".weight_g_idx"] = given.astype(np.int32)
    settings = scheme(num_bits=width, group_size=32)
    _, value = read("compressed-tensors", arrays, settings)
    expected = by_loops(
        (40, 96),
        lambda i, j: (
            (int(q[i, j]) - (0 if symmetric else int(zeros[i, groups[j]])))
            * np.float32(scales[i, groups[j]])
        ),
    )
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_compressed_tensors_of_4_bits(kind, rng):
    size = 16 if kind == "nvfp4" else 32
    codes = rng.integers(0, 16, (40, 96))
    packed = packing.halves(codes.reshape(-1), low_first=True).reshape(40, 48)
    arrays = {".weight_packed": packed}
    if kind == "nvfp4":
        of_tensor = np.float32(3.7)
        scales = rng.uniform(1, 400, (40, 6)).astype(F8)
        factors = scales.astype(np.float32) / of_tensor
        arrays[".weight_global_scale"] = of_tensor[None]
    else:
        scales = rng.integers(110, 140, (40, 3)).astype(np.uint8)
        factors = np.float32(2) ** (scales.astype(np.float32) - 127)
    arrays[".weight_scale"] = scales
    _, value = read("compressed-tensors", arrays, scheme(num_bits=4, group_size=size))
    expected = by_loops(
        (40, 96),
        lambda i, j: np.float32(E2M1[codes[i, j]]) * factors[i, j // size],
    )
    np.testing.assert_array_equal(value, expected)


def test_compressed_tensors_in_mxfp8(rng):
    packed = rng.normal(size=(40, 96)).astype(F8)
    scales = rng.integers(110, 140, (40, 3)).astype(np.uint8)
    arrays = {".weight": packed, ".weight_scale": scales}
    _, value = read("compressed-tensors", arrays, scheme(num_bits=8, group_size=32))
    factors = np.float32(2) ** (scales.astype(np.float32) - 127)
    expected = by_loops(
        (40, 96), lambda i, j: np.float32(packed[i, j]) * factors[i, j // 32]
    )
    np.testing.assert_array_equal(value, expected)
