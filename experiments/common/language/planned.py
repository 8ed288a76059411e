"""Reports models, vectors and forward passes of scripts on texts to a plan.

A script on texts does not run on stand-ins. It has a function `plan(config, record)`,
which reports what `main` would train and evaluate. It knows the number of samples of
the papers' tasks.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.common import planning, training
from experiments.common.language import architectures
from jaxarith import train
from jaxarith.models import bert, gpt2, t5
from jaxarith.typing import LossFn, Tree

# Samples of GLUE's training and validation splits on the Hugging Face Hub; for MNLI the
# matched validation split.
GLUE = {
    **{"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408)},
    **{"stsb": (5749, 1500), "qqp": (363846, 40430), "qnli": (104743, 5463)},
    **{"mnli": (392702, 9815), "rte": (2490, 277)},
}
# Tokens that a plan counts for an answer of T5 (a word or two).
ANSWER = 8
ANSWERS = f"An answer counts as {ANSWER} tokens."
TEXT_INPUTS = ("input_ids", "attention_mask")
T5_INPUTS = (*TEXT_INPUTS, "decoder_input_ids")


def glue_parts(name: str) -> tuple[int, int]:
    """Returns the samples of a task's training part, and of each of its other parts.

    Example:
      >>> glue_parts("rte")  # 277 of the 2490 training samples are held out
      (2213, 277)
    """
    found, test = GLUE[name]
    return found - test, test


def tokens(*shape: int) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of the tokens of a sample."""
    return jax.ShapeDtypeStruct(shape, np.int32)


def _texts(length, **more):
    return dict.fromkeys(TEXT_INPUTS, tokens(length)) | more


def t5_model(
    model: str, length: int, answers: Sequence[int], *, mask: str | None = None
) -> planning.Full:
    """Returns a T5 that reads a text and one or several targets.

    Args:
      model: a folder, or one of `architectures.SIZES`.
      length: number of tokens of a text.
      answers: shape of the decoder's input: number of tokens of the target, or number
        of answers and of their tokens.
      mask: field of a sample that marks the positions of a penalty.
    """
    config = architectures.t5_of(model)
    apply_fn, target = t5.language_model(config), tokens(*answers)
    fields = {"decoder_input_ids": target, "labels": target}
    fields |= {mask: target} if mask else {}
    read = " x ".join(map(str, answers))
    title = f"{Path(model).name}, {length} + {read} tokens"
    sample, layout = _texts(length, **fields), t5.layout(config)
    return planning.Full(title, apply_fn, apply_fn, layout, sample, T5_INPUTS, mask)


def gpt2_model(model: str, length: int) -> planning.Full:
    """Returns a GPT-2 that reads texts of `length` tokens."""
    config = architectures.gpt2_of(model)
    apply_fn, mask = gpt2.language_model(config), "attention_mask"
    title = f"{Path(model).name}, {length} tokens"
    sample, layout = _texts(length, labels=tokens(length)), gpt2.layout(config)
    return planning.Full(title, apply_fn, apply_fn, layout, sample, TEXT_INPUTS, mask)


def classifier(model: str, length: int, *, outputs: int | None = None) -> planning.Full:
    """Returns a BERT or RoBERTa with a classification head, by default its own."""
    config = architectures.bert_of(model, outputs)
    apply_fn = bert.classifier(config)
    title = f"{Path(model).name}, {length} tokens"
    # The label is a float, as in `roberta_glue.tokens`: it may be a score.
    sample = _texts(length, label=jax.ShapeDtypeStruct((), np.float32))
    layout = bert.layout(config, "classifier")
    return planning.Full(title, apply_fn, apply_fn, layout, sample, TEXT_INPUTS)


def wanted(
    name: str, file: Path, recipe: train.TrainConfig, head: object = None
) -> training.Wanted:
    """Describes a vector for a plan."""
    return training.Wanted(name, file, recipe, identity={}, source=(), head=head)


def vectors(
    record: planning.Recorder,
    full: planning.Full,
    method: str,
    loss: LossFn,
    found: Sequence[training.Wanted],
    *,
    stacked: Callable[[list], Tree] | None = None,
    together: int | None = None,
):
    """Reports the vectors that the bank lacks to the plan.

    Args:
      record: the plan.
      full: the model that is trained.
      method: name of the method in the plan.
      loss, stacked: as in `training.Network`.
      found: the vectors, see `wanted`.
      together: largest number that train side by side; by default all that can.
    """
    new = record.missing(full, method, [one.file for one in found])
    missing = [one for one, is_new in zip(found, new, strict=True) if is_new]
    for group in training.alike(missing, together):
        names = tuple(one.name for one in group)
        constants = stacked and stacked([one.head for one in group])
        record.train(
            planning.Training(full, method, names, group[0].recipe, loss, constants)
        )
