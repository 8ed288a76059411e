"""DC-Merge against a NumPy transcription of its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxarith import merge
from jaxarith.merge.dc_merge import smoothed


def polar(matrix):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def authors_smoothing(s, smoothing, ratio):
    if smoothing == "none":
        return s
    if smoothing == "average":
        return np.full(len(s), s.mean())
    line = np.linspace(min(ratio, s[0] / s[-1]), 1, len(s))
    return s.sum() * line / line.sum()


def bases_and_cores(taus, smoothing="none", ratio=5.0):
    """U `[out, Tk]`, V `[in, Tk]` and the cores `[T, Tk, Tk]` before TIES."""
    rank = min(taus.shape[1:]) // len(taus)
    parts = []
    for tau in taus:
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        parts.append(
            (u[:, :rank], authors_smoothing(s[:rank], smoothing, ratio), vt[:rank].T)
        )
    u = polar(np.concatenate([part[0] for part in parts], axis=1))
    v = polar(np.concatenate([part[2] for part in parts], axis=1))
    return u, v, np.stack([u.T @ a @ np.diag(s) @ b.T @ v for a, s, b in parts])


def dc(taus, keep, smoothing="none", ratio=5.0):
    u, v, cores = bases_and_cores(taus, smoothing, ratio)
    tasks, size = cores.shape[:2]
    for core in cores:
        least = np.sort(np.abs(core).ravel())[-max(int(keep * core.size), 1)]
        core[np.abs(core) < least] = 0
    agree = np.sign(cores) == np.sign(cores.sum(axis=0))
    agree &= cores != 0
    merged = (cores * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    rank = size // tasks
    for i in range(size):
        for j in range(size):
            if i // rank != j // rank:
                merged[i, j] = 0
    return u @ merged @ v.T


@pytest.mark.parametrize("shape", [(9, 13), (13, 9)])
@pytest.mark.parametrize(
    ("smoothing", "ratio", "keep"),
    [
        ("none", 5.0, 0.3),
        ("average", 5.0, 1.0),
        ("linear", 1.2, 0.3),
        ("linear", 9.0, 0.001),
    ],
)
def test_dc_merge_is_its_definition(shape, smoothing, ratio, keep):
    options = {"smoothing": smoothing, "ratio": ratio, "keep": keep}
    with jax.enable_x64(True):
        taus = oracles.normal(0, 3, *shape) + oracles.normal(1, *shape)
        params_0 = oracles.normal(2, *shape)
        biases = oracles.normal(3, 3, 5)
        moved = dc(taus, keep, smoothing, ratio)
        assert np.abs(moved).max() > 0.1
        start = {"w": params_0, "b": np.zeros(5)}
        vectors = [{"w": t, "b": b} for t, b in zip(taus, biases, strict=True)]
        merged = merge.dc_merge(start, vectors, coef=0.7, **options)
        expected = params_0 + 0.7 * moved
        np.testing.assert_allclose(merged["w"], expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(merged["b"], 0.7 * biases.mean(axis=0), rtol=1e-12)
    vectors = jax.tree.map(lambda x: np.float32(x), vectors)
    merged = merge.dc_merge(
        {"w": np.zeros(shape, np.float32)}, only_w(vectors), **options
    )
    np.testing.assert_allclose(merged["w"], moved, rtol=1e-4, atol=2e-5)


def only_w(vectors):
    return [{"w": vector["w"]} for vector in vectors]


def orthogonal_tasks(sizes, size=(9, 12)):
    """Tasks with `len(sizes[t])` singular values in rows and columns of their own."""
    u, v = (np.linalg.qr(oracles.normal(i, n, n))[0] for i, n in enumerate(size))
    taus, at = [], 0
    for s in map(np.array, sizes):
        own = slice(at, at + len(s))
        taus.append((u[:, own] * s) @ v[:, own].T)
        at += len(s)
    return taus


def test_cores_of_orthogonal_tasks_are_their_singular_values():
    taus = np.stack(orthogonal_tasks([[3.0, 2, 1], [6.0, 5, 4]], size=(6, 8)))
    _, _, cores = bases_and_cores(taus)
    expected = np.zeros((2, 6, 6))
    expected[0, :3, :3] = np.diag([3.0, 2, 1])
    expected[1, 3:, 3:] = np.diag([6.0, 5, 4])
    np.testing.assert_allclose(cores, expected, atol=1e-12)


@pytest.mark.parametrize("x64", [True, False])
def test_orthogonal_tasks_add_up_as_in_tsv(x64):
    """Rounding noise in the block of another task would halve that task's entries."""
    sizes = [[3.0, 2, 1], [6.0, 5, 4], [1.0, 0.5, 0.1]]
    dtype = np.float64 if x64 else np.float32
    with jax.enable_x64(x64):
        taus = [{"w": tau.astype(dtype)} for tau in orthogonal_tasks(sizes)]
        params_0 = {"w": np.zeros((9, 12), dtype)}
        merged = merge.dc_merge(params_0, taus, keep=1.0)
        tolerance = 1e-12 if x64 else 1e-5
        expected = sum(tau["w"] for tau in taus)
        np.testing.assert_allclose(merged["w"], expected, atol=tolerance)
        tsv = merge.tsv(params_0, taus)
        np.testing.assert_allclose(merged["w"], tsv["w"], atol=tolerance)


def test_smoothing_leaves_the_sum_and_the_directions_of_low_rank_tasks():
    """Two singular values for three places: nothing is lost to the third."""
    with jax.enable_x64(True):
        taus = orthogonal_tasks([[5.0, 1.0], [3.0, 1.0], [8.0, 2.0]])
        merge_them = functools.partial(
            merge.dc_merge, {"w": np.zeros((9, 12))}, [{"w": tau} for tau in taus]
        )
        means = merge_them(smoothing="average", keep=1.0)["w"]
        s = np.linalg.svd(means, compute_uv=False)
        np.testing.assert_allclose(s, [5, 5, 3, 3, 2, 2, 0, 0, 0], atol=1e-12)
        lines = merge_them(smoothing="linear", ratio=3.0, keep=1.0)["w"]
        s = np.linalg.svd(lines, compute_uv=False)
        # 6, 4 and 10 in two parts, the first at most three times the second.
        expected = [7.5, 4.5, 3, 2.5, 1.5, 1]
        np.testing.assert_allclose(s, expected + [0] * 3, atol=1e-12)


def test_smoothed_values_of_odd_spectra():
    def found(*s):
        return np.asarray(smoothed(jnp.array(s), 3.0))

    np.testing.assert_allclose(found(2.0), [2.0])
    np.testing.assert_allclose(found(2.0, 2.0), [2.0, 2.0])
    np.testing.assert_allclose(found(4.0, 2.0, 0.0), [4.0, 2.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(found(0.0, 0.0), [0.0, 0.0])
    slopes = jax.grad(lambda s: smoothed(s, 3.0).sum())(jnp.zeros(2))
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("factor", [-2.0, 1e-6, 1e6])
def test_scaled_tasks_give_the_scaled_merge(factor):
    with jax.enable_x64(True):
        taus = oracles.normal(0, 3, 9, 13)
        params_0 = {"w": np.zeros((9, 13))}

        def merged(factor):
            vectors = [{"w": factor * tau} for tau in taus]
            options = {"smoothing": "linear", "keep": 0.2}
            return np.asarray(merge.dc_merge(params_0, vectors, **options)["w"])

        np.testing.assert_allclose(
            merged(factor), factor * merged(1.0), rtol=1e-9, atol=1e-10 * abs(factor)
        )


def test_one_task_keeps_its_leading_directions():
    """The core of one task is diagonal, so `keep` decides how many there are."""
    with jax.enable_x64(True):
        tau = oracles.normal(0, 6, 9)
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        params_0 = {"w": np.zeros((6, 9))}
        merged = merge.dc_merge(params_0, [{"w": tau}], keep=2 / 36)
        np.testing.assert_allclose(merged["w"], u[:, :2] * s[:2] @ vt[:2], atol=1e-12)
        merged = merge.dc_merge(params_0, [{"w": tau}], keep=1.0)
        np.testing.assert_allclose(merged["w"], tau, atol=1e-12)


def test_zero_task_vector_does_not_disturb_the_others():
    with jax.enable_x64(True):
        tau = oracles.normal(0, 6, 9)
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        taus = [{"w": tau}, {"w": np.zeros((6, 9))}]
        merged = merge.dc_merge({"w": np.zeros((6, 9))}, taus, keep=1.0)
        np.testing.assert_allclose(merged["w"], u[:, :3] * s[:3] @ vt[:3], atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 5), (2, 4)])
def test_matrices_too_small_for_all_tasks_are_averaged(shape):
    taus = [{"w": oracles.normal(i, *shape)} for i in range(3)]
    merged = merge.dc_merge({"w": jnp.zeros(shape)}, taus)
    expected = np.mean([tau["w"] for tau in taus], axis=0)
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": "all"}, "unknown smoothing 'all'; known are none, average, lin"),
        ({"ratio": 0.5}, "ratio is 0.5; it must be 1 or more"),
        ({"ratio": np.nan}, "ratio is nan"),
        ({"keep": 0.0}, r"keep is 0.0; it must be in \(0, 1\]"),
        ({"keep": np.nan}, "keep is nan"),
        ({"matrices": "kernel"}, "no 2-D leaf matches matrices='kernel'"),
        ({"coef": [1.0, 2.0]}, "coef has shape"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    tau = {"w": np.ones((2, 2))}
    with pytest.raises(ValueError, match=message):
        merge.dc_merge(tau, [tau, tau], **options)
