r"""Proposition 1, measured: what the vectors of other tasks do to a task's inputs.

Jin et al. Fine-Tuning Attention Modules Only. ICLR 2025: section 3, Eq. 3.

    python -m experiments.linear_layers.proposition1 --data-dir DATA

The paper argues that linear layers are disentangled where
:math:`\sum_{t \neq i} \tau_t^\top x \to 0` for the inputs x of task i, and does not
measure it. Here it is measured, at every weight of attention's layers, with the inputs
that the pre-trained model gives them on 256 validation images of the task: the root
mean square of :math:`\sum_{t \neq i} \tau_t^\top x` over that of the task's own
:math:`\tau_i^\top x`, and over that of :math:`w^\top x`, what the layer gives before.

It is exact for the layers and not for the model: behind the first of them the inputs
change as well. A ratio above 1 says that the other tasks move a layer's outputs more
than the own task does, and so at coefficient 1 that the vectors are no orthogonal ones
to each other's data. Data: those of `table1_addition`, whose task vectors it takes from
the bank; of ordinary and of linearised training the same weights are looked at.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import fitted, options, planned, setups, vectors
from jaxarith import plots, sharding, tree
from jaxarith.merge import capture
from jaxarith.models import clip
from jaxarith.typing import Taus

METHODS: dict[str, vectors.Method] = {
    "Non-linear": "nonlinear",
    "NTK linearization": "linear",
    "Ours": "linear_layers_1",
}


class Config(options.Models): ...


def squares(
    grams: Mapping[str, jax.Array], kernels: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    r"""The mean of :math:`\|w^\top x\|^2` over a layer's inputs, by path.

    Args:
      grams: the mean of :math:`x x^\top`, `[in, in]` by the path of a kernel.
      kernels: w, `[in, out]`, by path.
    """
    return {path: _square(gram, kernels[path]) for path, gram in grams.items()}


@jax.jit
def _square(gram, kernel):
    return jnp.sum(kernel * jnp.matmul(gram, kernel, precision="highest"))


def inputs(setup: setups.Setup) -> list[dict[str, jax.Array]]:
    """For each task the Gram matrices of the inputs of attention's layers."""
    params_0 = sharding.to_host(setup.params_0)
    planned.passes(setup, fitted.SAMPLES * len(setup.tasks))
    progress = tqdm(fitted.validation_samples(setup), desc="inputs", unit="task")
    select = {"select": clip.ATTENTION_WEIGHTS}
    return [
        capture.input_grams(setup.apply_fn, params_0, batches, **select)
        for batches in progress
    ]


def ratios(
    grams: Sequence[Mapping[str, jax.Array]], kernels: Mapping, taus: Taus
) -> dict[str, np.ndarray]:
    """Root mean squares of the others' moves, `[T, layers]`.

    Args:
      grams: Gram matrices of the inputs of every task.
      kernels: the pre-trained kernels by path.
      taus: T task vectors.

    Returns:
      "own": over the task's own moves; "layer": over the layer's outputs before.
    """
    leaves = [tree.flatten(tau) for tau in taus]
    found: dict[str, list] = {"own": [], "layer": []}
    for i, gram in enumerate(grams):
        others = {
            path: tree.total(leaf[path] for t, leaf in enumerate(leaves) if t != i)
            for path in gram
        }
        moved = _values(squares(gram, others))
        own, before = (_values(squares(gram, w)) for w in (leaves[i], kernels))
        found["own"].append(np.sqrt(moved / own))
        found["layer"].append(np.sqrt(moved / before))
    return {name: np.array(rows) for name, rows in found.items()}


def _values(by_path):
    return np.array([float(value) for value in by_path.values()])


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows, matrices = [], []
    for setup in setups.each(config, config.models, control=False):
        if len(setup.tasks) < 2:
            raise ValueError("one task has no others; name at least two --tasks.")
        grams, panels = inputs(setup), {}
        kernels = sharding.to_host(tree.flatten(setup.params_0))
        for label, method in METHODS.items():
            taus = sharding.to_host(vectors.vectors(setup, method))
            found = ratios(grams, kernels, taus)
            panels[label] = found["own"].mean(axis=1)
            row: dict = {"model": setup.title, "method": label}
            row["others over own"] = float(found["own"].mean())
            row["others over the layer's outputs"] = float(found["layer"].mean())
            rows.append(row | setup.by_task(found["own"].mean(axis=1) / 100))
            layers = {name: values.tolist() for name, values in found.items()}
            named: dict = {"model": setup.title, "method": label}
            matrices.append(named | layers)
        if runs.is_first():
            file = config.out / f"proposition1_{setup.title}.png"
            label = "others' moves over the task's own"
            plots.bars(file, panels, setup.titles, y=label)
    caption = (
        "Root mean square of the moves of a layer's outputs by all other tasks over "
        "that by the task itself, mean over layers and, in the columns of tasks, by "
        "the task whose images enter."
    )
    results = {"rows": rows, "layers": [*grams[0]], "matrices": matrices}
    title = "Proposition 1, measured (linear-layers paper)"
    return tables.write(config.out, title, {caption: rows}, results, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
