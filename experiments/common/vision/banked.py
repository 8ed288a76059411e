"""Task vectors for scripts that need only the vectors, for example for cosines."""

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
    """Options of scripts that can run without a model and data."""

    bank_only: bool = False
    """Read the vectors from the bank by the names of the tasks; load neither the model
    nor data sets. The data and the recipe in the bank's records are then not compared
    with the options of this run."""

    def __post_init__(self):
        super().__post_init__()
        if self.bank_only and self.plan:
            raise ValueError(
                "--bank-only trains nothing, so there is nothing to plan. Give either "
                "--bank-only or --plan."
            )


class Banked(NamedTuple):
    """The tasks of a model and their vectors.

    Attributes:
      title: name of the model in the papers.
      names: names of the tasks in the bank.
      titles: names of the tasks in the papers.
      vectors: function `vectors(method)`; returns them in the order of the tasks.
      setup: the model and the data; None with `--bank-only`.
    """

    title: str
    names: list[str]
    titles: list[str]
    vectors: Callable[[vectors.Method], list[Tree]]
    setup: setups.Setup | None


def load(config: Options, model: str, *, control: bool = False) -> Banked:
    """Loads the vectors of a model; trains missing ones unless `--bank-only`.

    Args:
      config: options of the script.
      model: a folder, or an id of the Hugging Face Hub.
      control: whether the script uses the control task.

    Raises:
      ValueError, FileNotFoundError: as in `setups.load`. With `--bank-only`,
        `vectors(method)` raises a ValueError if the bank lacks vectors, or if they
        belong to different pre-trained models.
    """
    if config.bank_only:
        return _by_name(config, model)
    return _trained(setups.load(config, model, control=control))


def each(
    config: Options, models: Sequence[str], *, control: bool = False
) -> Iterator[Banked]:
    """Calls `load` for each model in turn; a smoke run uses only the first."""
    if config.bank_only:
        yield from (_by_name(config, model) for model in models)
    else:
        yield from map(_trained, setups.each(config, models, control=control))


def cosines(taus: Sequence[Tree]) -> np.ndarray:
    """Returns the cosines of T task vectors, `f64[T, T]`."""
    return np.asarray(task_vectors.cosine_matrix(taus), float)


def note(config: Options) -> str:
    """Returns a note on `--bank-only` for the report; "" without that option."""
    return config.bank_only * (
        "The vectors were read from the bank by name; their data and their recipes "
        "were not compared."
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
    runs.claim(config)  # only now: a run with mistakes must write nothing
    return [hub.load_tree(file)[0] for file in files]
