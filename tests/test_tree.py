"""Trees: slash paths, parts, Gram matrices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import normal

from jaxarith import tree


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


DICT = {"a": {"bias": 1.0, "kernel": 2.0}, "b": {"kernel": 3.0}}
OTHER = [Layer(jnp.ones((2, 3)), jnp.zeros(3)), {"scale": jnp.ones(())}]


def test_flatten_and_unflatten_are_inverse():
    leaves = tree.flatten(DICT)
    assert leaves == {"a/bias": 1.0, "a/kernel": 2.0, "b/kernel": 3.0}
    assert tree.unflatten(leaves) == DICT


def test_flatten_names_attributes_and_list_positions():
    assert list(tree.flatten(OTHER)) == ["0/kernel", "0/bias", "1/scale"]


def test_flatten_refuses_two_leaves_with_one_path():
    with pytest.raises(ValueError, match="two leaves have the path a/b"):
        tree.flatten({"a/b": 1.0, "a": {"b": 2.0}})


def test_select_matches_whole_paths():
    assert tree.select(DICT, ".*/kernel") == {
        "a": {"kernel": 2.0},
        "b": {"kernel": 3.0},
    }
    assert tree.select(DICT, "a/.*") == {"a": DICT["a"]}


def test_select_without_match_says_what_paths_look_like():
    with pytest.raises(ValueError, match=r"'kernel'.*whole slash paths.*a/bias"):
        tree.select(DICT, "kernel")


def test_restrict_drops_dict_keys_and_leaves_none_elsewhere():
    assert tree.restrict(DICT, ["a/bias"]) == {"a": {"bias": 1.0}}
    part = tree.restrict(OTHER, ["0/bias"])
    assert part[0].kernel is None
    assert list(tree.flatten(part)) == ["0/bias"]


def test_update_replaces_the_leaves_of_the_part():
    assert tree.update(DICT, {"b": {"kernel": 7.0}}) == {**DICT, "b": {"kernel": 7.0}}
    part = tree.restrict(jax.tree.map(lambda x: x + 1, OTHER), ["0/bias", "1/scale"])
    updated = tree.update(OTHER, part)
    assert jax.tree.structure(updated) == jax.tree.structure(OTHER)
    np.testing.assert_array_equal(updated[0].kernel, OTHER[0].kernel)
    np.testing.assert_array_equal(updated[0].bias, np.ones(3))
    np.testing.assert_array_equal(updated[1]["scale"], 2.0)


@pytest.mark.parametrize("like", [DICT, OTHER], ids=["dict", "list"])
def test_fill_is_zero_where_the_part_has_no_leaf(like):
    first, *rest = tree.flatten(like)
    filled = tree.fill(tree.restrict(like, [first]), like)
    assert jax.tree.structure(filled) == jax.tree.structure(like)
    leaves = tree.flatten(filled)
    np.testing.assert_array_equal(leaves[first], tree.flatten(like)[first])
    assert all(not np.any(leaves[path]) for path in rest)


def test_fill_takes_the_dtypes_of_the_model():
    like = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(1, jnp.bfloat16)}
    filled = tree.fill({"w": jnp.ones(2)}, like)
    assert {leaf.dtype for leaf in filled.values()} == {jnp.dtype("bfloat16")}


def test_stack_and_unstack_are_inverse():
    trees = [jax.tree.map(lambda x, i=i: x + i, OTHER) for i in range(3)]
    stacked = tree.stack(trees)
    assert stacked[0].kernel.shape == (3, 2, 3)
    for one, again in zip(trees, tree.unstack(stacked), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, again)


@pytest.mark.parametrize("trees", [[{"a": 1.0}, DICT], [DICT, {"b": DICT["b"]}]])
def test_stack_refuses_trees_of_different_structure(trees):
    with pytest.raises(ValueError, match="does not fit"):
        tree.stack(trees)


def test_check_part_lists_every_path_and_both_shapes():
    whole = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    part = {"a": jnp.ones((3, 2)), "c": jnp.ones(5)}
    with pytest.raises(ValueError) as error:
        tree.check_part(part, whole, "task vector", "model")
    assert str(error.value) == (
        "the task vector does not fit the model (2 leaves):\n"
        "  + c [5]: not in the model\n"
        "  ! a: [3, 2] in the task vector, [2, 3] in the model"
    )


def test_check_part_shows_ten_paths_of_many():
    with pytest.raises(ValueError, match=r"\(12 leaves\)(.|\n)*… and 2 more"):
        tree.check_part({str(i): 0.0 for i in range(12)}, {})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_path(value):
    bad = {"ids": jnp.arange(3), "a": {"w": jnp.ones(3).at[1].set(value), "b": 1.0}}
    with pytest.raises(ValueError, match="the model has NaN or infinite .* a/w"):
        tree.check_finite(bad, "model")


@pytest.mark.parametrize("size", [1, 7, 1000, 8192, 3 * 2**18 + 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_bad_value_is_found_wherever_it_is_in_leaves_of_any_size(size, dtype):
    # XLA's maximum on CPUs loses NaN in vectors of float32 from some length on.
    values = jax.random.normal(jax.random.key(0), (size,)).astype(dtype)
    extreme = values.at[0].set(jnp.finfo(dtype).max).at[-1].set(-jnp.finfo(dtype).tiny)
    tree.check_finite({"w": extreme}, "model")
    for place in {0, size // 2, size - 1}:
        for value in (np.nan, np.inf, -np.inf):
            assert not tree.is_finite({"w": extreme.at[place].set(value)})


def test_check_finite_accepts_integers_and_traced_values():
    tree.check_finite({"ids": jnp.arange(3), "w": np.ones(2), "b": 1.0}, "model")

    @jax.jit
    def traced(w):
        tree.check_finite({"w": w}, "model")
        return w

    assert np.isnan(traced(jnp.nan))


SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0)])


@settings(max_examples=15)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4), data=st.data())
def test_gram_is_that_of_concatenated_vectors(shapes, data):
    trees, rows = [{}, {}, {}], [[], [], []]
    for number, shape in enumerate(shapes):
        for i in range(3):
            present = i == 0 or data.draw(st.booleans())
            leaf = normal((number, i), *shape) if present else np.zeros(shape)
            rows[i].append(leaf.ravel())
            if present:
                trees[i][str(number)] = leaf
    vectors = np.stack([np.concatenate(row) for row in rows])
    with jax.enable_x64(True):
        actual = tree.gram(trees)
    np.testing.assert_allclose(actual, vectors @ vectors.T, rtol=1e-12, atol=1e-12)


def test_gram_accumulates_bfloat16_leaves_in_float32():
    ones = {"w": jnp.ones(1000, jnp.bfloat16), "s": jnp.bfloat16(1)}  # 1001: 10 bits
    gram = tree.gram([ones, ones])
    assert gram.dtype == jnp.float32
    np.testing.assert_array_equal(gram, np.full((2, 2), 1001))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gram_has_the_precision_of_the_leaves(dtype):
    with jax.enable_x64(True):
        assert tree.gram([{"w": jnp.ones(2, dtype)}]).dtype == dtype


def test_gram_names_the_path_of_leaves_that_differ_in_shape():
    with pytest.raises(ValueError, match=r"shape of a/w: \[\(2,\), \(3,\)\]"):
        tree.gram([{"a": {"w": jnp.ones(2)}}, {"a": {"w": jnp.ones(3)}}])


def test_cosine_of_a_zero_tree_is_zero_with_finite_gradient():
    def total(trees):
        return tree.cosine(tree.gram(trees)).sum()

    trees = [{"w": jnp.zeros(3)}, {"w": jnp.array([3.0, 4.0, 0.0])}]
    np.testing.assert_allclose(tree.cosine(tree.gram(trees)), [[0, 0], [0, 1]])
    gradient = jax.grad(total)(trees)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_safe_sqrt_has_derivative_zero_at_zero_and_keeps_nan():
    points = jnp.array([4.0, 0.0, -1e-9, jnp.nan])
    np.testing.assert_array_equal(tree.safe_sqrt(points), [2, 0, 0, np.nan])
    slopes = jax.vmap(jax.grad(tree.safe_sqrt))(points)
    np.testing.assert_array_equal(slopes, [0.25, 0, 0, np.nan])


@example(shapes=[()])
@example(shapes=[(2, 0)])
@given(shapes=st.lists(SHAPES, max_size=4))
def test_size_counts_all_entries(shapes):
    leaves = [np.zeros(shape) for shape in shapes]
    assert tree.size(leaves) == sum(leaf.size for leaf in leaves)


def test_map_with_path_passes_slash_paths():
    paths = tree.map_with_path(lambda path, leaf: f"{path}={leaf}", DICT)
    assert paths["a"]["bias"] == "a/bias=1.0"


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b")])
def test_a_leaf_above_another_has_no_nested_dict(paths):
    with pytest.raises(ValueError, match="is a leaf, and another leaf is"):
        tree.unflatten(dict.fromkeys(paths, 1.0))


def test_absent_leaves_take_no_memory():
    rows = tree.aligned([{"a": jnp.ones((100, 10))}, {"b": jnp.ones(3, jnp.bfloat16)}])
    absent = rows["a"][1]
    assert absent.shape == (100, 10) and absent.dtype == jnp.float32
    assert absent.strides == (0, 0) and not absent.any()
    assert rows["b"][0].dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(1_000_000,), (3, 5000), (4097,), (10, 100)])
def test_gram_of_long_leaves_is_exact_to_float32(shape):
    trees = [{"w": normal(i, *shape).astype(np.float32) + 1} for i in range(2)]
    wide = np.array([t["w"].ravel() for t in trees], np.float64)
    np.testing.assert_allclose(tree.gram(trees), wide @ wide.T, rtol=1e-6)
