"""Shared code of the scripts on T5: texts as tokens, task vectors, and answers.

A task vector is trained by the cross-entropy of the target's tokens. Its folder in the
bank is `editing`. Answers are either ranked or generated. Ranking chooses the label
with the lowest perplexity under the decoder (editing paper, Appendix D.7). Generation
takes the token with the largest logit.

The learning rate falls linearly to zero, without warm-up. The paper states neither
weight decay nor clipping; this library's 0.1 and norm 1 are used. T5's dropout is off.
"""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.common import bank, runs, training
from experiments.common.language import tiny_text
from jaxarith import fingerprint, hub, losses, task_vectors, train
from jaxarith.data import glue, language, pipeline, text
from jaxarith.evaluate import rank
from jaxarith.models import generate, t5
from jaxarith.typing import ApplyFn, Params, Tree

METHOD = "editing"  # the folder of the bank
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(runs.Banked, runs.Planned):
    """Options of all scripts on T5."""

    max_length: int = 128
    """Largest number of tokens of a text; longer texts are cut."""
    evaluation_batch: int = 32
    """Number of texts in a batch of an evaluation."""


class Base(NamedTuple):
    """A T5 that is edited.

    Attributes:
      config: the options of the script.
      mesh: the devices.
      model: its folder or id.
      checkpoint: its parameters.
      tokenizer: its tokenizer.
      fingerprint: fingerprint of its parameters.
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
    """Returns the task vector of a model that others have fine-tuned.

    Raises:
      ValueError: the model is not a T5, its files are broken, or its weights have other
        names or shapes than those of the base.
    """
    if (kind := hub.read_json(hub.find(model)).get("model_type")) != "t5":
        raise ValueError(
            f"{model} is a {kind!r}; expected a T5 with the architecture of "
            f"{base.model}."
        )
    try:
        return task_vectors.difference(t5.load(model).params, base.checkpoint.params)
    except ValueError as error:
        raise ValueError(
            f"{model} does not match {base.model}, so it has no task vector; leave it "
            f"out.\n{error}"
        ) from error


# Texts as tokens.


def glue_task(config: Options, name: str, seed: int) -> text.TextTask:
    """Loads the texts and labels of a task of GLUE; a smoke run makes them up."""
    task = glue.TASKS[name]
    if config.smoke:
        parts = [tiny_text.glue_records(task, count, count) for count in (40, 12)]
    else:
        parts = [glue.load(task, split) for split in ("train", "validation")]
    return glue.protocol(task, *parts, seed=seed)


def recipe(config: Any, samples: int, **changes: Any) -> train.TrainConfig:
    """Returns the recipe of the editing paper.

    Args:
      config: options with epochs and a batch size.
      samples: number of training samples.
      changes: the learning rate, the seed, and other fields that differ.
    """
    return train.TrainConfig(
        steps=max(math.ceil(config.epochs * samples / config.batch_size), 1),
        warmup_steps=0,
        decay="linear",
        batch_size=config.batch_size,
        **changes,
    )


def training_source(base: Base, records: list[dict], target_length: int) -> list[dict]:
    """Returns records with a `text` and a `target` as tokens."""
    rows = language.text_to_text(
        base.tokenizer, records, base.config.max_length, target_length
    )
    return with_decoder_inputs(base, rows)


def with_decoder_inputs(base: Base, rows: list[dict]) -> list[dict]:
    """Adds the decoder's input to each row: its start token, then the labels."""
    labels = np.stack([row["labels"] for row in rows])
    inputs = np.asarray(t5.shift_right(labels, base.checkpoint.config))
    return [
        {**row, "decoder_input_ids": ids} for row, ids in zip(rows, inputs, strict=True)
    ]


def batches(base: Base, records: list[dict]) -> list[dict]:
    """Returns the texts of records as evaluation batches, with their `label` if any."""
    rows = language.text_to_text(
        base.tokenizer,
        [{**record, "target": ""} for record in records],
        base.config.max_length,
        1,
    )
    return pipeline.evaluation_batches(rows, base.config.evaluation_batch)


# Training.


def network(base: Base) -> training.Network:
    """Returns the network that a task vector is trained from."""
    return training.Network(
        title=f"{Path(base.model).name}_{METHOD}",
        apply_fn=t5.language_model(base.checkpoint.config),
        params_0=base.checkpoint.params,
        loss=loss,
        mesh=base.mesh,
        inputs=INPUTS,
    )


def wanted(
    base: Base, name: str, source: list[dict], recipe: train.TrainConfig
) -> training.Wanted:
    """Describes a task vector in the bank's folder `editing`."""
    return training.Wanted(
        name=name,
        file=bank.vector_file(base.config.bank, base.model, METHOD, name),
        recipe=recipe,
        identity={
            "method": METHOD,
            "params_0": base.fingerprint,
            "samples": bank.checksum(source),
        },
        source=source,
    )


def loss(logits, batch, constants) -> jax.Array:
    """Returns the cross-entropy of the target's tokens."""
    del constants
    return losses.token_cross_entropy(logits, batch["labels"])


# Answers.


def ranked(
    base: Base,
    params: Params,
    found: list[dict],
    candidates: np.ndarray,
    apply_fn: ApplyFn | None = None,
) -> np.ndarray:
    """Returns the index of the candidate with the lowest perplexity, `i64[N]`.

    Args:
      base: the T5.
      params: parameters of `apply_fn`.
      found: texts from `batches`.
      candidates: the possible answers as tokens, `[C, T]`.
      apply_fn: the model of the parameters; by default the T5.
    """
    return rank.label_losses(
        apply_fn or t5.language_model(base.checkpoint.config),
        params,
        found,
        candidates,
        start_token_id=base.checkpoint.config.decoder_start_token_id,
        mesh=base.mesh,
    ).argmin(axis=1)


def generated(
    base: Base, params: Params, found: list[dict], max_new_tokens: int
) -> list[str]:
    """Returns the texts that the model writes, without sampling."""
    params, written = jax.device_put(params), []
    decoder = t5.decoder(base.checkpoint.config)
    for batch in found:
        new = generate.generate(
            decoder,
            params,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=base.tokenizer.eos_token_id,
            pad_token_id=text.padding_id(base.tokenizer),
        )
        kept = np.asarray(new)[np.asarray(batch["mask"], bool)]
        written += base.tokenizer.batch_decode(kept, skip_special_tokens=True)
    return written
