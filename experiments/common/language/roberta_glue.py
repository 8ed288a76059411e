"""RoBERTa with a classification head on GLUE, for the AWD paper's language tables.

Xiong et al. Multi-Task Model Merging via Adaptive Weight Disentanglement.
arXiv:2411.18729: sections 7.3 and 8.3.

The paper uses models of Lu et al. (2024): 10 epochs with a batch of 64 at 1e-5. Models
are trained like that here. Neither paper states the rest; our choices are:

- All parameters are trained, with the embeddings and a new head, by AdamW without
  weight decay and warm-up, clipped to norm 1, with half a cosine. There is no dropout.
  All tasks start from the same random head with three outputs; a task uses as many as
  it has classes. STS-B is a regression by mean squared error.
- Encoders are merged. Every task keeps the head of its own model, also in the row of
  the pre-trained encoder.
- A score is the mean of GLUE's official metrics: Matthews correlation for CoLA, F1 and
  accuracy for MRPC and QQP, Pearson and Spearman correlation for STS-B, else accuracy.
- `--from` uses classifiers that others have fine-tuned, for example public ones of the
  Hub, instead of training. Their encoders and heads are used unchanged.
- GLUE's validation split (for MNLI the matched one) is the test part. A validation part
  of the same size is taken out of the training split.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.common import bank, external, planning, runs, script, training
from experiments.common.language import classifiers, planned, tiny_text
from jaxarith import (
    evaluate,
    fingerprint,
    hub,
    losses,
    sharding,
    task_vectors,
    tree,
)
from jaxarith.data import glue, pipeline, text
from jaxarith.models import bert
from jaxarith.typing import Params, Tree

TITLES = {  # in the order of the tables; GLUE's own folders have the same names
    **{"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B"},
    **{"qqp": "QQP", "qnli": "QNLI", "mnli": "MNLI", "rte": "RTE"},
}
MODELS = {
    "FacebookAI/roberta-base": "RoBERTa-Base",
    "FacebookAI/roberta-large": "RoBERTa-Large",
}
TINY = "tiny_roberta"
INPUTS = ("input_ids", "attention_mask")
METHOD = "classifier"  # the folder in the bank
ENCODER = r"(bert|roberta)/.*"
_OUTPUTS = 3  # of MNLI, which has the most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(runs.Banked, runs.Planned):
    """Options of scripts on RoBERTa with classification heads."""

    models: tuple[str, ...] = tuple(MODELS)
    """RoBERTas: folders, or ids of the Hugging Face Hub."""
    tasks: tuple[str, ...] = tuple(TITLES)
    """Tasks of GLUE, in order."""
    checkpoints: Annotated[tuple[str, ...], tyro.conf.arg(name="from")] = ()
    """Classifiers that others have fine-tuned, each TASK=CHECKPOINT with a folder or an
    id of the Hugging Face Hub. --models must name the one model that they started from.
    These tasks are not trained."""
    data_dir: Path | None = None
    """Folder of GLUE's own files, for example CoLA/train.tsv and CoLA/dev.tsv; by
    default the tasks come from the Hugging Face Hub."""
    epochs: int = 10
    steps: int | None = None
    """Number of optimizer steps, instead of --epochs."""
    batch_size: int = 64
    learning_rate: float = 1e-5
    max_length: int = 128
    """Number of tokens of a text; shorter texts are padded, longer ones are cut."""
    validation_samples: int | None = 2000
    """Largest number of validation samples of a task, which choose coefficients."""
    evaluation_batch: int = 64
    seed: int = 0


C = TypeVar("C", bound=Options)


def smoke(options: C, **small: Any) -> C:
    """Returns the options; in a smoke run with small values, and those of `small`."""
    common: dict[str, Any] = {"models": (TINY,), "tasks": ("mrpc", "stsb", "mnli")}
    common |= {"steps": 20, "batch_size": 8, "learning_rate": 1e-2}
    common |= {"max_length": 24, "evaluation_batch": 16}
    return runs.smaller(options, **common | small)


class Task(NamedTuple):
    """A task as tokens.

    Attributes:
      train: its training source.
      parts: batches for evaluation, by part: "validation" and "test".
    """

    train: list[dict]
    parts: dict[str, list[dict]]


class Setup(NamedTuple):
    """A RoBERTa and the tasks.

    Attributes:
      options: the options of the script.
      model: the model, as given by the options; names its folder in the bank.
      mesh: the devices.
      config: its configuration, with three outputs.
      apply_fn: `apply_fn(params, *INPUTS) -> outputs[B, 3]`.
      params_0: its parameters, with the head that all tasks start from.
      identity: fingerprint of `params_0`.
      tasks: the tasks, by name.
    """

    options: Options
    model: str
    mesh: Mesh
    config: bert.BertConfig
    apply_fn: Callable
    params_0: dict
    identity: int
    tasks: dict[str, Task]

    @property
    def title(self) -> str:
        """The paper's name of the model."""
        return MODELS.get(self.model, Path(self.model).name)


def setups(options: Options):
    """Yields every model in turn, with the tasks.

    Nothing is written before the first model is loaded and checked.

    Raises:
      ValueError: tasks are missing or malformed; the message lists all of them.
      FileNotFoundError: a model does not exist.
    """
    script.needs("text", "sklearn", "transformers")
    if not (options.smoke or options.data_dir):
        script.needs("text", "datasets")
    if unknown := [name for name in options.tasks if name not in TITLES]:
        raise ValueError(
            f"not tasks of GLUE: {', '.join(unknown)}; expected tasks out of "
            f"{', '.join(TITLES)}."
        )
    if len(set(options.tasks)) < max(len(options.tasks), 2):
        raise ValueError(
            "--tasks: expected at least two tasks, and each only once; got "
            f"{options.tasks}."
        )
    given = from_outside(options)
    mesh = runs.start(options)
    found = script.collected(
        options.tasks,
        lambda name: records(options, name),
        errors=script.OF_DATASETS,
        named=True,
    )
    parts = dict(zip(options.tasks, found, strict=True))
    for i, model in enumerate(options.models):
        setup = load(options, model, mesh, parts)
        added = {
            file_of(setup, name): outside(setup, name, checkpoint)
            for name, checkpoint in given.items()
        }
        for file, one in added.items():
            external.check_place(file, one)
        if i == 0:
            training.check(network(setup), wanted(setup))
            for other in () if options.smoke else options.models[1:]:
                hub.find(other)  # report a missing one before hours of training
            runs.claim(options)
        for file, one in added.items():
            external.add(file, one)
        yield setup


def from_outside(options: Options) -> dict[str, str]:
    """Returns the checkpoints of --from by task.

    Raises:
      ValueError: one is not TASK=CHECKPOINT, or --models has several models.
    """
    pairs = [spec.partition("=") for spec in options.checkpoints]
    for name, _, checkpoint in pairs:
        if name not in options.tasks or not checkpoint:
            raise ValueError(
                f"--from {name}: expected TASK=CHECKPOINT with one of the --tasks "
                f"{', '.join(options.tasks)}."
            )
    if pairs and len(options.models) > 1:
        raise ValueError(
            f"--from with {len(options.models)} --models; expected one: the model that "
            "all of these checkpoints started from."
        )
    return {name: checkpoint for name, _, checkpoint in pairs}


def outside(setup: Setup, name: str, checkpoint: str) -> external.External:
    """Returns the task vector of a classifier that others have fine-tuned."""
    return classifiers.load(
        checkpoint,
        glue.TASKS[name],
        setup.config,
        sharding.to_host(setup.params_0),
        method=METHOD,
        identity=setup.identity,
        encoder=ENCODER,
    )


def records(options: Options, name: str) -> text.TextTask:
    """Loads the texts and labels of a task, with a validation part."""
    task = glue.TASKS[name]
    if options.smoke:
        made = [tiny_text.glue_records(task, count, count) for count in (60, 16)]
    elif options.data_dir is None:
        made = [glue.load(task, split) for split in ("train", "validation")]
    else:
        dev = "dev_matched.tsv" if name == "mnli" else "dev.tsv"
        folder = options.data_dir / TITLES[name]
        made = [glue.read_tsv(task, folder / file) for file in ("train.tsv", dev)]
    return glue.protocol(task, *made, seed=options.seed)


def load(options: Options, model: str, mesh: Mesh, parts) -> Setup:
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_text.write_roberta(Path(folder) / TINY) if options.smoke else model
        checkpoint = bert.load(path, head=None)
        tokenizer = text.load_tokenizer(checkpoint.folder)
    text.check_vocabulary(tokenizer, checkpoint.config.vocab_size)
    config = dataclasses.replace(checkpoint.config, num_labels=_OUTPUTS)
    params_0 = with_head(config, checkpoint.params, options.seed)
    return Setup(
        options=options,
        model=model,
        mesh=mesh,
        config=config,
        apply_fn=bert.classifier(config),
        params_0=sharding.shard(params_0, mesh),
        identity=fingerprint.combined(params_0),
        tasks={
            name: tokens(options, tokenizer, own)
            for name, own in tqdm(
                parts.items(), desc="tokens", unit="task", leave=False
            )
        },
    )


def with_head(config: bert.BertConfig, params: dict, seed: int) -> dict:
    """Returns the parameters of a base with a new head; drops those it does not use."""
    init = jax.jit(bert.init, static_argnames=("config", "head"))
    fresh = init(jax.random.key(seed), config=config, head="classifier")
    base = tree.flatten(params)
    return tree.map_with_path(lambda path, leaf: base.get(path, leaf), fresh)


def tokens(options: Options, tokenizer, parts: text.TextTask) -> Task:
    def source(rows):
        found = text.encode(tokenizer, rows, options.max_length)
        # One dtype of labels for all tasks: they train in one program.
        return [{**row, "label": np.float32(row["label"])} for row in found]

    held_out = parts.validation[: options.validation_samples]
    batches = {
        part: pipeline.evaluation_batches(source(rows), options.evaluation_batch)
        for part, rows in (("validation", held_out), ("test", parts.test))
    }
    return Task(source(parts.train), batches)


# Training.


def loss(outputs, batch, constants) -> jax.Array:
    """Returns the cross-entropy over a task's classes; squared error for regression."""
    regression = constants["classes"] == 1
    valid = jnp.arange(_OUTPUTS) < constants["classes"]
    # A regression has no class; label 0 is its only output, with cross-entropy zero.
    labels = jnp.where(regression, 0, batch["label"].astype(jnp.int32))
    scores = jnp.where(valid, outputs, -jnp.inf)
    squared = jnp.mean((outputs[:, 0] - batch["label"]) ** 2)
    return jnp.where(regression, squared, losses.cross_entropy(scores, labels))


def outputs_of(name: str) -> int:
    """Returns the number of outputs that a task uses."""
    return len(glue.TASKS[name].classes) or 1


def stacked(counts: Sequence[int]) -> Tree:
    """Returns the constants of the loss, from the number of outputs of every task."""
    return {"classes": np.array(counts, np.int32)}


def network(setup: Setup) -> training.Network:
    """Returns the network that a task vector is trained from."""
    return training.Network(
        title=f"{setup.title}_{METHOD}",
        apply_fn=setup.apply_fn,
        params_0=setup.params_0,
        loss=loss,
        mesh=setup.mesh,
        inputs=INPUTS,
        stacked=stacked,
    )


def wanted(setup: Setup) -> list[training.Wanted]:
    """Describes the task vectors of all tasks."""
    return [
        training.Wanted(
            name=name,
            file=file_of(setup, name),
            recipe=training.recipe(setup.options, len(task.train)),
            identity={
                "method": METHOD,
                "samples": bank.checksum(task.train),
                "params_0": setup.identity,
            },
            source=task.train,
            head=outputs_of(name),
        )
        for name, task in setup.tasks.items()
    ]


def file_of(setup: Setup, name: str) -> Path:
    """Returns the path in the bank for the vector of a task."""
    return bank.vector_file(setup.options.bank, setup.model, METHOD, name)


def vectors(setup: Setup) -> dict[str, Tree]:
    """Returns task vectors by task, with heads; trains those that the bank lacks."""
    found = training.vectors(setup.options, network(setup), wanted(setup))
    return dict(zip(setup.tasks, found, strict=True))


# Plans.


class Texts(NamedTuple):
    """A RoBERTa and the numbers of texts in a plan.

    Attributes:
      full: the model.
      validation, test: number of texts in these parts of all tasks.
    """

    full: planning.Full
    validation: int
    test: int


def plan_vectors(record: planning.Recorder, options: Options) -> list[Texts]:
    """Reports to the plan the vectors of all models that --from does not name."""
    given = from_outside(options)
    parts = {name: planned.glue_parts(name) for name in options.tasks}
    most, found = options.validation_samples, []
    for model in options.models:
        full = planned.classifier(model, options.max_length, outputs=_OUTPUTS)
        wanted = [
            planned.wanted(
                name,
                bank.vector_file(options.bank, model, METHOD, name),
                training.recipe(options, samples),
                outputs_of(name),
            )
            for name, (samples, _) in parts.items()
            if name not in given
        ]
        planned.vectors(record, full, METHOD, loss, wanted, stacked=stacked)
        tests = [test for _, test in parts.values()]
        held = tests if most is None else [min(test, most) for test in tests]
        found.append(Texts(full, sum(held), sum(tests)))
    return found


# Scores.


def encoders(taus: dict[str, Tree]) -> list[Tree]:
    """Returns the parts of the task vectors that are merged."""
    return [tree.select(tau, ENCODER) for tau in taus.values()]


def scores_at(
    setup: Setup, taus: dict[str, Tree], added: Sequence[Tree], split: str
) -> Callable[[float], list[float]]:
    """Returns the scores on all tasks as a function of a coefficient.

    Args:
      setup: the model and the tasks.
      taus: the task vectors by task; their heads are used unchanged.
      added: for every task, the encoder vector that the coefficient scales.
      split: "validation" or "test".
    """
    outputs = []
    for (name, tau), vector in zip(taus.items(), added, strict=True):
        paths = tree.flatten(tau).keys() - encoder_paths(tau)
        own = task_vectors.apply(setup.params_0, tree.restrict(tau, paths))
        batches = setup.tasks[name].parts[split]
        outputs.append(
            evaluate.forward(
                setup.apply_fn, own, [vector], batches, INPUTS, mesh=setup.mesh
            )
        )

    def at(coef):
        return [
            score(name, at_coefs([coef]), setup.tasks[name].parts[split])
            for name, at_coefs in zip(taus, outputs, strict=True)
        ]

    return at


def encoder_paths(tau: Params) -> set[str]:
    return set(tree.flatten(tree.select(tau, ENCODER)))


def score(name: str, outputs: np.ndarray, batches: list[dict]) -> float:
    """Returns the mean of a task's official metrics for outputs `[N, 3]`."""
    labels = evaluate.labels(batches)
    count = outputs_of(name)
    if count == 1:
        return glue.score(glue.TASKS[name], outputs[:, 0], labels)
    predictions = outputs[:, :count].argmax(-1)
    return glue.score(glue.TASKS[name], predictions, labels.astype(int))
