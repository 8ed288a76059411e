"""Task vectors and their arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from oracles import normal

from jaxarith import task_vectors, tree

PARAMS_0 = {
    "a": {"kernel": normal(0, 3, 4), "bias": normal(1, 4)},
    "ids": np.arange(3),
    "scale": normal(2),
}
PARAMS = {
    "a": {"kernel": normal(3, 3, 4), "bias": normal(4, 4)},
    "ids": np.arange(3),
    "scale": normal(5),
}


def test_apply_is_the_inverse_of_difference():
    with jax.enable_x64(True):
        tau = task_vectors.difference(PARAMS, PARAMS_0)
        back = task_vectors.apply(PARAMS_0, tau)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-14),
            *(back, PARAMS),
        )


def test_difference_covers_the_part_that_is_given():
    part = tree.select(PARAMS, "a/bias|scale")
    tau = task_vectors.difference(part, PARAMS_0)
    assert tree.flatten(tau).keys() == {"a/bias", "scale"}
    expected = np.float32(PARAMS["scale"]) - np.float32(PARAMS_0["scale"])
    np.testing.assert_allclose(tau["scale"], expected, rtol=1e-6)


@pytest.mark.parametrize("function", [task_vectors.difference, task_vectors.apply])
def test_what_does_not_fit_is_named_with_both_shapes(function):
    a, b = {"w": jnp.ones(2)}, {"w": jnp.ones(3)}
    args = (b, a) if function is task_vectors.difference else (a, b)
    with pytest.raises(ValueError, match=r"w: \[3\] in the .*, \[2\] in the"):
        function(*args)


def test_apply_leaves_what_tau_lacks_alone():
    tau = {"a": {"bias": jnp.ones(4)}}
    params = task_vectors.apply(PARAMS_0, tau, 0.5)
    assert params["ids"] is PARAMS_0["ids"]
    assert params["a"]["kernel"] is PARAMS_0["a"]["kernel"]
    np.testing.assert_allclose(
        params["a"]["bias"], PARAMS_0["a"]["bias"] + 0.5, rtol=1e-6
    )


def test_bfloat16_models_have_float32_task_vectors():
    params_0 = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
    params = {"w": jnp.array([1.0078125, -3.0], jnp.bfloat16)}
    tau = task_vectors.difference(params, params_0)
    assert tau["w"].dtype == jnp.float32
    np.testing.assert_array_equal(tau["w"], [0.0078125, -5])
    moved = task_vectors.apply(params_0, tau)
    assert moved["w"].dtype == jnp.bfloat16
    assert_close(moved, params)


def test_apply_rounds_bfloat16_once():
    # 0.3 · tau would round to bfloat16 first if the sum were not taken in float32.
    params_0 = {"w": jnp.full(1, 1.0, jnp.bfloat16)}
    tau = {"w": jnp.full(1, 0.12109375, jnp.float32)}
    moved = task_vectors.apply(params_0, tau, 0.3)
    expected = jnp.asarray(1 + np.float32(0.3) * np.float32(0.12109375), jnp.bfloat16)
    np.testing.assert_array_equal(moved["w"][0], expected)


def test_add_is_over_the_union_of_leaves():
    total = task_vectors.add([{"a": {"w": 1.0}}, {"a": {"w": 2.0, "b": 3.0}}])
    assert_close(total, {"a": {"w": 3.0, "b": 3.0}})


def test_sums_have_the_structure_of_a_vector_with_all_leaves():
    tau = ({"a/b": jnp.array(1.0)}, [jnp.array(2.0), {"c": jnp.array(3.0)}])
    expected = jax.tree.map(lambda leaf: 3 * leaf, tau)
    assert_close(task_vectors.add([tau, tau, tau]), expected)
    part = ({}, [jnp.array(2.0), {}])
    total = task_vectors.add([part, tau])
    assert_close(total, ({"a/b": 1.0}, [4.0, {"c": 3.0}]))
    assert_close(task_vectors.analogy(tau, tau, tau), tau)


def test_add_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        task_vectors.add([])


def test_negate_forgets_what_apply_learned():
    tau = task_vectors.difference(PARAMS, PARAMS_0)
    assert_close(
        task_vectors.apply(PARAMS_0, task_vectors.negate(tau)),
        task_vectors.apply(PARAMS_0, tau, -1.0),
    )


def test_analogy_is_c_plus_b_minus_a():
    a, b, c = ({"w": jnp.array(value)} for value in (1.0, 10.0, 100.0))
    assert_close(task_vectors.analogy(a, b, c), {"w": 109.0})
    partial = task_vectors.analogy({"v": jnp.array(1.0)}, b, c)
    assert_close(partial, {"w": 110.0, "v": -1.0})


def test_analogy_weighs_c_and_the_difference_each_by_its_own_coefficient():
    trees = [{"w": normal(seed, 3, 4), "s": normal(seed + 9)} for seed in range(3)]
    with jax.enable_x64(True):
        found = task_vectors.analogy(*trees, coefs=(0.3, 0.7))
    for path in ("w", "s"):
        a, b, c = (tau[path] for tau in trees)
        np.testing.assert_allclose(found[path], 0.3 * c + 0.7 * (b - a), rtol=1e-12)
    a, b, c = jax.tree.map(jnp.float32, trees)
    plain = task_vectors.add([c, b, task_vectors.negate(a)])
    assert_close(task_vectors.analogy(a, b, c), plain)
    assert_close(task_vectors.analogy(a, b, c, (1.0, 0.0)), c)


def test_random_like_has_the_norm_of_every_leaf():
    tau = {"w": jnp.asarray(normal(0, 30, 20)), "s": jnp.array(-2.0), "e": jnp.ones(0)}
    noise = task_vectors.random_like(jax.random.key(0), tau)
    for path in ("w", "s", "e"):
        assert noise[path].shape == tau[path].shape
        np.testing.assert_allclose(
            *(np.linalg.norm(t[path]) for t in (noise, tau)), rtol=1e-6
        )
    cosine = task_vectors.cosine_matrix([{"w": noise["w"]}, {"w": tau["w"]}])[0, 1]
    assert 0 < abs(cosine) < 0.1  # 600 entries: 0.04 is one standard deviation


def test_random_like_depends_on_the_key_and_the_path_alone():
    w = jnp.ones((3, 4))
    key = jax.random.key(0)
    alone = task_vectors.random_like(key, {"b": {"w": w}})
    among = task_vectors.random_like(key, {"a": w, "b": {"v": w, "w": w}, "c": w})
    np.testing.assert_array_equal(alone["b"]["w"], among["b"]["w"])
    assert not np.array_equal(among["b"]["v"], among["b"]["w"])
    other = task_vectors.random_like(jax.random.key(1), {"b": {"w": w}})
    assert not np.array_equal(alone["b"]["w"], other["b"]["w"])


def test_norm_is_that_of_the_whole_vector():
    assert task_vectors.norm({"w": jnp.array([2.0, 4.0]), "s": jnp.array(4.0)}) == 6


def test_norm_has_gradient_zero_at_zero():
    zero = {"w": jnp.zeros(3), "s": jnp.zeros(())}
    assert_close(jax.grad(task_vectors.norm)(zero), zero)


def test_norm_of_nan_is_nan():
    assert np.isnan(task_vectors.norm({"w": jnp.array([1.0, jnp.nan])}))


def test_cosine_matrix_is_that_of_concatenated_vectors():
    taus = [{"w": normal((i, 0), 2, 3), "b": normal((i, 1), 2)} for i in range(3)]
    del taus[2]["b"]
    rows = [
        np.concatenate([tau["w"].ravel(), tau.get("b", np.zeros(2))]) for tau in taus
    ]
    unit = np.stack([row / np.linalg.norm(row) for row in rows])
    with jax.enable_x64(True):
        cosines = task_vectors.cosine_matrix(taus)
    np.testing.assert_allclose(cosines, unit @ unit.T, rtol=1e-12)


def test_integers_are_no_part_of_a_task_vector():
    start = {"w": jnp.ones(2), "steps": jnp.array(3)}
    tuned = {"w": 3 * jnp.ones(2), "steps": jnp.array(7)}
    tau = task_vectors.difference(tuned, start)
    assert set(tau) == {"w"}
    assert task_vectors.apply(start, tau)["steps"] == 3
