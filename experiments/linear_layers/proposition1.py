r"""Proposition 1, measured: how other tasks' vectors change a task's layer outputs.

Jin et al. Fine-Tuning Attention Modules Only. ICLR 2025: section 3, Eq. 3.

    python -m experiments.linear_layers.proposition1 --data-dir DATA

The paper argues that linear layers are disentangled if
:math:`\sum_{t \neq i} \tau_t^\top x \to 0` for the inputs x of task i, and does not
measure it. This script measures it at every weight of attention's layers, with the
layers' inputs in the pre-trained model for 256 validation images of the task. It
divides the root mean square of :math:`\sum_{t \neq i} \tau_t^\top x` by that of the
task's own :math:`\tau_i^\top x`, and by that of the layer's pre-trained outputs
:math:`w^\top x`.

The result is exact for single layers, not for the model: after the first layer the
inputs change too. A ratio above 1 means that, at coefficient 1, the other tasks change
the outputs of a layer more than the own task does; so the vectors are not orthogonal to
each other's data.

Data: the same as for `table1_addition`. Its task vectors in the bank are used. For
ordinary and linearised training the same weights are measured.
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
    r"""Returns the mean of :math:`\|w^\top x\|^2` over a layer's inputs, by path.

    Args:
      grams: mean of :math:`x x^\top`, `[in, in]`, by the path of a kernel.
      kernels: kernels w, `[in, out]`, by path.
    """
    return {path: _square(gram, kernels[path]) for path, gram in grams.items()}


@jax.jit
def _square(gram, kernel):
    return jnp.sum(kernel * jnp.matmul(gram, kernel, precision="highest"))


def inputs(setup: setups.Setup) -> list[dict[str, jax.Array]]:
    """Returns for each task the Gram matrices of the inputs of attention's layers."""
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
    """Returns ratios of root mean squares, `[T, layers]`.

    The numerator is the change of a layer's outputs by all other tasks.

    Args:
      grams: Gram matrices of the inputs of every task.
      kernels: the pre-trained kernels by path.
      taus: T task vectors.

    Returns:
      "own": ratio to the change by the task itself. "layer": ratio to the pre-trained
      outputs of the layer.
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
            raise ValueError(
                f"--tasks names {len(setup.tasks)} task; expected two or more."
            )
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
            label = "change by other tasks / by the own task"
            plots.bars(file, panels, setup.titles, y=label)
    caption = (
        "Change of a layer's outputs by all other tasks, divided by the change by the "
        "task itself (root mean squares); mean over layers. A column of a task uses "
        "the images of that task."
    )
    results = {"rows": rows, "layers": [*grams[0]], "matrices": matrices}
    title = "Proposition 1, measured (linear-layers paper)"
    return tables.write(config.out, title, {caption: rows}, results, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
