"""Random masks of DARE and DELLA: the hash, the probabilities, what they depend on."""

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarith import sharding
from jaxarith.merge import _draws

KEY = jax.random.key(3)


def test_the_hash_is_that_of_jax():
    counters = jax.random.bits(KEY, (64,), jnp.uint32)
    key = jnp.array([0xDEADBEEF, 7], jnp.uint32)
    found = _draws.threefry(key, counters[:32], counters[32:])
    expected = jax.extend.random.threefry_2x32((key[0], key[1]), counters)
    np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.1, 0.5, 0.9, 1.0])
def test_the_share_that_is_kept_is_that_which_is_asked_for(share):
    kept = np.asarray(_draws.draw(KEY, share, (1000, 1001)))
    deviation = np.sqrt(share * (1 - share) / kept.size)
    assert abs(kept.mean() - share) <= 5 * deviation


def test_the_next_bits_decide_where_the_first_are_equal():
    share = np.float32(0.1)  # 6553 of 2^-16, and 39328 of 65536 more
    pairs = [(6552, 65535), (6553, 0), (6553, 39327), (6553, 39328), (6554, 0)]
    words = jnp.array([first * 65536 + second for first, second in pairs], jnp.uint32)
    kept = _draws._is_below(words, share)
    assert kept.tolist() == [True, True, True, False, False]
    assert float(share) * 2.0**32 == 6553 * 65536 + 39328
    ends = [_draws._is_below(words, end) for end in (0.0, 1.0)]
    assert not np.any(ends[0]) and np.all(ends[1])


def levels(shape, key=KEY, count=16):
    """In which of so many equal parts of [0, 1) the number behind each entry is."""
    shares = [i / count for i in range(1, count)]
    return count - 1 - sum(np.asarray(_draws.draw(key, s, shape), int) for s in shares)


def test_all_levels_come_as_often():
    found = levels((256, 1024), count=64)
    counts = np.bincount(found.ravel(), minlength=64)
    mean = found.size / 64
    assert abs(np.sum((counts - mean) ** 2) / mean - 63) < 5 * np.sqrt(2 * 63)


def test_neighbours_rows_and_runs_are_uncorrelated():
    x = (levels((512, 512)) - 7.5) / 16
    runs = x.reshape(512, 4, 128)
    pairs = [(x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (runs[:, 0], runs[:, 1])]
    pairs += [(runs[:, 0], runs[:, 2]), (runs[:, 2], runs[:, 3])]
    for one, two in pairs:
        # Products of uniform numbers have the deviation 1/12.
        assert abs(np.mean(one * two)) < 5 / 12 / np.sqrt(one.size)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (7,), (5, 1), (3, 5), (2, 3, 6)])
def test_any_shape_has_its_draws_and_keys_differ(shape):
    keys = jax.random.split(KEY, 40)
    found = np.stack([_draws.draw(key, 0.5, shape) for key in keys])
    assert found.shape == (40, *shape) and found.dtype == bool
    assert np.all((found.mean(axis=0) > 0.1) & (found.mean(axis=0) < 0.9))
    again = jax.jit(_draws.draw, static_argnums=(1, 2))(keys[0], 0.5, shape)
    np.testing.assert_array_equal(found[0], again)


def test_no_two_entries_of_a_leaf_share_their_counters():
    first, second = _draws._places((6, 5, 3))
    assert len({*zip(np.ravel(first), np.ravel(second), strict=True)}) == 90


def test_a_probability_for_each_entry_is_its_own():
    shares = jnp.broadcast_to(jnp.linspace(0, 1, 5)[None], (20_000, 5))
    kept = np.asarray(_draws.draw(KEY, shares, (20_000, 5)))
    np.testing.assert_allclose(kept.mean(axis=0), shares[0], atol=0.02)
    alike = _draws.draw(KEY, jnp.full((33, 7), 0.3), (33, 7))
    np.testing.assert_array_equal(alike, _draws.draw(KEY, 0.3, (33, 7)))


def test_keys_of_another_implementation_do():
    key = jax.random.key(0, impl="rbg")
    assert abs(np.asarray(_draws.draw(key, 0.3, (100, 100))).mean() - 0.3) < 0.03


@pytest.mark.devices
@pytest.mark.parametrize("axes", ["data", "fsdp"])
def test_devices_draw_the_same_bits(axes):
    mesh = sharding.make_mesh(f"{axes}=8")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))
    last = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, axes))
    expected = _draws.draw(KEY, 0.4, (16, 24))
    for target in (place, last):
        drawn = jax.jit(
            lambda key: _draws.draw(key, 0.4, (16, 24)), out_shardings=target
        )(KEY)
        np.testing.assert_array_equal(drawn, expected)
