"""Shared code of the τJp paper's language scripts: methods, recipe, rows.

Task vectors are ordinary (`nonlinear`), linearised (`linear`), or linearised with the
cyclic τJp penalty (`tau_jp_cyclic`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from experiments.common import runs
from jaxarith import merge, task_vectors, tau_jp, train
from jaxarith.typing import Params, Taus

METHODS = {
    "nonlinear": "Non-lin. FT",
    "linear": "Linear FT",
    "tau_jp_cyclic": "Ours",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(runs.Banked):
    """Options of these scripts."""

    coefficient: Literal["searched", "one"] = "searched"
    """Whether the coefficient of every row is searched, or is one (two tables of the
    paper)."""
    coefs: tuple[float, ...]
    """Candidate values of the coefficient."""
    batch_size: int = 16
    learning_rate: float = 1e-5
    """Learning rate, the same at every step."""
    penalty_coef: float
    """Weight λ of the τJp penalty."""
    penalty_power: tau_jp.Power = 1
    """Power of the norm in the penalty: 1, or 2 as in the paper. They need different
    λ."""
    penalty_norm: tau_jp.Norm = "l2"
    """The norm of the logits: Euclidean (l2), or the mean of their magnitudes."""
    penalty_start: int = 0
    """Number of steps before the penalty begins."""
    penalty_batch_size: int = 4
    """Number of penalty samples per step; by default a quarter of the default batch."""
    ties_density: float = 0.1
    """Share of the entries that TIES keeps."""
    seed: int = 0


def recipe(
    options: Options, method: str, *, steps: int, weight_decay: float = 0.0
) -> train.TrainConfig:
    """Returns the recipe of a method: a constant learning rate, and no clipping."""
    return train.TrainConfig(
        steps=steps,
        warmup_steps=0,
        decay="constant",
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=weight_decay,
        clip_norm=None,
        linearized=method != "nonlinear",
        penalty="cyclic" if method == "tau_jp_cyclic" else None,
        penalty_coef=options.penalty_coef,
        penalty_power=options.penalty_power,
        penalty_norm=options.penalty_norm,
        penalty_start=options.penalty_start,
        penalty_batch_size=options.penalty_batch_size,
        seed=options.seed,
    )


def merged(
    params_0: Params, taus: Mapping[str, Taus], density: float
) -> dict[str, tuple[str, Params]]:
    """Returns, for each row, the method of the edited model and the merged vector.

    The merged vector is the sum of the method's vectors. TIES merges the ordinary
    vectors; a single vector is only trimmed.
    """
    rows = {
        name: (method, task_vectors.add(taus[method]))
        for method, name in METHODS.items()
    }
    edited = merge.ties(params_0, taus["nonlinear"], density=density, coef=1.0)
    rows["TIES"] = "nonlinear", task_vectors.difference(edited, params_0)
    return {name: rows[name] for name in ("Non-lin. FT", "Linear FT", "TIES", "Ours")}
