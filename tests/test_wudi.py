"""WUDI: iterates of Adam on the paper's loss, and its minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxarith import merge

OUT, IN = 5, 7


def loss(tau, taus):
    """The paper's, on weights [output, input]."""
    inner = jnp.matmul(tau[None] - taus, jnp.swapaxes(taus, 1, 2))
    squares = jnp.sum(taus**2, axis=(1, 2))
    return jnp.sum(jnp.sum(inner**2, axis=(1, 2)) / squares)


def torch_adam(taus, steps, learning_rate):
    """Kingma and Ba's, on the gradient of the loss by automatic differentiation."""
    x, m, v = taus.sum(axis=0), 0, 0
    gradient = jax.jit(jax.grad(loss))
    for i in range(1, steps + 1):
        g = np.asarray(gradient(x, taus))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - learning_rate * (m / (1 - 0.9**i)) / (
            np.sqrt(v / (1 - 0.999**i)) + 1e-8
        )
    return x


def vectors(tasks=3, scale=0.1):
    return scale * (oracles.normal(0, tasks, OUT, IN) + oracles.normal(1, OUT, IN))


def wudi(taus, **options):
    """Of weights [output, input], stored as kernels."""
    taus = [{"kernel": tau.T} for tau in taus]
    return merge.wudi({"kernel": np.zeros((IN, OUT))}, taus, **options)["kernel"].T


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_iterates_are_those_of_adam_on_the_paper_s_loss(steps):
    taus = vectors()
    merged = wudi(taus, steps=steps, learning_rate=1e-3)
    expected = torch_adam(taus, steps, 1e-3)
    assert steps == 0 or np.abs(expected - taus.sum(axis=0)).max() > 5e-4
    np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-11)


def test_float32_vectors_stay_so_where_float64_is_on():
    taus = vectors().astype(np.float32)
    params_0 = {"kernel": np.zeros((IN, OUT), np.float32)}
    merged = merge.wudi(params_0, [{"kernel": tau.T} for tau in taus], steps=40)
    assert merged["kernel"].dtype == np.float32
    np.testing.assert_allclose(
        merged["kernel"].T, wudi(vectors(), steps=40), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("tasks", [2, 4])
def test_closed_form_is_a_stationary_point(tasks):
    taus = vectors(tasks)
    merged = np.asarray(wudi(taus, solver="closed"))
    for seed in range(5):
        direction = oracles.normal(seed, OUT, IN)
        slope = oracles.central_difference(
            lambda tau: loss(tau, taus), merged, direction, h=1e-2
        )
        at_start = oracles.central_difference(
            lambda tau: loss(tau, taus), np.zeros((OUT, IN)), direction, h=1e-2
        )
        assert abs(slope) < 1e-9 * abs(at_start)


def test_closed_form_is_the_pseudo_inverse():
    taus = vectors(2)[:, :2]  # ranks 2 and 2 of 7: many minima
    grams = np.stack([tau.T @ tau / np.sum(tau**2) for tau in taus])
    right = np.sum(taus @ grams, axis=0)
    expected = right @ np.linalg.pinv(grams.sum(axis=0), hermitian=True)
    params_0 = {"kernel": np.zeros((IN, 2))}
    merged = merge.wudi(params_0, [{"kernel": t.T} for t in taus], solver="closed")
    np.testing.assert_allclose(merged["kernel"].T, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 8), (8, 8)])
def test_closed_form_in_float32_of_well_conditioned_matrices(shape):
    # Singular values from 0.5 to 1: those of the sum of Gram matrices are alike.
    taus = []
    for seed in range(3):
        u, _, vt = np.linalg.svd(oracles.normal(seed, *shape), full_matrices=False)
        taus.append(u * np.linspace(0.5, 1, len(vt)) @ vt)

    def closed(dtype):
        rows = [{"kernel": tau.T.astype(dtype)} for tau in taus]
        params_0 = {"kernel": np.zeros(shape[::-1], dtype)}
        return merge.wudi(params_0, rows, solver="closed")["kernel"]

    merged, expected = closed(np.float32), closed(np.float64)
    assert merged.dtype == np.float32
    assert np.abs(expected - sum(taus).T).max() > 0.1
    np.testing.assert_allclose(merged, expected, atol=2e-6)


def test_closed_form_in_float32_does_not_move_along_unresolved_directions():
    # Below √(nε) = 4.9e-4 of the largest singular value, which is 1.
    first, second = np.diag([1.0, 1e-2]), np.diag([1.0, 1e-4])
    for tau, resolved in [(first, True), (second, False)]:
        taus = [{"kernel": tau.astype(np.float32)}] * 2
        params_0 = {"kernel": np.zeros((2, 2), np.float32)}
        merged = merge.wudi(params_0, taus, solver="closed")["kernel"]
        expected = tau if resolved else np.diag([1.0, 0.0])
        np.testing.assert_allclose(merged, expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_gradients_are_those_of_finite_differences(solver):
    taus, direction = vectors(), oracles.normal(7, 3, OUT, IN)

    def entries(taus):
        return jnp.sum(wudi(taus, solver=solver, steps=5, learning_rate=1e-3) ** 3)

    gradient = jax.grad(entries)(jnp.asarray(taus))
    expected = oracles.central_difference(entries, taus, direction, h=1e-5)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(jnp.sum(gradient * direction), expected, rtol=1e-6)


def test_iterates_descend_towards_the_minimum():
    taus = vectors()
    losses = [
        float(loss(wudi(taus, steps=steps, learning_rate=1e-3), taus))
        for steps in (0, 100, 2000)
    ]
    minimum = float(loss(wudi(taus, solver="closed"), taus))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.5 * minimum
    assert minimum < losses[-1] < minimum * 1.01


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_one_task_is_given_back(solver):
    taus = vectors(1)
    np.testing.assert_array_equal(wudi(taus, solver=solver), taus[0])


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_tasks_with_orthogonal_inputs_add_up(solver):
    taus = np.zeros((2, OUT, IN))
    taus[0, :, :3], taus[1, :, 3:] = (
        oracles.normal(0, OUT, 3),
        oracles.normal(1, OUT, 4),
    )
    merged = wudi(taus, solver=solver)
    np.testing.assert_allclose(merged, taus.sum(axis=0), atol=1e-7)


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_zero_task_vector_changes_nothing(solver):
    taus = vectors(2)
    with_zero = np.concatenate([taus, np.zeros((1, OUT, IN))])
    options = dict(solver=solver, steps=20)
    np.testing.assert_allclose(
        wudi(with_zero, **options), wudi(taus, **options), atol=1e-12
    )


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_weights_of_pytorch_are_the_transposes_of_kernels(solver):
    taus = vectors()
    options = dict(solver=solver, steps=20, matrices=".*(kernel|weight)")
    params_0 = {"weight": np.zeros((OUT, IN)), "kernel": np.zeros((IN, OUT))}
    merged = merge.wudi(
        params_0, [{"weight": tau, "kernel": tau.T} for tau in taus], **options
    )
    np.testing.assert_allclose(merged["weight"], merged["kernel"].T, atol=1e-14)


def test_other_leaves_stay_or_are_averaged():
    taus = [{"kernel": tau.T, "b": np.full(2, 3.0)} for tau in vectors(2)]
    params_0 = {"kernel": np.zeros((IN, OUT)), "b": np.ones(2)}
    np.testing.assert_array_equal(merge.wudi(params_0, taus, steps=1)["b"], [1, 1])
    averaged = merge.wudi(params_0, taus, steps=1, others="average")
    np.testing.assert_array_equal(averaged["b"], [4, 4])


def test_without_a_matrix_there_is_something_to_merge_or_an_error():
    params_0, taus = {"b": np.ones(2)}, [{"b": np.full(2, 3.0)}, {"b": np.full(2, 1.0)}]
    averaged = merge.wudi(params_0, taus, others="average")
    np.testing.assert_array_equal(averaged["b"], [3, 3])
    for matrices in (None, ".*kernel"):
        with pytest.raises(ValueError, match="no 2-D leaf.* others='average'"):
            merge.wudi(params_0, taus, matrices=matrices)


def test_a_pattern_without_a_match_is_an_error_that_shows_paths():
    taus = [{"layer": {"weight": tau}} for tau in vectors(2)]
    with pytest.raises(ValueError, match="include layer/weight. matrices=None takes"):
        merge.wudi(taus[0], taus, matrices=".*kernel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "sgd"}, "unknown solver 'sgd'; known are adam, closed"),
        ({"others": "sum"}, "unknown others 'sum'; known are pretrained, average"),
    ],
)
def test_unknown_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        wudi(vectors(), **options)


def flow_in_numpy(taus, time, rank=None, weighting="norm"):
    """The formula of the spectral filter, on weights [output, input]."""
    squares = [np.sum(tau**2) if weighting == "norm" else 1 for tau in taus]
    grams = [tau.T @ tau / s for tau, s in zip(taus, squares, strict=True)]
    total, start = sum(grams), taus.sum(axis=0)
    right = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
    values, vectors = np.linalg.eigh(total)
    time = time * len(taus) / values.sum()
    new = start.copy()
    for k in np.argsort(values)[::-1][:rank]:
        q, value = vectors[:, k], values[k]
        factor = (1 - np.exp(-time * value)) / value
        new += factor * np.outer((right - start @ total) @ q, q)
    return new


@pytest.mark.parametrize("weighting", ["norm", "none"])
@pytest.mark.parametrize(("time", "rank"), [(0.7, None), (3.0, 2), (40.0, 5)])
def test_the_filter_is_the_papers(time, rank, weighting):
    taus = vectors(4, scale=0.3)
    found = wudi(taus, solver="closed", time=time, rank=rank, weighting=weighting)
    expected = flow_in_numpy(taus, time, rank, weighting)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_the_filter_is_the_limit_of_small_steps_of_gradient_descent():
    taus, time, steps = vectors(3), 2.0, 4000
    x, gradient = taus.sum(axis=0), jax.jit(jax.grad(loss))
    for _ in range(steps):  # half the gradient is that of the flow
        x = x - time / steps * np.asarray(gradient(x, taus)) / 2
    found = wudi(taus, solver="closed", time=time)
    moved = np.abs(x - taus.sum(axis=0)).max()
    assert moved > 0.01
    # Euler's error: first order in the step.
    np.testing.assert_allclose(found, x, atol=1e-3 * moved)


def test_the_filter_has_two_limits():
    taus = vectors(3)
    at_once = wudi(taus, solver="closed", time=0.0)
    np.testing.assert_allclose(at_once, taus.sum(axis=0), rtol=1e-12)
    late = wudi(taus, solver="closed", time=1e12)
    minimum = wudi(taus, solver="closed")
    np.testing.assert_allclose(late, minimum, rtol=1e-6, atol=1e-8)
    every = wudi(taus, solver="closed", rank=IN)
    np.testing.assert_allclose(every, minimum, rtol=1e-6, atol=1e-8)


def test_participation_counts_equal_eigenvalues_and_leaves_the_rest_as_summed():
    # Two eigenvalues that are alike, and others of a millionth: K is 3, rounded up.
    spectrum = np.array([1.0, 1.0, 1e-3, 1e-3, 1e-3, 0, 0])
    q = np.linalg.qr(oracles.normal(3, IN, IN))[0]
    p = np.linalg.qr(oracles.normal(4, IN, IN))[0]
    taus = np.stack([p @ np.diag(spectrum) @ q.T, 2 * p @ np.diag(spectrum) @ q.T])
    params_0 = {"kernel": np.zeros((IN, IN))}
    rows = [{"kernel": tau.T} for tau in taus]
    roots = 2 * np.sqrt(2) + 3e-3 * np.sqrt(2)
    count = int(np.ceil(roots**2 / (4 + 6e-6)))
    assert count == 3
    found = merge.wudi(params_0, rows, solver="closed", rank="participation")
    fixed = merge.wudi(params_0, rows, solver="closed", rank=count)
    np.testing.assert_allclose(found["kernel"], fixed["kernel"], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"time": 1.0}, 'time and rank are for solver="closed"'),
        ({"solver": "closed", "time": -1.0}, "time is -1.0"),
        ({"solver": "closed", "rank": 0}, "rank is 0"),
        ({"solver": "closed", "rank": "some"}, "rank is 'some'"),
        ({"weighting": "some"}, "unknown weighting"),
    ],
)
def test_a_filter_out_of_range_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        wudi(vectors(), **options)
