"""What the scripts on T5 share: texts as tokens, task vectors, and answers.

A task vector is trained by the cross-entropy of the target's tokens and lies in the
bank under `editing`. Answers are ranked (Ilharco et al. 2023, Appendix D.7: the label
that the decoder finds least perplexing) or generated, by the largest logit each.

The learning rate falls in a straight line to zero, without warm-up. Weight decay 0.1
and clipping to norm 1 are this library's, for the paper does not say. T5's dropout is
off.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.common import bank, runs
from experiments.common.language import tiny_text
from jaxarith import fingerprint, hub, losses, sharding, task_vectors, train
from jaxarith.data import language, pipeline, text
from jaxarith.evaluate import rank
from jaxarith.models import generate, t5
from jaxarith.sharding import processes
from jaxarith.typing import Params, Tree

METHOD = "editing"  # the folder of the bank
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(runs.Options):
    """The options of all scripts on T5."""

    bank: Path = Path("bank")
    """Folder of task vectors, which all scripts share: what is there is not trained
    again."""
    max_length: int = 128
    """Tokens of a text; longer ones lose their end."""
    evaluation_batch: int = 32
    """Texts that are evaluated at a time."""
    smoke: bool = False
    """Run the whole path in seconds, with tiny models and made-up texts; what it finds
    means nothing."""


class Base(NamedTuple):
    """A T5 that is edited.

    Attributes:
      config: the options of the script.
      mesh: the devices.
      model: its folder or id.
      checkpoint: its parameters.
      tokenizer: its tokenizer.
      fingerprint: of its parameters.
    """

    config: Options
    mesh: Mesh
    model: str
    checkpoint: t5.T5
    tokenizer: Any
    fingerprint: int


def load(config: Options, mesh: Mesh, model: str) -> Base:
    """Loads a T5 with its tokenizer; in a smoke run a tiny one."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / model
        checkpoint = t5.load(tiny_text.write_t5(tiny) if config.smoke else model)
        tokenizer = text.load_tokenizer(checkpoint.folder)
    text.check_vocabulary(tokenizer, checkpoint.config.vocab_size)
    found = fingerprint.combined(checkpoint.params)
    return Base(config, mesh, model, checkpoint, tokenizer, found)


def external_vector(base: Base, model: str) -> Tree:
    """The task vector of a model that others have fine-tuned.

    Raises:
      ValueError: it is no T5, its files are broken, or its weights have other shapes
        or places than those of the base.
    """
    if (kind := hub.read_json(hub.find(model)).get("model_type")) != "t5":
        raise ValueError(f"{model} is a {kind!r}; expected a T5 as {base.model}.")
    try:
        return task_vectors.difference(t5.load(model).params, base.checkpoint.params)
    except ValueError as error:
        raise ValueError(
            f"{model} has no task vector with {base.model}; leave it out.\n{error}"
        ) from error


# Texts as tokens.


def training_source(base: Base, records: list[dict], target_length: int) -> list[dict]:
    """Records with a `text` and a `target` as tokens."""
    rows = language.text_to_text(
        base.tokenizer, records, base.config.max_length, target_length
    )
    return with_decoder_inputs(base, rows)


def with_decoder_inputs(base: Base, rows: list[dict]) -> list[dict]:
    """What the decoder reads: the labels, after its start token."""
    labels = np.stack([row["labels"] for row in rows])
    inputs = np.asarray(t5.shift_right(labels, base.checkpoint.config))
    return [
        {**row, "decoder_input_ids": ids} for row, ids in zip(rows, inputs, strict=True)
    ]


def batches(base: Base, records: list[dict]) -> list[dict]:
    """The texts of records as batches to evaluate on, with their `label` if any."""
    rows = language.text_to_text(
        base.tokenizer,
        [{**record, "target": ""} for record in records],
        *(base.config.max_length, 1),
    )
    return pipeline.evaluation_batches(rows, base.config.evaluation_batch)


# Training.


def file_of(base: Base, name: str) -> Path:
    return bank.vector_file(base.config.bank, base.model, METHOD, name)


def identity(base: Base, source: list[dict], recipe: train.TrainConfig) -> dict:
    """What a task vector in the bank must have been trained with."""
    return {
        "method": METHOD,
        "recipe": bank.plain_recipe(recipe),
        "params_0": base.fingerprint,
        "samples": bank.checksum(source),
    }


def banked(base: Base, name: str, source, recipe: train.TrainConfig) -> Tree | None:
    """The task vector if the bank has it; also checks that training could start."""
    training_batches(base, name, source, recipe)  # a wrong mesh shows here
    return bank.read(file_of(base, name), identity(base, source, recipe))


def training_batches(base: Base, name: str, source, recipe: train.TrainConfig):
    seeds = [train.seed_of(name, recipe.seed)]
    return train.task_batches(
        [source], recipe, seeds=seeds, inputs=INPUTS, mesh=base.mesh
    )


def vector(base: Base, name: str, source, recipe: train.TrainConfig) -> Tree:
    """A task vector, from the bank or trained."""
    config, found = base.config, banked(base, name, source, recipe)
    if found is not None:
        return found
    label = f"{name}_{Path(base.model).name}"
    checkpoints = runs.checkpoints(config) / label
    [tau] = train.fine_tune(
        t5.language_model(base.checkpoint.config),
        base.checkpoint.params,
        _loss,
        training_batches(base, name, source, recipe),
        recipe,
        names=[name],
        inputs=INPUTS,
        log=config.out / f"train_{label}.jsonl",
        mesh=base.mesh,
        checkpoints=checkpoints if config.save_every else None,
        save_every=config.save_every,
    )
    tau = sharding.to_host(tau)

    def save():
        bank.write(file_of(base, name), tau, identity(base, source, recipe), {})
        shutil.rmtree(checkpoints, ignore_errors=True)

    processes.on_first(save)
    return tau


def _loss(logits, batch, _):
    return losses.token_cross_entropy(logits, batch["labels"])


# Answers.


def ranked(base: Base, params: Params, found: list[dict], candidates) -> np.ndarray:
    """The number of the candidate that the decoder finds least perplexing, `i64[N]`."""
    return rank.label_losses(
        t5.language_model(base.checkpoint.config),
        params,
        found,
        candidates,
        start_token_id=base.checkpoint.config.decoder_start_token_id,
    ).argmin(axis=1)


def generated(
    base: Base, params: Params, found: list[dict], max_new_tokens: int
) -> list[str]:
    """The texts that the model writes, without sampling."""
    params, written = jax.device_put(params), []
    decoder = t5.decoder(base.checkpoint.config)
    for batch in found:
        new = generate.generate(
            decoder,
            params,
            *(batch["input_ids"], batch["attention_mask"]),
            max_new_tokens=max_new_tokens,
            eos_token_id=base.tokenizer.eos_token_id,
            pad_token_id=text.padding_id(base.tokenizer),
        )
        kept = np.asarray(new)[np.asarray(batch["mask"], bool)]
        written += base.tokenizer.batch_decode(kept, skip_special_tokens=True)
    return written
