"""Figures 2, 3, 15 and 16: adds all subsets of eight task vectors.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: section 4.1, D.2 to D.4.

    python -m experiments.editing.figure2_subsets --data-dir DATA

Data: the eight tasks, without the control. The vectors in the bank are used.

Every subset has one coefficient, searched in 0, 0.05, …, 1 by the mean normalised
validation accuracy: over all tasks in Figure 3, over the members of the subset in
Figures 2 and 16. Figure 15 shows the coefficients of Figure 3, and its mean validation
accuracies. The paper does not name the CLIP of these figures; we take ViT-L-14, as in
the others.

With ordinary vectors the 2^8 subsets cost 43,000 passes over validation data; reduce
them by --validate. --method linear needs one pass in all. Scores are saved in the run's
folder, so a restarted run continues.

Published, as plots; the text has normalised accuracies (Figures 2 and 3, D.2):

    result                                norm
    pairs, both tasks                     0.989
    best subset, all tasks, on test data  0.912
    multi-task training                   0.994

"Scaling coefficients in the range 0.3 to 0.5 produce close to optimal results in many
cases."
"""

import dataclasses
import zlib
from typing import Literal

import numpy as np
from tqdm import tqdm

from experiments.common import partial, runs, script, tables
from experiments.common.vision import (
    options,
    pairwise,
    planned,
    scores,
    setups,
    vectors,
)
from jaxarith import fingerprint, plots
from jaxarith.typing import Tree

PUBLISHED = tables.published(__doc__, "result")
TOGETHER = 32  # number of models between two writes of the scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.LargeModel):
    method: Literal["nonlinear", "linear"] = "nonlinear"
    """Ordinary vectors as in the paper (nonlinear), or linearised ones (linear)."""
    validate: int | None = None
    """Number of validation samples of a task that choose coefficients; by default
    all."""


def accuracies(
    setup: setups.Setup, taus: list[Tree], rows: np.ndarray, config, split: str
) -> np.ndarray:
    """Measures accuracies `[n, T]` on every task at n sets of coefficients `[n, T]`.

    They are saved in `scores/` in the run's folder, and not measured again.
    """
    linearized = config.method == "linear"
    models = {"params_0": fingerprint.combined(setup.params_0), "linear": linearized}
    models["vectors"] = [fingerprint.combined(tau) for tau in taus]
    columns = []
    for task in tqdm(setup.tasks, desc=f"subsets, {split}", unit="task"):
        dataset = getattr(task, split)
        if split == "validation" and config.validate is not None:
            dataset = setups.drawn(setup, dataset, config.validate)

        def score(part, dataset=dataset):
            return scores.accuracies(setup, taus, dataset, linearized, part)

        if config.plan:  # one row stands for all
            columns.append(np.repeat(score(rows[:1]), len(rows)))
            if not linearized:
                planned.passes(setup, (len(rows) - 1) * dataset.size)
            continue
        data = {"head": fingerprint.combined({"head": dataset.head})}
        data["labels"] = zlib.crc32(np.asarray(dataset.labels, np.int32).tobytes())
        columns.append(
            partial.scored(
                config.out / "scores" / f"{split}_{task.name}.json",
                models | data,
                rows,
                score,
                # A tangent-space model needs one pass for all rows.
                together=len(rows) if linearized else TOGETHER,
                resume=config.resume,
            )
        )
    return np.array(columns).T


def normalized(found: np.ndarray, single: np.ndarray) -> np.ndarray:
    """Returns accuracies `[..., T]` divided by those of single models, unless 0."""
    return found / np.where(single > 0, single, 1)


def choose(curves: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns, for each subset, the index of the best of n coefficients.

    Args:
      curves: normalised accuracies `[S, n, T]`.
      weights: zeros and ones, `[S, T]`: the tasks whose mean accuracy decides.

    Returns:
      Indices `[S]`; the first wins if several are equal.

    Example:
      >>> curves = np.array([[[0.5, 0.9], [0.7, 0.2]]])
      >>> choose(curves, np.array([[1, 0]])), choose(curves, np.array([[1, 1]]))
      (array([1]), array([0]))
    """
    return np.einsum("snt,st->sn", curves, weights.astype(float)).argmax(-1)


def subset_rows(setup: setups.Setup, config: Config) -> tuple[list[dict], np.ndarray]:
    """Returns a row for every subset, and mean validation accuracies, `[S, n]`."""
    taus = vectors.vectors(setup, config.method)
    coefs = scores.coefs_of(config, scores.COEFS)
    # The empty subset is included: it is the pre-trained model.
    members = pairwise.subsets(len(taus))
    grid = (coefs[None, :, None] * members[:, None]).reshape(-1, len(taus))
    ones = np.eye(len(taus))
    found = accuracies(setup, taus, np.concatenate([ones, grid]), config, "validation")
    single, curves = np.diag(found[: len(ones)]), found[len(ones) :]
    curves = normalized(curves, single).reshape(len(members), len(coefs), -1)
    criteria = {"all": np.ones_like(members), "members": members}
    chosen = {name: coefs[choose(curves, w)] for name, w in criteria.items()}
    rows = [ones, *(c[:, None] * members for c in chosen.values())]
    found = accuracies(setup, taus, np.concatenate(rows), config, "test")
    single = np.diag(found[: len(ones)])
    parts = normalized(found[len(ones) :], single).reshape(2, len(members), -1)
    parts = dict(zip(chosen, parts, strict=True))
    zero_shot = parts["all"][0]
    plain = []
    for i, own in enumerate(members):
        row = {
            "tasks": [name for name, m in zip(setup.names, own, strict=True) if m],
            "size": int(own.sum()),
        }
        for name, weights in criteria.items():
            # The empty subset has no members to average over.
            if weights[i].any():
                here = parts[name][i][weights[i] == 1]
                row[name] = float(here.mean())
                row[f"coefficient, {name}"] = float(chosen[name][i])
                row[f"accuracies, {name}"] = here.tolist()
        if own.any():
            row["zero-shot, members"] = float(zero_shot[own == 1].mean())
        plain.append(row)
    return plain, curves.mean(-1)


def draw(setup: setups.Setup, config: Config, rows: list[dict], curves: np.ndarray):
    """Draws the four figures."""
    sizes = np.array([row["size"] for row in rows])
    every = range(1, len(setup.tasks) + 1)
    normal = "normalised accuracy"
    pairs = [row for row in rows if row["size"] == 2]
    titles = dict(zip(setup.names, setup.titles, strict=True))
    plots.horizontal_bars(
        config.out / "figure2.png",
        {
            "zero-shot": [row["zero-shot, members"] for row in pairs],
            "sum of both vectors": [row["members"] for row in pairs],
        },
        [" + ".join(titles[name] for name in row["tasks"]) for row in pairs],
        x=f"{normal}, mean over both tasks",
    )
    for figure, name in ((3, "all"), (16, "members")):
        start = 0 if name == "all" else 1
        xs = range(start, len(setup.tasks) + 1)
        lines = {
            "mean, and range of all subsets": [
                [row[name] for row in rows if row["size"] == n] for n in xs
            ]
        }
        plots.repeated(
            config.out / f"figure{figure}.png",
            list(xs),
            lines,
            {"single models": 1.0},
            x="number of task vectors",
            y=f"{normal}, mean over "
            + ("all tasks" if name == "all" else "the tasks of the vectors"),
        )
    coefs = scores.coefs_of(config, scores.COEFS)
    plots.scatter(
        config.out / "figure15_coefficients.png",
        {
            "Chosen coefficients": {
                "one subset": (
                    [row["size"] for row in rows if row["size"]],
                    [row["coefficient, all"] for row in rows if row["size"]],
                )
            }
        },
        x="number of task vectors",
        y="scaling coefficient",
    )
    plots.curves(
        config.out / "figure15.png",
        {
            f"vectors: {n}": (list(coefs), curves[sizes == n].mean(0).tolist())
            for n in every
        },
        x="scaling coefficient",
        y=f"{normal}, validation, all tasks",
    )


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config)
    if len(config.tasks) < 2:
        raise ValueError(f"--tasks names {config.tasks}; expected two or more.")
    runs.start(config)
    setup = setups.load(config, config.model, control=False)
    subsets, curves = subset_rows(setup, config)
    # These are ordinary models, whatever the vectors are.
    alone = scores.single_accuracies(setup, "nonlinear")[1] / 100
    joint = normalized(scores.joint_accuracies(setup), alone)
    pairs = float(np.mean([row["members"] for row in subsets if row["size"] == 2]))
    # The largest test value of Figure 3; the paper seems to mean this one.
    best = max(row["all"] for row in subsets)
    values = (pairs, best, float(joint.mean()))  # in the published order
    rows = [
        {"result": name, "norm": value}
        for name, value in zip(PUBLISHED, values, strict=True)
    ]
    if runs.is_first():
        draw(setup, config, subsets, curves)
    results = {"rows": rows, "subsets": subsets, "curves": curves.tolist()}
    sizes = [
        {
            "vectors": n,
            "subsets": len(own),
            "all tasks": float(np.mean([row["all"] for row in own])),
            "members": float(np.mean([row["members"] for row in own])) if n else None,
            "coefficient": float(np.mean([row["coefficient, all"] for row in own])),
        }
        for n in range(len(setup.tasks) + 1)
        for own in [[row for row in subsets if row["size"] == n]]
    ]
    beside = tables.beside(rows, PUBLISHED, keys=["result"], values=["norm"])
    shown = {
        f"{setup.title}: normalised test accuracy.": beside,
        "Mean over subsets by the number of vectors (Fig. 3, 16 and 15); 0 vectors "
        "are the pre-trained model.": sizes,
    }
    title = "All subsets (editing paper, Figures 2, 3, 15, 16)"
    return tables.write(config.out, title, shown, results, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
