"""Losses of edited models against closed forms, and their picture."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import normal

from jaxarith import plots, tangent, task_vectors
from jaxarith.evaluate import landscape

CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
XS, YS = np.array([-0.5, 0.0, 0.25, 1.0]), np.array([0.0, 0.5, 1.5])
PLANE = np.stack(np.meshgrid(XS, YS, indexing="ij"), axis=-1)
PARAMS_0 = {"a": normal(0, 4, 5), "b": normal(1, 5, 3)}
TAUS = [{"a": normal(2, 4, 5)}, {"a": normal(3, 4, 5), "b": normal(4, 5, 3)}]


@pytest.fixture(autouse=True)
def float64(x64):
    yield


def linear(params, x):
    return x @ params["w"]


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def batches(image, label, size):
    rows = np.arange(-(-len(image) // size) * size)
    mask, rows = rows < len(image), rows % len(image)
    whole = {"image": image[rows], "label": label[rows], "mask": mask}
    return [
        {name: leaf[i : i + size] for name, leaf in whole.items()}
        for i in range(0, len(rows), size)
    ]


def task(count=11):
    return normal(5, count, 4), np.random.default_rng(6).integers(3, size=count)


@pytest.mark.parametrize("linearized", [False, True])
def test_of_least_squares_it_is_the_quadratic_form(linearized):
    x, y, w = normal(0, 9, 4), normal(1, 9), normal(2, 4)
    u, v = normal(3, 4), normal(4, 4)
    found = landscape.losses(
        *(linear, optax.l2_loss, {"w": w}, [{"w": u}, {"w": v}]),
        *(batches(x, y, 4), PLANE),
        linearized=linearized,
    )
    move = PLANE @ np.stack([u, v])
    slope, matrix = x.T @ (x @ w - y) / 9, x.T @ x / 9
    expected = np.mean((x @ w - y) ** 2) / 2 + move @ slope
    expected += np.einsum("nmi,ij,nmj->nm", move, matrix, move) / 2
    assert found.shape == (len(XS), len(YS)) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("linearized", [False, True])
def test_it_is_the_mean_loss_of_the_edited_model_over_real_samples(linearized):
    x, y = task()
    found = landscape.losses(
        *(mlp, CROSS_ENTROPY, PARAMS_0, TAUS, iter(batches(x, y, 4)), PLANE),
        linearized=linearized,
    )
    start = jax.tree.map(jnp.asarray, PARAMS_0)
    model = tangent.linearize(mlp, start) if linearized else mlp
    for i, j in np.ndindex(found.shape):
        params = start
        for coef, tau in zip(PLANE[i, j], TAUS, strict=True):
            params = task_vectors.apply(params, tau, coef)
        expected = CROSS_ENTROPY(model(params, x), y).mean()
        assert found[i, j] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("linearized", [False, True])
def test_it_does_not_matter_how_samples_are_cut_into_batches(linearized):
    x, y = task()
    padding = batches(x, y, 3)[0] | {"mask": np.zeros(3, bool)}
    found, expected = (
        landscape.losses(
            *(mlp, CROSS_ENTROPY, PARAMS_0, TAUS, read, [[1.0, 0.5]]),
            linearized=linearized,
        )
        for read in ([padding, *batches(x, y, 3)], batches(x, y, 11))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("linearized", [False, True])
def test_losses_take_any_targets(linearized):
    """A loss of `label` and `weight`, of one coefficient and one vector."""
    x, y = normal(0, 6, 4), normal(1, 6)
    data = [batches(x, y, 6)[0] | {"weight": np.arange(6.0)}]
    found = landscape.losses(
        linear,
        lambda outputs, label, weight: weight * (outputs - label) ** 2,
        *({"w": normal(2, 4)}, [{"w": normal(3, 4)}], data, [0.5]),
        **dict(targets=("label", "weight"), linearized=linearized),
    )
    outputs = x @ (normal(2, 4) + 0.5 * normal(3, 4))
    assert found == pytest.approx(np.mean(np.arange(6) * (outputs - y) ** 2))
    assert found.shape == ()


def test_the_network_is_compiled_once_for_many_calls():
    traced = []

    def counted(params, x):
        traced.append(1)
        return mlp(params, x)

    for count in (4, 8):  # batches of one size
        data = batches(*task(count), 4)
        landscape.losses(counted, CROSS_ENTROPY, PARAMS_0, TAUS, data, PLANE)
    assert len(traced) == 1


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(batches=[]), "no sample"),
        (dict(coefs=[[1.0, 2.0, 3.0]]), "2 task vectors"),
        (dict(coefs=1.0), "2 task vectors"),
        (dict(loss_fn=lambda *rest: CROSS_ENTROPY(*rest).mean()), r"expected .*\[B\]"),
    ],
)
def test_what_cannot_be_measured_is_an_error(linearized, changed, message):
    usual = dict(apply_fn=mlp, loss_fn=CROSS_ENTROPY, params_0=PARAMS_0, taus=TAUS)
    usual |= dict(batches=batches(*task(), 4), coefs=PLANE, linearized=linearized)
    with pytest.raises(ValueError, match=message):
        landscape.losses(**(usual | changed))


def test_the_picture_is_a_png_file(tmp_path):
    a, b = np.meshgrid(np.linspace(-0.5, 1.5, 21), np.linspace(-0.5, 1.5, 17))
    bowl = ((a - 1) ** 2 + 0.3 * (b - 0.1) ** 2).T
    broken = np.where(bowl > 2, np.inf, np.exp(4 * bowl))
    plots.landscape(
        tmp_path / "plane.png",
        {"MNIST": bowl, "SVHN": broken, "flat": 0 * bowl, "none": np.nan * bowl},
        (a[0], b[:, 0]),
        {"pre-trained": (0, 0), "MNIST": (1, 0), "SVHN": (0, 1), "merged": (0.5, 0.5)},
        **dict(x="coefficient of MNIST", y="coefficient of SVHN"),
    )
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")
