"""The largest eigenvalue of a Hessian against the dense matrix, in float64."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import normal

from jaxarith import sharding, tangent, tree
from jaxarith.evaluate import smoothness

CLASSES = 3
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
PARAMS = {"a": normal(1, 4, 5), "b": normal(2, 5, CLASSES)}
KEY = jax.random.key(0)
CLOSE = {"key": KEY, "tolerance": 1e-9, "max_iterations": 2000}


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def linear(params, x):
    return x @ params["w"]


def weighted_square(outputs, label, weight):
    return 0.5 * weight * (outputs - label) ** 2


def samples(count, seed=0):
    labels = np.random.default_rng(seed).integers(CLASSES, size=count)
    return {"image": normal(seed, count, 4), "label": labels}


def batches(data, size):
    """The samples in batches; the last is padded with NaN and an absurd label."""
    count = len(data["image"])
    rows = np.arange(-(-count // size) * size)
    mask = rows < count
    padded = {name: leaf[rows % count].copy() for name, leaf in data.items()}
    padded["image"][~mask] = np.nan
    padded["label"][~mask] = 99
    return [
        {name: leaf[i : i + size] for name, leaf in (padded | {"mask": mask}).items()}
        for i in range(0, len(rows), size)
    ]


def dense(apply_fn, loss_fn, params, data, part=None):
    """The Hessian of the mean loss in the leaves of `part`, as a matrix."""
    part = params if part is None else tree.restrict(params, tree.flatten(part))
    start, unravel = jax.flatten_util.ravel_pytree(part)

    def loss(flat):
        outputs = apply_fn(tree.update(params, unravel(flat)), data["image"])
        return loss_fn(outputs, *(data[k] for k in data if k != "image")).mean()

    return np.asarray(jax.jit(jax.hessian(loss))(start))


def of_largest_magnitude(matrix):
    values = np.linalg.eigvalsh(matrix)
    return values[np.abs(values).argmax()]


def quadratic(values, seed=0):
    """Samples of a weighted least-squares problem with these Hessian eigenvalues."""
    axes, _ = np.linalg.qr(normal(seed, len(values), len(values)))
    return {
        "image": np.sqrt(len(values)) * axes,
        "label": normal(seed + 1, len(values)),
        "weight": np.asarray(values, float),
    }


def of_quadratic(values, **options):
    return smoothness.largest_eigenvalue(
        *(linear, weighted_square, {"w": normal(5, len(values))}),
        batches(quadratic(values), 3),
        targets=("label", "weight"),
        **(CLOSE | options),
    )


@pytest.mark.parametrize("part", [None, {"b": PARAMS["b"]}])
def test_it_is_that_of_the_dense_hessian(x64, part):
    data = samples(20)
    found = smoothness.largest_eigenvalue(
        *(mlp, CROSS_ENTROPY, PARAMS, batches(data, 8)), part=part, **CLOSE
    )
    matrix = dense(mlp, CROSS_ENTROPY, PARAMS, data, part)
    expected = of_largest_magnitude(matrix)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert found.smoothness == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-10)
    assert found.residual <= 1e-9 * found.smoothness


def test_the_largest_magnitude_may_be_that_of_a_negative_eigenvalue(x64):
    found = of_quadratic([2.0, 1.0, -3.0, 0.5, 0.0])
    assert found.value == pytest.approx(-3, rel=1e-12)
    assert found.smoothness == pytest.approx(3, rel=1e-12)


def test_of_two_opposite_largest_eigenvalues_the_spectral_norm_is_found(x64):
    found = of_quadratic([2.0, -2.0, 1.0], max_iterations=60)
    assert found.iterations == 60 and found.residual > 0.01
    assert found.smoothness == pytest.approx(2, rel=1e-12)


def test_it_rises_to_the_spectral_norm(x64):
    found = [
        of_quadratic([2.0, 1.9, -1.8, 0.1], max_iterations=count).smoothness
        for count in (1, 2, 5, 20, 2000)
    ]
    assert found == sorted(found)
    assert found[0] < 1.9 and found[-1] == pytest.approx(2, rel=1e-12)


def test_the_residual_is_how_far_an_eigenvalue_may_be(x64):
    values = np.array([2.0, 1.5, -1.4, 0.1])
    for count in range(1, 20):
        found = of_quadratic(values, max_iterations=count)
        assert np.abs(values - found.value).min() <= found.residual * (1 + 1e-9)
        assert found.iterations == count


def test_it_ends_at_the_tolerance(x64):
    loose, tight = (of_quadratic([2.0, 1.0], tolerance=t) for t in (1e-2, 1e-6))
    assert loose.iterations < tight.iterations < 50
    assert 1e-6 * loose.smoothness < loose.residual <= 1e-2 * loose.smoothness


@pytest.mark.parametrize("size", [3, 7, 20])
def test_it_does_not_matter_how_samples_are_cut_into_batches(x64, size):
    data = samples(20)
    found, whole = (
        smoothness.largest_eigenvalue(
            *(mlp, CROSS_ENTROPY, PARAMS, batches(data, size)), **CLOSE
        )
        for size in (size, 40)
    )
    assert found.iterations == whole.iterations
    assert found.value == pytest.approx(whole.value, rel=1e-12)


def test_a_batch_of_padding_alone_adds_nothing(x64):
    data = batches(samples(8), 4)
    padding = [data[0] | {"mask": np.zeros(4, bool)}]
    found, expected = (
        smoothness.largest_eigenvalue(mlp, CROSS_ENTROPY, PARAMS, read, **CLOSE)
        for read in (padding + data, data)
    )
    assert found == expected


def test_of_a_linearised_model_it_is_that_of_the_gauss_newton_matrix(x64):
    data, params = samples(20), jax.tree.map(jnp.asarray, PARAMS)
    found = smoothness.largest_eigenvalue(
        *(tangent.linearize(mlp, params), CROSS_ENTROPY, params, batches(data, 8)),
        **CLOSE,
    )
    start, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacobian(lambda flat: mlp(unravel(flat), data["image"]))(start)
    p = jax.nn.softmax(mlp(params, data["image"]))
    of_outputs = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
    matrix = jnp.einsum("nci,ncd,ndj->ij", jacobian, of_outputs, jacobian) / 20
    assert found.value == pytest.approx(of_largest_magnitude(matrix), rel=1e-10)


def test_a_loss_without_curvature_has_none():
    found = smoothness.largest_eigenvalue(
        *(linear, lambda outputs, label: outputs, {"w": jnp.ones(4)}),
        batches(samples(6), 3),
        key=KEY,
    )
    assert found == (0, 0, 1) and found.smoothness == 0


def test_devices_share_batches_and_parameters(x64, monkeypatch):
    monkeypatch.setattr(sharding.mesh, "SMALLEST_SHARDED", 1)
    mesh = sharding.make_mesh("data=2,fsdp=2")
    params = {"a": normal(1, 4, 8), "b": normal(2, 8, CLASSES)}
    data = batches(samples(10), 5)
    found, expected = (
        smoothness.largest_eigenvalue(
            mlp, CROSS_ENTROPY, params, data, key=KEY, mesh=mesh, max_iterations=9
        )
        for mesh in (mesh, None)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_model_is_traced_once():
    traced = []

    def counted(params, x):
        traced.append(1)
        return mlp(params, x)

    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PARAMS)
    data = batches(samples(20), 8)
    for key in jax.random.split(KEY):
        smoothness.largest_eigenvalue(
            *(counted, CROSS_ENTROPY, params, data),
            **dict(key=key, tolerance=0.0, max_iterations=5),
        )
    assert len(traced) == 1


def test_parameters_in_bfloat16_are_summed_in_float32():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    data = batches(samples(20), 8)
    found, expected = (
        smoothness.largest_eigenvalue(mlp, CROSS_ENTROPY, p, data, key=KEY)
        for p in (params, wide)
    )
    assert found.value == pytest.approx(expected.value, rel=0.03)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(batches=[]), "pass 1 .* 0 samples"),
        (dict(batches=iter(batches(samples(4), 4))), "pass 2 .* 0 samples.* had 4"),
        (dict(loss_fn=lambda *rest: CROSS_ENTROPY(*rest).mean()), r"expected .*\[B\]"),
        (dict(params=PARAMS | {"b": np.nan * PARAMS["b"]}), "not finite"),
        (dict(part={"c": np.zeros(2)}), r"\+ c \[2\]: not in the parameters"),
        (dict(max_iterations=0), "max_iterations is 0"),
    ],
)
def test_what_cannot_be_measured_is_an_error(changed, message):
    usual = dict(apply_fn=mlp, loss_fn=CROSS_ENTROPY, params=PARAMS, key=KEY)
    usual["batches"] = batches(samples(4), 4)
    with pytest.raises(ValueError, match=message):
        smoothness.largest_eigenvalue(**(usual | changed))
