"""The PyTorch transcriptions that merges are timed beside give the same models."""

import functools

import jax
import numpy as np
import pytest
from oracles import normal

from experiments.bench import merge_ops
from jaxarith import merge, tree

# Wider than the tasks are many, as the transcription of TSV needs.
SHAPES = {"a/kernel": (24, 16), "b/bias": (30,), "c/kernel": (20, 40)}
SHAPES |= {"conv/kernel": (2, 2, 3, 9)}
OURS = {name: method.merge for name, method in merge_ops.METHODS.items()}
SAME = {
    **{name: OURS[name] for name in ("average", "task_arithmetic", "ties", "magmax")},
    **{name: OURS[name] for name in ("model_stock", "consensus", "tsv", "iso_c")},
    "emr": lambda params_0, taus: tree.update(
        params_0,
        jax.tree.map(np.add, params_0, merge.emr_masks(params_0, taus).tau),
    ),
    "dare": functools.partial(merge.dare, drop_rate=0.0, coef=0.3, key=merge_ops.KEY),
    "iso_cts": merge.iso_cts,
    "wudi": merge.wudi,
    "svc": merge_ops.svc,
    "core": functools.partial(merge_ops.core, rank=3),
}
OPTIONS = {"dare": {"drop_rate": 0.0}, "core": {"rank": 3}}  # that are not the default


def leaves(seed, scale):
    return {
        path: np.asarray(normal((seed, i), *shape, scale=scale), np.float32)
        for i, (path, shape) in enumerate(SHAPES.items())
    }


@pytest.mark.torch
@pytest.mark.parametrize("name", SAME)
def test_the_transcription_is_the_same_merge(name):
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_merges

    params_0, taus = leaves(0, 1.0), [leaves(1 + i, 0.1) for i in range(4)]
    # A common component, so that Model Stock's cosines are above zero.
    taus = [jax.tree.map(np.add, tau, leaves(9, 0.1)) for tau in taus]
    tensors = [jax.tree.map(torch.from_numpy, tree) for tree in (params_0, *taus)]
    method = getattr(torch_merges, name)
    theirs = method(tensors[0], tensors[1:], **OPTIONS.get(name, {}))
    nested = [tree.unflatten(flat) for flat in (params_0, *taus)]
    ours = tree.flatten(SAME[name](nested[0], nested[1:]))
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf.numpy(), rtol=1e-5, atol=1e-5)
        # These two leave all but matrices as they are.
        if name not in ("wudi", "core") or leaf.ndim == 2:
            assert np.abs(ours[path] - params_0[path]).max() > 1e-2


def test_the_shapes_are_those_of_the_published_models():
    sizes = {
        name: sum(
            np.prod(leaf.shape)
            for leaf in merge_ops.shapes(
                merge_ops.Config(out="unused", model=name)
            ).values()
        )
        for name in ("vit-b-32", "vit-l-14")
    }
    assert sizes == {"vit-b-32": 87_456_000, "vit-l-14": 303_179_776}


def test_an_unknown_method_is_an_error_that_names_the_known(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="unknown methods .*; known are average, "):
        merge_ops.main(merge_ops.Config(out, methods=("median",)))
    assert not out.exists()
