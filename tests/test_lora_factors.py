"""Factors beside kernels: the model with them, its tangents, its training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import random_params, tiny_clip
from tiny_bert import tiny, tiny_params

from jaxarith import evaluate, tangent, task_vectors, train, tree
from jaxarith.models import bert, clip, lora

ALPHA, RANK = 6.0, 2
KERNELS = r"bert/encoder/.*/kernel"
CONFIG = tiny("bert")
RNG = np.random.default_rng(0)
TEXTS = (
    RNG.integers(2, 30, (5, 7), np.int32),
    (np.arange(7) < RNG.integers(3, 8, (5, 1))).astype(np.int32),
)
encode = bert.mean_encoder(CONFIG)
adapted = lora.adapted(encode, alpha=ALPHA)


def noise(params, scale=0.3):
    """A task vector of all factors."""
    return jax.tree.map(
        lambda x: jnp.asarray(scale * RNG.normal(size=x.shape), x.dtype),
        tree.select(params, lora.FACTORS),
    )


@pytest.fixture(scope="module")
def start():
    return lora.init(jax.random.key(0), tiny_params("bert"), rank=RANK, select=KERNELS)


@pytest.fixture(scope="module")
def moved(start):
    """Parameters whose A and B are both away from zero."""
    return task_vectors.apply(start, noise(start))


def merged(params):
    """By NumPy, the kernels with the products of their factors."""
    leaves = {path: np.asarray(x, float) for path, x in tree.flatten(params).items()}
    for path in [path for path in leaves if path.endswith("lora_a")]:
        module = path.removesuffix("lora_a")
        product = leaves[path] @ leaves[f"{module}lora_b"]
        kernel = leaves[f"{module}kernel"]
        leaves[f"{module}kernel"] = kernel + ALPHA / RANK * product
    return tree.unflatten({k: v for k, v in leaves.items() if "lora_" not in k})


def test_the_factors_stand_beside_the_chosen_kernels(start):
    base, leaves = tree.flatten(tiny_params("bert")), tree.flatten(start)
    kernels = [path for path in base if path.startswith("bert/enc") and "kern" in path]
    assert len(kernels) == 12
    assert len(leaves) == len(base) + 2 * len(kernels)
    for path in kernels:
        a = leaves[path.replace("kernel", "lora_a")]
        b = leaves[path.replace("kernel", "lora_b")]
        inputs, outputs = base[path].shape
        assert (a.shape, b.shape) == ((inputs, RANK), (RANK, outputs))
        assert not b.any()
        assert 0.7 < inputs**0.5 * np.abs(a).max() <= 1
    for path, leaf in base.items():
        np.testing.assert_array_equal(leaves[path], leaf)
    draws = [np.asarray(x) for path, x in leaves.items() if path.endswith("/lora_a")]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_at_the_start_the_model_is_the_base(start):
    expected = encode(tiny_params("bert"), *TEXTS)
    np.testing.assert_array_equal(adapted(start, *TEXTS), expected)


def test_outputs_are_those_of_merged_kernels(moved):
    actual = adapted(moved, *TEXTS)
    expected = encode(jax.tree.map(np.float32, merged(moved)), *TEXTS)
    assert np.abs(expected - encode(tiny_params("bert"), *TEXTS)).max() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_in_float64_to_rounding(moved):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), "f8"), moved)
        actual, expected = adapted(wide, *TEXTS), encode(merged(wide), *TEXTS)
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_tangent_is_that_of_finite_differences(moved):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), "f8"), moved)
        tau = noise(wide)
        f0, found = tangent.jvp(adapted, wide, tau, *TEXTS)
        step = 1e-6
        ends = [
            adapted(task_vectors.apply(wide, tau, c), *TEXTS) for c in (step, -step)
        ]
        np.testing.assert_array_equal(f0, adapted(wide, *TEXTS))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_the_linearised_layer_is_its_formula():
    dense = nn.Dense(4)
    x, w, bias = RNG.normal(size=(3, 5)), RNG.normal(size=(5, 4)), RNG.normal(size=4)
    a, b, da, db = (RNG.normal(size=s) for s in ((5, 2), (2, 4)) * 2)
    apply_fn = lora.adapted(
        lambda params, x: dense.apply({"params": params}, x), alpha=ALPHA
    )
    with jax.enable_x64(True):
        params = {"kernel": w, "bias": bias, "lora_a": a, "lora_b": b}
        linear = tangent.linearize(apply_fn, params)
        found = linear({"lora_a": a + da, "lora_b": b + db}, x)
    expected = x @ w + bias + ALPHA / 2 * x @ (a @ b + da @ b + a @ db)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize("from_zero", [False, True])
def test_the_task_vector_of_the_kernels_is_the_same_model(
    start, moved, linearized, from_zero
):
    params_0 = start if from_zero else moved
    tau = noise(params_0)
    weights = lora.task_vector(params_0, tau, alpha=ALPHA, linearized=linearized)
    assert all(path.endswith("/kernel") for path in tree.flatten(weights))
    plain = jax.tree.map(np.float32, merged(params_0))
    if linearized:
        expected = tangent.jvp(adapted, params_0, tau, *TEXTS)
        found = tangent.jvp(encode, plain, weights, *TEXTS)
        tolerance = 1e-4  # of a large tangent
    else:
        expected = adapted(task_vectors.apply(params_0, tau), *TEXTS)
        found = encode(task_vectors.apply(plain, weights), *TEXTS)
        tolerance = 1e-5
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        *(found, expected),
    )


@pytest.mark.parametrize("from_zero", [False, True])
def test_tangent_factors_are_the_start_and_the_tangent(start, moved, from_zero):
    params_0 = start if from_zero else moved
    tau = noise(params_0)
    factors = lora.tangent_factors(params_0, tau)
    ranks = {a.shape[1] for path, a in tree.flatten(factors).items() if "_a" in path}
    assert ranks == {RANK if from_zero else 2 * RANK}
    whole = task_vectors.add(
        [
            lora.delta(params_0, alpha=ALPHA),
            lora.task_vector(params_0, tau, alpha=ALPHA, linearized=True),
        ]
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        *(lora.delta(factors, alpha=ALPHA), whole),
    )


def test_blocks_that_are_rematerialised_are_adapted_too():
    config = tiny_clip()
    layout = tree.select(clip.layout(config), clip.IMAGE_ENCODER)
    params = lora.init(
        jax.random.key(1),
        random_params(1, layout),
        rank=RANK,
        select=clip.BLOCK_LINEAR_WEIGHTS,
    )
    params = task_vectors.apply(params, noise(params))
    images = RNG.normal(size=(2, 12, 12, 3)).astype(np.float32)

    def gradient(remat):
        apply_fn = lora.adapted(clip.image_encoder(config, remat=remat), alpha=ALPHA)

        def loss(part):
            return jnp.sum(apply_fn(tree.update(params, part), images) ** 2)

        return jax.jit(jax.grad(loss))(tree.select(params, lora.FACTORS))

    plain, again = gradient(False), gradient(True)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        *(plain, again),
    )


def test_a_narrow_model_keeps_its_dtype(moved):
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), moved)
    assert adapted(narrow, *TEXTS).dtype == jnp.bfloat16
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny_params("bert"))
    found = tree.flatten(lora.init(jax.random.key(0), base, rank=1, select=KERNELS))
    factors = [x for path, x in found.items() if "lora" in path]
    assert {x.dtype for x in factors} == {jnp.dtype("float32")}


def flops(step, *args):
    return jax.jit(step).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("linearized", [False, True])
def test_frozen_kernels_cost_no_tangent_and_no_gradient_product(linearized):
    """One layer after another, so that the products can be counted by hand."""
    width, rows, rank, depth = 64, 128, 1, 8
    dense = [nn.Dense(width, use_bias=False) for _ in range(depth)]

    def apply_fn(params, x):
        for i, layer in enumerate(dense):
            x = layer.apply({"params": params[str(i)]}, x)
        return x

    base = {str(i): {"kernel": jnp.ones((width, width))} for i in range(depth)}
    params = lora.init(jax.random.key(0), base, rank=rank)
    x, factors = jnp.ones((rows, width)), tree.select(params, lora.FACTORS)
    apply_lora = lora.adapted(apply_fn, alpha=1)

    def step(part):
        if linearized:
            f0, move = tangent.jvp(apply_lora, params, part, x)
            return jnp.sum((f0 + move) ** 2)
        return jnp.sum(apply_lora(tree.update(params, part), x) ** 2)

    product = 2 * rows * width * width
    # No tangent enters the first layer. Forward and the gradient of its input are a
    # product each of the others, and their tangent a third.
    products = depth + (2 if linearized else 1) * (depth - 1)
    counted = flops(jax.grad(step), factors) / product
    assert products <= counted < 1.2 * products


def test_training_moves_the_factors_alone_and_a_only_where_b_is_not_zero(start):
    rows = [
        {"input_ids": TEXTS[0][i], "attention_mask": TEXTS[1][i], "label": i % 2}
        for i in range(5)
    ]

    def loss_fn(features, batch, constants):
        return jnp.mean((features[:, 0] - batch["label"]) ** 2)

    def tuned(**options):
        config = train.TrainConfig(
            steps=4, warmup_steps=0, batch_size=4, weight_decay=0, **options
        )
        batches = train.task_batches(
            [rows], config, seeds=[0], inputs=("input_ids", "attention_mask")
        )
        [tau] = train.fine_tune(
            *(adapted, start, loss_fn, batches, config),
            names=["parity"],
            inputs=("input_ids", "attention_mask"),
        )
        return tree.flatten(tau)

    everything, linear, b_alone = (
        tuned(trained=lora.FACTORS, learning_rate=1e-2),
        tuned(trained=lora.FACTORS, learning_rate=1e-2, linearized=True),
        tuned(trained=lora.B_FACTORS, learning_rate=1e-2, linearized=True),
    )
    assert len(everything) == len(linear) == 2 * len(b_alone) == 24
    assert all(leaf.any() for leaf in everything.values())
    for path, leaf in linear.items():
        assert leaf.any() == path.endswith("lora_b")
    for path, leaf in b_alone.items():
        np.testing.assert_allclose(leaf, linear[path], rtol=1e-5, atol=1e-7)


def test_linearised_vectors_of_factors_and_of_kernels_add_alike(start):
    taus = [noise(start, 0.1) for _ in range(2)]
    weights = [
        lora.task_vector(start, tau, alpha=ALPHA, linearized=True) for tau in taus
    ]
    names = ("input_ids", "attention_mask")
    batch = dict(zip(names, TEXTS, strict=True)) | {"mask": np.ones(5, bool)}
    of_factors = evaluate.tangent(adapted, start, taus, [batch], names)
    of_kernels = evaluate.tangent(encode, tiny_params("bert"), weights, [batch], names)
    np.testing.assert_allclose(
        of_factors([0.3, 0.7]), of_kernels([0.3, 0.7]), rtol=1e-4, atol=1e-4
    )


def test_a_model_without_linen_takes_whole_kernels():
    params = {"fc": {"kernel": RNG.normal(size=(3, 2)).astype("f4")}}
    params = lora.init(jax.random.key(0), params, rank=1)
    params = task_vectors.apply(params, noise(params))

    def apply_fn(params, x):
        return x @ params["fc"]["kernel"]

    x = RNG.normal(size=(4, 3)).astype("f4")
    apply = lambda params, x: apply_fn(  # noqa: E731
        task_vectors.apply(params, lora.delta(params, alpha=ALPHA)), x
    )
    w, a, b = (np.asarray(params["fc"][k]) for k in ("kernel", "lora_a", "lora_b"))
    np.testing.assert_allclose(
        apply(params, x), x @ (w + ALPHA * a @ b), rtol=1e-5, atol=1e-5
    )


def test_mistakes_are_named(start):
    base = tiny_params("bert")
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="rank is 0; at least 1"):
        lora.init(key, base, rank=0)
    with pytest.raises(ValueError, match=r"no leaf matches 'kernels'"):
        lora.init(key, base, rank=1, select="kernels")
    with pytest.raises(ValueError, match=r"bias has shape \[24\] and is no kernel"):
        lora.init(key, base, rank=1, select=".*")
    with pytest.raises(ValueError, match=r"no factors: make them with `lora.init`"):
        adapted(base, *TEXTS)
    hidden = lora.adapted(jax.jit(encode), alpha=1)
    jax.jit(encode)(start, *TEXTS)  # what is compiled without the factors is reused
    with pytest.raises(ValueError, match=r"reads the factors beside 12 kernels"):
        hidden(start, *TEXTS)
