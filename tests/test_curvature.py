"""Curvature against exact Jacobians, in float64: every claim of its docstrings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_networks as tiny

from jaxarith import curvature, tau_jp, tree

pytestmark = pytest.mark.usefixtures("x64")
EXACT = dict(rtol=1e-10, atol=1e-12)


def collected(apply_fn, params, x, **options):
    options = {"probes": None} | options
    return curvature.collect(apply_fn, params, [{"image": x}], **options)


def test_the_form_is_that_of_a_kronecker_product():
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(2, n, n)) for n in (4, 3)]
    a, b = (root @ root.swapaxes(1, 2) for root in roots)
    tau = {"kernel": rng.normal(size=(3, 3)), "bias": rng.normal(size=3)}
    factors = curvature.Factors(
        layers=(curvature.Layer(("kernel",), ("bias",), False),),
        base=0,
        sharing="whole",
        inputs={"kernel": jnp.asarray(a)},
        outputs={"kernel": jnp.asarray(b)},
        divisors={"kernel": jnp.asarray([1.0, 2.0])},
        full={},
        diagonal={},
        sketch={},
        samples=jnp.ones(()),
    )
    w = np.concatenate([tau["kernel"], tau["bias"][None]]).reshape(-1)
    dense = np.kron(a[0], b[0]) + np.kron(a[1], b[1]) / 2
    found = curvature.penalty(jax.tree.map(jnp.asarray, tau), factors)
    np.testing.assert_allclose(found, w @ dense @ w, **EXACT)


@pytest.mark.parametrize("sharing", ["whole", "expand", "reduce"])
def test_of_one_linear_layer_the_penalty_is_the_mean_squared_tau_jp(sharing):
    _, params, x = tiny.network()
    params = {"second": params["second"]}
    x = x[:, :2] @ jnp.ones((2, 4))

    def apply_fn(params, x):
        return tiny.nn.Dense(3, name="second").apply({"params": params["second"]}, x)

    def in_path(params, x):  # the layer's path must be that of its leaf
        return apply_fn({"second": params}, x)

    tau = tiny.vector(params["second"])
    found = collected(in_path, params["second"], x, sharing=sharing)
    exact = tau_jp.matrix(in_path, params["second"], [tau], [[{"image": x}]], power=2)
    np.testing.assert_allclose(curvature.penalty(tau, found), exact[0, 0], rtol=1e-7)
    np.testing.assert_allclose(
        curvature.penalty(tau, found),
        tiny.exact_form(in_path, params["second"], tau, x),
        **EXACT,
    )


@pytest.mark.parametrize("sharing", ["whole", "expand", "reduce"])
@pytest.mark.parametrize("layer", ["first", "second"])
def test_blocks_of_a_deep_linear_network_are_exact(sharing, layer):
    apply_fn, params, x = tiny.network("linear")
    found = tiny.kronecker_block(collected(apply_fn, params, x, sharing=sharing), layer)
    np.testing.assert_allclose(
        found, tiny.exact_block(apply_fn, params, x, layer), **EXACT
    )


@pytest.mark.parametrize(
    "sharing, pooled", [("whole", True), ("reduce", True), ("expand", False)]
)
@pytest.mark.parametrize("layer", ["first", "second"])
def test_with_tokens_blocks_of_a_deep_linear_network_are_exact(sharing, pooled, layer):
    # Eschenhagen et al. (2023): "reduce" where outputs are pooled, "expand" where each
    # token has its own. "whole" knows no difference between pooling and one token.
    apply_fn, params, x = tiny.network("linear", pooled, tokens=5)
    found = tiny.kronecker_block(collected(apply_fn, params, x, sharing=sharing), layer)
    np.testing.assert_allclose(
        found, tiny.exact_block(apply_fn, params, x, layer), **EXACT
    )


@pytest.mark.parametrize("pooled, tokens", [(False, None), (True, 5)])
@pytest.mark.parametrize("layer", ["first", "second"])
def test_whole_samples_have_the_trace_of_the_exact_block(pooled, tokens, layer):
    apply_fn, params, x = tiny.network("tanh", pooled, tokens)
    found = tiny.kronecker_block(collected(apply_fn, params, x), layer)
    exact = tiny.exact_block(apply_fn, params, x, layer)
    np.testing.assert_allclose(np.trace(found), jnp.trace(exact), **EXACT)


def test_whole_samples_of_two_sets_are_the_mean_of_theirs():
    apply_fn, params, x = tiny.network("tanh", True, 5)
    parts = [collected(apply_fn, params, half) for half in (x[:2], x[2:])]
    merged = curvature.merge(parts, weights=[2, 4])
    union = collected(apply_fn, params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **EXACT),
        dataclasses.replace(merged, samples=union.samples),
        union,
    )
    assert float(merged.samples) == 6


@pytest.mark.parametrize("pooled, tokens", [(False, None), (True, 5)])
def test_an_eigenbasis_has_the_exact_trace_and_is_nearer_than_the_factors(
    pooled, tokens
):
    apply_fn, params, x = tiny.network("tanh", pooled, tokens)
    factors = collected(apply_fn, params, x)
    before = curvature.eigen(factors)
    after = curvature.correct(
        apply_fn, params, [{"image": x}], before, probes=None, chunk=4
    )
    tau = tiny.vector(params)
    np.testing.assert_allclose(
        curvature.penalty(tau, before), curvature.penalty(tau, factors), rtol=1e-9
    )
    for layer in ("first", "second"):
        name, exact = f"{layer}/kernel", tiny.exact_block(apply_fn, params, x, layer)
        np.testing.assert_allclose(
            after.eigenvalues[name].sum(), jnp.trace(exact), **EXACT
        )
        basis = np.kron(after.inputs[name], after.outputs[name])
        dense = basis * np.asarray(after.eigenvalues[name]).reshape(-1) @ basis.T
        off = np.linalg.norm(dense - exact)
        before_it = np.linalg.norm(tiny.kronecker_block(factors, layer) - exact)
        assert off <= before_it + 1e-12  # both are exact where the layers are linear


def test_leaves_outside_of_layers_have_their_exact_blocks_and_diagonal():
    def apply_fn(params, x):
        return jnp.tanh(x * params["scale"][None]) @ params["w"]

    rng = np.random.default_rng(0)
    params = {"scale": jnp.ones(3), "w": jnp.asarray(rng.normal(size=(3, 2)))}
    x = jnp.asarray(rng.normal(size=(5, 3)))
    found = collected(apply_fn, params, x, full_up_to=3)
    assert found.full.keys() == {"scale"} and found.diagonal.keys() == {"w"}
    jacobian = jax.jacrev(apply_fn)(params, x)
    scale = jacobian["scale"].reshape(-1, 3)
    np.testing.assert_allclose(found.full["scale"], scale.T @ scale / 5, **EXACT)
    squares = jnp.sum(jacobian["w"] ** 2, axis=(0, 1)) / 5
    np.testing.assert_allclose(found.diagonal["w"], squares, **EXACT)


def test_a_sketch_of_full_rank_is_the_exact_form():
    apply_fn, params, x = tiny.network("tanh", True, 5)
    found = collected(apply_fn, params, x, rank=31, chunk=2)
    none = {"inputs", "outputs"}
    alone = dataclasses.replace(
        found, **{f: jax.tree.map(jnp.zeros_like, getattr(found, f)) for f in none}
    )
    tau = tiny.vector(params)
    exact = tiny.exact_form(apply_fn, params, tau, x)
    np.testing.assert_allclose(curvature.penalty(tau, alone), exact, rtol=1e-9)


def test_a_sketch_keeps_the_largest_eigenvalues():
    apply_fn, params, x = tiny.network("tanh", True, 5)
    found = collected(apply_fn, params, x, rank=3, chunk=6)
    jacobian = jax.jacrev(apply_fn)(params, x)
    rows = np.concatenate(
        [np.reshape(j, (18, -1)) for j in tree.flatten(jacobian).values()], axis=1
    )
    exact = np.linalg.eigvalsh(rows.T @ rows / 6)[::-1][:3]
    lengths = sum(
        np.sum(np.square(np.reshape(part, (3, -1))), axis=1)
        for part in found.sketch.values()
    )
    # The first rows of each chunk are exact, what is dropped between them is not.
    np.testing.assert_allclose(lengths, exact, rtol=0.02)


def test_calibrated_blocks_agree_with_the_sketch_along_it():
    apply_fn, params, x = tiny.network("tanh", True, 5)
    found = curvature.calibrate(collected(apply_fn, params, x, rank=4))
    blocks = dataclasses.replace(found, sketch={})
    exact, own = 0.0, 0.0
    for row in range(4):
        u = {path: part[row] for path, part in found.sketch.items()}
        square = sum(float(jnp.sum(leaf**2)) for leaf in u.values())
        exact += square
        own += float(curvature.penalty(u, blocks)) / square
    np.testing.assert_allclose(own, exact, **EXACT)


def test_joint_layers_have_the_terms_between_them():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 3)))

    class Pair(tiny.nn.Module):
        @tiny.nn.compact
        def __call__(self, x):
            return tiny.nn.Dense(2, name="q")(x) + tiny.nn.Dense(2, name="k")(x)

    def apply_fn(params, x):
        return Pair().apply({"params": params}, x)

    params = Pair().init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
    tau = tiny.vector(params)
    exact = tiny.exact_form(apply_fn, params, tau, x)
    joint = collected(apply_fn, params, x, joint=True)
    assert [layer.name for layer in joint.layers] == ["q/kernel+k/kernel"]
    np.testing.assert_allclose(curvature.penalty(tau, joint), exact, **EXACT)
    apart = curvature.penalty(tau, collected(apply_fn, params, x))
    assert abs(float(apart) - exact) > 0.01 * exact


def test_the_average_over_probes_is_the_exact_sum():
    apply_fn, params, x = tiny.network()
    exact = collected(apply_fn, params, x)
    tau = tiny.vector(params)
    values = {
        probes: [
            float(
                curvature.penalty(
                    tau,
                    collected(
                        apply_fn, params, x, probes=probes, key=jax.random.key(seed)
                    ),
                )
            )
            for seed in range(24)
        ]
        for probes in (1, 64)
    }
    # Of Kronecker products of means the expectation is not exactly the product.
    one, many = (np.asarray(values[n]) for n in (1, 64))
    want = float(curvature.penalty(tau, exact))
    assert abs(many.mean() - want) < 4 * many.std() / 24**0.5 + 0.02 * want
    assert abs(one.mean() - want) < 4 * one.std() / 24**0.5 + 0.2 * want
    assert many.std() < one.std() / 4


def test_the_gradient_is_twice_the_product_and_the_form_is_never_negative():
    apply_fn, params, x = tiny.network("tanh", True, 5)
    found = collected(apply_fn, params, x, rank=2)
    corrected = curvature.eigen(found)
    for measured in (found, corrected, curvature.block_diagonal(found, 2)):
        tau = tiny.vector(params, seed=3)
        gradient = jax.grad(curvature.penalty)(tau, measured)
        doubled = jax.tree.map(lambda m: 2 * m, curvature.product(tau, measured))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **EXACT), gradient, doubled
        )
        value = curvature.penalty(tau, measured)
        euler = tree.total(
            jnp.sum(g * t)
            for g, t in zip(
                jax.tree.leaves(gradient), jax.tree.leaves(tau), strict=True
            )
        )
        np.testing.assert_allclose(value, euler / 2, **EXACT)
        assert float(value) > 0
        moved = jax.tree.map(lambda t, g: t + 1e-6 * g, tau, tau)
        slope = (curvature.penalty(moved, measured) - value) / 1e-6
        np.testing.assert_allclose(slope, euler, rtol=1e-5)
        zero = jax.tree.map(jnp.zeros_like, tau)
        assert float(curvature.penalty(zero, measured)) == 0
        at_zero = jax.grad(curvature.penalty)(zero, measured)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(at_zero))


def test_weighted_factors_weigh_each_part_of_the_form():
    apply_fn, params, x = tiny.network("tanh", True, 5)
    factors, tau = collected(apply_fn, params, x), tiny.vector(params)
    weights = {path: 1.0 + i for i, path in enumerate(tree.flatten(tau))}
    layers = {p: la.kernels[0] for la in factors.layers for p in la.biases}
    found = curvature.weighted(factors, weights.__getitem__)
    for path in weights:
        alone = tree.map_with_path(
            lambda p, leaf, path=path: leaf if p == path else jnp.zeros_like(leaf), tau
        )
        np.testing.assert_allclose(
            curvature.penalty(alone, found),
            weights[layers.get(path, path)] * curvature.penalty(alone, factors),
            rtol=1e-12,
        )
    with pytest.raises(ValueError, match="cannot be weighted by path"):
        curvature.weighted(collected(apply_fn, params, x, rank=2), lambda path: 1.0)


def test_one_block_is_the_whole_matrix_and_more_are_its_diagonal():
    apply_fn, params, x = tiny.network()
    found, tau = collected(apply_fn, params, x), tiny.vector(params)
    want = curvature.penalty(tau, found)
    one = curvature.penalty(tau, curvature.block_diagonal(found, 1))
    np.testing.assert_allclose(one, want, **EXACT)
    cut = curvature.block_diagonal(found, 2)
    assert cut.inputs["first/kernel"].shape == (1, 2, 2, 2)

    def by_hand(matrix, size):
        kept = np.zeros_like(matrix)
        for start in range(0, matrix.shape[-1], size):
            own = np.s_[..., start : start + size, start : start + size]
            kept[own] = np.asarray(matrix)[own]
        return jnp.asarray(kept)

    halves = {n: -(-a.shape[-1] // 2) for n, a in found.inputs.items()}
    outer = {n: -(-b.shape[-1] // 2) for n, b in found.outputs.items()}
    dense = dataclasses.replace(
        found,
        inputs={n: by_hand(a, halves[n]) for n, a in found.inputs.items()},
        outputs={n: by_hand(b, outer[n]) for n, b in found.outputs.items()},
    )
    np.testing.assert_allclose(
        curvature.penalty(tau, cut), curvature.penalty(tau, dense), **EXACT
    )
