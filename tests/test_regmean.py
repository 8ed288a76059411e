"""RegMean and RegMean++ against least squares and NumPy transcriptions."""

import dataclasses
import functools
import itertools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checks import assert_close
from oracles import normal

from jaxarith import merge, task_vectors, tree
from jaxarith.merge import capture
from jaxarith.merge.regmean_plusplus import TRANSFORMER_LAYER, _layer
from jaxarith.models import clip

IN, OUT, ROWS, TASKS = 4, 3, 12, 3


def shrink(gram, alpha):
    return alpha * gram + (1 - alpha) * np.diag(np.diag(gram))


def regression_mean(grams, weights, alpha):
    """RegMean as printed, on weights `[in, out]`."""
    grams = [shrink(gram, alpha) for gram in grams]
    return np.linalg.solve(
        sum(grams), sum(g @ w for g, w in zip(grams, weights, strict=True))
    )


def problem(seed):
    """Inputs of unequal scale and weights of T linear models."""
    x = [normal((seed, 0, i), ROWS, IN) * (1 + i) + 0.5 for i in range(TASKS)]
    return x, normal((seed, 1), IN, OUT), list(normal((seed, 2), TASKS, IN, OUT))


def test_without_shrinking_it_is_the_joint_least_squares_solution(x64):
    x, w_0, weights = problem(0)
    y = [normal((5, i), ROWS, OUT) for i in range(TASKS)]
    weights = [np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(x, y, strict=True)]
    merged = merge.regmean(
        {"kernel": w_0},
        [{"kernel": w - w_0} for w in weights],
        [{"kernel": a.T @ a} for a in x],
        off_diagonal=1.0,
        ridge=0.0,
    )
    joint = np.linalg.lstsq(np.concatenate(x), np.concatenate(y), rcond=None)[0]
    np.testing.assert_allclose(merged["kernel"], joint, rtol=1e-10, atol=1e-10)
    assert np.abs(joint - np.mean(weights, axis=0)).max() > 0.05


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_it_is_the_paper_s_formula_and_the_mean_elsewhere(x64, alpha):
    x, w_0, weights = problem(1)
    grams = [a.T @ a / ROWS for a in x]
    biases = list(normal(7, TASKS, OUT))
    merged = merge.regmean(
        {"fc": {"kernel": w_0, "bias": np.zeros(OUT)}, "other": w_0},
        [
            {"fc": {"kernel": w - w_0, "bias": b}, "other": w - w_0}
            for w, b in zip(weights, biases, strict=True)
        ],
        [{"fc/kernel": gram} for gram in grams],
        **dict(off_diagonal=alpha, ridge=0.0),
    )
    expected = regression_mean(grams, weights, alpha)
    np.testing.assert_allclose(merged["fc"]["kernel"], expected, rtol=1e-10)
    np.testing.assert_allclose(merged["fc"]["bias"], np.mean(biases, 0), rtol=1e-10)
    np.testing.assert_allclose(merged["other"], np.mean(weights, 0), rtol=1e-10)


def test_the_ridge_pulls_to_the_mean_of_the_models(x64):
    x, w_0, weights = problem(2)
    grams = [a.T @ a / ROWS for a in x]
    taus = [{"kernel": w - w_0} for w in weights]

    def merged(ridge):
        by_path = [{"kernel": gram} for gram in grams]
        return merge.regmean({"kernel": w_0}, taus, by_path, ridge=ridge)["kernel"]

    scale = np.trace(sum(grams)) / IN
    shrunk = [shrink(gram, 0.9) + 0.1 * scale / TASKS * np.eye(IN) for gram in grams]
    np.testing.assert_allclose(
        merged(0.1), regression_mean(shrunk, weights, 1.0), rtol=1e-10
    )
    np.testing.assert_allclose(merged(1e12), np.mean(weights, 0), rtol=1e-9)


def test_inputs_that_never_occur_get_the_mean():
    """One input is always zero, and one task has no inputs at all."""
    x, w_0, weights = problem(3)
    for a in x:
        a[:, 2] = 0
    x[1][:] = 0
    grams = [{"kernel": np.float32(a.T @ a)} for a in x]
    taus = [{"kernel": np.float32(w - w_0)} for w in weights]
    w_0 = np.float32(w_0)
    merged = merge.regmean({"kernel": w_0}, taus, grams)["kernel"]
    np.testing.assert_allclose(merged[2], np.mean(weights, 0)[2], rtol=1e-5)
    live = [0, 1, 3]
    expected = regression_mean(
        [(a.T @ a)[np.ix_(live, live)] for a in x], [w[live] for w in weights], 0.9
    )
    np.testing.assert_allclose(merged[jnp.array(live)], expected, rtol=1e-4)
    nothing = [{"kernel": np.zeros((IN, IN))} for _ in taus]
    merged = merge.regmean({"kernel": w_0}, taus, nothing, ridge=0.0)["kernel"]
    np.testing.assert_allclose(merged, np.mean(weights, 0), rtol=1e-5)


def test_rank_deficient_grams_are_solved_or_refused():
    x = normal(0, 3, 64).astype(np.float32)  # fewer tokens than inputs
    gram = {"kernel": x.T @ x}
    taus = [{"kernel": normal(i, 64, 2).astype(np.float32)} for i in (1, 2)]
    start = {"kernel": np.zeros((64, 2), np.float32)}
    merged = merge.regmean(start, taus, [gram, gram])["kernel"]
    mean = sum(tau["kernel"] for tau in taus) / 2
    np.testing.assert_allclose(merged, mean, rtol=1e-3, atol=1e-3)
    negative = {"kernel": -np.eye(64, dtype=np.float32)}
    indefinite = {"kernel": 2 * gram["kernel"]}
    with pytest.raises(ValueError, match="raise ridge.*kernel"):
        merge.regmean(start, taus, [indefinite, negative], off_diagonal=1.0, ridge=0.0)


def test_one_task_gives_its_model_back_exactly():
    x, w_0, weights = problem(4)
    tau = {"kernel": np.float32(weights[0])}
    start = {"kernel": np.float32(w_0)}
    merged = merge.regmean(start, [tau], [{"kernel": x[0].T @ x[0]}], ridge=0.1)
    np.testing.assert_array_equal(merged["kernel"], start["kernel"] + tau["kernel"])


def test_second_call_compiles_nothing(caplog):
    def compilations(seed):
        taus = [{"kernel": normal((seed, i), 7, 5)} for i in range(3)]
        grams = [{"kernel": np.diag(normal((seed, i), 7) ** 2)} for i in range(3)]
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            merge.regmean({"kernel": normal(seed, 7, 5)}, taus, grams)
        return [m for m in caplog.messages if m.startswith("Compiling")]

    assert compilations(0)
    assert not compilations(1)


START, MOVE = {"kernel": np.zeros((2, 1))}, {"kernel": np.ones((2, 1))}
GRAM = {"kernel": np.eye(2)}


@pytest.mark.parametrize(
    ("grams", "options", "message"),
    [
        ([GRAM], {}, "1 sets of Gram matrices for 2 task vectors"),
        ([GRAM, {}], {}, r"tasks \[1\] have no Gram matrix of kernel"),
        ([GRAM, {"kernel": np.eye(3)}], {}, r"\[2, 2\], \[3, 3\].* for kernel"),
        ([{"x": np.eye(2)}] * 2, {}, r"for x, which has shape \[\]"),
        ([GRAM, {"kernel": np.full((2, 2), np.nan)}], {}, "task 1 has NaN"),
        ([GRAM, GRAM], {"off_diagonal": 1.5}, r"off_diagonal is 1.5; .* \[0, 1\]"),
        ([GRAM, GRAM], {"ridge": -1}, "ridge is -1"),
    ],
)
def test_grams_that_do_not_fit_are_an_error(grams, options, message):
    with pytest.raises(ValueError, match=message):
        merge.regmean(START, [MOVE, MOVE], grams, **options)


class Net(nn.Module):
    """Dense layers `0`, `1`, … with tanh between, each scaled by a parameter."""

    widths: tuple

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=str(i))(jnp.tanh(x) if i else x)
        return x * self.param("scale", nn.initializers.ones, ())


def net(*widths):
    return lambda params, x: Net(widths).apply({"params": params}, x)


def parameters(seed, *widths):
    layers = {
        str(i): {"kernel": normal((seed, i), a, b), "bias": normal((seed, i, 1), b)}
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }
    return {**layers, "scale": normal((seed, 99))}


def data(seed, count, width, size=5):
    x = normal(seed, count, width) * 2
    padded = np.concatenate([x, np.full((-count % size, width), 9.0)])
    mask = np.arange(len(padded)) < count
    rows = range(0, len(padded), size)
    return x, [
        {"image": padded[i : i + size], "mask": mask[i : i + size]} for i in rows
    ]


def models(*widths):
    params_0, tuned = (
        parameters(0, *widths),
        [parameters(i, *widths) for i in range(1, TASKS + 1)],
    )
    sets = [data((8, i), 6 + i, widths[0]) for i in range(TASKS)]
    return (
        params_0,
        tuned,
        [task_vectors.difference(params, params_0) for params in tuned],
        [x for x, _ in sets],
        [batches for _, batches in sets],
    )


def test_plusplus_of_one_layer_is_regmean(x64):
    params_0, tuned, taus, _, batches = models(4, 3)
    apply_fn = net(3)
    grams = [
        capture.input_grams(apply_fn, *pair)
        for pair in zip(tuned, batches, strict=True)
    ]
    expected = merge.regmean(params_0, taus, grams, off_diagonal=0.95)
    merged = merge.regmean_plusplus(params_0, taus, apply_fn, batches)
    assert_close(merged, expected, 1e-9)
    average = merge.average(params_0, taus)
    assert np.abs(merged["0"]["kernel"] - average["0"]["kernel"]).max() > 1e-2


def means(tuned, name):
    return np.mean([params[name]["bias"] for params in tuned], axis=0)


def test_plusplus_sees_what_merged_layers_put_out(x64):
    """Three layers of one Dense each, in NumPy."""
    params_0, tuned, taus, x, batches = models(4, 5, 3, 2)
    options = dict(off_diagonal=0.8, ridge=0.0)
    merged = merge.regmean_plusplus(
        params_0, taus, net(5, 3, 2), batches, layers=None, **options
    )
    own = merge.regmean_plusplus(
        params_0, taus, net(5, 3, 2), batches, layers="", **options
    )
    for name in "012":
        kernel = regression_mean(
            [a.T @ a / len(a) for a in x], [p[name]["kernel"] for p in tuned], 0.8
        )
        bias = np.mean([params[name]["bias"] for params in tuned], axis=0)
        np.testing.assert_allclose(merged[name]["kernel"], kernel, rtol=1e-8)
        np.testing.assert_allclose(merged[name]["bias"], bias, rtol=1e-8)
        x = [np.tanh(a @ kernel + bias) for a in x]
    scale = np.mean([params["scale"] for params in tuned])
    np.testing.assert_allclose(merged["scale"], scale, rtol=1e-8)
    # If all of the network is one layer, its inputs are the data, and the rest RegMean.
    grams = [
        capture.input_grams(net(5, 3, 2), *pair)
        for pair in zip(tuned, batches, strict=True)
    ]
    assert_close(own, merge.regmean(params_0, taus, grams, **options), 1e-9)
    assert np.abs(own["1"]["kernel"] - merged["1"]["kernel"]).max() > 1e-2


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=str(i))(x)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, ())
        hidden = jnp.tanh(nn.Dense(5, name="fc1")(x * scale))
        return x + nn.Dense(4, name="fc2")(hidden)


class Transformer(nn.Module):
    """Two residual blocks of two Dense layers and a scale, and a head."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(Blocks(name="layers")(x))


def transformer(params, x):
    return Transformer().apply({"params": params}, x)


def dense(seed, a, b):
    return {"kernel": normal(seed, a, b), "bias": normal((seed, 1), b)}


def block_parameters(seed):
    layers = {
        str(i): {
            "fc1": dense(10 * seed + i, 4, 5),
            "fc2": dense(10 * seed + i + 2, 5, 4),
            "scale": np.asarray(0.5 + 0.2 * seed + i),
        }
        for i in range(2)
    }
    return {"layers": layers, "head": dense(10 * seed + 4, 4, 2)}


def test_inside_a_layer_plusplus_has_the_inputs_of_the_task_s_own_layer(x64):
    """Two transformer layers, which the default pattern finds, and a head, in NumPy."""
    params_0, *tuned = (block_parameters(seed) for seed in range(TASKS + 1))
    taus = [task_vectors.difference(params, params_0) for params in tuned]
    x, batches = zip(*(data((8, i), 6 + i, 4) for i in range(TASKS)), strict=True)
    merged = merge.regmean_plusplus(
        params_0, taus, transformer, batches, off_diagonal=0.8, ridge=0.0
    )

    def hidden(a, p):
        return np.tanh((a * p["scale"]) @ p["fc1"]["kernel"] + p["fc1"]["bias"])

    def solve(inputs, layers):
        grams = [a.T @ a / len(a) for a in inputs]
        kernel = regression_mean(grams, [p["kernel"] for p in layers], 0.8)
        return {"kernel": kernel, "bias": np.mean([p["bias"] for p in layers], 0)}

    for i in "01":
        own = [params["layers"][i] for params in tuned]
        expected = {
            "fc1": solve(
                [a * p["scale"] for a, p in zip(x, own, strict=True)],
                [p["fc1"] for p in own],
            ),
            "fc2": solve(
                [hidden(a, p) for a, p in zip(x, own, strict=True)],
                [p["fc2"] for p in own],
            ),
            "scale": np.mean([p["scale"] for p in own]),
        }
        assert_close(merged["layers"][i], jax.tree.map(jnp.asarray, expected), 1e-9)
        fc2 = expected["fc2"]
        x = [a + hidden(a, expected) @ fc2["kernel"] + fc2["bias"] for a in x]
    assert_close(merged["head"], solve(x, [params["head"] for params in tuned]), 1e-9)


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        (
            "vision_model/encoder/layers/11/mlp/fc1/kernel",
            "vision_model/encoder/layers/11",
        ),
        ("decoder/block/2/layer/0/SelfAttention/q/kernel", "decoder/block/2"),
        ("transformer/h/0/attn/c_attn/kernel", "transformer/h/0"),
        ("layer/3/attention/kernel", "layer/3"),
        ("vision_model/pre_layrnorm/scale", "vision_model/pre_layrnorm"),
        ("visual_projection/kernel", "visual_projection"),
        ("kernel", ""),
    ],
)
def test_layers_are_found_in_the_names_of_hugging_face(path, layer):
    assert _layer(path, TRANSFORMER_LAYER) == layer


def test_plusplus_merges_clip():
    config = tiny.tiny_clip()
    vision = dataclasses.replace(config.vision, num_hidden_layers=1)
    config = dataclasses.replace(config, vision=vision)
    encode = clip.image_encoder(config)
    params_0, *tuned = (
        tree.select(tiny.random_params(seed, clip.layout(config)), clip.IMAGE_ENCODER)
        for seed in range(3)
    )
    # Two Dense layers were trained, one of them in the transformer layer.
    trained = ".*/fc1/.*|visual_projection/.*|.*/post_layernorm/.*"
    taus = [
        tree.select(task_vectors.difference(params, params_0), trained)
        for params in tuned
    ]
    taus[1] = tree.select(taus[1], ".*/kernel")  # only a part was trained
    images = normal(0, 2, 24, 12, 12, 3).astype(np.float32)
    batches = [[{"image": x, "mask": np.ones(24, bool)}] for x in images]
    merged = merge.regmean_plusplus(params_0, taus, encode, batches)
    average = merge.average(params_0, taus)
    kernels = set(tree.flatten(taus[1]))
    for path, leaf in tree.flatten(merged).items():
        distance = np.abs(leaf - tree.flatten(average)[path]).max()
        assert distance > 1e-3 if path in kernels else distance < 1e-6, path
    assert len(kernels) == 2


def test_plusplus_keeps_the_promises_of_a_merge():
    params_0, _, taus, _, batches = jax.tree.map(np.float32, models(4, 5, 3))
    params_0["ids"] = np.arange(3)
    method = functools.partial(
        merge.regmean_plusplus, apply_fn=without_ids, batches=batches, layers=None
    )
    merged = method(params_0, taus)

    def loss(taus):
        merged = method(params_0, taus)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(merged)), merged

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, jitted), _ = both(taus)
    assert_close(jitted, merged, 1e-4)
    swapped = merge.regmean_plusplus(params_0, taus[::-1], without_ids, batches[::-1])
    assert_close(swapped, merged, 1e-4)
    alone = merge.regmean_plusplus(params_0, taus[:1], without_ids, batches[:1])
    assert_close(alone, task_vectors.apply(params_0, taus[0]), 1e-6)
    assert merged["ids"].dtype == params_0["ids"].dtype
    zeros = [jax.tree.map(np.zeros_like, tau) for tau in taus]
    jax.tree.map(np.testing.assert_array_equal, method(params_0, zeros), params_0)
    _, gradients = both(zeros)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def without_ids(params, x):
    return net(5, 3)({name: params[name] for name in ("0", "1", "scale")}, x)


def test_batches_that_do_not_fit_are_an_error():
    params_0, _, taus, _, batches = models(4, 3)
    with pytest.raises(ValueError, match="2 sequences of batches for 3 task vectors"):
        merge.regmean_plusplus(params_0, taus, net(3), batches[:2])
    with pytest.raises(ValueError, match="a task has no batch"):
        merge.regmean_plusplus(params_0, taus, net(3), [*batches[:2], []])
    with pytest.raises(ValueError, match="called no flax.linen.Dense"):
        merge.regmean_plusplus(params_0, taus, lambda params, x: x, batches)
