"""The task vectors of scripts that look at nothing else, such as their cosines."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.common import bank, runs
from experiments.common.vision import options, raw_tasks, setups, vectors
from jaxarith import hub, task_vectors
from jaxarith.typing import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """The options of scripts that can do without models and data."""

    bank_only: bool = False
    """Take the vectors from the bank by the names of the tasks, and load neither the
    model nor data sets. Data and recipe are then those that the bank's records name;
    they are not compared with the options of this run."""

    def __post_init__(self):
        super().__post_init__()
        if self.bank_only and self.plan:
            raise ValueError("--bank-only trains nothing, so there is no --plan of it.")


class Banked(NamedTuple):
    """The tasks of a model and their vectors.

    Attributes:
      title: what the papers call the model.
      names: names of the tasks in the bank.
      titles: what the papers call the tasks.
      vectors: `vectors(method)`, in the order of the tasks.
      setup: the model and the data; None with `--bank-only`.
    """

    title: str
    names: list[str]
    titles: list[str]
    vectors: Callable[[vectors.Method], list[Tree]]
    setup: setups.Setup | None


def load(config: Options, model: str, *, control: bool = False) -> Banked:
    """The vectors of a model; what the bank lacks is trained unless `--bank-only`.

    Args:
      config: options of the script.
      model: a folder, or an id of the Hugging Face Hub.
      control: whether the script has a use for the control task.

    Raises:
      ValueError, FileNotFoundError: as `setups.load`; or, when the vectors are asked
        for, the bank lacks some, or they belong to different pre-trained models.
    """
    if config.bank_only:
        return _by_name(config, model)
    return _trained(setups.load(config, model, control=control))


def each(
    config: Options, models: Sequence[str], *, control: bool = False
) -> Iterator[Banked]:
    """`load` for each model in turn; of a smoke run the first."""
    if config.bank_only:
        yield from (_by_name(config, model) for model in models)
    else:
        yield from map(_trained, setups.each(config, models, control=control))


def cosines(taus: Sequence[Tree]) -> np.ndarray:
    """The cosines `[T, T]` in float64."""
    return np.asarray(task_vectors.cosine_matrix(taus), float)


def note(config: Options) -> str:
    """What a report says of where its vectors are from; "" where data were compared."""
    return config.bank_only * (
        "The vectors were taken from the bank by name; the data and the recipes they "
        "were trained with were not compared."
    )


def _trained(setup):
    of_method = functools.partial(vectors.vectors, setup)
    return Banked(setup.title, setup.names, setup.titles, of_method, setup)


def _by_name(config, model):
    names = [raw_tasks.name_of(spec) for spec in config.tasks]
    titles = [raw_tasks.title_of(name) for name in names]
    read = functools.partial(_read, config, model, names)
    return Banked(options.title_of(model), names, titles, read, None)


def _read(config, model, names, method):
    files = [bank.vector_file(config.bank, model, method, name) for name in names]
    if missing := [str(file) for file in files if not file.exists()]:
        raise ValueError(
            f"--bank-only: the bank lacks {', '.join(missing)}. Train them without "
            "--bank-only or by experiments.finetune, or name other --tasks."
        )
    origins = {str(bank.record(f)["configuration"].get("params_0")) for f in files}
    if len(origins) > 1:
        raise ValueError(
            f"the vectors of {files[0].parent} start from {len(origins)} different "
            "pre-trained models, by the fingerprints in their records. Cosines between "
            "them mean nothing; train them from one model."
        )
    runs.claim(config)  # nothing is written before all mistakes are found
    return [hub.load_tree(file)[0] for file in files]
