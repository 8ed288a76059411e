"""Merges that look at samples, for encoders below frozen heads."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
from tqdm import tqdm

from jaxarith import merge, task_vectors
from jaxarith.merge import capture
from jaxarith.typing import ApplyFn, Params, Taus, Tree

DataFree = Literal["ties", "dare_ties", "consensus", "awd", "tsv", "iso_c", "wudi"]
Fitted = Literal["fisher", "regmean", "adamerging"]
Merge = Literal[DataFree, Fitted]
MERGES: tuple[DataFree, ...] = get_args(DataFree)
FITTED: tuple[Fitted, ...] = get_args(Fitted)
ALL: tuple[Merge, ...] = (*MERGES, *FITTED)


def fisher(
    logits_of: Callable[..., jax.Array],
    params_0: Params,
    taus: Taus,
    heads: Sequence[Tree],
    samples: Sequence[Sequence[dict]],
    *,
    key: jax.Array,
    inputs: Sequence[str],
) -> Params:
    """Merges T models by Fisher information, each with its own head.

    Args:
      logits_of: `logits_of({"encoder": params, "head": head}, *inputs) -> logits`.
      params_0: the pre-trained parameters of the encoder.
      taus: T task vectors.
      heads: the heads of the tasks, all of one shape.
      samples: for each task, batches of unlabelled samples.
      key: random key for drawing labels, 4 per sample.
      inputs: the fields of a batch that `logits_of` receives.

    Returns:
      The merged parameters of the encoder.
    """
    diagonals = []
    progress = tqdm(taus, desc="Fisher", unit="task")
    for tau, head, batches in zip(progress, heads, samples, strict=True):
        tuned = task_vectors.apply(params_0, tau)
        diagonal = merge.fisher_diagonal(
            logits_of,
            {"encoder": tuned, "head": head},
            batches,
            part={"encoder": tau},
            samples=4,
            key=key,
            chunk=32,
            inputs=inputs,
        )
        diagonals.append(diagonal["encoder"])
    return merge.fisher(params_0, taus, diagonals)


def input_grams(
    apply_fn: ApplyFn,
    params_0: Params,
    taus: Taus,
    samples: Sequence[Sequence[dict]],
    *,
    inputs: Sequence[str],
    token_mask: str | None = None,
    select: str = ".*",
) -> list[dict[str, jax.Array]]:
    """Returns the Gram matrices of every task, for `merge.regmean` and `merge.esm`.

    See `capture.input_grams` for the options.
    """
    progress = tqdm(taus, desc="Gram matrices", unit="task")
    return [
        capture.input_grams(
            apply_fn,
            task_vectors.apply(params_0, tau),
            batches,
            inputs=inputs,
            token_mask=token_mask,
            select=select,
        )
        for tau, batches in zip(progress, samples, strict=True)
    ]


def adamerging(
    logits_of: Callable[..., jax.Array],
    params_0: Params,
    taus: Taus,
    heads: Sequence[Tree],
    samples: Sequence[Sequence[dict]],
    *,
    inputs: Sequence[str],
    **options: Any,
) -> Params:
    """Merges T encoders by AdaMerging; see `fisher` for the arguments.

    Batches have 16 samples, as in the authors' code. `options` are those of
    `merge.adamerging`.
    """
    entropies = _in_sixteens(logits_of, heads, samples, inputs)
    return merge.adamerging(params_0, taus, *entropies, **options).params


def adarank(
    logits_of: Callable[..., jax.Array],
    params_0: Params,
    taus: Taus,
    heads: Sequence[Tree],
    samples: Sequence[Sequence[dict]],
    *,
    inputs: Sequence[str],
    **options: Any,
) -> Params:
    """Merges T encoders by AdaRank; see `adamerging` for the arguments."""
    entropies = _in_sixteens(logits_of, heads, samples, inputs)
    return merge.adarank(params_0, taus, *entropies, **options).params


def _in_sixteens(logits_of, heads, samples, inputs):
    """Returns the functions and the batches of merges that minimise entropies."""

    def logits_of_batch(params, batch):
        own = {"encoder": params, "head": batch["head"]}
        return logits_of(own, *(batch[name] for name in inputs))

    sixteens = [
        [
            {name: batch[name][i : i + 16] for name in (*inputs, "mask")}
            | {"head": head}
            for batch in batches
            for i in range(0, len(batch["mask"]), 16)
        ]
        for head, batches in zip(heads, samples, strict=True)
    ]
    return [logits_of_batch] * len(heads), sixteens
