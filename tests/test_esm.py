"""ESM against a NumPy transcription of its equations, with and without data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from checks import assert_close
from flax import linen as nn

from jaxarith import merge
from jaxarith.merge import capture
from jaxarith.merge.esm import directions

TASKS = 3


def leading(tau, x, rank):
    """Principal directions of `x @ tau.T`, or left singular vectors: `[out, rank]`."""
    if x is None:
        return np.linalg.svd(tau)[0][:, :rank]
    return np.linalg.svd(x @ tau.T, full_matrices=False)[2].T[:, :rank]


def relative(norms):
    return norms / norms.mean()


def levelled(matrix, singular_values):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    level = s[s > 1e-9].mean() if singular_values == "mean" else 1
    return level * u[:, s > 1e-9] @ vt[s > 1e-9]


def papers_esm(taus, xs=None, scaling=True, singular_values="mean"):
    """A layer `[out, in]` before it is scaled among the layers."""
    rank = taus.shape[1] // len(taus)
    xs = [None] * len(taus) if xs is None else xs
    p = [leading(tau, x, rank) for tau, x in zip(taus, xs, strict=True)]
    a = [own.T @ tau for own, tau in zip(p, taus, strict=True)]
    if scaling:
        scales = relative(np.array([np.linalg.norm(own) for own in a])) ** 2
        a = [scale * own for scale, own in zip(scales, a, strict=True)]
    p, a = np.concatenate(p, axis=1), np.concatenate(a)
    if scaling:
        a = a * relative(np.linalg.norm(a, axis=0)) ** 2
    return levelled(p, singular_values) @ levelled(a, singular_values)


def normal_taus(shape, seed=0):
    """Tasks of different lengths with something in common."""
    own = (
        oracles.normal((seed, 0), TASKS, *shape) * np.array([1, 2, 0.5])[:, None, None]
    )
    return own + oracles.normal((seed, 1), *shape)


def inputs(size, rows=40, seed=5):
    """Inputs of every task, whose directions have different lengths."""
    lengths = np.linspace(0.3, 2, size)
    return oracles.normal((seed, 2), TASKS, rows, size) * lengths + 0.5


def grams_of(xs, path):
    return [{path: x.T @ x / len(x)} for x in xs]


def of_leaf(taus, name, transpose=False):
    return [{name: tau.T if transpose else tau} for tau in taus]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (11, 3)])
@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize(
    ("scaling", "singular_values"), [(True, "mean"), (False, "mean"), (True, "one")]
)
def test_esm_is_its_equations(shape, with_data, scaling, singular_values):
    options = {"scaling": scaling, "singular_values": singular_values}
    with jax.enable_x64(True):
        taus, params_0 = normal_taus(shape), oracles.normal(2, *shape)
        xs = inputs(shape[1]) if with_data else None
        moved = papers_esm(taus, xs, **options)
        assert np.abs(moved).max() > 0.1
        for name in ("weight", "kernel"):
            turned = name == "kernel"
            merged = merge.esm(
                {name: params_0.T if turned else params_0},
                of_leaf(taus, name, turned),
                grams_of(xs, name) if xs is not None else None,
                coef=0.7,
                **options,
            )[name]
            np.testing.assert_allclose(
                merged.T if turned else merged,
                params_0 + 0.7 * moved,
                rtol=1e-8,
                atol=1e-9,
            )


def test_float32_is_float64_rounded():
    taus, xs = normal_taus((6, 9)), inputs(9)
    params_0 = {"weight": np.zeros((6, 9), np.float32)}
    args = of_leaf(taus.astype(np.float32), "weight"), grams_of(xs, "weight")
    merged = merge.esm(params_0, *args)["weight"]
    expected = papers_esm(taus, xs)
    np.testing.assert_allclose(merged, expected, atol=1e-4 * np.abs(expected).max())


def test_layers_are_scaled_among_those_of_their_kind():
    """Blocks of two kinds of layers; the head is the only one of its kind."""
    sizes = {"fc1": (8, 6), "fc2": (6, 8)}
    paths = [f"h/{i}/{kind}/weight" for i in range(3) for kind in sizes]
    shapes = {path: sizes[path.split("/")[2]] for path in paths}
    shapes |= {"head/weight": (5, 6)}
    taus = {
        path: (1 + i) * normal_taus(shape, seed=i)
        for i, (path, shape) in enumerate(shapes.items())
    }
    before = {path: papers_esm(own) for path, own in taus.items()}
    norms = {path: np.linalg.norm(own) for path, own in before.items()}
    with jax.enable_x64(True):
        merged = merge.esm(
            {path: np.zeros(shape) for path, shape in shapes.items()},
            [{path: own[i] for path, own in taus.items()} for i in range(TASKS)],
        )
    for path, own in before.items():
        name = path.split("/")[-2]
        kind = [norms[other] for other in shapes if other.split("/")[-2] == name]
        scale = (norms[path] / np.mean(kind)) ** 2
        assert abs(scale - 1) > 0.02 if len(kind) == 3 else scale == 1
        np.testing.assert_allclose(merged[path], scale * own, rtol=1e-8, atol=1e-9)


def test_with_singular_values_of_one_all_layers_of_a_kind_have_one_norm():
    """So the paper's scaling of layers has nothing to scale."""
    layers = [(1 + 3 * i) * normal_taus((6, 9), seed=i) for i in range(3)]
    with jax.enable_x64(True):
        paths = [f"h/{i}/weight" for i in range(3)]
        taus = [
            {path: own[t] for path, own in zip(paths, layers, strict=True)}
            for t in range(TASKS)
        ]
        params_0 = {path: np.zeros((6, 9)) for path in paths}
        merged = merge.esm(params_0, taus, singular_values="one")
        for path in paths:
            s = np.linalg.svd(merged[path], compute_uv=False)
            np.testing.assert_allclose(s, 1, rtol=1e-9)


def test_identity_as_gram_matrix_is_the_form_without_data():
    with jax.enable_x64(True):
        taus = of_leaf(normal_taus((6, 9)), "weight")
        params_0 = {"weight": oracles.normal(2, 6, 9)}
        grams = [{"weight": jnp.eye(9)}] * TASKS
        assert_close(merge.esm(params_0, taus, grams), merge.esm(params_0, taus), 1e-9)


def test_directions_of_the_gram_matrix_are_those_of_the_displaced_outputs():
    """The right singular vectors of x @ tau.T, and 0 where there are no more."""
    tau, x = oracles.normal(0, 6, 9), inputs(9)[0]
    for rows in (40, 4):
        seen = x[:rows]
        with jax.enable_x64(True):
            found = np.asarray(directions(jnp.asarray(tau), seen.T @ seen / rows))
        expected = np.linalg.svd(seen @ tau.T, full_matrices=False)[2].T
        own = min(rows, 6)
        cosines = np.sum(found[:, :own] * expected, axis=0)
        np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-9)
        assert not np.any(found[:, own:])


def test_fewer_inputs_than_directions_give_fewer_directions():
    with jax.enable_x64(True):
        taus, xs = normal_taus((9, 12)), inputs(12, rows=2)  # for 3 directions of each
        args = {"weight": np.zeros((9, 12))}, of_leaf(taus, "weight")
        merged = merge.esm(*args, grams_of(xs, "weight"))["weight"]
        np.testing.assert_allclose(merged, papers_esm(taus, xs), rtol=1e-7, atol=1e-9)
        assert np.linalg.matrix_rank(merged) == 2 * TASKS


def test_matrices_without_gram_matrices_get_the_directions_of_their_own():
    with jax.enable_x64(True):
        a, b = normal_taus((6, 9)), normal_taus((6, 9), seed=1)
        taus = [{"a/weight": a[t], "b/weight": b[t]} for t in range(TASKS)]
        params_0 = {"a/weight": np.zeros((6, 9)), "b/weight": np.zeros((6, 9))}
        xs = inputs(9)
        merged = merge.esm(params_0, taus, grams_of(xs, "a/weight"))
        np.testing.assert_allclose(merged["a/weight"], papers_esm(a, xs), rtol=1e-7)
        np.testing.assert_allclose(merged["b/weight"], papers_esm(b), rtol=1e-7)
        assert np.abs(papers_esm(a) - papers_esm(a, xs)).max() > 0.01


def test_captured_gram_matrices_are_what_it_takes():
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(4)])
    x = oracles.normal(0, 20, 5).astype(np.float32)
    trees = [model.init(jax.random.key(i), x)["params"] for i in range(3)]
    params_0, *models = trees
    taus = [jax.tree.map(jnp.subtract, own, params_0) for own in models]

    def apply_fn(params, x):
        return model.apply({"params": params}, x)

    grams = [capture.input_grams(apply_fn, own, [{"image": x}]) for own in models]
    merged = merge.esm(params_0, taus, grams)
    assert jax.tree.structure(merged) == jax.tree.structure(params_0)
    plain = merge.esm(params_0, taus)
    difference = merged["layers_2"]["kernel"] - plain["layers_2"]["kernel"]
    assert np.abs(difference).max() > 1e-3
    jitted = jax.jit(merge.esm)(params_0, taus, grams)
    assert_close(jitted, merged, 1e-4)


def test_one_task_is_merged_to_the_closest_vector_of_equal_singular_values():
    """So the best coefficient is 1. With singular values of 1 it is their mean."""
    with jax.enable_x64(True):
        tau = oracles.normal(0, 6, 9)
        params_0, taus = {"weight": np.zeros((6, 9))}, of_leaf([tau], "weight")
        run = functools.partial(merge.esm, params_0, taus, scaling=False)
        isotropic = merge.iso_c(params_0, taus)["weight"]
        level = np.linalg.svd(tau, compute_uv=False).mean()
        for merged, best in [
            (run(), 1),
            (run(grams_of(inputs(9)[:1], "weight")), 1),
            (run(singular_values="one"), level),
        ]:
            np.testing.assert_allclose(merged["weight"] * best, isotropic, atol=1e-9)
            fit = np.sum(merged["weight"] * tau) / np.sum(merged["weight"] ** 2)
            np.testing.assert_allclose(fit, best, rtol=1e-9)


def test_columns_of_equal_length_and_layers_alone_are_not_scaled():
    signs = np.array([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    with jax.enable_x64(True):
        # The columns of the product are as long as those of `signs`.
        tau = np.linalg.qr(oracles.normal(0, 4, 4))[0] @ signs
        params_0, taus = {"weight": np.zeros((4, 4))}, of_leaf([tau], "weight")
        merged = merge.esm(params_0, taus)
        assert_close(merged, merge.esm(params_0, taus, scaling=False), 1e-12)
        taus = of_leaf([tau * np.array([1, 1, 1, 3])], "weight")
        other = merge.esm(params_0, taus, scaling=False)
        assert np.abs(merge.esm(params_0, taus)["weight"] - other["weight"]).max() > 0.1


@pytest.mark.parametrize("singular_values", ["mean", "one"])
def test_scaled_tasks_give_the_scaled_merge_unless_singular_values_are_one(
    singular_values,
):
    with jax.enable_x64(True):
        taus, params_0 = normal_taus((6, 9)), {"weight": np.zeros((6, 9))}
        run = functools.partial(merge.esm, params_0, singular_values=singular_values)
        merged = run(of_leaf(taus, "weight"))["weight"]
        longer = run(of_leaf(1e3 * taus, "weight"))["weight"]
        factor = 1e3 if singular_values == "mean" else 1
        np.testing.assert_allclose(longer, factor * merged, rtol=1e-9)


def test_zero_task_vector_does_not_disturb_the_others():
    with jax.enable_x64(True):
        tau = oracles.normal(0, 6, 9)
        taus = of_leaf([tau, np.zeros((6, 9))], "weight")
        merged = merge.esm({"weight": np.zeros((6, 9))}, taus, scaling=False)["weight"]
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        np.testing.assert_allclose(merged, s[:3].mean() * u[:, :3] @ vt[:3], atol=1e-12)


def test_other_leaves_and_layers_of_few_outputs_are_averaged():
    shapes = {
        "embed": (7, 4),
        "head/weight": (2, 9),
        "head/bias": (2,),
        "weight": (4, 4),
    }
    taus = [
        {p: oracles.normal((i, j), *s) for j, (p, s) in enumerate(shapes.items())}
        for i in range(TASKS)
    ]
    params_0 = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    merged, mean = merge.esm(params_0, taus), merge.average(params_0, taus)
    for path in ("embed", "head/weight", "head/bias"):
        np.testing.assert_allclose(merged[path], mean[path], rtol=1e-5, atol=1e-7)
    assert np.abs(merged["weight"] - mean["weight"]).max() > 0.1


def grams(*found):
    return [{} if own is None else {"weight": np.ones(own)} for own in found]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            None,
            {"singular_values": "two"},
            "unknown singular_values 'two'; known are m",
        ),
        (None, {"matrices": "kernel"}, "no 2-D leaf matches matrices='kernel'"),
        (None, {"coef": [1.0, 2.0]}, "coef has shape"),
        (grams((3, 3)), {}, "1 sets of Gram matrices for 2 task vectors"),
        (grams((3, 3), None), {}, r"tasks \[1\] have no Gram matrix of weight"),
        (
            grams((2, 2), (2, 2)),
            {},
            r"Gram matrices of shapes \[\[2, 2\], \[2, 2\]\] for weight, which has "
            r"shape \[2, 3\]; expected \[in, in\] for a weight \[out, in\]",
        ),
        ([{"a": np.eye(3)}] * 2, {}, r"for a, which has shape \[\]"),
        (
            [{"weight": np.full((3, 3), np.nan)}] * 2,
            {},
            "Gram matrices of task 0 has NaN",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(given, options, message):
    tau = {"weight": np.ones((2, 3))}
    with pytest.raises(ValueError, match=message):
        merge.esm(tau, [tau, tau], given, **options)
