"""Figures 2 and 7: single-task models from parts of their vectors, and at every λ.

Xiong et al. Adaptive Weight Disentanglement. arXiv:2411.18729: section 4.2, 8.5.

    python -m experiments.awd.figure2_single_models --data-dir DATA

Figure 2 compares three models on every task: the fine-tuned model, θ0 + τ_i with only
the linear weights of the blocks, and θ0 + (τ_i - δ) after AWD. `table3_glue` draws
Figure 2 for RoBERTa. Figure 7 shows the accuracy of θ0 + λ τ_i on its own task by λ.

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

Published, as plots only: the three models of Figure 2 are alike on every task, and
"when λ > 0.3 for each combination of Θ + λτ_i, its performance is close to that of the
fully fine-tuned model". Figure 2 shows ViT-B/32; Figure 7 seems to show ViT-B/32 and
ViT-L/14.
"""

import dataclasses

import numpy as np

from experiments.awd import disentangled, solving
from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import plots, task_vectors

COEFS = np.linspace(0, 1, 11)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(solving.Options, options.Models):
    models: tuple[str, ...] = (options.B32, options.L14)
    tasks: tuple[str, ...] = disentangled.TASKS
    alpha: float = 1e-4
    """α of AWD; use the value that `table1_addition` has found."""


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    coefs = list(map(float, scores.coefs_of(config, COEFS)))
    rows, curves, merged = [], [], []
    for setup in setups.each(config, config.models, control=False):
        taus = vectors.vectors(setup, "nonlinear")
        curve = 100 * scores.on_own(setup, taus, "test", coefs)
        parts = disentangled.linear_weights(taus)
        found = {
            "fine-tuned": curve[-1] / 100,
            "linear weights": scores.on_own(setup, parts, "test")[0],
        }
        parts = disentangled.disentangled(
            setup.params_0, taus, config, alpha=config.alpha
        )
        found["reconstructed by AWD"] = scores.on_own(setup, parts, "test")[0]
        beside = disentangled.beside_sum(taus, task_vectors.add(parts))
        merged.append({"model": setup.title, "λ": 1.0, "alpha": config.alpha} | beside)
        groups = {name: (100 * own).tolist() for name, own in found.items()}
        for name, own in groups.items():
            row = {"model": setup.title, "vector": name}
            row |= dict(zip(setup.names, own, strict=True))
            rows.append(row | {"mean": float(np.mean(own))})
        names = setup.names
        lines = dict(zip(names, curve.T.tolist(), strict=True))
        curves.append({"model": setup.title, "coefs": coefs, "accuracies": lines})
        if runs.is_first():
            file = config.out / f"figure2_{setup.title}.png"
            plots.bars(file, groups, setup.titles, y="test accuracy, %")
            drawn = {
                title: (coefs, lines[name])
                for name, title in zip(names, setup.titles, strict=True)
            }
            file = config.out / f"figure7_{setup.title}.png"
            plots.curves(file, drawn, x="coefficient λ", y="test accuracy, %")
    results = {"rows": rows, "curves": curves, "merged": merged}
    shown = {
        "Test accuracy of single-task models, percent.": rows,
        "AWD's merged vector beside the plain sum.": tables.markdown(merged, digits=6),
    }
    title = "Single-task models (AWD paper, Figures 2 and 7)"
    return tables.write(config.out, title, shown, results)


if __name__ == "__main__":
    script.run(Config, main)
