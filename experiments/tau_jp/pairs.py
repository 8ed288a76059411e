"""Measures pairs of task vectors for the figures of the τJp paper.

The vectors belong to tangent-space models, and their outputs are affine in the
coefficients. So one pass over the images with all vectors is enough for every pair,
every coefficient, and τJp.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.common.vision import pairwise, planned, scores, setups, vectors
from jaxarith import evaluate, metrics
from jaxarith.typing import Numbers, Taus

METHODS: dict[str, vectors.Method] = {"Linear FT": "linear", "Ours": "tau_jp_cyclic"}


class TauJp(NamedTuple):
    """τJp of T task vectors (rows) on the test data of T tasks (columns).

    The figures show `norm`. The paper's code measures it, so the published figures most
    likely show it too; in its square the small values would be hard to see. report.json
    has both.

    Attributes:
      norm: mean of ‖J(x; θ0)τ‖ over samples, `[T, T]`.
      square: mean of ‖J(x; θ0)τ‖² over samples, as in Eq. 9, `[T, T]`.
    """

    norm: np.ndarray
    square: np.ndarray

    def of_pairs(self) -> list[dict[str, float]]:
        """Returns both measures of every pair, in the order of `pairwise.pairs`."""
        return [
            {"tau_jp": norm, "tau_jp_squared": square}
            for norm, square in zip(
                pairwise.pair_values(self.norm),
                pairwise.pair_values(self.square),
                strict=True,
            )
        ]


def tau_jp(setup: setups.Setup, taus: Taus) -> TauJp:
    """Measures τJp of every vector on the test data of every task, in one pass."""
    return _matrices([norms(at.moves) for _, at in outputs(setup, taus, "test")])


def additions(setup: setups.Setup, taus: Taus, coefs: Numbers) -> list[dict]:
    """Adds every two task vectors, with a coefficient searched for each pair.

    Args:
      setup: the model and the tasks.
      taus: one linearised vector per task.
      coefs: candidates of the common coefficient of both vectors; the one with the best
        mean normalised accuracy on validation data is chosen.

    Returns:
      For every pair, as plain data: the names, both measures of τJp, the coefficient,
      the two test accuracies, and their means in percent.
    """
    couples = pairwise.pairs(len(taus))
    curves, single, _ = _accuracies(
        setup, taus, "validation", dict.fromkeys(couples, coefs)
    )
    chosen = {}
    for pair, curve in curves.items():
        alone = single[list(pair)]
        chosen[pair] = evaluate.search(
            dict(zip(coefs, curve, strict=True)).__getitem__,
            # Without normalisation if a single accuracy is 0.
            alone if alone.all() else np.ones(2),
            coefs,
        ).coef
    found, single, measured = _accuracies(
        setup, taus, "test", {pair: [coef] for pair, coef in chosen.items()}
    )
    rows = []
    for pair, measures in zip(couples, measured.of_pairs(), strict=True):
        [both] = found[pair]
        rows.append(
            {
                "pair": [setup.names[i] for i in pair],
                **measures,
                "coefficient": chosen[pair],
                "accuracies": both.tolist(),
                "abs": scores.means(both),
                "norm": scores.normalized(both, single[list(pair)]),
            }
        )
    return rows


def panels(points: Sequence[dict], y: str) -> dict:
    """Returns τJp and the measure `y` by model and method, for `plots.scatter`."""
    found: dict = {}
    for point in points:
        xs, ys = found.setdefault(point["model"], {}).setdefault(
            point["method"], ([], [])
        )
        xs.append(point["tau_jp"])
        ys.append(point[y])
    return found


def correlations(points: Sequence[dict], y: str) -> list[dict]:
    """Correlates `y` with both measures of τJp; returns rows of a table.

    Args:
      points: plain data with the fields "model", "method", "tau_jp", "tau_jp_squared"
        and `y`. Pairs with `y` None are left out.
      y: name of a measure.

    Returns:
      For each model, one row per method and one for both methods together, with the
      number of pairs, and the correlations of Pearson and Spearman (None if undefined).
    """
    rows = []
    for model in dict.fromkeys(point["model"] for point in points):
        for method in (*METHODS, "both"):
            own = [
                point
                for point in points
                if point["model"] == model
                and method in (point["method"], "both")
                and point[y] is not None
            ]
            row = {"model": model, "method": method, "pairs": len(own)}
            ys = np.array([point[y] for point in own], float)
            for measure in ("tau_jp", "tau_jp_squared"):
                xs = np.array([point[measure] for point in own], float)
                for name in ("pearson", "spearman"):
                    correlation = getattr(metrics, name)
                    defined = len(set(xs)) > 1 and len(set(ys)) > 1
                    row[f"{name}, {measure}"] = correlation(xs, ys) if defined else None
            rows.append(row)
    return rows


def title(titles: Sequence[str], pair: Sequence[int]) -> str:
    """Returns the names of two tasks, as the paper prints them."""
    return " – ".join(titles[i] for i in pair)


def outputs(
    setup: setups.Setup, taus: Taus, split: str
) -> Iterator[tuple[setups.Dataset, evaluate.TangentOutputs]]:
    """Yields the dataset of every task, and its outputs in terms of all vectors."""
    for task in tqdm(setup.tasks, desc=f"tangents, {split}", unit="task"):
        dataset = getattr(task, split)
        model = (setup.apply_fn, setup.params_0, taus, dataset.batches)
        planned.passes(setup, (1 + 2 * len(taus)) * dataset.size)
        yield dataset, evaluate.tangent(*model, mesh=setup.mesh)


def norms(moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the means over samples of ‖J(x)τ‖ and of its square.

    Args:
      moves: tangents `[T, N, D]`.

    Returns:
      Two arrays `[T]`.

    Example:
      >>> norm, square = norms(np.array([[[3.0, 4.0], [0.0, 1.0]]]))
      >>> print(norm, square)
      [3.] [13.]
    """
    lengths = np.linalg.norm(moves, axis=-1).astype(float)
    return lengths.mean(-1), np.square(lengths).mean(-1)


def _accuracies(setup, taus, split, coefs: Mapping[tuple[int, int], Numbers]):
    """Returns accuracies of pairs, of single models, and τJp, from one pass.

    A pair has accuracies `[n, 2]` at its n coefficients; single models have `[T]`.
    """
    found = {pair: np.empty((len(values), 2)) for pair, values in coefs.items()}
    single, lengths = [], []
    for task, (dataset, at) in enumerate(outputs(setup, taus, split)):
        single.append(dataset.accuracy(at.f0 + at.moves[task]))
        lengths.append(norms(at.moves))
        for pair, values in coefs.items():
            if task in pair:
                total = at.moves[pair[0]] + at.moves[pair[1]]
                added = evaluate.TangentOutputs(at.f0, total[None])
                found[pair][:, pair.index(task)] = [
                    dataset.accuracy(added([coef])) for coef in values
                ]
    return found, np.array(single), _matrices(lengths)


def _matrices(columns):
    return TauJp(*np.stack(columns, axis=-1))
