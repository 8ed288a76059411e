r"""RegMean++: RegMean in which each layer's inputs come from the merged layers below.

Nguyen, Dang, Suzuki, Nguyen. RegMean++: Enhancing Effectiveness and Generalization of
Regression Mean for Model Merging. TMLR 2026. arXiv:2508.03121.

The inputs of transformer layer l on the data of task i are

.. math:: X_i^{(l)} = f_M^{(l-1)}(X_i^{(l-1)}),

where f_M are the merged layers. RegMean uses the layers of model i instead. Inside
layer l, the inputs of the linear maps come from model i's own layer l, applied to
:math:`X_i^{(l)}`, as in the authors' code.
"""

import re
from collections.abc import Callable, Sequence

from jaxarith import task_vectors, tree
from jaxarith.merge import _leaves
from jaxarith.merge.average import average
from jaxarith.merge.regmean import regmean
from jaxarith.typing import ApplyFn, Params, Taus

# Matches the outermost layer of a path: `encoder/layers/3`, `encoder/layer/3`, `h/3` or
# `block/3`.
TRANSFORMER_LAYER = r"(.*?/)??(layers?|h|block)/\d+(?=/)"


def regmean_plusplus(
    params_0: Params,
    taus: Taus,
    apply_fn: ApplyFn,
    batches: Sequence[Sequence[dict]],
    *,
    off_diagonal: float = 0.95,
    ridge: float = 1e-6,
    inputs: Sequence[str] = ("image",),
    token_mask: str | Callable[[str], str | None] | None = None,
    layers: str | None = TRANSFORMER_LAYER,
) -> Params:
    r"""Merges one layer after another by RegMean, on outputs of the merged layers.

    Each layer costs one compilation, and one pass of each task's data through the
    layers up to it; XLA drops the layers after it. So L layers cost about (L + 1)/2
    forward passes. One batch and the Gram matrices of one layer are in memory at a
    time.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      apply_fn: `apply_fn(params, *inputs)`, which calls Flax Linen modules; see
        `capture`.
      batches: for every task, dicts of arrays `[B, ...]` with a `mask`, `bool[B]`, as
        `data.pipeline.evaluation_batches` makes them.
      off_diagonal: as for `regmean`; the authors use 0.95 for CLIP.
      ridge: as for `regmean`.
      inputs, token_mask: as for `capture.input_grams`.
      layers: a regular expression for the path of a layer, which starts the paths of
        its parameters. A Dense layer outside all of them is a layer of its own. With
        None every Dense layer is one, so its inputs come from merged Dense layers.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a wrong number of sequences of batches, a task without a batch, no
        Dense layer, or as for `regmean` and `capture.input_grams`.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> apply_fn = lambda params, x: nn.Dense(1).apply({"params": params}, x)
      >>> params_0 = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
      >>> taus = [{"kernel": jnp.array([[1.0], [1.0]])}, {"kernel": jnp.zeros((2, 1))}]
      >>> batches = [[{"image": jnp.eye(2)}], [{"image": jnp.array([[1.0, 0.0]])}]]
      >>> params = regmean_plusplus(params_0, taus, apply_fn, batches, ridge=0.0)
      >>> print(params["kernel"].round(3).T)
      [[0.333 1.   ]]
    """
    from jaxarith.merge import capture  # here, because it is the only import of flax

    merged = average(params_0, taus)
    _leaves.one_each(batches, len(taus), "sequences of batches")
    if not all(len(of_task) for of_task in batches):
        raise ValueError("a task has no batch; give at least one for every task.")
    sample = (batches[0][0][name] for name in inputs)
    moved = tree.aligned(taus)
    kernels: dict[str, list[str]] = {}
    for path in capture.dense_paths(apply_fn, params_0, *sample):
        if path in moved:
            kernels.setdefault(_layer(path, layers), []).append(path)

    for layer, of_layer in kernels.items():  # in the order of the calls
        paths = [path for path in moved if _layer(path, layers) == layer]
        start = tree.restrict(params_0, paths)
        moves = [tree.restrict(tau, paths) for tau in taus]
        grams = [
            capture.input_grams(
                apply_fn,
                tree.update(merged, task_vectors.apply(start, move)),
                of_task,
                inputs=inputs,
                token_mask=token_mask,
                select="|".join(map(re.escape, of_layer)),
            )
            for move, of_task in zip(moves, batches, strict=True)
        ]
        solved = regmean(start, moves, grams, off_diagonal=off_diagonal, ridge=ridge)
        merged = tree.update(merged, solved)
    return merged


def _layer(path: str, layers: str | None) -> str:
    """Returns the layer of a leaf: the match of the pattern, or else its own module."""
    found = layers is not None and re.match(layers, path)
    return found.group() if found else path.rpartition("/")[0]
