"""Figures 2 and 8: τJp of two tasks against accuracy and cosine, for all 28 pairs.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025: section 3.2, Appendix E.4.

    python -m experiments.tau_jp.figure2_pairs --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

Each pair is a point. In Figure 2 the two vectors are added with one coefficient,
searched in 0, 0.05, …, 1 on validation data; the figure shows the mean normalised test
accuracy of the two tasks against the τJp of the pair. Figure 8 shows the cosine of the
two vectors against the τJp of the pair.

Published, as plots only. Figure 2: "Across all model scales, we observed a consistent
trend where task pairs with smaller τJp values tend to exhibit higher normalized
accuracy." Ours has much smaller τJp than Linear FT. Figure 8: "Weak positive
correlations were observed between these values in three model sizes", "considered weak
in the setting of ViT-L-14"; Linear FT and Ours are in one plot. The paper prints no
correlations.
"""

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, pairwise, scores, setups, vectors
from experiments.tau_jp import pairs
from jaxarith import plots, task_vectors

# By measure: its file, its name on the axis, and its name in the table.
FIGURES = {
    "norm": ("figure2.png", "normalised accuracy, percent", "normalised accuracy"),
    "cosine": ("figure8.png", "cosine of the task vectors", "cosine"),
}


class Config(options.Models): ...


def points_of(setup: setups.Setup, method: vectors.Method, coefs) -> list[dict]:
    """Returns τJp, accuracies and cosine of every pair."""
    taus = vectors.vectors(setup, method)
    cosines = np.asarray(task_vectors.cosine_matrix(taus))
    added = pairs.additions(setup, taus, coefs)
    return [
        {"model": setup.title, **row, "cosine": float(cosines[pair])}
        for row, pair in zip(added, pairwise.pairs(len(taus)), strict=True)
    ]


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    coefs = scores.coefs_of(config, scores.COEFS)
    points = []
    for setup in setups.each(config, config.models):
        for name, method in pairs.METHODS.items():
            found = points_of(setup, method, coefs)
            points += [{"method": name} | point for point in found]
    correlations, shown = {}, {}
    for measure, (file, axis, name) in FIGURES.items():
        correlations[measure] = pairs.correlations(points, measure)
        caption = f"Correlations of τJp and of its square with the {name}."
        shown[caption] = correlations[measure]
        if runs.is_first():
            plots.scatter(
                config.out / file,
                pairs.panels(points, measure),
                x="τJp of the pair",
                y=axis,
            )
    results = {"points": points, "correlations": correlations}
    title = "Pairs of tasks by τJp (τJp paper, Figures 2 and 8)"
    return tables.write(config.out, title, shown, results, digits=2)


if __name__ == "__main__":
    script.run(Config, main)
