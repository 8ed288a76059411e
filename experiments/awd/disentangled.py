"""Shared code of the scripts on images: vectors of linear weights, AWD, the search.

The AWD paper merges only the weights of the linear layers in the blocks, from vectors
of ordinary fine-tuning (`nonlinear` in the bank); so does AWD here. The coefficient λ
out of 0.3, 0.4, …, 1 and AWD's weight α out of 1e-2, 1e-3, …, 1e-6 are chosen by the
mean accuracy on validation data.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.awd import solving
from experiments.common import tables
from experiments.common.vision import options, scores, setups
from jaxarith import merge, task_vectors, tree
from jaxarith.models import clip
from jaxarith.typing import Numbers, Params, Taus, Tree

# In the order of the paper's tables.
_TASKS = "sun397 stanford_cars resisc45 eurosat svhn gtsrb mnist dtd"
TASKS: tuple[str, ...] = tuple(_TASKS.split())
COEFS = np.linspace(0.3, 1.0, 8)
ALPHAS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def linear_weights(taus: Taus) -> list[Tree]:
    """Returns the part of task vectors that AWD disentangles and merges."""
    return [tree.select(tau, clip.BLOCK_LINEAR_WEIGHTS) for tau in taus]


def alphas(config: options.Options) -> tuple[float, ...]:
    """Returns the candidates of α; two of them in a smoke run."""
    return ALPHAS[1:4:2] if config.smoke else ALPHAS


def coefs(config: options.Options) -> np.ndarray:
    """Returns the candidates of λ; two of them in a smoke run."""
    return COEFS[::7] if config.smoke else COEFS


def disentangled(
    params_0: Params,
    taus: Taus,
    how: solving.Options,
    *,
    alpha: float = 1e-4,
    objective: Literal["reduce", "reverse"] = "reduce",
) -> list[Tree]:
    """Returns the vectors τ_i - δ of the linear weights.

    Args:
      params_0: parameters of the model, or any tree with the vectors' structure.
      taus: whole task vectors, or their linear weights.
      how: options of the script.
      alpha: weight of the norm of δ.
      objective: "reduce" the cosines, or "reverse" (increase them).
    """
    parts = linear_weights(taus)
    given = {"alpha": alpha, "objective": objective}
    return apart(parts, solving.merged(params_0, parts, how, **given))


def apart(parts: Taus, merged: Tree) -> list[Tree]:
    """Returns the vectors τ_i - δ, from the τ_i and the sum of the τ_i - δ."""
    # The plain sum minus that sum is K δ.
    lacking = task_vectors.difference(task_vectors.add(parts), merged)
    return [task_vectors.apply(part, lacking, -1 / len(parts)) for part in parts]


def sums(setup: setups.Setup, taus: Taus, how: solving.Options) -> dict[str, Tree]:
    """Returns the sum of the disentangled vectors for every α."""
    parts = linear_weights(taus)
    progress = tqdm(alphas(setup.options), desc="AWD", unit="α")
    return {
        f"{alpha:g}": solving.merged(setup.params_0, parts, how, alpha=alpha)
        for alpha in progress
    }


def beside_sum(taus: Taus, vector: Tree, coef: float = 1.0) -> dict[str, float]:
    """Returns `solving.beside_sum` with the plain sum of the linear weights."""
    return solving.beside_sum(vector, task_vectors.add(linear_weights(taus)), coef)


def ties(setup: setups.Setup, taus: Taus) -> Tree:
    """Returns the vector of TIES at λ = 1; it sums the entries of the elected sign.

    AdaMerging and FusionBench sum them too, at λ = 0.3. The authors of TIES take the
    mean, and search λ from 0.8 to 2.5. The AWD paper searches λ up to 1, and does not
    say which form it uses.
    """
    model = merge.ties(setup.params_0, taus, preset="adamerging", coef=1.0)
    return task_vectors.difference(model, setup.params_0)


class Chosen(NamedTuple):
    """The candidate and the coefficient that validation data have chosen.

    Attributes:
      name: name of the candidate.
      coef: coefficient λ.
      validation: mean validation accuracy at λ.
      test: test accuracies at λ, `[T]`.
    """

    name: str
    coef: float
    validation: float
    test: np.ndarray


def searched(
    setup: setups.Setup,
    candidates: Mapping[str, Tree],
    coefs: Numbers,
    *,
    linearized: bool = False,
) -> Chosen:
    """Finds the candidate and the coefficient with the best mean validation accuracy.

    If several are equal, the first candidate with its smallest coefficient wins.

    Args:
      setup: the model and the tasks.
      candidates: merged vectors at λ = 1, by name.
      coefs: the candidate values of λ.
      linearized: whether the vectors belong to the tangent-space model.
    """
    vectors = list(candidates.values())
    units = np.eye(len(vectors))
    rows = np.concatenate([np.outer(coefs, unit) for unit in units])
    measured = functools.partial(scores.on_all, setup, linearized=linearized)
    curves = measured(vectors, "validation", rows).mean(axis=1)
    best = int(np.argmax(curves))
    index, coef = best // len(coefs), float(coefs[best % len(coefs)])
    test = measured(vectors[index : index + 1], "test", [[coef]])[0]
    return Chosen(list(candidates)[index], coef, float(curves[best]), test)


def mean_cosine(taus: Taus) -> float:
    """Returns the mean |cosine| of different vectors (AWD paper, Eq. 11)."""
    cosines = np.abs(task_vectors.cosine_matrix(taus))
    return float(jnp.mean(cosines[~np.eye(len(taus), dtype=bool)]))


def shown(
    setup: setups.Setup,
    rows: Sequence[Mapping[str, Any]],
    published: Mapping[str, Mapping[Any, Sequence[float | None]]],
    keys: Sequence[str],
) -> dict[str, str]:
    """Returns the table of a model: tasks and mean, beside the published values.

    Args:
      setup: the model and the tasks.
      rows: rows of the model.
      published: by model and row, a value for each of `TASKS`, then the mean. The mean
        is shown only if the tasks are the paper's.
      keys: the fields that name a row.
    """
    same = sorted(setup.names) == sorted(TASKS) or setup.options.smoke
    found = {}
    for row, (*values, mean) in published.get(setup.title, {}).items():
        by_task = dict(zip(TASKS, values, strict=True))
        own = [by_task.get(name) for name in setup.names]
        found[row] = [*own, mean if same else None]
    values = [*setup.names, "mean"]
    beside = tables.beside(rows, found, keys=keys, values=values)
    return {f"{setup.title}: test accuracy, percent.": tables.markdown(beside)}
