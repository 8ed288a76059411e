"""The table and the figures of a study, and a summary in sentences."""

import numpy as np
from tqdm import tqdm

from experiments.common.studies.evaluation import Evaluation, Outputs
from experiments.common.studies.study import Study
from jaxarith import evaluate, plots
from jaxarith import report as reports
from jaxarith.plots import style

XI_COEFS = np.linspace(-2, 2, 15)
# Names of methods in sentences and figures.
NAMES = {
    "zero_shot": "zero-shot",
    "nonlinear": "ordinary",
    "linear": "linearised",
    "curvature": "linearised + curvature",
    "tau_jp_cyclic": "cyclic τJp",
    "tau_jp_mixed": "mixed τJp",
    "tau_jp_strict": "strict τJp",
}
# Names of merges in figures.
MERGES = {
    "task_arithmetic": "sum",
    "ties": "TIES",
    "dare_ties": "DARE and TIES",
    "consensus": "Consensus",
    "awd": "AWD",
    "tsv": "TSV-M",
    "iso_c": "Iso-C",
    "wudi": "WUDI",
    "fisher": "Fisher",
    "regmean": "RegMean",
    "adamerging": "AdaMerging",
}


def tau_jp_matrix(outputs: Outputs) -> np.ndarray:
    """Returns τJp of every task vector on every test set, from the cached tangents.

    `tau_jp.matrix` computes the same without a cache.
    """
    return np.array(
        [
            [
                float(np.linalg.norm(at.moves[task], axis=-1).mean())
                for at in outputs.test
            ]
            for task in range(len(outputs.vectors))
        ]
    )


def worst_pair(matrix: np.ndarray) -> tuple[int, int]:
    """Returns the two tasks whose vectors disturb each other most (Eq. 9)."""
    both = np.triu(matrix + matrix.T, 1)
    first, second = np.unravel_index(both.argmax(), both.shape)
    return int(first), int(second)


def xi_grid(study: Study, outputs: Outputs, pair: tuple[int, int]) -> np.ndarray:
    """Returns ξ of a pair of tasks on test data, without the other vectors."""
    one_hot = np.eye(len(study.names))[list(pair)]
    return evaluate.disentanglement_error(
        [lambda c, at=outputs.test[i]: at(np.asarray(c) @ one_hot) for i in pair],
        [study.test[i].predict for i in pair],
        XI_COEFS,
    )


def figures(
    study: Study,
    found: Evaluation,
    matrices: dict[str, np.ndarray],
    cosines: dict[str, np.ndarray],
) -> None:
    """Draws all figures into the output folder.

    Args:
      study: the study.
      found: rows, searches and outputs of the methods.
      matrices: for each linearised method, its τJp matrix.
      cosines: for each method, the cosines of its task vectors.
    """
    out, names = study.config.out, study.names
    pair = worst_pair(matrices["linear"])
    maps = {
        NAMES[method]: xi_grid(study, found.outputs[method], pair)
        for method in tqdm(matrices, desc="ξ grids", unit="grid")
    }
    tasks = (names[pair[0]], names[pair[1]])
    plots.disentanglement(out / "xi.png", maps, XI_COEFS, tasks)
    plots.matrices(
        out / "tau_jp.png",
        {NAMES[method]: matrix for method, matrix in matrices.items()},
        names,
        rows="task vector",
        columns="data",
        value="mean of ‖J(x)τ‖",
    )
    plots.matrices(
        out / "cosine.png",
        {NAMES[method]: matrix for method, matrix in cosines.items()},
        names,
        rows="task vector",
        columns="task vector",
        value="cosine",
    )
    plots.curves(
        out / "coefficients.png",
        {
            name_of(*label.replace(" ", "_").split(",_")): (s.coefs, s.normalized)
            for label, s in found.searches.items()
        },
        x="coefficient of every task vector",
        y="normalised accuracy (validation)",
    )
    best = best_of_families(found.rows)
    plots.by_task(
        out / "tasks.png",
        {label: list(row["per_task"].values()) for label, row in best.items()},
        names,
        x="test accuracy (searched coefficient)",
    )
    at_one = {
        name_of(row["method"], row["merge"]): row["absolute"]
        for row in found.rows
        if not row["searched"] and not row["method"].startswith("individual")
    }
    plots.overview(
        out / "overview.png",
        maps,
        XI_COEFS,
        tasks,
        {label: at_one[label] for label in best},
        {label: row["absolute"] for label, row in best.items() if row["searched"]},
        x="test accuracy at coefficient 1, mean over tasks",
        tick="at the coefficient that is best on validation data",
    )


def name_of(method: str, merge: str) -> str:
    """Returns the name of a row in figures.

    Example:
      >>> name_of("nonlinear", "ties"), name_of("zero_shot", "none")
      ('ordinary, TIES', 'zero-shot')
    """
    own = NAMES[method]
    return own if merge == "none" else f"{own}, {MERGES[merge]}"


def best_of_families(rows: list[dict]) -> dict[str, dict]:
    """Returns the rows that figures show; the table has all rows.

    They are the pre-trained model, every plain sum, and the most accurate merge of each
    other family, at the searched coefficients.

    Args:
      rows: the rows of the table.

    Returns:
      Row by name, the most accurate first.
    """
    searched = {(r["method"], r["merge"]) for r in rows if r["searched"]}
    candidates = [
        r
        for r in rows
        if (r["searched"] or (r["method"], r["merge"]) not in searched)
        and not r["method"].startswith("individual")
    ]
    candidates.sort(key=lambda row: -row["absolute"])
    plain = {"none", "task_arithmetic"}
    taken = {
        style.family(name_of(r["method"], r["merge"]))
        for r in candidates
        if r["merge"] in plain
    }
    found = {}
    for row in candidates:
        label = name_of(row["method"], row["merge"])
        own = style.family(label)
        if row["merge"] in plain or own not in taken:
            found[label] = row
            taken.add(own)
    return found


def table(rows: list[dict], names: list[str]) -> str:
    """Returns the rows as a Markdown table."""
    header = ["method", "merge", "coefficient", "absolute", "normalised", *names]
    cells = [
        [
            r["method"],
            r["merge"],
            f"{r['coef']:.2f}" + " (searched)" * r["searched"],
            r["absolute"],
            r["normalized"],
            *r["per_task"].values(),
        ]
        for r in rows
    ]
    return reports.markdown_table(header, cells)


def summary(rows: list[dict]) -> list[str]:
    """Returns the main results, one sentence each.

    They are the accuracies of the pre-trained model, and of its sums with ordinary
    vectors and with vectors trained with a penalty, at coefficient 1 and at the
    searched coefficient.
    """
    at = {(r["method"], r["merge"], r["searched"]): r for r in rows}
    normalized = all(r["normalized"] for r in rows)
    measure = "normalized" if normalized else "absolute"
    whole = "the accuracy of models fine-tuned on each task"
    start = at["zero_shot", "none", False][measure]
    lines = [
        f"The pre-trained model has {start:.3f} of {whole}."
        if normalized
        else f"The accuracy of the pre-trained model is {start:.3f}."
    ]
    summed = [
        r["method"] for r in rows if r["merge"] == "task_arithmetic" and r["searched"]
    ]
    for method in (name for name in summed if name != "linear"):
        one = at[method, "task_arithmetic", False]
        best = at[method, "task_arithmetic", True]
        lines.append(
            f"With the sum of the {NAMES[method]} task vectors it has "
            f"{one[measure]:.3f} at coefficient 1 and {best[measure]:.3f} at "
            f"{best['coef']:.2f}, the best coefficient on validation data."
        )
    return lines
