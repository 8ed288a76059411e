"""Evaluates a study's task vectors and their merges, and makes the rows of its table.

An ordinary model runs once for every merge and coefficient. All of these share one pass
over the data of a split and one compiled program (`evaluate.sweep_all`). A linearised
model runs only once: its outputs are affine in the coefficients (`evaluate.tangent`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common import runs
from experiments.common.studies import merges
from experiments.common.studies.study import Config, Dataset, Study, classifier
from jaxarith import evaluate, metrics, task_vectors
from jaxarith.typing import Numbers, Taus, Tree

COEFS = np.linspace(0, 1, 21)

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")

# Accuracies on a split of all T tasks, `[n, T]`, at n coefficients.
AccuraciesAt = Callable[[Split, Numbers], np.ndarray]
# A vector, and the coefficients at which it is added.
Along = tuple[Tree, Numbers]
# Accuracies of every task's own vector on its own data, `[T]`, by split.
Single = dict[Split, list[float]]


class Outputs(NamedTuple):
    """Outputs of linearised models on every validation and test set."""

    vectors: Taus
    validation: list[evaluate.TangentOutputs]
    test: list[evaluate.TangentOutputs]


def outputs_of(study: Study, vectors: Taus, title: str = "tangents") -> Outputs:
    """Makes one pass over all samples; later coefficients need no pass."""
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
    """Returns accuracies on every task at these coefficients, one for each vector."""
    pairs = zip(_datasets(study, split), getattr(outputs, split), strict=True)
    return [dataset.accuracy(at(coefs)) for dataset, at in pairs]


def linearized_single(study: Study, outputs: Outputs) -> Single:
    """Returns accuracies of every task's own linearised vector on its own data."""

    def single(split):
        own = np.eye(len(study.names))
        triples = zip(
            _datasets(study, split), getattr(outputs, split), own, strict=True
        )
        return [dataset.accuracy(at(coefs)) for dataset, at, coefs in triples]

    return {split: single(split) for split in SPLITS}


def linearized_sum(study: Study, outputs: Outputs) -> AccuraciesAt:
    """Returns accuracies of the linearised model along the sum of its vectors."""
    ones = np.ones(len(outputs.vectors))
    return lambda split, coefs: np.array(
        [linearized_at(study, split, outputs, c * ones) for c in coefs]
    )


def ordinary_single(study: Study, vectors: Taus) -> Single:
    """Returns accuracies of every task's own ordinary vector on its own data."""
    own = [[(vector, [1.0])] for vector in vectors]

    def single(split):
        [found] = _swept(study, split, own, f"single tasks, {split}")
        return found[0].tolist()

    return {split: single(split) for split in SPLITS}


def ordinary_at(
    study: Study, split: Split, several: Mapping[str, Along], title: str
) -> dict[str, np.ndarray]:
    """Returns accuracies of the networks θ0 + c·τ for several vectors τ, in one pass.

    Args:
      study: the study.
      split: the part of the data.
      several: for each name, a vector, such as the sum of all or a merge, and its n
        coefficients.
      title: the title of the progress bar.

    Returns:
      For each name, accuracies `[n, T]`.
    """
    own = [list(several.values())] * len(study.names)
    found = _swept(study, split, own, f"{title}, {split}")
    return dict(zip(several, found, strict=True))


def ordinary_along(study: Study, vector: Tree, title: str) -> AccuraciesAt:
    """Returns accuracies of θ0 + c·τ for one vector τ, as a function of c."""
    return lambda split, coefs: ordinary_at(
        study, split, {title: (vector, coefs)}, title
    )[title]


def _swept(
    study: Study, split: Split, own: Sequence[Sequence[Along]], title: str
) -> list[np.ndarray]:
    """Returns accuracies along vectors of each task on that task's data.

    Args:
      study, split, title: as for `ordinary_at`.
      own: for each task, K vectors with their coefficients; K is the same for all
        tasks.

    Returns:
      For each of the K vectors, accuracies `[n, T]`.
    """
    datasets, columns = _datasets(study, split), []
    with _passes(datasets, title) as bar:
        for dataset, along in zip(datasets, own, strict=True):
            found = evaluate.sweep_all(
                classifier(study.apply_fn, study.logits),
                {"encoder": study.params_0, "head": dataset.padded},
                [
                    ([{"encoder": vector}], np.reshape(coefs, (-1, 1)))
                    for vector, coefs in along
                ],
                _ticking(dataset.batches, bar),
                study.inputs,
                mesh=study.mesh,
                readout=_classes,
            )
            columns.append([np.mean(x == dataset.labels, axis=1) for x in found])
    return [np.stack(column, axis=1) for column in zip(*columns, strict=True)]


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
    """Makes one line of the report; not normalised if a single accuracy is zero."""
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
    """Makes the rows at coefficient 1 and at the one chosen on validation data.

    Returns:
      The rows and the search.
    """
    coefs = coefs_of(study.config, merge_name)
    search = search_of(at("validation", coefs), coefs, single)
    found = at("test", [1.0, search.coef])
    return rows_of(study, method, merge_name, search, found, single), search


def coefs_of(config: Config, merge_name: str) -> np.ndarray:
    """Returns the candidate coefficients of a merge."""
    # Every coefficient of a merge of ordinary vectors costs forward passes.
    return COEFS[:: 5 if config.smoke else 1 if merge_name == "task_arithmetic" else 2]


def search_of(
    accuracies: np.ndarray, coefs: np.ndarray, single: Single
) -> evaluate.Search:
    """Finds the best coefficient from validation accuracies `[n, T]`."""
    own = single["validation"]
    return evaluate.search(
        dict(zip(coefs, accuracies, strict=True)).__getitem__,
        own if all(own) else [1.0] * len(own),  # absolute if one is zero
        coefs,
    )


def rows_of(
    study: Study,
    method: str,
    merge_name: str,
    search: evaluate.Search,
    found: np.ndarray,
    single: Single,
) -> list[dict]:
    """Makes the rows of a merge from test accuracies `[2, T]`, at 1 and as searched."""
    chosen = ((1.0, False), (search.coef, True))
    return [
        row(study, method, merge_name, coef, searched, accuracy, single["test"])
        for (coef, searched), accuracy in zip(chosen, found, strict=True)
    ]


class Evaluation(NamedTuple):
    """The results of one method, or of all methods.

    Attributes:
      alone: rows of models of single tasks, and of the pre-trained model.
      merged: rows of merged models.
      searches: the searches for coefficients, by title.
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
    """Evaluates all methods: rows, searches, and outputs of linearised methods."""
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
    """Evaluates the pre-trained model, the ordinary ones, and their vectors' merges."""
    method, title = "nonlinear", "evaluate, ordinary"
    single = ordinary_single(study, vectors)
    total = task_vectors.add(vectors)
    searched = {"task_arithmetic": total} | merges.merged_vectors(study, vectors)
    fitted = merges.fitted_vectors(study, vectors)
    coefs = {name: coefs_of(study.config, name) for name in searched}
    along = {name: (vector, coefs[name]) for name, vector in searched.items()}
    validation = ordinary_at(study, "validation", along, title)
    searches = {
        name: search_of(found, coefs[name], single)
        for name, found in validation.items()
    }
    chosen = {
        name: (searched[name], [1.0, search.coef]) for name, search in searches.items()
    }
    at_one = {name: (vector, [1.0]) for name, vector in fitted.items()}
    start = {"zero_shot": (total, [0.0])}
    found = ordinary_at(study, "test", chosen | at_one | start, title)
    [zero], own = found["zero_shot"], single["test"]
    alone = [
        row(study, "zero_shot", "none", 0, False, zero, own),
        row(study, f"individual_{method}", "none", 1, False, own, own),
    ]
    rows = []
    for name, search in searches.items():
        rows += rows_of(study, method, name, search, found[name], single)
    rows += [row(study, method, name, 1, False, found[name][0], own) for name in fitted]
    titled = {
        f"{method}, {name.replace('_', ' ')}": search
        for name, search in searches.items()
    }
    return Evaluation(alone, rows, titled, {})


def evaluate_linearized(study: Study, method: str, vectors: Taus) -> Evaluation:
    """Evaluates the linearised models of a method, and their merges."""
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
