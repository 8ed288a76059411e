"""Measures the curvature of tasks, and the options for it that scripts share."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jaxarith import curvature, tree
from jaxarith.data import pipeline, splits
from jaxarith.typing import ApplyFn, Params, Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of scripts that train with the curvature of other tasks."""

    curvature_coef: float = 0.05
    """Weight λ of the curvature penalty."""
    curvature_samples: int = 256
    """Largest number of training samples that the curvature of a task is measured
    on."""
    curvature_rank: int = 32
    """Number of rows of the sketch, which holds the curvature between layers; each row
    has the size of a task vector."""


def drawn(source: Source, count: int, seed: int) -> list[dict]:
    """Returns at most `count` samples of a source, in random order."""
    order = splits.torch_permutation(len(source), seed)
    return [source[int(i)] for i in order[:count]]


def collected(
    apply_fn: ApplyFn,
    params_0: Params,
    samples: Sequence[dict],
    *,
    inputs: Sequence[str],
    key: jax.Array,
    mesh: Mesh,
    rank: int,
    select: str = ".*",
    sharing: curvature.Sharing | None = "whole",
    probes: int = 1,
) -> curvature.Factors:
    """Measures the factors of one task; see `curvature.collect` for the arguments."""
    size = tree.size(tree.select(params_0, select))
    return curvature.collect(
        apply_fn,
        params_0,
        pipeline.evaluation_batches(samples, 64),
        inputs=inputs,
        sharing=sharing,
        probes=probes,
        key=key,
        select=select,
        joint=True,
        rank=rank,
        # The gradients of one chunk then take about 256 MB.
        chunk=min(max(2**26 // size, 1), 32),
        mesh=mesh,
    )
