"""The merges that a study compares with the sum of its task vectors."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from experiments.common import study_merges
from experiments.common.studies.study import Config, Study, classifier
from jaxarith import evaluate, merge, sharding, task_vectors, tree
from jaxarith.typing import Params, Taus, Tree


def merged_vectors(study: Study, taus: Taus) -> dict[str, Tree]:
    """Makes data-free merges of ordinary vectors; a coefficient scales each result."""
    params_0, key = study.params_0, jax.random.key(study.config.seed)
    # The AWD paper merges only the linear weights of the blocks.
    blocks = [tree.select(tau, study.blocks) for tau in taus]
    operators = {
        "ties": lambda: merge.ties(params_0, taus, coef=1.0),
        "dare_ties": lambda: merge.ties(params_0, merge.drop(taus, key=key), coef=1.0),
        "consensus": lambda: merge.consensus(params_0, taus, coef=1.0),
        "awd": lambda: merge.awd(params_0, blocks, coef=1.0),
        "tsv": lambda: merge.tsv(params_0, taus, coef=1.0),
        "iso_c": lambda: merge.iso_c(params_0, taus, coef=1.0),
        # With Adam, the learning rate would have to fit these vectors.
        "wudi": lambda: merge.wudi(
            params_0, taus, solver="closed", rank="participation"
        ),
    }
    wanted = [name for name in study_merges.MERGES if name in study.config.merges]
    return {
        name: _vector(operators[name](), params_0, taus)
        for name in tqdm(wanted, desc="merge", unit="merge")
    }


def fitted_vectors(study: Study, taus: Taus) -> dict[str, Tree]:
    """Makes merges of ordinary vectors that use unlabelled validation samples."""
    wanted = [name for name in study_merges.FITTED if name in study.config.merges]
    if not wanted:
        return {}
    # These merges run the network on one device in every process, whatever the mesh.
    params_0, taus = sharding.to_host((study.params_0, list(taus)))
    logits_of = classifier(study.apply_fn, study.logits)
    head_of = [dataset.padded for dataset in study.validation]

    # As many samples of each task as in the published tables.
    samples = [dataset.batches[:2] for dataset in study.validation]

    def fisher():
        return study_merges.fisher(
            logits_of,
            params_0,
            taus,
            head_of,
            samples,
            key=jax.random.key(study.config.seed),
            inputs=study.inputs,
        )

    def regmean():
        grams = study_merges.input_grams(
            study.apply_fn,
            params_0,
            taus,
            samples,
            inputs=study.inputs,
            token_mask=study.token_mask,
            # Layers after the tokens, such as a prompt's head, have no mask.
            select=study.blocks if study.token_mask else ".*",
        )
        return merge.regmean(params_0, taus, grams)

    def adamerging():
        return study_merges.adamerging(
            logits_of,
            params_0,
            taus,
            head_of,
            samples,
            inputs=study.inputs,
            **adaptation(study.config),
        )

    operators = {"fisher": fisher, "regmean": regmean, "adamerging": adamerging}
    return {name: _vector(operators[name](), params_0, taus) for name in wanted}


def _vector(merged: Params, params_0: Params, taus: Taus) -> Tree:
    """Returns the task vector of a merge, with the leaves of the merged vectors.

    All merges have the same leaves, so they share one compiled program.
    """
    moved = task_vectors.difference(merged, params_0)
    return tree.restrict(moved, tree.flatten(taus[0]))


def adaptation(config: Config) -> dict:
    """Returns fewer and larger steps of AdaMerging than the paper's 500 of 1e-3."""
    return {"steps": 2 if config.smoke else 50, "learning_rate": 1e-2}


def adapted_coefs(
    study: Study, validation: Sequence[evaluate.TangentOutputs]
) -> np.ndarray:
    """Runs AdaMerging of linearised vectors, on cached tangents of validation data."""
    coefs, _ = merge.adamerging_tangent(
        [at.f0 for at in validation],
        [at.moves for at in validation],
        [functools.partial(study.logits, d.head) for d in study.validation],
        **adaptation(study.config),
    )
    return np.asarray(coefs)
