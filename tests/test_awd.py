"""AWD: the iterates in Gram space are those of descent in the space of the weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from jaxarith import merge, tree
from jaxarith.merge import _awd_solvers
from jaxarith.merge.awd import redundant_coefs


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def correlated(tasks, size=50):
    """Task vectors with a common component and unequal norms."""
    taus = oracles.normal(tasks, tasks, size) + oracles.normal(99, size)
    return jnp.asarray(taus * np.linspace(0.5, 2, tasks)[:, None])


def learning_rate(taus, step_size):
    return step_size * jnp.mean(jnp.sum(taus**2, axis=1))


def mean_abs_cosine(taus):
    return oracles.awd_loss(jnp.zeros_like(taus[0]), taus, 0.0)


@pytest.mark.parametrize("tasks", [2, 4])
@pytest.mark.parametrize(
    ("alpha", "step_size"), [(0.0, 0.01), (1e-2, 0.05), (0.03, 0.02)]
)
def test_gram_space_iterates_are_those_of_the_full_space(tasks, alpha, step_size):
    taus, steps = correlated(tasks), 60
    expected = oracles.awd_descent(taus, alpha, learning_rate(taus, step_size), steps)
    c = redundant_coefs(taus @ taus.T, alpha, step_size, steps)
    assert jnp.linalg.norm(expected) > 1e-3
    np.testing.assert_allclose(c @ taus, expected, rtol=1e-10, atol=1e-10)


def test_one_step_is_the_finite_difference_gradient_of_the_loss():
    taus = correlated(4, size=6)
    delta = jnp.zeros(6)  # α‖δ‖ has no gradient there, so α plays no part
    gradient = [
        oracles.central_difference(
            lambda delta: oracles.awd_loss(delta, taus, 0.0), delta, direction
        )
        for direction in np.eye(6)
    ]
    c = redundant_coefs(taus @ taus.T, 0.1, 1.0, steps=1)
    expected = -learning_rate(taus, 1.0) * jnp.array(gradient)
    np.testing.assert_allclose(c @ taus, expected, rtol=1e-9, atol=1e-9)


def test_merged_model_is_task_arithmetic_of_the_disentangled_vectors():
    taus, params_0, coefs = (
        correlated(3),
        oracles.normal(7, 50),
        jnp.array([0.3, 1, -2]),
    )
    delta = oracles.awd_descent(taus, 0.01, learning_rate(taus, 0.02), 30)
    merged = merge.awd(
        {"a": params_0[:20].reshape(4, 5), "b": params_0[20:]},
        [{"a": tau[:20].reshape(4, 5), "b": tau[20:]} for tau in taus],
        **dict(coef=coefs, alpha=0.01, step_size=0.02, steps=30),
    )
    expected = params_0 + coefs @ (taus - delta[None])
    actual = np.concatenate([merged["a"].ravel(), merged["b"]])
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_disentangled_vectors_have_smaller_cosines():
    taus = correlated(5)
    deltas = [
        redundant_coefs(taus @ taus.T, 1e-4, 0.02, steps) @ taus
        for steps in (100, 1000)
    ]
    cosines = [mean_abs_cosine(taus - delta[None]) for delta in (0 * taus[0], *deltas)]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > 0.5 and cosines[-1] < 0.2


@pytest.mark.parametrize("tasks", [2, 5])
def test_delta_stays_zero_when_the_vectors_are_orthogonal(tasks):
    taus = jnp.linalg.qr(oracles.normal(0, 20, tasks))[0].T * 3
    gram = jnp.diag(jnp.diagonal(taus @ taus.T))
    np.testing.assert_array_equal(redundant_coefs(gram, 0.1, 0.01, 100), 0)


def test_delta_stays_near_zero_when_alpha_outweighs_the_cosines():
    taus = correlated(3)
    gradient = oracles.awd_gradient(jnp.zeros(50), taus, 0.0)
    rate = learning_rate(taus, 0.01)
    alpha = 1.5 * jnp.linalg.norm(gradient)
    delta = redundant_coefs(taus @ taus.T, alpha, 0.01, 200) @ taus
    # Descent on a norm ends in steps of its own length about the minimum.
    assert jnp.linalg.norm(delta) <= 2 * rate * alpha


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_delta_scales_with_the_vectors_and_alpha_against_them(scale):
    taus = correlated(4)
    c = redundant_coefs(taus @ taus.T, 0.01, 0.02, 100)
    gram = scale**2 * (taus @ taus.T)
    scaled = redundant_coefs(gram, 0.01 / scale, 0.02, 100)
    np.testing.assert_allclose(scaled, c, rtol=1e-9)


def test_one_task_vector_is_an_error():
    with pytest.raises(ValueError, match="at least two task vectors"):
        merge.awd({"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}])


def reversed_loss(delta, taus, alpha):
    """Eq. 14 with the cosines' sign turned: -(L_O - α‖δ‖)."""
    return -oracles.awd_loss(delta, taus, -alpha)


def descent(loss, taus, learning_rate, steps):
    gradient = jax.jit(jax.grad(loss))
    delta = jnp.zeros_like(taus[0])
    for _ in range(steps):
        delta = delta - learning_rate * gradient(delta)
    return delta


def trees(taus):
    return [{"a": tau[:20].reshape(4, 5), "b": tau[20:]} for tau in taus]


def flat(params):
    return np.concatenate([np.ravel(params["a"]), np.ravel(params["b"])])


def delta_of(params, taus):
    """The redundant vector of a model merged from `params_0` = 0 with coefficient 1."""
    return (jnp.sum(taus, axis=0) - flat(params)) / len(taus)


ZERO = {"a": np.zeros((4, 5)), "b": np.zeros(30)}


@pytest.mark.parametrize("tasks", [2, 4])
def test_reversed_iterates_are_those_of_the_full_space(tasks):
    taus = correlated(tasks)
    expected = descent(
        lambda delta: reversed_loss(delta, taus, 0.01),
        *(taus, learning_rate(taus, 0.02), 60),
    )
    c = redundant_coefs(taus @ taus.T, 0.01, 0.02, 60, reverse=True)
    assert jnp.linalg.norm(expected) > 1e-3
    np.testing.assert_allclose(c @ taus, expected, rtol=1e-10, atol=1e-10)


def test_the_reversed_objective_makes_vectors_parallel():
    taus = correlated(4)
    merged = merge.awd(ZERO, trees(taus), coef=1.0, objective="reverse")
    rest = taus - delta_of(merged, taus)[None]
    assert mean_abs_cosine(rest) > mean_abs_cosine(taus) + 0.1


@pytest.mark.parametrize("objective", ["reduce", "reverse"])
def test_layer_scope_is_the_descent_of_every_leaf(objective):
    taus = correlated(3)
    merged = merge.awd(
        *(ZERO, trees(taus)),
        **dict(coef=1.0, alpha=0.01, step_size=0.02, steps=40),
        **dict(scope="layer", objective=objective),
    )
    loss = oracles.awd_loss if objective == "reduce" else reversed_loss
    parts = [taus[:, :20], taus[:, 20:]]
    expected = jnp.concatenate(
        [
            descent(
                lambda delta, part=part: loss(delta, part, 0.01),
                *(part, learning_rate(part, 0.02), 40),
            )
            for part in parts
        ]
    )
    actual = delta_of(merged, taus)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)
    globally = merge.awd(ZERO, trees(taus), coef=1.0, objective=objective)
    assert jnp.linalg.norm(delta_of(globally, taus) - expected) > 0.1


@pytest.mark.parametrize("reverse", [False, True])
def test_duplicates_do_not_disturb_the_descent(reverse):
    a, b = correlated(2)
    taus = jnp.stack([a, b, a, -b])
    sign = -1 if reverse else 1
    expected = descent(
        lambda delta: sign * oracles.awd_loss(delta, taus, sign * 0.01),
        *(taus, learning_rate(taus, 0.02), 1),
    )
    c = redundant_coefs(taus @ taus.T, 0.01, 0.02, 1, reverse)
    assert jnp.linalg.norm(expected) > 1e-3
    np.testing.assert_allclose(c @ taus, expected, rtol=1e-8, atol=1e-10)
    assert jnp.abs(redundant_coefs(taus @ taus.T, 0.01, 0.02, 1000, reverse)).max() < 10


@pytest.mark.parametrize("solver", ["gradient_descent", "direct", "adam"])
@pytest.mark.parametrize("objective", ["reduce", "reverse"])
def test_vectors_of_one_entry_have_nothing_to_disentangle(solver, objective):
    # Their cosines are 1 or -1, wherever δ is: it stays where it starts.
    with jax.enable_x64(False):
        taus = [{"w": jnp.array(x)} for x in (1.0, -2.0, 3.0, 0.5, 0.0, 1e-4)]
        options = dict(scope="layer", objective=objective, solver=solver)
        merged = merge.awd({"w": jnp.zeros(())}, taus, coef=1.0, **options)
        np.testing.assert_allclose(merged["w"], 2.5001, rtol=1e-5)


@pytest.mark.parametrize("objective", ["reduce", "reverse"])
def test_a_zero_vector_does_not_disturb_the_others(objective):
    taus = correlated(3)
    with_zero = jnp.concatenate([taus, jnp.zeros((1, 50))])
    reverse = objective == "reverse"
    # Of K(K-1) pairs 6 are left of 12, and the mean squared norm is 3/4.
    c = redundant_coefs(taus @ taus.T, 0.02, 0.01, 100, reverse)
    gram = with_zero @ with_zero.T
    actual = redundant_coefs(gram, 0.01, 0.01 * 2 * 4 / 3, 100, reverse)
    assert jnp.abs(c).max() > 1e-3
    np.testing.assert_allclose(actual[:3], c, rtol=1e-9)


def direct(taus, alpha, reverse=False, room=False):
    gram = taus @ taus.T
    start = redundant_coefs(gram, alpha, 0.01, 1000, reverse)
    solve = functools.partial(_awd_solvers.direct, reverse=reverse)
    c, length = solve(gram[None], alpha, start[None], jnp.array([room]))
    return start, c[0], length[0]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("alpha", [1e-3, 0.03])
def test_direct_is_below_gradient_descent_and_a_local_minimum(alpha, reverse):
    loss = jax.jit(reversed_loss if reverse else oracles.awd_loss)
    gaps = []
    for seed in range(4):
        taus = jnp.asarray(oracles.normal(seed, 4, 30) + oracles.normal(seed + 9, 30))
        start, c, length = direct(taus, alpha, reverse)
        assert length == 0
        delta = c @ taus
        value = loss(delta, taus, alpha)
        gaps.append(loss(start @ taus, taus, alpha) - value)
        # In the full space, kinks included: it does not descend in any direction.
        for direction in oracles.normal((seed, 1), 20, 30):
            move = 1e-4 * jnp.linalg.norm(taus) * direction / np.linalg.norm(direction)
            assert loss(delta + move, taus, alpha) >= value - 1e-9
            span = 1e-4 * (direction[:4] @ taus)
            assert loss(delta + span, taus, alpha) >= value - 1e-9
    assert min(gaps) >= -1e-12 and max(gaps) > 1e-5


def test_direct_solution_is_stationary_where_the_objective_is_smooth():
    taus = correlated(4)
    _, c, _ = direct(taus, 0.03, reverse=True)
    gradient = jax.grad(reversed_loss)(c @ taus, taus, 0.03)
    at_zero = jax.grad(reversed_loss)(jnp.zeros(50), taus, 0.03)
    assert jnp.linalg.norm(gradient) < 1e-6 * jnp.linalg.norm(at_zero)


def test_three_vectors_become_orthogonal():
    taus = correlated(3)
    _, c, _ = direct(taus, 0.0)
    assert mean_abs_cosine(taus) > 0.5
    assert mean_abs_cosine(taus - (c @ taus)[None]) < 1e-6


SIMPLEX = np.eye(4) - 1 / 4
SIMPLEX = SIMPLEX / np.linalg.norm(SIMPLEX, axis=1)[:, None]


def test_off_the_span_a_regular_simplex_becomes_orthogonal():
    # All cosines are -1/3. A common orthogonal vector of squared length 1/3 undoes it.
    frame = np.linalg.qr(oracles.normal(0, 50, 4))[0].T
    taus, alpha = jnp.asarray(2 * SIMPLEX @ frame), 1e-3
    solve = functools.partial(
        merge.awd, ZERO, trees(taus), coef=1.0, alpha=alpha, solver="direct"
    )
    in_span = delta_of(solve(), taus)
    deltas = [delta_of(solve(key=jax.random.key(i)), taus) for i in range(2)]
    for delta in deltas:
        np.testing.assert_allclose(taus @ delta, 0, atol=1e-6)
        np.testing.assert_allclose(jnp.linalg.norm(delta), 2 / 3**0.5, rtol=1e-6)
        value = oracles.awd_loss(delta, taus, alpha)
        np.testing.assert_allclose(value, alpha * 2 / 3**0.5, rtol=1e-4)
    assert oracles.awd_loss(in_span, taus, alpha) > 0.2
    assert jnp.linalg.norm(deltas[0] - deltas[1]) > 0.5


def test_vectors_that_fill_their_space_have_no_orthogonal_direction():
    taus = [{"w": jnp.asarray(row)} for row in SIMPLEX]
    params_0 = {"w": np.zeros(4)}
    solve = functools.partial(merge.awd, params_0, taus, solver="direct", alpha=1e-3)
    outside = solve(key=jax.random.key(0))
    np.testing.assert_allclose(outside["w"], solve()["w"], atol=1e-9)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("objective", ["reduce", "reverse"])
def test_adam_is_optax_on_the_loss_of_whole_vectors(scope, objective):
    taus, alpha, steps = correlated(3), 0.01, 25
    loss = oracles.awd_loss if objective == "reduce" else reversed_loss

    def solve(part):
        rate = 0.01 * jnp.sqrt(jnp.mean(part**2))
        optimizer = optax.adam(rate)
        delta = jnp.zeros_like(part[0])
        state = optimizer.init(delta)
        gradient = jax.jit(jax.grad(loss))
        for _ in range(steps):
            updates, state = optimizer.update(gradient(delta, part, alpha), state)
            delta = delta + updates
        return delta

    parts = [taus] if scope == "global" else [taus[:, :20], taus[:, 20:]]
    expected = jnp.concatenate([solve(part) for part in parts])
    merged = merge.awd(
        *(ZERO, trees(taus)),
        **dict(coef=1.0, alpha=alpha, steps=steps, solver="adam"),
        **dict(scope=scope, objective=objective),
    )
    assert jnp.linalg.norm(expected) > 0.1
    np.testing.assert_allclose(delta_of(merged, taus), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", ["direct", "adam"])
def test_other_solvers_keep_the_promises_of_a_merge(solver):
    taus = trees(correlated(4))
    method = functools.partial(merge.awd, coef=0.5, steps=5, solver=solver)

    def total(taus):
        merged = method(ZERO, taus)
        return jnp.sum(merged["b"]), merged

    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, merged), _ = both(taus)
    np.testing.assert_allclose(flat(merged), flat(method(ZERO, taus)), rtol=1e-7)
    partial = [taus[0], {"a": taus[1]["a"]}, *taus[2:]]
    full = [tree.fill(tau, taus[0]) for tau in partial]
    (_, merged), _ = both(full)
    np.testing.assert_allclose(flat(merged), flat(method(ZERO, partial)), rtol=1e-7)
    zeros = [jax.tree.map(jnp.zeros_like, tau) for tau in taus]
    (_, merged), gradients = both(zeros)
    np.testing.assert_array_equal(flat(merged), 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_adam_takes_leaves_of_unlike_dtypes():
    taus = [
        {"a": tau["a"].astype(jnp.float32), "b": tau["b"]}
        for tau in trees(correlated(3))
    ]
    options = dict(coef=1.0, steps=25, solver="adam")
    merged = merge.awd(ZERO, taus, **options)
    expected = merge.awd(ZERO, trees(correlated(3)), **options)
    np.testing.assert_allclose(flat(merged), flat(expected), rtol=1e-4, atol=1e-5)
    assert np.abs(flat(expected) - correlated(3).sum(0)).max() > 0.1


def test_adam_holds_no_wide_copy_of_bfloat16_vectors():
    rows = {"w": (jnp.ones(10_000, jnp.bfloat16),) * 8}
    compiled = _awd_solvers.adam.lower(rows, 1e-4, 0.01, 5, False).compile()
    copy = 8 * 10_000 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * copy


def test_pattern_leaves_other_leaves_at_params_0():
    taus, params_0 = correlated(3), trees(oracles.normal(1, 1, 50))[0]
    merged = merge.awd(params_0, trees(taus), pattern="a|c", steps=10)
    np.testing.assert_array_equal(merged["b"], params_0["b"])
    expected = merge.awd(params_0, [{"a": tau["a"]} for tau in trees(taus)], steps=10)
    np.testing.assert_array_equal(merged["a"], expected["a"])
    with pytest.raises(ValueError, match="no leaf matches 'c'"):
        merge.awd(params_0, trees(taus), pattern="c")


def test_coefficients_may_depend_on_the_path():
    taus = correlated(3)
    whole = delta_of(merge.awd(ZERO, trees(taus), coef=1.0, steps=20), taus)
    coefs = {"a": jnp.array([0.1, 0.2, 0.3]), "b": 0.5}
    merged = merge.awd(ZERO, trees(taus), coef=lambda path: coefs[path], steps=20)
    rest = taus - whole[None]
    expected = jnp.concatenate([coefs["a"] @ rest[:, :20], 0.5 * rest[:, 20:].sum(0)])
    np.testing.assert_allclose(flat(merged), expected, rtol=1e-9, atol=1e-12)


def test_unknown_options_are_errors():
    taus = trees(correlated(2))
    for name, value in [("scope", "column"), ("objective", "up"), ("solver", "sgd")]:
        with pytest.raises(ValueError, match=f"unknown {name} '{value}'; known are"):
            merge.awd(ZERO, taus, **{name: value})
    with pytest.raises(ValueError, match='key is for solver="direct"'):
        merge.awd(ZERO, taus, key=jax.random.key(0))
    with pytest.raises(ValueError, match='found scope="row"'):
        options = dict(scope="row", solver="direct", key=jax.random.key(0))
        merge.awd(ZERO, taus, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tasks", [2, 4])
def test_momentum_in_gram_space_is_that_of_the_full_space(tasks, reverse):
    taus, rate = correlated(tasks), learning_rate(correlated(tasks), 0.01)
    sign = -1.0 if reverse else 1.0
    expected = oracles.awd_momentum(taus, 0.02, rate, 40, sign=sign)
    plain = oracles.awd_momentum(taus, 0.02, rate, 40, momentum=0.0, sign=sign)
    c = redundant_coefs(taus @ taus.T, 0.02, 0.01, 40, reverse, momentum=0.9)
    assert np.linalg.norm(expected - plain) > 0.1
    np.testing.assert_allclose(c @ taus, expected, rtol=1e-9, atol=1e-10)
    objective = "reverse" if reverse else "reduce"
    options = dict(coef=1.0, alpha=0.02, steps=40, solver="momentum")
    merged = merge.awd(ZERO, trees(taus), objective=objective, **options)
    np.testing.assert_allclose(delta_of(merged, taus), expected, rtol=1e-9, atol=1e-10)
