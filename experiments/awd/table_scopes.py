"""Compares scopes and solvers of AWD with task arithmetic at its best λ (our table).

    python -m experiments.awd.table_scopes
    python -m experiments.awd.table_scopes --model openai/clip-vit-base-patch32 \\
        --source tfds --data-dir DATA --steps 2000 --learning-rate 1e-5 \\
        --batch-size 128 \\
        --tasks sun397 stanford_cars resisc45 eurosat svhn gtsrb mnist dtd

Without options it is a small study: the embedded tiny CLIP on the six small tasks of
the quickstart, which need no data, with three training seeds.

Every row is a merged vector. All are searched in the same way on validation data: λ in
0.1, 0.15, …, 0.7, and α of AWD in 1e-2 and 1e-4. "Gain" is the difference to Task
Arithmetic of whole vectors with the same seed. "Spread" is the largest value over the
seeds minus the smallest. "Cosine with sum" and "effective λ" compare with the plain sum
of the linear weights (`experiments.awd.solving`). "Cosine left" is the mean |cosine| of
the disentangled vectors divided by that of the task vectors. The weights of "K weights
searched" start at the best λ of the plain sum of the linear weights
(`experiments.awd.beyond`).
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from tqdm import tqdm

from experiments.awd import beyond, disentangled, solving
from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, small_tasks, vectors
from jaxarith import task_vectors
from jaxarith.merge.awd import Scope, Solver
from jaxarith.models import clip

COEFS = np.linspace(0.1, 0.7, 13)
ALPHAS = (1e-2, 1e-4)
PLAIN = "Task Arithmetic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    model: str = str(clip.TINY_CLIP)
    """A CLIP: a folder, or an id of the Hugging Face Hub."""
    tasks: tuple[str, ...] = small_tasks.NAMES
    source: Literal["tfds", "hub", "folder", "small"] | None = "small"
    """Source of the tasks; `small` are the tasks of the quickstart."""
    steps: int | None = 120
    """Optimizer steps."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; each has its own bank below --bank."""
    scopes: tuple[Scope, ...] = get_args(Scope)
    solvers: tuple[Solver, ...] = ("gradient_descent", "momentum", "adam")
    step_size: float = 0.01
    """AWD's learning rate, see `jaxarith.merge.awd`."""
    awd_steps: int = 1000


def rows_of(setup: setups.Setup, config: Config) -> list[dict]:
    """Returns the rows of one seed."""
    taus, rows = vectors.vectors(setup, "nonlinear"), []
    parts = disentangled.linear_weights(taus)
    total, coefs = task_vectors.add(parts), scores.coefs_of(config, COEFS)
    before = disentangled.mean_cosine(parts)

    def add(method, test, beside, **found):
        row = {"method": method, "seed": setup.options.seed}
        row |= setup.by_task(test) | {"mean": scores.means(test)}
        row |= {"coef": None, "alpha": None, "cosine left": None}
        rows.append(row | beside | found)

    whole = task_vectors.add(taus)
    found = disentangled.searched(setup, {"": whole}, coefs)
    nothing = {"cosine with sum": None, "effective λ": None}
    add(PLAIN, found.test, nothing, coef=found.coef)
    plain = disentangled.searched(setup, {"": total}, coefs)
    beside = solving.beside_sum(total, total, plain.coef)
    add(beyond.PLAIN, plain.test, beside, coef=plain.coef)
    weights, test = beyond.weights_searched(setup, parts, plain.coef)
    vector = solving.weighted_sum(parts, weights)
    add(beyond.SEARCHED, test, solving.beside_sum(vector, total))
    pairs = list(itertools.product(config.scopes, config.solvers))
    for scope, solver in tqdm(pairs, desc="AWD", unit="row"):
        how = solving.Options(
            scope=scope,
            solver=solver,
            step_size=config.step_size,
            awd_steps=config.awd_steps,
        )
        sums = {
            f"{alpha:g}": solving.merged(setup.params_0, parts, how, alpha=alpha)
            for alpha in ALPHAS[: 1 if config.smoke else None]
        }
        found = disentangled.searched(setup, sums, coefs)
        vector, alpha = sums[found.name], float(found.name)
        own = disentangled.apart(parts, vector)
        add(
            f"AWD, {scope}, {solver.replace('_', ' ')}",
            found.test,
            solving.beside_sum(vector, total, found.coef),
            coef=found.coef,
            alpha=alpha,
            **{"cosine left": disentangled.mean_cosine(own) / before},
        )
    return rows


def over_seeds(rows: Sequence[dict]) -> list[dict]:
    """Returns means over the seeds, with spread and gain over Task Arithmetic."""
    plain = {row["seed"]: row["mean"] for row in rows if row["method"] == PLAIN}
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        means = [row["mean"] for row in own]
        gains = [row["mean"] - plain[row["seed"]] for row in own]
        line = {"method": method, "mean": float(np.mean(means))}
        line |= {"spread": max(means) - min(means), "gain": float(np.mean(gains))}
        line["smallest gain"] = min(gains)
        for name in ("coef", "cosine left", "cosine with sum", "effective λ"):
            values = [row[name] for row in own]
            line[name] = None if None in values else float(np.mean(values))
        found.append(line)
    return found


def one_seed(config: Config, seed: int) -> list[dict]:
    """Returns the rows of a seed; its vectors have their own bank."""
    folder = f"seed_{seed}"
    own = dataclasses.replace(
        config, seed=seed, bank=config.bank / folder, out=config.out / folder
    )
    return rows_of(setups.load(own, own.model, control=False), config)


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(
        config, seeds=config.seeds[:2], scopes=("row",), solvers=("momentum",)
    )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(
            f"--seeds {config.seeds}: expected at least one, and each only once."
        )
    rows = []
    for seed in tqdm(config.seeds, desc="seeds", unit="seed"):
        rows += one_seed(config, seed)
    means = over_seeds(rows)
    figures = ("method", "mean", "spread", "gain", "smallest gain")
    others = ("method", "coef", "cosine left", "cosine with sum", "effective λ")
    caption = f"Test accuracy in percent, seeds {', '.join(map(str, config.seeds))}."
    shown = {
        caption: tables.markdown([{n: row[n] for n in figures} for row in means], 2),
        "Means over the seeds.": tables.markdown(
            [{name: row[name] for name in others} for row in means], digits=4
        ),
    }
    title = "AWD by scope and solver"
    runs.claim(config)
    return tables.write(config.out, title, shown, {"rows": rows, "means": means})


if __name__ == "__main__":
    script.run(Config, main)
