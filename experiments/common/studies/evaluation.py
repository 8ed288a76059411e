"""Accuracies of a study's task vectors and of their merges, and the rows of its table.

An ordinary model runs once for every coefficient, all coefficients of a batch in one
compiled program (`evaluate.sweep`). A linearised one runs once in all: its outputs are
affine in the coefficients (`evaluate.tangent`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common import runs
from experiments.common.studies import merges
from experiments.common.studies.study import Dataset, Study, classifier
from jaxarith import evaluate, metrics, task_vectors
from jaxarith.typing import Numbers, Taus, Tree

COEFS = np.linspace(0, 1, 21)

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")

# Accuracies on a split of all T tasks, `[n, T]`, at n coefficients.
AccuraciesAt = Callable[[Split, Numbers], np.ndarray]
# Accuracies of every task's own vector on its own data, `[T]`, by split.
Single = dict[Split, list[float]]


class Outputs(NamedTuple):
    """Outputs of linearised models on every validation and test set."""

    vectors: Taus
    validation: list[evaluate.TangentOutputs]
    test: list[evaluate.TangentOutputs]


def outputs_of(study: Study, vectors: Taus, title: str = "tangents") -> Outputs:
    """Free to vary in coefficients, after one pass over all samples."""
    found = {}
    for split in SPLITS:
        datasets = _datasets(study, split)
        with _passes(datasets, f"{title}, {split}") as bar:
            found[split] = [
                evaluate.tangent(
                    study.apply_fn,
                    study.params_0,
                    vectors,
                    _ticking(dataset.batches, bar),
                    study.inputs,
                    mesh=study.mesh,
                )
                for dataset in datasets
            ]
    return Outputs(vectors, **found)


def linearized_at(
    study: Study, split: Split, outputs: Outputs, coefs: Numbers
) -> list[float]:
    """Accuracies on every task with these coefficients, one for each vector."""
    pairs = zip(_datasets(study, split), getattr(outputs, split), strict=True)
    return [dataset.accuracy(at(coefs)) for dataset, at in pairs]


def linearized_single(study: Study, outputs: Outputs) -> Single:
    """Accuracies of every task's own linearised vector on its own data."""

    def single(split):
        own = np.eye(len(study.names))
        triples = zip(
            _datasets(study, split), getattr(outputs, split), own, strict=True
        )
        return [dataset.accuracy(at(coefs)) for dataset, at, coefs in triples]

    return {split: single(split) for split in SPLITS}


def linearized_sum(study: Study, outputs: Outputs) -> AccuraciesAt:
    """The linearised model along the sum of its vectors."""
    ones = np.ones(len(outputs.vectors))
    return lambda split, coefs: np.array(
        [linearized_at(study, split, outputs, c * ones) for c in coefs]
    )


def ordinary_single(study: Study, vectors: Taus) -> Single:
    """Accuracies of every task's own ordinary vector on its own data."""
    return {
        split: _swept(study, split, vectors, [1.0], f"single tasks, {split}")[
            0
        ].tolist()
        for split in SPLITS
    }


def ordinary_along(study: Study, vector: Tree, title: str) -> AccuraciesAt:
    """The network θ0 + c·τ for one vector τ, such as the sum of all, or a merge."""
    vectors = [vector] * len(study.names)
    return lambda split, coefs: _swept(
        study, split, vectors, coefs, f"{title}, {split}"
    )


def _swept(study, split, vectors, coefs, title):
    """Accuracies `[n, T]` on every task with that task's vector, at n coefficients."""
    datasets, columns = _datasets(study, split), []
    with _passes(datasets, title) as bar:
        for dataset, vector in zip(datasets, vectors, strict=True):
            found = evaluate.sweep(
                classifier(study.apply_fn, study.logits),
                {"encoder": study.params_0, "head": dataset.padded},
                [{"encoder": vector}],
                _ticking(dataset.batches, bar),
                np.reshape(coefs, (-1, 1)),
                study.inputs,
                mesh=study.mesh,
                readout=_classes,
            )
            columns.append(np.mean(found == dataset.labels, axis=1))
    return np.stack(columns, axis=1)


def _classes(logits):
    return logits.argmax(-1)


def _datasets(study, split) -> list[Dataset]:
    return study.validation if split == "validation" else study.test


def _passes(datasets, title):
    return tqdm(
        total=sum(len(dataset.batches) for dataset in datasets),
        desc=title,
        unit="batch",
        leave=False,
        disable=not runs.is_first(),
    )


def _ticking(batches: Iterable[dict], bar: tqdm) -> Iterator[dict]:
    for batch in batches:
        yield batch
        bar.update()


def row(
    study: Study,
    method: str,
    merge_name: str,
    coef: float,
    searched: bool,
    found: Sequence[float] | np.ndarray,
    single: Sequence[float],
) -> dict:
    """One line of the report; nothing is normalised by an accuracy of zero."""
    normalized = metrics.normalized_accuracy(found, single) if all(single) else None
    return {
        "method": method,
        "merge": merge_name,
        "coef": float(coef),
        "searched": searched,
        "absolute": float(np.mean(found)),
        "normalized": normalized,
        "per_task": dict(zip(study.names, map(float, found), strict=True)),
    }


def merge_rows(
    study: Study, method: str, merge_name: str, at: AccuraciesAt, single: Single
) -> tuple[list[dict], evaluate.Search]:
    """Rows at coefficient 1 and at the one chosen on validation data; the search."""
    # Every coefficient of a merge of ordinary vectors costs forward passes.
    stride = 5 if study.config.smoke else 1 if merge_name == "task_arithmetic" else 2
    coefs = COEFS[::stride]
    accuracies = dict(zip(coefs, at("validation", coefs), strict=True))
    own = single["validation"]
    search = evaluate.search(
        accuracies.__getitem__,
        own if all(own) else [1.0] * len(own),  # absolute, where one is zero
        coefs,
    )
    chosen = ((1.0, False), (search.coef, True))
    found = at("test", [coef for coef, _ in chosen])
    rows = [
        row(study, method, merge_name, coef, searched, accuracy, single["test"])
        for (coef, searched), accuracy in zip(chosen, found, strict=True)
    ]
    return rows, search


class Evaluation(NamedTuple):
    """What is found of a method, or of all.

    Attributes:
      alone: rows of models of single tasks, and of the pre-trained one.
      merged: rows of merged models.
      searches: the searches of coefficients, by their title.
      outputs: outputs of the linearised methods.
    """

    alone: list[dict]
    merged: list[dict]
    searches: dict[str, evaluate.Search]
    outputs: dict[str, Outputs]

    @property
    def rows(self) -> list[dict]:
        return self.alone + self.merged


def evaluate_all(study: Study, taus: dict[str, Taus]) -> Evaluation:
    """All rows of the table, the searches, and the outputs of linearised methods."""
    parts = [
        evaluate_ordinary(study, vectors)
        if method == "nonlinear"
        else evaluate_linearized(study, method, vectors)
        for method, vectors in taus.items()
    ]
    return Evaluation(
        alone=[row for part in parts for row in part.alone],
        merged=[row for part in parts for row in part.merged],
        searches={k: v for part in parts for k, v in part.searches.items()},
        outputs={k: v for part in parts for k, v in part.outputs.items()},
    )


def evaluate_ordinary(study: Study, vectors: Taus) -> Evaluation:
    """The pre-trained model, the ordinary ones, and all merges of their vectors."""
    method = "nonlinear"
    single = ordinary_single(study, vectors)
    total = task_vectors.add(vectors)
    zero = ordinary_along(study, total, "zero-shot")("test", [0.0])[0]
    alone = [
        row(study, "zero_shot", "none", 0, False, zero, single["test"]),
        row(
            study,
            f"individual_{method}",
            "none",
            1,
            False,
            single["test"],
            single["test"],
        ),
    ]
    searched = {"task_arithmetic": total} | merges.merged_vectors(study, vectors)
    rows, searches = [], {}
    for name, vector in _progress(searched, "evaluate, ordinary"):
        title = name.replace("_", " ")
        at = ordinary_along(study, vector, title)
        found, search = merge_rows(study, method, name, at, single)
        rows += found
        searches[f"{method}, {title}"] = search
    for name, vector in merges.fitted_vectors(study, vectors).items():
        at = ordinary_along(study, vector, name)
        rows.append(
            row(study, method, name, 1, False, at("test", [1.0])[0], single["test"])
        )
    return Evaluation(alone, rows, searches, {})


def evaluate_linearized(study: Study, method: str, vectors: Taus) -> Evaluation:
    """The linearised models of a method, and their merges."""
    outputs = outputs_of(study, vectors, f"evaluate, {method}")
    single = linearized_single(study, outputs)
    own = single["test"]
    alone = [row(study, f"individual_{method}", "none", 1, False, own, own)]
    at = linearized_sum(study, outputs)
    rows, search = merge_rows(study, method, "task_arithmetic", at, single)
    if method == "linear" and "adamerging" in study.config.merges:
        coefs = merges.adapted_coefs(study, outputs.validation)
        found = linearized_at(study, "test", outputs, coefs)
        mean = float(np.mean(coefs))
        rows.append(row(study, method, "adamerging", mean, False, found, own))
    title = f"{method}, task arithmetic"
    return Evaluation(alone, rows, {title: search}, {method: outputs})


def _progress(named: dict, title: str):
    bar = tqdm(named.items(), desc=title, unit="merge", disable=not runs.is_first())
    return iter(bar)
