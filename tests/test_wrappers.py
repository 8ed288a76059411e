"""Wrappers of what a merge gave, against NumPy transcriptions of the papers."""

import functools
import importlib

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal

from jaxarith import hub, merge, stream, task_vectors, tree
from jaxarith.merge import wrapped

pytestmark = pytest.mark.usefixtures("default_emitters")

TASKS, OUT, IN = 3, 6, 8
PATHS = [f"layers/{i}/{kind}/kernel" for i in range(3) for kind in ("fc", "out")]
WRAPPERS = {
    "svc": merge.svc,
    "lines": functools.partial(merge.lines, beta=0.5),
    "subspace_boosting": functools.partial(merge.subspace_boosting, beta=0.3),
    "isotropise": merge.isotropise,
    "polarize": merge.polarize,
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)


def model(seed, dtype=np.float64):
    """Kernels [in, out] of three layers, an embedding, a bias and running means."""
    leaves = {p: normal((seed, i), IN, OUT) for i, p in enumerate(PATHS)}
    leaves["embed/embedding"] = normal((seed, 10), 5, 4)
    leaves["head/bias"] = normal((seed, 11), OUT)
    leaves["batch_stats/norm/mean"] = normal((seed, 12), OUT)
    return {path: np.asarray(leaf, dtype) for path, leaf in leaves.items()}


def vectors(dtype=np.float64):
    common = model(9)
    return [
        {p: ((1 + i) * leaf + common[p]).astype(dtype) for p, leaf in model(i).items()}
        for i in range(1, 1 + TASKS)
    ]


def total(params_0, taus, coef=1.0):
    return {p: params_0[p] + coef * sum(tau[p] for tau in taus) for p in params_0}


def module(name):
    """The module of a wrapper, whose name the function has in the package."""
    return importlib.import_module(f"jaxarith.merge.{name}")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def svc_in_numpy(vector, taus, alpha):
    """Steps 1 to 3 of the paper, direction by direction, on [output, input]."""
    u, s, vt = np.linalg.svd(vector, full_matrices=False)
    new = np.zeros_like(vector)
    for r in range(len(s)):
        own = u[:, r] @ vector
        shares = [own @ (u[:, r] @ tau) / np.sum((u[:, r] @ tau) ** 2) for tau in taus]
        factor = len(taus) / sum(max(alpha, share) for share in shares)
        new += factor * s[r] * np.outer(u[:, r], vt[r])
    return new


@pytest.mark.parametrize("alpha", [None, 0.1, 1.0])
def test_svc_is_the_papers(alpha, x64):
    params_0, taus = model(0), vectors()
    merged = total(params_0, taus, 0.7)
    found = merge.svc(params_0, taus, merged, alpha=alpha, coef=1.3)
    for path in PATHS:
        of_path = [tau[path].T for tau in taus]
        vector = svc_in_numpy(0.7 * sum(of_path), of_path, alpha or 1 / TASKS)
        expected = params_0[path] + 1.3 * vector.T
        np.testing.assert_allclose(found[path], expected, rtol=1e-9, atol=1e-10)


def test_svc_of_one_task_is_the_identity():
    params_0, [tau, *_] = model(0, np.float32), vectors(np.float32)
    merged = total(params_0, [tau])
    found = merge.svc(params_0, [tau], merged)
    for path in PATHS:
        np.testing.assert_allclose(found[path], merged[path], atol=2e-5)


def test_svc_undoes_the_coefficient_where_no_share_is_below_alpha(x64):
    params_0, taus = model(0), vectors()
    alike = [tree.flatten(taus[0]), {p: 2 * leaf for p, leaf in taus[0].items()}]
    at = [merge.svc(params_0, alike, total(params_0, alike, c)) for c in (1.0, 0.6)]
    np.testing.assert_allclose(at[0][PATHS[0]], at[1][PATHS[0]], rtol=1e-9, atol=1e-9)


def test_svc_of_a_task_that_does_not_move_is_finite():
    params_0, taus = model(0, np.float32), vectors(np.float32)
    still = {path: np.zeros_like(leaf) for path, leaf in taus[0].items()}
    low = {path: leaf.copy() for path, leaf in taus[1].items()}
    for path in PATHS:
        low[path][:, 2:] = 0  # it has two outputs alone
    tasks = [taus[0], still, low]
    found = merge.svc(params_0, tasks, total(params_0, tasks))
    assert tree.is_finite(found)
    nothing = [still, still]
    same = merge.svc(params_0, nothing, total(params_0, nothing))
    np.testing.assert_array_equal(same[PATHS[0]], params_0[PATHS[0]])


def test_lines_scales_by_depth_and_by_the_ratio_of_l1_norms(x64):
    params_0, taus = model(0), vectors()
    merged = merge.ties(params_0, taus)
    found = merge.lines(params_0, taus, merged, beta=0.6)
    own = [p for p in params_0 if "batch_stats" not in p]
    of_sum = sum(np.abs(sum(tau[p] for tau in taus)).sum() for p in own)
    of_merged = sum(np.abs(merged[p] - params_0[p]).sum() for p in own)
    alpha = of_sum / of_merged / TASKS
    for path in own:
        depth = int(path.split("/")[1]) / 2 if path in PATHS else 0
        expected = params_0[path] + (alpha + 0.6 * depth) * (
            merged[path] - params_0[path]
        )
        np.testing.assert_allclose(found[path], expected, rtol=1e-10)


def test_lines_without_beta_is_one_coefficient_and_of_the_sum_the_mean(x64):
    params_0, taus = model(0), vectors()
    merged = total(params_0, taus)
    found = merge.lines(params_0, taus, merged, beta=0.0)
    mean = merge.average(params_0, taus)
    for path in PATHS:
        np.testing.assert_allclose(found[path], mean[path], rtol=1e-12)


def test_stacks_have_depths_of_their_own():
    paths = ["encoder/block/0/w", "encoder/block/3/w", "decoder/block/1/w", "h.0.w"]
    found = module("lines").block_depths([*paths, "decoder/block/0/1/w", "norm/scale"])
    assert list(found.values()) == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def boosted_in_numpy(vector, beta):
    u, s, vt = np.linalg.svd(vector, full_matrices=False)
    k = next(k for k in range(len(s)) if s[: k + 1].sum() / s.sum() >= beta - 1e-12)
    return u * np.maximum(s, s[k]) @ vt


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8, 1.0])
def test_boosting_is_the_papers(beta, x64):
    params_0, taus = model(0), vectors()
    merged = total(params_0, taus)
    found = merge.subspace_boosting(params_0, taus, merged, beta=beta, coef=0.4)
    for path in [*PATHS, "embed/embedding"]:
        vector = boosted_in_numpy(merged[path] - params_0[path], beta)
        expected = params_0[path] + 0.4 * vector
        np.testing.assert_allclose(found[path], expected, rtol=1e-9, atol=1e-10)


def test_boosting_has_two_limits(x64):
    params_0, taus = model(0), vectors()
    merged = total(params_0, taus)
    same = merge.subspace_boosting(params_0, taus, merged, beta=1.0)
    flat = merge.subspace_boosting(params_0, taus, merged, beta=0.0)
    level = merge.isotropise(params_0, taus, merged)
    for path in PATHS:
        np.testing.assert_allclose(same[path], merged[path], rtol=1e-9, atol=1e-10)
        parts = [found[path] - params_0[path] for found in (flat, level)]
        ratio = parts[0] / parts[1]
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
        s = np.linalg.svd(merged[path] - params_0[path], compute_uv=False)
        np.testing.assert_allclose(ratio[0, 0], s[0] / s.mean(), rtol=1e-9)


def test_isotropise_of_the_sum_is_iso_c(x64):
    params_0, taus = model(0), vectors()
    found = merge.isotropise(params_0, taus, total(params_0, taus), coef=0.8)
    expected = merge.iso_c(params_0, taus, coef=0.8)
    for path in PATHS:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-9, atol=1e-10)


def test_polarize_is_the_papers_scaling(x64):
    params_0, taus = model(0), vectors()
    merged = total(params_0, taus)
    found = merge.polarize(params_0, taus, merged, coef=0.5)
    scaled = {}
    for path in PATHS:  # [output, input]
        of_path = [tau[path].T for tau in taus]
        norms = np.array([np.linalg.norm(tau) for tau in of_path])
        weights = (norms / norms.mean()) ** 2
        together = np.concatenate(
            [w * tau for w, tau in zip(weights, of_path, strict=True)]
        )
        columns = np.linalg.norm(together, axis=0)
        scaled[path] = sum(of_path) * (columns / columns.mean()) ** 2
    for kind in ("fc", "out"):
        own = [path for path in PATHS if f"/{kind}/" in path]
        norms = np.array([np.linalg.norm(scaled[path]) for path in own])
        for path, scale in zip(own, (norms / norms.mean()) ** 2, strict=True):
            expected = params_0[path] + 0.5 * scale * scaled[path].T
            np.testing.assert_allclose(found[path], expected, rtol=1e-10)


@every_wrapper
def test_running_means_and_what_does_not_move_stay_as_merged(wrapper):
    params_0, taus = model(0, np.float32), vectors(np.float32)
    for tau in taus:
        del tau["head/bias"]
    merged = model(5, np.float32)
    found = wrapper(params_0, taus, merged)
    for path in ("head/bias", "batch_stats/norm/mean"):
        np.testing.assert_array_equal(found[path], merged[path])
    assert not np.array_equal(found[PATHS[0]], merged[PATHS[0]])


@every_wrapper
def test_order_and_jit_change_nothing_and_dtypes_stay(wrapper):
    params_0, taus = model(0, np.float32), vectors(np.float32)
    merged = total(params_0, taus, 0.5)
    found = wrapper(params_0, taus, merged)
    again = wrapper(params_0, taus[::-1], merged)
    traced = jax.jit(wrapper)(params_0, taus, merged)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), merged)
    narrow = wrapper(params_0, taus, half)
    for path, leaf in found.items():
        np.testing.assert_allclose(again[path], leaf, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(traced[path], leaf, rtol=1e-4, atol=1e-4)
        assert leaf.dtype == np.float32 and narrow[path].dtype == jnp.bfloat16


@every_wrapper
def test_bad_input_is_named(wrapper):
    params_0, taus = model(0, np.float32), vectors(np.float32)
    with pytest.raises(ValueError, match="merged model lacks .*head/bias"):
        part = {p: x for p, x in params_0.items() if p != "head/bias"}
        wrapper(params_0, taus, part)
    with pytest.raises(ValueError, match="does not fit the pre-trained model"):
        wrapper(params_0, taus, params_0 | {"head/bias": np.zeros(1)})
    with pytest.raises(ValueError, match="merged model"):
        wrapper(params_0, taus, params_0 | {"head/bias": np.full(OUT, np.nan)})


@pytest.mark.parametrize(
    ("options", "match"),
    [({"alpha": 0.0}, "alpha is 0.0"), ({"matrices": "x"}, "no 2-D leaf matches")],
)
def test_bad_options_of_svc_are_named(options, match):
    params_0, taus = model(0, np.float32), vectors(np.float32)
    with pytest.raises(ValueError, match=match):
        merge.svc(params_0, taus, params_0, **options)


def test_beta_out_of_range_is_named():
    params_0, taus = model(0, np.float32), vectors(np.float32)
    with pytest.raises(ValueError, match=r"beta is 1.5; it must be in \[0, 1\]"):
        merge.subspace_boosting(params_0, taus, params_0, beta=1.5)


@pytest.mark.parametrize("name", merge.WRAPPERS)
def test_streamed_wrappers_have_the_bits_of_those_in_memory(name, tmp_path):
    kinds = ("up_proj.weight", "down_proj.weight")
    layout = {f"h.{i}.{kind}": (8, 6) for i in range(2) for kind in kinds}
    layout |= {"norm.weight": (6,), "batch_stats.mean": (6,)}
    base, *models = (
        checkpoints.write(tmp_path / f"{i}", checkpoints.tensors(i, shapes=layout))
        for i in range(4)
    )
    wrapper = WRAPPERS[name]
    options = dict(getattr(wrapper, "keywords", {}))
    plan = functools.partial(module(name).plan, **options)
    method = wrapped.streamed(plan, functools.partial(merge.ties, density=0.5))
    opened = stream.open_models(base, models)
    stream.merge(method, opened, tmp_path / "out", quiet=True)

    params_0 = hub.read(base)
    taus = [task_vectors.difference(hub.read(folder), params_0) for folder in models]
    wide = params_0 | {p: np.asarray(params_0[p], np.float32) for p in layout}
    merged = wrapper(wide, taus, merge.ties(wide, taus, density=0.5))
    found = hub.read(tmp_path / "out")
    for path in layout:
        expected = np.asarray(jnp.asarray(merged[path], found[path].dtype))
        assert found[path].tobytes() == expected.tobytes(), path
    path = "h.1.up_proj.weight"
    plain = merge.ties(params_0, taus, density=0.5)[path]
    assert np.any(np.asarray(plain, np.float32) != np.asarray(found[path], np.float32))
