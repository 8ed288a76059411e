"""Compares our merges under mergekit's definitions with mergekit's own.

For several architectures, it makes tiny random models: a base and three fine-tunes.
mergekit, in its own environment, and `jaxarith.merge.mergekit` merge them, and the
merged tensors are compared. So are the folders that mergekit and `jaxarith merge` make
from files with slices and tokenizers. Random methods are compared by the properties
that their draws share: the number of entries that are kept, and the sum of magnitudes
of every tensor.

    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    python -m experiments.bench.against_mergekit --mergekit mergekit/bin --out runs/mk

Without `--mergekit`, only our code merges the models, to try the script. PyTorch and
transformers are needed to make the models.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.bench import measure, mergekit_files
from experiments.bench.mergekit_runs import make_models, run_mergekit
from experiments.common import script
from jaxarith import hub, report, task_vectors
from jaxarith.merge import mergekit

LIMIT = 1e-6  # the largest absolute difference of results that count as the same
FINE_TUNES = 3
ARCHITECTURES = ("llama", "gpt2", "bert", "clip_vision")

# Differences that are not rounding, and that the script does not look for.
KNOWN_DIFFERENCES = (
    "If several entries tie with the smallest magnitude that is kept, ours keeps them "
    "all; mergekit keeps as many as its share, by an unstable sort.",
    "In a tensor with density·n < 1, mergekit's breadcrumbs keep nothing, and nor does "
    "its SCE with select_topk·m < 1; ours keeps one entry.",
    "In bfloat16 and float16, mergekit subtracts, weighs and adds in that dtype in all "
    "methods but linear and slerp; ours computes in float32 and casts once.",
    "mergekit's multislerp of three or more models fails at a tensor that none of them "
    "changed, and its DELLA fails at rows of one entry; ours goes on.",
    "mergekit's karcher drops models of norm below 1e-5, and takes the first model's "
    "tensor where directions cancel; ours averages.",
    "mergekit's DARE and DELLA do not rescale tensors whose sum of magnitudes is below "
    "1e-7.",
    "In float32, rounding of softmax decides whether mergekit's arcee_fusion takes "
    "over entries near the threshold; ours sums terms that do not cancel. The two "
    "differ in single entries, so a largest difference above 1e-6 says little there.",
    "Weights that sum to zero give infinite values in mergekit's linear; ours raises "
    "an error.",
)


@dataclasses.dataclass(frozen=True)
class Config:
    mergekit: Path | None = None
    """Folder of programs of an environment with mergekit, such as venv/bin."""
    out: Path | None = None
    """Folder for report.json and report.md."""
    architectures: tuple[Literal["llama", "gpt2", "bert", "clip_vision"], ...] = (
        ARCHITECTURES
    )


Inputs = Literal["task vectors", "models", "base and model"]


class Case(NamedTuple):
    """A merge, described for mergekit and for our code.

    Attributes:
      method: mergekit's name of the method.
      merge: our function, `merge(params_0, taus)`.
      shared: mergekit's parameters for all models together.
      each: mergekit's parameters for every single model.
      inputs: what is merged: task vectors of the base, the fine-tunes, or, as in slerp,
        the base and a fine-tune.
      models: number of fine-tunes.
      random: whether the method is random, so that only statistics can agree.
    """

    method: str
    merge: Callable
    shared: dict[str, Any]
    each: dict[str, list] = {}
    inputs: Inputs = "task vectors"
    models: int = FINE_TUNES
    random: bool = False


WEIGHTS = [0.5, 0.8, 0.3]
DENSITIES = [0.3, 0.5, 0.9]
DRAWN = 0.4  # the density of the random methods
FILTERED = [{"filter": "att", "value": 0.2}, {"value": 0.6}]  # att(n|ention)


def filtered(path: str) -> float:
    return 0.2 if "att" in path else 0.6


FAMILY = mergekit.generalized_task_arithmetic
KEY = jax.random.key(0)


def family(method: str, **options) -> Case:
    """Makes a case of the task-arithmetic family, with weights for the three models."""
    ours = functools.partial(FAMILY, method=method, weight=WEIGHTS, key=KEY, **options)
    shared = {"lambda" if k == "coef" else k: v for k, v in options.items()}
    each = {"weight": WEIGHTS}
    for name in [name for name, value in shared.items() if isinstance(value, list)]:
        each[name] = shared.pop(name)
    return Case(method, ours, shared, each)


def draws(method: str) -> Case:
    """Makes a random case of one model: both must keep a share and all magnitude."""
    options = {"weight": 1.0, "density": DRAWN}
    ours = functools.partial(FAMILY, method=method, key=KEY, **options)
    return Case(method, ours, options, models=1, random=True)


def nuslerp(inputs: Inputs, **options) -> Case:
    ours = functools.partial(mergekit.nuslerp, weight=[0.4, 0.7], **options)
    shared = {f"nuslerp_{name}": value for name, value in options.items()}
    return Case("nuslerp", ours, shared, {"weight": [0.4, 0.7]}, inputs, 2)


def plain(
    method: str, inputs: Inputs = "task vectors", models=FINE_TUNES, **options
) -> Case:
    """Makes a case without parameters of single models."""
    ours = functools.partial(getattr(mergekit, method), **options)
    return Case(method, ours, options, {}, inputs, models)


def mean(method: str, inputs: Inputs = "models", normalize=True) -> Case:
    """Makes a case that averages three weighted models, or their task vectors."""
    options = {"weight": WEIGHTS, "normalize": normalize}
    ours = functools.partial(getattr(mergekit, method), **options)
    name = "normalize" if method == "linear" else "normalize_weights"
    return Case(method, ours, {name: normalize}, {"weight": WEIGHTS}, inputs)


def by_filter(case: Case, parameter: str) -> Case:
    """Returns the case with one shared parameter that depends on the tensor."""
    ours = functools.partial(case.merge, **{parameter: filtered})
    return case._replace(merge=ours, shared={parameter: FILTERED})


CASES = {
    "linear": mean("linear"),
    "linear, normalize false": mean("linear", normalize=False),
    "slerp": plain("slerp", "base and model", 1, t=0.3),
    "slerp, t by filter": by_filter(plain("slerp", "base and model", 1), "t"),
    "nuslerp": nuslerp("models"),
    "nuslerp, base": nuslerp("task vectors"),
    "nuslerp, last axis": nuslerp("models", flatten=False),
    "nuslerp, base, first axis": nuslerp("task vectors", flatten=False, row_wise=True),
    "multislerp": mean("multislerp"),
    "multislerp, base, not normalized": mean(
        "multislerp", "task vectors", normalize=False
    ),
    "karcher": plain("karcher", "models"),
    "task_arithmetic": family("task_arithmetic", coef=0.7),
    "task_arithmetic, normalize": family("task_arithmetic", normalize=True),
    "ties": family("ties", density=0.3),
    "ties, densities, lambda": family("ties", density=DENSITIES, coef=1.3),
    "ties, normalize false, rescale": family(
        "ties", density=0.3, normalize=False, rescale=True
    ),
    "ties, density by filter": by_filter(family("ties"), "density"),
    "breadcrumbs": family("breadcrumbs", density=0.6, gamma=0.05),
    "breadcrumbs, gammas": family("breadcrumbs", density=0.9, gamma=[0.01, 0.2, 0.05]),
    "breadcrumbs_ties": family("breadcrumbs_ties", density=DENSITIES),
    "della, density 1": family("della", density=1.0),
    "model_stock": plain("model_stock"),
    "model_stock, filter_wise": plain("model_stock", filter_wise=True),
    "sce": plain("sce"),
    "sce, select_topk 0.3": plain("sce", select_topk=0.3),
    "nearswap": plain("nearswap", models=1, t=0.01),
    "arcee_fusion": plain("arcee_fusion", models=1),
    "ram": plain("ram"),
    "ramplus_tl": plain("ramplus_tl", epsilon=0.01, r=0.5),
    "dare_linear": draws("dare_linear"),
    "dare_ties": draws("dare_ties"),
    "della": draws("della"),
    "della_linear": draws("della_linear"),
}


def recipe(case: Case, folders: list[Path]) -> dict:
    """Returns the case as a configuration for mergekit."""
    base, *tuned = map(str, folders)
    entries = [
        {"model": model, "parameters": {k: v[i] for k, v in case.each.items()}}
        for i, model in enumerate(tuned[: case.models])
    ]
    config = {"merge_method": case.method, "models": entries, "dtype": "float32"}
    if case.inputs != "models":
        config["base_model"] = base
    return config | ({"parameters": case.shared} if case.shared else {})


def merged_by_ours(case: Case, trees: list[dict]) -> dict[str, np.ndarray]:
    base, *tuned = trees
    tuned = tuned[: case.models]
    if case.inputs == "task vectors":
        merged = case.merge(base, [task_vectors.difference(m, base) for m in tuned])
    else:
        inputs = tuned if case.inputs == "models" else [base, *tuned]
        merged = case.merge(
            {name: np.zeros_like(x) for name, x in base.items()}, inputs
        )
    return {name: np.asarray(leaf) for name, leaf in merged.items()}


def compare(case: Case, ours: dict, theirs: dict, base: dict) -> dict:
    """Returns the differences of two merges."""
    names = sorted(ours.keys() & theirs.keys())
    row = {"tensors": len(names), "in one only": len(ours.keys() ^ theirs.keys())}
    if not case.random:
        apart = max(float(np.abs(ours[n] - theirs[n]).max()) for n in names)
        same = apart <= LIMIT and not row["in one only"]
        return row | {"difference": apart, "same": same}
    moves = [{n: np.float64(x[n]) - base[n] for n in names} for x in (ours, theirs)]
    shares = [
        sum(np.count_nonzero(x) for x in move.values())
        / sum(x.size for x in move.values())
        for move in moves
    ]
    sums = [np.array([np.abs(move[n]).sum() for n in names]) for move in moves]
    apart = float(np.max(np.abs(sums[0] / sums[1] - 1)))
    entries = sum(base[n].size for n in names)
    likely = 5 * np.sqrt(2 * DRAWN * (1 - DRAWN) / entries)  # five deviations
    return row | {
        "kept by ours": shares[0],
        "kept by mergekit": shares[1],
        "difference": apart,
        # The moves are differences of float32 numbers, with their rounding.
        "same": bool(apart <= 1e-4 and abs(shares[0] - shares[1]) < likely),
    }


@script.full_precision
def main(config: Config) -> dict:
    """Merges, compares, prints and writes; returns the content of `report.json`."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = {name: make_models(name, folder) for name in config.architectures}
        jobs = {
            f"{name}/{case}": (recipe(CASES[case], made[name]), f"{folder}/{name}/{i}")
            for name in made
            for i, case in enumerate(CASES)
        }
        errors = {}
        if config.mergekit is not None:
            errors = run_mergekit(config.mergekit, jobs, folder)
        for name, folders in made.items():
            trees = [hub.read(model) for model in folders]
            for case_name, case in CASES.items():
                ours = merged_by_ours(case, trees)
                row = {"method": case_name, "architecture": name, "random": case.random}
                job = f"{name}/{case_name}"
                if config.mergekit is None:
                    row |= {"same": None, "error": "mergekit was not run"}
                elif job in errors:
                    row |= {"same": None, "error": errors[job]}
                else:
                    theirs = hub.read(jobs[job][1])
                    row |= compare(case, ours, theirs, trees[0])
                rows.append(row)
        files = mergekit_files.compared(config.mergekit, folder / "files")
    results = {"rows": rows, "files": files, "known_differences": KNOWN_DIFFERENCES}
    parts = parts_of(rows, files)
    return measure.write(config.out, "Compared with mergekit", parts, results)


def parts_of(rows, files) -> list[str]:
    """Returns the paragraphs and tables of the report."""

    def verdict(row):
        words = {True: "same", False: "differs", None: row.get("error")}
        return words[row["same"]]

    def shown(row):
        return f"{row['difference']:.1e}" if "difference" in row else None

    exact = [
        [r["method"], r["architecture"], r.get("tensors"), shown(r), verdict(r)]
        for r in rows
        if not r["random"]
    ]
    random = [
        [
            *(r["method"], r["architecture"]),
            *(r.get("kept by ours"), r.get("kept by mergekit"), shown(r), verdict(r)),
        ]
        for r in rows
        if r["random"]
    ]
    header = ["method", "architecture", "tensors", "largest difference", "verdict"]
    drawn = ["method", "architecture", "kept by ours", "kept by mergekit"]
    drawn += ["sums of magnitudes apart", "verdict"]
    parts = [report.markdown_table(header, exact), report.markdown_table(drawn, random)]
    parts.append(mergekit_files.table(files))
    parts.append("Known differences; only arcee_fusion's occurs in these merges:")
    return [*parts, "\n".join(f"- {line}" for line in KNOWN_DIFFERENCES)]


if __name__ == "__main__":
    script.run(Config, main)
