"""Fingerprints: every changed bit shows; sharding and order do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith import fingerprint


def random_bits(dtype, shape=(8, 6), seed=0):
    if dtype == "bool":
        return np.random.default_rng(seed).random(shape) < 0.5
    dtype = jnp.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).bytes(count)  # NaN of all kinds among them
    return np.frombuffer(data, dtype).reshape(shape)


def words(array):
    """The entries as Python integers of at most 32 bits, in C order."""
    size = min(array.dtype.itemsize, 4)
    return [int(x) for x in np.ascontiguousarray(array).view(f"u{size}").ravel()]


def murmur_mix(x):
    """The last step of MurmurHash3, with Python's integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def sum_of_mixed(words):
    mixed = (murmur_mix((w + i * 0x9E3779B9) % 2**32) for i, w in enumerate(words))
    return sum(mixed) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_fingerprint_is_the_sum_of_mixed_bits_and_places(dtype):
    array = random_bits(dtype)
    expected = sum_of_mixed(words(array))
    assert fingerprint.of({"w": jnp.asarray(array)}) == {"w": expected}
    assert expected


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_entries_of_64_bits_count_as_two(dtype, x64):
    array = random_bits(dtype)
    expected = sum_of_mixed(words(array))
    assert fingerprint.of({"w": jnp.asarray(array)}) == {"w": expected}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_every_bit_of_every_entry_shows(dtype):
    array = random_bits(dtype, (3, 4))
    start = fingerprint.of({"w": jnp.asarray(array)})
    for position in range(array.nbytes):
        for bit in range(8):
            data = bytearray(array.tobytes())
            data[position] ^= 1 << bit
            changed = np.frombuffer(bytes(data), array.dtype).reshape(array.shape)
            assert fingerprint.of({"w": jnp.asarray(changed)}) != start


def test_changes_of_all_entries_show():
    # Of an even number of entries, so that what is added to the bits may cancel.
    leaves = [jnp.full((64, 64), value) for value in (0.0, 1.0, -1.0, 2.0, 0.5)]
    rng = np.random.default_rng(3)
    random = rng.normal(size=(64, 64)).astype(np.float32)
    leaves += [random * factor for factor in (1, -1, 2, 0.5, 4)]
    leaves += [random[::-1], random.T, np.roll(random, 1)]
    found = [fingerprint.of({"w": leaf})["w"] for leaf in leaves]
    assert len(set(found)) == len(leaves)


def test_order_of_entries_shows():
    array = jnp.arange(1.0, 7.0)
    assert fingerprint.of({"w": array}) != fingerprint.of({"w": array[::-1]})


def test_fingerprint_does_not_depend_on_sharding_and_gathers_nothing():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    array = random_bits("float32", (16, 8))
    expected = fingerprint.of({"w": jnp.asarray(array)})
    for spec in (P(), P("data"), P(None, "fsdp"), P("data", "fsdp"), P("fsdp", "data")):
        sharded = jax.device_put(array, NamedSharding(mesh, spec))
        assert fingerprint.of({"w": sharded}) == expected
        text = fingerprint._fingerprint.lower(sharded).compile().as_text()
        assert "all-gather" not in text and "all-to-all" not in text


def test_prng_keys_count_by_their_data():
    keys = jax.random.split(jax.random.key(3), 4)
    data = jax.random.key_data(keys)
    assert fingerprint.of({"k": keys}) == fingerprint.of({"k": data})
    assert fingerprint.of({"k": keys}) != fingerprint.of({"k": keys[::-1]})


def test_combined_tells_paths_shapes_and_dtypes_apart():
    zeros = [
        {"a": jnp.zeros(4)},
        {"b": jnp.zeros(4)},
        {"a": jnp.zeros((2, 2))},
        {"a": jnp.zeros(4, jnp.int32)},
        {"a": jnp.zeros(4), "b": jnp.zeros(0)},
    ]
    assert len({fingerprint.combined(tree) for tree in zeros}) == len(zeros)
    assert fingerprint.combined({"a": np.zeros(4, np.float32)}) == (
        fingerprint.combined(zeros[0])
    )
