"""Figures 4 and 6: cosines before and after AWD, and accuracy against them.

Xiong et al. Adaptive Weight Disentanglement. arXiv:2411.18729: section 4.6, 8.2.

    python -m experiments.awd.figure4_cosines --data-dir DATA

Figure 4 has the cosines of all pairs of task vectors, before and after AWD. Figure 6
varies α at a fixed λ. It shows the accuracy of the merged model by the mean |cosine|
after AWD, as a share of that of the task vectors.

Data: the same as for `table1_addition`. Its task vectors in the bank are used. With
--bank-only no data are needed, and only Figure 4 is drawn.

Published, as plots only, for ViT-B/32 and ViT-L/14: cosines shrink, and "as the
normalised cosine similarity between disentangled task vectors decreases, the
performance of the merged model correspondingly improves". The paper states neither the
values of α nor λ; here α is 1e-6, …, 1 in half decades, and λ is 0.3. All cosines are
those of the linear weights of the blocks.
"""

import dataclasses

import jax
import numpy as np
from tqdm import tqdm

from experiments.awd import disentangled, solving
from experiments.common import runs, script, tables
from experiments.common.vision import banked, options, scores, setups
from jaxarith import plots, task_vectors

ALPHAS = np.logspace(-6, 0, 13)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(solving.Options, banked.Options, options.Models):
    models: tuple[str, ...] = (options.B32, options.L14)
    tasks: tuple[str, ...] = disentangled.TASKS
    alpha: float = 1e-4
    """α of Figure 4; use the value that `table1_addition` has found."""
    coef: float = 0.3
    """λ of Figure 6."""


def sweep(setup: setups.Setup, taus, config: Config) -> list[dict]:
    """Returns the rows of Figure 6: cosines after AWD and accuracy, for each α."""
    alphas = ALPHAS[::6] if setup.options.smoke else ALPHAS
    before = disentangled.mean_cosine(disentangled.linear_weights(taus))
    cosines, sums = [], []
    for alpha in tqdm(alphas, desc="AWD", unit="α"):
        parts = disentangled.disentangled(
            setup.params_0, taus, config, alpha=float(alpha)
        )
        cosines.append(disentangled.mean_cosine(parts))
        sums.append(task_vectors.add(parts))
    rows = config.coef * np.eye(len(sums))
    means = 100 * scores.on_all(setup, sums, "test", rows).mean(axis=1)
    found = zip(alphas, cosines, means, sums, strict=True)
    return [
        {
            "model": setup.title,
            "alpha": float(alpha),
            "cosine": cosine,
            "normalised cosine": cosine / before,
            "mean": float(mean),
            **disentangled.beside_sum(taus, total, config.coef),
        }
        for alpha, cosine, mean, total in found
    ]


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    matrices, rows = [], []
    for own in banked.each(config, config.models):
        taus = own.vectors("nonlinear")
        parts = disentangled.linear_weights(taus)
        start = jax.tree.map(np.zeros_like, parts[0])  # AWD needs only the vectors
        both = {
            "task vectors": parts,
            "disentangled": disentangled.disentangled(
                start, parts, config, alpha=config.alpha
            ),
        }
        panels = {name: banked.cosines(part) for name, part in both.items()}
        plain = {name: panel.tolist() for name, panel in panels.items()}
        matrices.append({"model": own.title, "tasks": own.names} | plain)
        if runs.is_first():
            more = {"rows": "task", "columns": "task", "digits": 3}
            file = config.out / f"figure4_{own.title}.png"
            scores.draw_cosines(file, panels, own.titles, **more)
        if own.setup is None:
            means = {
                name: disentangled.mean_cosine(part) for name, part in both.items()
            }
            rows.append({"model": own.title, "alpha": config.alpha} | means)
            continue
        found = sweep(own.setup, taus, config)
        rows += found
        if runs.is_first():
            xs, ys = [[row[n] for row in found] for n in ("normalised cosine", "mean")]
            label = {f"AWD, λ = {config.coef:g}, one point for each α": (xs, ys)}
            axes = {"x": "normalised cosine", "y": "mean test accuracy, %"}
            file = config.out / f"figure6_{own.title}.png"
            plots.scatter(file, {own.title: label}, **axes)
    results = {"matrices": matrices, "rows": rows}
    if config.bank_only:
        caption = "Mean |cosine| of two tasks. " + banked.note(config)
    else:
        caption = (
            f"Cosines after AWD, and test accuracy in percent at λ = {config.coef:g}."
        )
    title = "Cosines before and after AWD (Figures 4 and 6)"
    return tables.write(config.out, title, {caption: rows}, results, digits=6)


if __name__ == "__main__":
    script.run(Config, main)
