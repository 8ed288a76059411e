"""AWD with a redundant vector of every row of a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxarith import merge, tree
from jaxarith.merge import _awd_rows
from jaxarith.merge.awd import redundant_coefs


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


LAYER = {"weight": (4, 6), "kernel": (6, 4), "bias": (6,), "conv/kernel": (1, 3, 2)}


def layers(tasks, seed=0):
    """Task vectors with a common part; `kernel` is the transpose of `weight`."""

    def drawn(*seeds):
        found = {
            path: oracles.normal((seed, *seeds, i), *shape)
            for i, (path, shape) in enumerate(LAYER.items())
        }
        return found | {"kernel": found["weight"].T}

    shared = drawn(99)
    return [
        tree.unflatten({path: shared[path] + leaf for path, leaf in drawn(i).items()})
        for i in range(tasks)
    ]


ZEROS = jax.tree.map(np.zeros_like, layers(1)[0])


def rows_of(path, leaf):
    """The rows of a leaf: one for every output of a layer, else one for the leaf."""
    return {"weight": leaf, "kernel": leaf.T}.get(path, leaf.reshape(1, -1))


def in_rows(taus, solve):
    """`solve(taus[task, n]) -> δ[n]` of every row: `{path: δ[row, n]}`."""
    leaves = [tree.flatten(tau) for tau in taus]

    def of_leaf(path):
        rows = zip(*(rows_of(path, own[path]) for own in leaves), strict=True)
        return np.stack([solve(jnp.stack(row)) for row in rows])

    return {path: of_leaf(path) for path in LAYER}


def row_deltas(merged, taus):
    """The redundant vectors of a model merged from zero with coefficient 1."""
    lacking = jax.tree.map(lambda m, *t: (sum(t) - m) / len(t), merged, *taus)
    return {path: rows_of(path, leaf) for path, leaf in tree.flatten(lacking).items()}


def assert_close(found, expected):
    for path, rows in expected.items():
        assert np.linalg.norm(rows) > 1e-2
        np.testing.assert_allclose(found[path], rows, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", ["gradient_descent", "momentum"])
@pytest.mark.parametrize("objective", ["reduce", "reverse"])
def test_row_scope_is_the_descent_of_every_row(solver, objective):
    taus, momentum = layers(3), 0.9 if solver == "momentum" else 0.0
    sign = -1.0 if objective == "reverse" else 1.0

    def solve(part):
        rate = 0.01 * jnp.mean(jnp.sum(part**2, axis=1))
        return oracles.awd_momentum(part, 0.01, rate, 20, momentum, sign)

    options = dict(coef=1.0, alpha=0.01, steps=20, scope="row", objective=objective)
    merged = merge.awd(ZEROS, taus, solver=solver, **options)
    assert_close(row_deltas(merged, taus), in_rows(taus, solve))
    # A kernel of Flax is the transpose of PyTorch's weight.
    np.testing.assert_array_equal(merged["kernel"], merged["weight"].T)


def test_adam_in_rows_is_adam_of_every_row():
    taus = layers(3)
    options = dict(coef=1.0, alpha=0.01, steps=15, solver="adam")
    merged = merge.awd(ZEROS, taus, scope="row", **options)

    def solve(part):
        zero = {"w": jnp.zeros(part.shape[1])}
        alone = merge.awd(zero, [{"w": tau} for tau in part], **options)
        return (part.sum(0) - alone["w"]) / len(part)

    assert_close(row_deltas(merged, taus), in_rows(taus, solve))


def test_the_direct_solver_is_below_gradient_descent_in_every_row():
    taus, alpha = layers(4), 0.02
    options = dict(coef=1.0, alpha=alpha, scope="row")
    leaves = [tree.flatten(tau) for tau in taus]
    loss, values = jax.jit(oracles.awd_loss), []
    for solver in ("direct", "gradient_descent"):
        deltas = row_deltas(merge.awd(ZEROS, taus, solver=solver, **options), taus)
        values.append(
            [
                loss(delta, jnp.stack(row), alpha)
                for path in LAYER
                for delta, *row in zip(
                    deltas[path],
                    *(rows_of(path, own[path]) for own in leaves),
                    strict=True,
                )
            ]
        )
    gaps = np.subtract(*values)
    assert gaps.max() < 1e-12 and gaps.min() < -1e-4


def test_rows_do_not_depend_on_the_chunks_in_which_they_are_solved(monkeypatch):
    options = dict(coef=1.0, steps=20, scope="row")
    whole = merge.awd(ZEROS, layers(3), **options)
    monkeypatch.setattr(_awd_rows, "ENTRIES", 3 * 9)  # three rows of three tasks
    parts = tree.flatten(merge.awd(ZEROS, layers(3), **options))
    for path, leaf in tree.flatten(whole).items():
        np.testing.assert_allclose(parts[path], leaf, rtol=1e-12, atol=1e-12)


def test_rows_take_coefficients_by_task_and_path_and_a_row_that_is_zero():
    taus = layers(3)
    taus[1]["weight"] = taus[1]["weight"].copy()
    taus[1]["weight"][2] = 0
    options = dict(steps=20, scope="row", solver="momentum")
    delta = row_deltas(merge.awd(ZEROS, taus, coef=1.0, **options), taus)
    coefs = {path: jnp.array([0.1, 0.2, 0.3]) for path in LAYER} | {"bias": 0.5}
    merged = jax.jit(
        lambda taus: merge.awd(ZEROS, taus, coef=lambda path: coefs[path], **options)
    )(taus)
    for path, found in tree.flatten(merged).items():
        own = jnp.broadcast_to(coefs[path], 3)
        rows = jnp.stack([rows_of(path, tree.flatten(tau)[path]) for tau in taus])
        expected = jnp.einsum("t,trn->rn", own, rows - delta[path][None])
        np.testing.assert_allclose(rows_of(path, found), expected, 1e-9, 1e-12)


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_the_merge_is_task_arithmetic_with_a_scalar_for_every_task_and_part(scope):
    # λ Σ(τ_k - δ) = λ Σ(1 - K c_k) τ_k, with one c for all, for a leaf, or for a row.
    taus, coef = layers(3), 0.4
    options = dict(alpha=0.01, step_size=0.02, steps=30)
    merged = merge.awd(ZEROS, taus, coef=coef, scope=scope, **options)
    leaves = [tree.flatten(tau) for tau in taus]
    whole = jnp.stack(
        [jnp.concatenate([*map(jnp.ravel, own.values())]) for own in leaves]
    )
    for path, found in tree.flatten(merged).items():
        rows = np.stack([rows_of(path, own[path]) for own in leaves], axis=1)
        if scope != "row":
            rows = rows.swapaxes(0, 1).reshape(1, 3, -1)
        expected = []
        for part in map(jnp.asarray, rows):
            shared = whole if scope == "global" else part
            c = redundant_coefs(shared @ shared.T, **options)
            expected.append(coef * (1 - 3 * c) @ part)
        actual = np.ravel(rows_of(path, found))
        np.testing.assert_allclose(actual, np.ravel(expected), rtol=1e-9, atol=1e-12)
