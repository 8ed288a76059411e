"""Plans of the scripts on prompted RoBERTa, see `prompted`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.common import bank, planning, training
from experiments.common.language import architectures, planned, prompted
from jaxarith.data import prompt_sources
from jaxarith.models import bert, heads

# Test samples of GLUE's tasks and of the other tasks of He et al. (2024). LM-BFF made
# the four sets of 2000. SNLI counts only samples with a label.
_TESTED = {
    **{"CR": 2000, "MR": 2000, "MPQA": 2000, "SUBJ": 2000, "TREC": 500, "SNLI": 9824},
    **{"SST2": 872, "CoLA": 1043, "MRPC": 408, "QQP": 40430, "QNLI": 5463},
    **{"MNLI": 9815, "RTE": 277},
}
_MASK = 50264  # RoBERTa's mask token; it changes no number of the plan


class Sizes(NamedTuple):
    """The encoder and the sizes of the tasks in a plan.

    Attributes:
      full: the encoder.
      training: samples of all training parts; the validation parts have as many.
      tests: samples of all test parts of known size.
    """

    full: planning.Full
    training: int
    tests: int


def encoder(options: prompted.Options) -> tuple[planning.Full, int]:
    """Returns the encoder for the kind of head, and the width of its features."""
    config = architectures.bert_of(options.model)
    words = options.head == "label-word"
    apply_fn = bert.mask_encoder(config, _MASK) if words else bert.mean_encoder(config)
    ids = planned.tokens(options.max_length)
    sample = dict.fromkeys(prompted.INPUTS, ids)
    full = planning.Full(
        f"{Path(options.model).name}, {options.max_length} tokens",
        apply_fn,
        apply_fn,
        bert.layout(config, "masked_lm" if words else None),
        sample | {"label": jax.ShapeDtypeStruct((), np.int32)},
        prompted.INPUTS,
    )
    return full, config.hidden_size


def vectors(
    record: planning.Recorder, options: prompted.Options, *, again: Sequence[str] = ()
) -> Sizes:
    """Reports the vectors of all tasks to the plan.

    Args:
      record: the plan.
      options: the options of the script.
      again: tasks that are also trained with another prompt.

    Raises:
      ValueError: a task is a file; a plan knows only the tasks of the list.
    """
    known, method = prompt_sources.sources(), prompted.METHODS[options.head]
    if unknown := [name for name in options.tasks if name not in known]:
        raise ValueError(
            f"--plan knows only the tasks of the paper's list, not "
            f"{', '.join(unknown)}. Leave these out, or run without --plan."
        )
    full, width = encoder(options)
    wanted, samples = [], 0
    for name in (*options.tasks, *(f"{name}Adv" for name in again)):
        source = known[name if name in known else name.removesuffix("Adv")]
        classes = len(set(source.classes.values()))
        own = training.recipe(
            options, options.shots * classes, decay="linear", trained=bert.BLOCKS
        )
        file = bank.vector_file(
            options.bank, options.model, method, name.replace("/", "-")
        )
        head = np.zeros((classes, width + 1), np.float32)
        wanted.append(planned.wanted(name, file, own, head))
        samples += options.shots * classes
    planned.vectors(
        record,
        full,
        method,
        prompted.loss,
        wanted,
        stacked=heads.pad,
        together=options.tasks_together,
    )
    record.note(
        f"Every text counts as {options.max_length} tokens, --max-length. That is an "
        "upper bound: a real run pads to the longest text of a task."
    )
    return Sizes(full, samples, _tests(record, options))


def _tests(record, options) -> int:
    """Returns the number of test samples of all tasks."""
    missing = [name for name in options.tasks if name not in _TESTED]
    if missing and options.samples is None:
        record.note(
            f"The test parts of {len(missing)} of {len(options.tasks)} tasks have "
            "unknown sizes and are not counted. With --samples they are."
        )
    most = options.samples
    found = [_TESTED.get(name, most or 0) for name in options.tasks]
    return sum(found if most is None else (min(count, most) for count in found))
