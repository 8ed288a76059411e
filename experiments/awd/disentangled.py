"""What the scripts on images share: vectors of linear weights, AWD, and the search.

The paper merges the weights of the linear layers in the blocks and nothing else, from
vectors of ordinary fine-tuning (`nonlinear` in the bank); so it is here for AWD. One
coefficient λ of 0.3, 0.4, …, 1 is chosen by the mean accuracy on validation data, and
so is the weight α of AWD of 1e-2, 1e-3, …, 1e-6.
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
    """The part of task vectors that AWD disentangles and merges."""
    return [tree.select(tau, clip.BLOCK_LINEAR_WEIGHTS) for tau in taus]


def alphas(config: options.Options) -> tuple[float, ...]:
    """The candidates of α; of a smoke run two."""
    return ALPHAS[1:4:2] if config.smoke else ALPHAS


def coefs(config: options.Options) -> np.ndarray:
    """The candidates of λ; of a smoke run two."""
    return COEFS[::7] if config.smoke else COEFS


def disentangled(
    params_0: Params,
    taus: Taus,
    how: solving.Options,
    *,
    alpha: float = 1e-4,
    objective: Literal["reduce", "reverse"] = "reduce",
) -> list[Tree]:
    """The vectors τ_i - δ of the linear weights.

    Args:
      params_0: parameters of the model, or any tree of the vectors' form.
      taus: whole task vectors, or their linear weights.
      how: options of the script.
      alpha: the weight of the norm of δ.
      objective: "reduce" the cosines, or "reverse".
    """
    parts = linear_weights(taus)
    given = {"alpha": alpha, "objective": objective}
    return apart(parts, solving.merged(params_0, parts, how, **given))


def apart(parts: Taus, merged: Tree) -> list[Tree]:
    """The vectors τ_i - δ, from the τ_i and the sum of the τ_i - δ."""
    # K δ is what that sum lacks of the plain one.
    lacking = task_vectors.difference(task_vectors.add(parts), merged)
    return [task_vectors.apply(part, lacking, -1 / len(parts)) for part in parts]


def sums(setup: setups.Setup, taus: Taus, how: solving.Options) -> dict[str, Tree]:
    """By α, one after the other, the sum of the disentangled vectors."""
    parts = linear_weights(taus)
    progress = tqdm(alphas(setup.options), desc="AWD", unit="α")
    return {
        f"{alpha:g}": solving.merged(setup.params_0, parts, how, alpha=alpha)
        for alpha in progress
    }


def beside_sum(taus: Taus, vector: Tree, coef: float = 1.0) -> dict[str, float]:
    """`solving.beside_sum`, with the plain sum of the linear weights."""
    return solving.beside_sum(vector, task_vectors.add(linear_weights(taus)), coef)


def ties(setup: setups.Setup, taus: Taus) -> Tree:
    """The vector of TIES at λ = 1, with the sum of the entries of the elected sign.

    So AdaMerging and FusionBench have it, at λ = 0.3; the authors of TIES take the mean
    and search λ from 0.8 to 2.5. The paper, which searches up to 1, does not say which.
    """
    model = merge.ties(setup.params_0, taus, preset="adamerging", coef=1.0)
    return task_vectors.difference(model, setup.params_0)


class Chosen(NamedTuple):
    """A merged vector at the coefficient that validation data have chosen.

    Attributes:
      name: which of the candidates it is.
      coef: λ.
      validation: mean accuracy there.
      test: accuracies on test data, `[T]`.
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
    """The candidate and the coefficient with the best mean validation accuracy.

    Args:
      setup: the model and the tasks.
      candidates: merged vectors at λ = 1 by name; of equals the first is taken, at the
        smallest coefficient.
      coefs: the candidates of λ.
      linearized: whether they belong to the tangent-space model.
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
    """The mean magnitude of the cosines of different vectors: Eq. 11."""
    cosines = np.abs(task_vectors.cosine_matrix(taus))
    return float(jnp.mean(cosines[~np.eye(len(taus), dtype=bool)]))


def shown(
    setup: setups.Setup,
    rows: Sequence[Mapping[str, Any]],
    published: Mapping[str, Mapping[Any, Sequence[float | None]]],
    keys: Sequence[str],
) -> dict[str, str]:
    """The table of a model: the tasks and the mean, with what the paper prints.

    Args:
      setup: the model and the tasks.
      rows: rows of the model.
      published: by model and row, a value of each of `TASKS`, and the mean, which is
        shown beside ours where the tasks are the same.
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
