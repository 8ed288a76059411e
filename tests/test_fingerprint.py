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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_fingerprint_is_the_sum_of_bits_times_odd_numbers(dtype):
    array = random_bits(dtype)
    expected = sum((2 * i + 1) * bits for i, bits in enumerate(words(array))) % 2**32
    assert fingerprint.of({"w": jnp.asarray(array)}) == {"w": expected}
    assert expected


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_entries_of_64_bits_count_as_two(dtype, x64):
    array = random_bits(dtype)
    expected = sum((2 * i + 1) * bits for i, bits in enumerate(words(array))) % 2**32
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
