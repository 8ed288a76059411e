"""What a study of merging does with its task vectors, whatever the model and data are.

Fine-tunes on every task in several ways (ordinary, linearised, linearised with the τJp
penalty), merges, searches coefficients, evaluates, and writes a table, figures, task
vectors and a merged checkpoint. `quickstart` and `text_study` bring model and tasks.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: its Tables 1 and 6 and Figure 6 on other data.
"""

import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.common import runs, study_merges
from jaxarith import (
    evaluate,
    hub,
    losses,
    merge,
    metrics,
    plots,
    report,
    sharding,
    task_vectors,
    tau_jp,
    train,
    tree,
)
from jaxarith.data import pipeline
from jaxarith.models import heads
from jaxarith.sharding import processes
from jaxarith.typing import Tree

COEFS = np.linspace(0, 1, 21)
XI_COEFS = np.linspace(-2, 2, 15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.Options):
    """The options that all studies have."""

    out: Path
    """Folder for report.json, report.md, figures, task vectors and a merged model."""
    modes: tuple[Literal["cyclic", "mixed", "strict"], ...] = ("cyclic",)
    """Modes of the τJp penalty, each trained and reported."""
    merges: tuple[Literal[*study_merges.MERGES, *study_merges.FITTED], ...] = (
        *study_merges.MERGES,
        *study_merges.FITTED,
    )
    """Merges of the ordinary vectors beside task arithmetic."""
    steps: int = 200
    batch_size: int = 64
    learning_rate: float = 1e-3
    penalty_coef: float = 0.1
    """Weight of the τJp penalty."""
    penalty_batch_size: int | None = None
    """Its samples per step; an eighth of the batch by default."""
    samples: int | None = None
    """The largest number of samples of a split; all by default."""
    seed: int = 0
    smoke: bool = False
    """Run the whole path with few steps, samples and coefficients; what it finds means
    nothing."""


class Dataset(NamedTuple):
    """One split of one task: batches, labels, and the frozen head with its logits."""

    batches: list[dict]
    labels: np.ndarray
    head: jax.Array
    logits: Callable

    def predict(self, features) -> np.ndarray:
        return np.asarray(self.logits(self.head, features)).argmax(-1)

    def accuracy(self, features) -> float:
        return metrics.accuracy(self.logits(self.head, features), self.labels)


class Study(NamedTuple):
    """What every method starts from.

    Attributes:
      config: the options.
      model: a checkpoint with `params`, `folder` and `config`.
      apply_fn: `apply_fn(params, *inputs) -> features[B, D]`, what is linearised.
      params_0: the pre-trained parameters that `apply_fn` reads.
      trained: pattern of the paths in `params_0` that are trained.
      blocks: pattern of the linear weights, to which AWD confines itself.
      inputs: the fields of a batch that `apply_fn` takes.
      token_mask: the field that is true where a token counts; None without tokens.
      logits: `logits(head, features, valid) -> [B, C]`.
      merged_config: what config.json of the merged checkpoint holds.
      names: of the tasks.
      classes: the names of their classes.
      sources: their training samples.
      validation, test: their other splits.
    """

    config: Config
    model: Any
    apply_fn: Callable
    params_0: dict
    trained: str
    blocks: str
    inputs: tuple[str, ...]
    token_mask: str | None
    logits: Callable
    merged_config: dict
    names: list[str]
    classes: list
    sources: list
    validation: list[Dataset]
    test: list[Dataset]

    @property
    def mesh(self) -> Mesh:
        return sharding.make_mesh(self.config.mesh)

    def loss(self, features, batch, constants):
        logits = self.logits(constants["head"], features, constants["valid"])
        return losses.cross_entropy(logits, batch["label"])


def datasets(sources, head_of, logits: Callable, batch_size: int) -> list[Dataset]:
    """One split of all tasks, ready to be evaluated."""
    batches = [pipeline.evaluation_batches(source, batch_size) for source in sources]
    return [
        Dataset(own, evaluate.labels(own), head, logits)
        for own, head in zip(batches, head_of, strict=True)
    ]


def recipe_of(config: Config, method: str, mode: str | None) -> train.TrainConfig:
    return train.TrainConfig(
        steps=config.steps,
        warmup_steps=config.steps // 10,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        linearized=method != "nonlinear",
        penalty=mode,
        penalty_coef=config.penalty_coef,
        penalty_batch_size=config.penalty_batch_size or max(config.batch_size // 8, 1),
        seed=config.seed,
    )


def batches_of(study: Study, recipe: train.TrainConfig) -> Sequence[dict]:
    return train.task_batches(
        study.sources,
        recipe,
        seeds=[train.seed_of(name, recipe.seed) for name in study.names],
        inputs=study.inputs,
        mesh=study.mesh,
    )


def fine_tune(study: Study, method: str, recipe: train.TrainConfig) -> list[Tree]:
    """Trains the task vectors of a method, all tasks at once, and saves them.

    With --resume those that a run has saved before are not trained again, and a run
    that was stopped goes on from its last checkpoint.
    """
    config = study.config
    folder = runs.vectors(config) / method
    files = [folder / f"{name}.safetensors" for name in study.names]
    if config.resume and all(file.exists() for file in files):
        tqdm.write(f"{method}: trained before, {folder}", file=sys.stderr)
        taus = [hub.load_tree(file)[0] for file in files]
        return [sharding.shard(tau, study.mesh) for tau in taus]
    checkpoints = runs.checkpoints(config) / method
    taus = train.fine_tune(
        study.apply_fn,
        study.params_0,
        study.loss,
        batches_of(study, recipe),
        recipe,
        names=study.names,
        constants=heads.pad([dataset.head for dataset in study.test]),
        inputs=study.inputs,
        log=config.out / f"train_{method}.jsonl",
        mesh=study.mesh,
        checkpoints=checkpoints if config.save_every else None,
        save_every=config.save_every,
    )
    held = sharding.to_host(taus)

    def save():
        folder.mkdir(parents=True, exist_ok=True)
        model = Path(str(config.model)).name  # of a folder only the last part
        for name, file, tau in zip(study.names, files, held, strict=True):
            metadata = {"model": model, "task": name, "method": method}
            hub.save_tree(file, tau, metadata)

    processes.on_first(save)
    runs.remove_checkpoints(config, checkpoints)
    return taus


class Outputs(NamedTuple):
    """Outputs of some task vectors on every validation and test set."""

    vectors: Sequence[Tree]
    validation: list[evaluate.OutputsAt]
    test: list[evaluate.OutputsAt]


def outputs_of(study: Study, method: str, vectors: Sequence[Tree]) -> Outputs:
    """Free to vary in coefficients for tangent-space methods, a pass each otherwise."""
    at = evaluate.forward if method == "nonlinear" else evaluate.tangent
    model = (study.apply_fn, study.params_0, vectors)
    return Outputs(
        vectors,
        *(
            [
                at(*model, dataset.batches, study.inputs, mesh=study.mesh)
                for dataset in split
            ]
            for split in (study.validation, study.test)
        ),
    )


def accuracies(datasets, outputs_at, coefs) -> list[float]:
    """Accuracy on every dataset at the same coefficients."""
    pairs = zip(datasets, outputs_at, strict=True)
    return [dataset.accuracy(at(coefs)) for dataset, at in pairs]


def single_accuracies(datasets, outputs_at) -> list[float]:
    """Accuracy of every task's own vector on its own dataset."""
    one_hot = np.eye(len(datasets))
    triples = zip(datasets, outputs_at, one_hot, strict=True)
    return [dataset.accuracy(at(coefs)) for dataset, at, coefs in triples]


def row(study, method, merge_name, coef, searched, found, single) -> dict:
    """One line of the report; nothing is normalised by an accuracy of zero."""
    normalized = metrics.normalized_accuracy(found, single) if all(single) else None
    return {
        "method": method,
        "merge": merge_name,
        "coef": float(coef),
        "searched": searched,
        "absolute": float(np.mean(found)),
        "normalized": normalized,
        "per_task": dict(zip(study.names, found, strict=True)),
    }


def merge_rows(study, method, merge_name, outputs: Outputs, single):
    """Rows at coefficient 1 and at the one chosen on validation data; the search."""
    ones = np.ones(len(outputs.vectors))
    # Every coefficient of a merge of ordinary vectors costs forward passes.
    stride = 5 if study.config.smoke else 1 if merge_name == "task_arithmetic" else 2
    search = evaluate.search(
        lambda c: accuracies(study.validation, outputs.validation, c * ones),
        single[0] if all(single[0]) else np.ones(len(single[0])),  # or absolute
        COEFS[::stride],
    )
    rows = [
        row(
            study,
            method,
            merge_name,
            coef,
            searched,
            accuracies(study.test, outputs.test, coef * ones),
            single[1],
        )
        for coef, searched in ((1.0, False), (search.coef, True))
    ]
    return rows, search


def evaluate_all(study: Study, taus: dict):
    """All rows of the table, the searches, and the outputs of every method."""
    individual, merged, searches, outputs = [], [], {}, {}
    for method, vectors in tqdm(taus.items(), desc="evaluate", unit="method"):
        found = outputs[method] = outputs_of(study, method, vectors)
        single = [
            single_accuracies(study.validation, found.validation),
            single_accuracies(study.test, found.test),
        ]

        def at(merge_name, coefs, outputs, row_single=single[1], method=method):
            accuracy = accuracies(study.test, outputs.test, coefs)
            coef = float(np.mean(coefs))
            return row(study, method, merge_name, coef, False, accuracy, row_single)

        searched = {"task_arithmetic": found}
        fitted = []
        own = row(study, f"individual_{method}", "none", 1, False, single[1], single[1])
        individual.append(own)
        if method == "nonlinear":
            zero_shot = at("none", np.zeros(len(vectors)), found, method="zero_shot")
            for name, vector in study_merges.merged_vectors(study, vectors).items():
                searched[name] = outputs_of(study, method, [vector])
            for name, vector in study_merges.fitted_vectors(study, vectors).items():
                fitted.append(at(name, np.ones(1), outputs_of(study, method, [vector])))
        if method == "linear" and "adamerging" in study.config.merges:
            fitted.append(
                at("adamerging", study_merges.adapted_coefs(study, found), found)
            )
        for name, merge_outputs in searched.items():
            rows, search = merge_rows(study, method, name, merge_outputs, single)
            merged += rows
            searches[f"{method}, {name.replace('_', ' ')}"] = search
        merged += fitted
    return [zero_shot, *individual, *merged], searches, outputs


def tau_jp_matrix(outputs: Outputs) -> np.ndarray:
    """τJp of every task vector on every test set, from the cached tangents.

    `tau_jp.matrix` measures the same without a cache.
    """
    count = len(outputs.vectors)
    return np.array(
        [
            [
                float(tau_jp.penalty(at(tau) - at(np.zeros(count))))
                for at in outputs.test
            ]
            for tau in np.eye(count)
        ]
    )


def worst_pair(matrix: np.ndarray) -> tuple[int, int]:
    """The two tasks whose vectors disturb each other the most (Eq. 9)."""
    both = np.triu(matrix + matrix.T, 1)
    first, second = np.unravel_index(both.argmax(), both.shape)
    return int(first), int(second)


def xi_grid(study: Study, outputs: Outputs, pair: tuple[int, int]) -> np.ndarray:
    """ξ of a pair of tasks on test data, the other vectors left out."""
    one_hot = np.eye(len(study.names))[list(pair)]
    return evaluate.disentanglement_error(
        [lambda c, at=outputs.test[i]: at(np.asarray(c) @ one_hot) for i in pair],
        [study.test[i].predict for i in pair],
        XI_COEFS,
    )


def figures(study: Study, rows, searches, outputs, matrices, cosines):
    """Draws everything into the output folder."""
    out, names = study.config.out, study.names
    pair = worst_pair(matrices["linear"])
    plots.disentanglement(
        out / "xi.png",
        {
            method: xi_grid(study, outputs[method], pair)
            for method in tqdm(matrices, desc="ξ grids", unit="grid")
        },
        XI_COEFS,
        (names[pair[0]], names[pair[1]]),
    )
    plots.matrices(
        out / "tau_jp.png",
        matrices,
        names,
        rows="task vector",
        columns="data",
        value="mean of ‖J(x)τ‖",
    )
    plots.matrices(
        out / "cosine.png",
        cosines,
        names,
        rows="task vector",
        columns="task vector",
        value="cosine",
    )
    plots.curves(
        out / "coefficients.png",
        {label: (s.coefs, s.normalized) for label, s in searches.items()},
        x="coefficient of every task vector",
        y="normalised accuracy (validation)",
    )
    shown = [r for r in rows if r["method"] == "zero_shot" or r["searched"]]
    plots.bars(
        out / "tasks.png",
        {
            f"{r['method']} {r['merge'].replace('none', '')}": list(
                r["per_task"].values()
            )
            for r in shown
        },
        names,
        y="test accuracy (searched coefficient)",
    )


def table(rows, names) -> str:
    """The rows as a Markdown table."""
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
    return report.markdown_table(header, cells)


def save_merged(study: Study, taus, coef: float):
    """Writes the sum of the ordinary vectors as a checkpoint for transformers."""
    edited = merge.task_arithmetic(study.params_0, taus, coef=coef)
    edited = sharding.to_host(edited)
    if not runs.is_first():
        return
    hub.save(
        study.config.out / "merged",
        tree.update(study.model.params, edited),
        study.merged_config,
        copy_from=study.model.folder,
    )


def save_heads(study: Study):
    """Writes the fixed heads, without which no task vector classifies anything."""
    hub.save_tree(
        study.config.out / "heads.safetensors",
        {
            name: np.asarray(dataset.head)
            for name, dataset in zip(study.names, study.test, strict=True)
        },
        {
            name: json.dumps(list(classes))
            for name, classes in zip(study.names, study.classes, strict=True)
        },
    )


def check(names: Sequence[str]):
    """Raises ValueError for tasks that no study can have."""
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"merging needs at least two tasks, each once; got {list(names)}."
        )
    if wrong := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ValueError(
            f"the task {wrong[0]!r} cannot be the name of a file; use letters, digits "
            "and - . _"
        )


def run(config: Config, prepare: Callable[[Config], Study], title: str) -> dict:
    """Everything after the options; returns what `report.json` holds.

    Args:
      config: the options.
      prepare: loads the model and the tasks; errors in the options are its to find,
        for nothing is written before it returns.
      title: of report.md.
    """
    mesh = runs.start(config)
    modes = {"nonlinear": None, "linear": None}
    modes |= {f"tau_jp_{mode}": mode for mode in config.modes}
    recipes = {method: recipe_of(config, method, m) for method, m in modes.items()}
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(stage):
        start = time.perf_counter()
        yield
        seconds[stage] = round(time.perf_counter() - start, 2)

    with timed("total"):
        with timed("prepare"):
            study = prepare(config)
            study = study._replace(params_0=sharding.shard(study.params_0, mesh))
            for recipe in recipes.values():
                batches_of(
                    study, recipe
                )  # a wrong mesh shows before the folder is made
        runs.claim(config)
        if runs.is_first():
            save_heads(study)
        taus = {}
        for method, recipe in recipes.items():
            recipe = dataclasses.replace(recipe, trained=study.trained)
            with timed(f"train_{method}"):
                taus[method] = fine_tune(study, method, recipe)
        with timed("evaluate"):
            rows, searches, outputs = evaluate_all(study, taus)
            matrices = {
                method: tau_jp_matrix(outputs[method])
                for method in taus
                if method != "nonlinear"
            }
            cosines = {
                method: np.asarray(task_vectors.cosine_matrix(vectors))
                for method, vectors in taus.items()
            }
        # Written before the figures, which no mistake in drawing should cost.
        results = {
            "tasks": study.names,
            "rows": rows,
            "tau_jp": {method: m.tolist() for method, m in matrices.items()},
            "cosine": {method: m.tolist() for method, m in cosines.items()},
            "seconds": seconds,
        }
        text = table(rows, study.names)
        chosen = searches["nonlinear, task arithmetic"].coef
        save_merged(study, taus["nonlinear"], chosen)
        if runs.is_first():
            report.write_json(config.out / "report.json", results)
            report.write_text(config.out / "report.md", f"# {title}\n\n{text}\n")
            with timed("figures"):
                figures(study, rows, searches, outputs, matrices, cosines)
    if runs.is_first():
        report.write_json(config.out / "report.json", results)  # now with all times
        print(f"\n{text}\n")
        print(", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items()))
        print(f"report, figures, task vectors and merged model: {config.out}")
    return results
