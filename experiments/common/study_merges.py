"""The merges that a study compares, beside the sum of its task vectors.

`study` is a `studies.Study` throughout, and `outputs` a `studies.Outputs`.
"""

import functools

import jax
import numpy as np
from tqdm import tqdm

from jaxarith import merge, sharding, task_vectors, tree
from jaxarith.merge import capture
from jaxarith.models import heads
from jaxarith.typing import Tree

MERGES = ("ties", "dare_ties", "consensus", "awd", "tsv", "iso_c")
FITTED = ("fisher", "regmean", "adamerging")


def merged_vectors(study, taus) -> dict[str, Tree]:
    """Data-free merges of the ordinary vectors; each is linear in its coefficient."""
    params_0, key = study.params_0, jax.random.key(study.config.seed)
    # The paper of AWD merges the linear weights of the blocks and nothing else.
    blocks = [tree.select(tau, study.blocks) for tau in taus]
    operators = {
        "ties": lambda: merge.ties(params_0, taus, coef=1.0),
        "dare_ties": lambda: merge.dare(params_0, taus, key=key, into="ties", coef=1.0),
        "consensus": lambda: merge.consensus(params_0, taus, coef=1.0),
        "awd": lambda: merge.awd(params_0, blocks, coef=1.0),
        "tsv": lambda: merge.tsv(params_0, taus, coef=1.0),
        "iso_c": lambda: merge.iso_c(params_0, taus, coef=1.0),
    }
    wanted = [name for name in MERGES if name in study.config.merges]
    return {
        name: task_vectors.difference(operators[name](), params_0) for name in wanted
    }


def fitted_vectors(study, taus) -> dict[str, Tree]:
    """Merges of the ordinary vectors that look at unlabelled validation samples."""
    wanted = [name for name in FITTED if name in study.config.merges]
    if not wanted:
        return {}
    # They run the network on one device, whatever the mesh, in every process.
    params_0, taus = sharding.to_host((study.params_0, list(taus)))
    padded = heads.pad([dataset.head for dataset in study.validation])
    # Heads are inputs, padded to one shape, so that all tasks share one compilation.
    head_of = [jax.tree.map(lambda x, i=i: x[i], padded) for i in range(len(taus))]

    def logits_of(params, *inputs):
        features = study.apply_fn(params["encoder"], *inputs)
        return study.logits(params["head"]["head"], features, params["head"]["valid"])

    def logits_of_batch(params, batch):
        inputs = (batch[name] for name in study.inputs)
        return logits_of({"encoder": params, "head": batch["head"]}, *inputs)

    # As many samples of each task as the public tables take.
    samples = [dataset.batches[:2] for dataset in study.validation]

    def fisher_mean():
        return fisher(
            *(logits_of, params_0, taus, head_of, samples),
            key=jax.random.key(study.config.seed),
            inputs=study.inputs,
        )

    def regression_mean():
        return regmean(
            *(study.apply_fn, params_0, taus, samples),
            inputs=study.inputs,
            token_mask=study.token_mask,
            # What follows the tokens, such as a prompt's head, has no mask.
            select=study.blocks if study.token_mask else ".*",
        )

    def adamerging():
        with_heads = [
            [part | {"head": head} for part in sixteens(batches, study.inputs)]
            for head, batches in zip(head_of, samples, strict=True)
        ]
        return merge.adamerging(
            *(params_0, taus, [logits_of_batch] * len(taus), with_heads),
            **adaptation(study.config),
        ).params

    operators = {
        "fisher": fisher_mean,
        "regmean": regression_mean,
        "adamerging": adamerging,
    }
    return {
        name: task_vectors.difference(operators[name](), params_0) for name in wanted
    }


def fisher(logits_of, params_0, taus, heads, samples, *, key, inputs) -> Tree:
    """The Fisher merge of T models, each with its own head.

    Args:
      logits_of: `logits_of({"encoder": params, "head": head}, *inputs) -> logits`.
      params_0: of the encoder.
      taus: T task vectors.
      heads: of every task, all of one shape.
      samples: of every task, batches of unlabelled samples.
      key: of the draws of labels, 4 for every sample.
      inputs: the fields of a batch that are passed on.
    """
    diagonals = []
    progress = tqdm(taus, desc="Fisher", unit="task")
    for tau, head, batches in zip(progress, heads, samples, strict=True):
        tuned = task_vectors.apply(params_0, tau)
        diagonal = merge.fisher_diagonal(
            *(logits_of, {"encoder": tuned, "head": head}, batches),
            **dict(part={"encoder": tau}, samples=4, key=key, chunk=32),
            inputs=inputs,
        )
        diagonals.append(diagonal["encoder"])
    return merge.fisher(params_0, taus, diagonals)


def regmean(
    apply_fn, params_0, taus, samples, *, inputs, token_mask=None, select=".*"
) -> Tree:
    """The RegMean merge of T encoders; see `capture.input_grams` for the options."""
    progress = tqdm(taus, desc="Gram matrices", unit="task")
    grams = [
        capture.input_grams(
            *(apply_fn, task_vectors.apply(params_0, tau), batches),
            inputs=inputs,
            token_mask=token_mask,
            select=select,
        )
        for tau, batches in zip(progress, samples, strict=True)
    ]
    return merge.regmean(params_0, taus, grams)


def sixteens(batches, inputs) -> list[dict]:
    """Inputs and masks in batches of 16, as the authors of AdaMerging take them."""
    return [
        {name: batch[name][i : i + 16] for name in (*inputs, "mask")}
        for batch in batches
        for i in range(0, len(batch["mask"]), 16)
    ]


def adaptation(config) -> dict:
    """Fewer and larger steps of AdaMerging than the paper's 500 of 1e-3."""
    return {"steps": 2 if config.smoke else 50, "learning_rate": 1e-2}


def adapted_coefs(study, outputs) -> np.ndarray:
    """AdaMerging of linearised vectors, on cached tangents of validation samples."""
    coefs, _ = merge.adamerging_tangent(
        [at.f0 for at in outputs.validation],
        [at.moves for at in outputs.validation],
        [functools.partial(study.logits, d.head) for d in study.validation],
        **adaptation(study.config),
    )
    return np.asarray(coefs)
