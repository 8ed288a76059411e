"""Evaluation of a study's ordinary vectors, against one forward pass after another."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import studies
from experiments.common.studies import evaluation
from jaxarith import evaluate, merge, task_vectors
from jaxarith.models import heads

TASKS = 3


def encode(params, x):
    return jnp.tanh(x @ params["w"]) + params["b"][None]


def draw(rng, scale):
    leaves = {"w": rng.normal(size=(6, 5)), "b": rng.normal(size=(5,))}
    return {name: np.asarray(scale * x, np.float32) for name, x in leaves.items()}


def samples(rng, count):
    return [
        {"x": rng.normal(size=6).astype(np.float32), "label": rng.integers(4)}
        for _ in range(count)
    ]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a study that evaluation reads."""

    merges: tuple[str, ...] = ("ties", "dare_ties", "fisher")
    smoke: bool = False
    seed: int = 0
    mesh: str = "data=1"


@pytest.fixture
def study() -> studies.Study:
    rng = np.random.default_rng(0)
    head_of = [jnp.asarray(rng.normal(size=(4, 5)), "f4") for _ in range(TASKS)]
    parts = [
        studies.datasets(
            [samples(rng, count) for count in counts], head_of, heads.logits, 8
        )
        for counts in ((13, 21, 8), (30, 9, 17))
    ]
    nothing: dict[str, Any] = dict.fromkeys(studies.Study._fields)
    known = {"config": Options(), "apply_fn": encode, "params_0": draw(rng, 1.0)}
    known |= {"trained": ".*", "blocks": ".*", "inputs": ("x",), "logits": heads.logits}
    known |= {"names": list("abc"), "validation": parts[0], "test": parts[1]}
    return studies.Study(**nothing | known)


@pytest.fixture
def vectors():
    return [draw(np.random.default_rng(seed), 0.7) for seed in (1, 2, 3)]


def accuracies(study, split, vector, coef):
    params = task_vectors.apply(study.params_0, vector, coef)
    datasets = getattr(study, split)
    return [
        d.accuracy(evaluate.outputs(encode, params, d.batches, ["x"])) for d in datasets
    ]


def test_rows_are_those_of_one_pass_for_each_merge_and_coefficient(study, vectors):
    found = evaluation.evaluate_ordinary(study, vectors)
    rows = {(r["method"], r["merge"], r["searched"]): r for r in found.rows}
    own = [
        accuracies(study, "test", tau, 1.0)[task] for task, tau in enumerate(vectors)
    ]
    expected = {
        ("zero_shot", "none", False): accuracies(study, "test", vectors[0], 0.0),
        ("individual_nonlinear", "none", False): own,
    }
    total = task_vectors.add(vectors)
    elected = merge.ties(study.params_0, vectors, coef=1.0)
    elected = task_vectors.difference(elected, study.params_0)
    for name, vector in (("task_arithmetic", total), ("ties", elected)):
        search = found.searches[f"nonlinear, {name.replace('_', ' ')}"]
        single = [
            accuracies(study, "validation", tau, 1.0)[task]
            for task, tau in enumerate(vectors)
        ]
        again = evaluate.search(
            lambda c, vector=vector: accuracies(study, "validation", vector, c),
            single,
            search.coefs,
        )
        np.testing.assert_allclose(search.normalized, again.normalized, atol=1e-12)
        assert search.coef == again.coef
        for coef, searched in ((1.0, False), (search.coef, True)):
            at = accuracies(study, "test", vector, coef)
            expected["nonlinear", name, searched] = at
            assert rows["nonlinear", name, searched]["coef"] == coef
    for key, values in expected.items():
        np.testing.assert_allclose(list(rows[key]["per_task"].values()), values)
    assert len(found.searches["nonlinear, task arithmetic"].coefs) == 21
    assert len(found.searches["nonlinear, ties"].coefs) == 11
    assert [r["merge"] for r in found.merged][-1] == "fisher"


def test_the_merges_share_one_pass_over_each_split(study, vectors, monkeypatch):
    passes, sweep_all = [], evaluate.sweep_all

    def counted(apply_fn, params_0, several, *more, **options):
        passes.append(len(several))
        return sweep_all(apply_fn, params_0, several, *more, **options)

    monkeypatch.setattr(evaluate, "sweep_all", counted)
    evaluation.evaluate_ordinary(study, vectors)
    alone = [1] * TASKS
    # The sum and two merges; on test data also Fisher's and the pre-trained model.
    assert passes == [*alone, *alone, *[3] * TASKS, *[5] * TASKS]
