"""Figures 9, 10 and 11: target and control accuracy along three directions.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: B.4, B.6 and B.7.

    python -m experiments.editing.figure9_forgetting_curves --data-dir DATA

Data: the same as for `table1_forgetting`. Its task vectors in the bank are used.

From the pre-trained model the script moves in three directions: away from the
fine-tuned model (-τ), along a random vector with the same norms, and towards the model
of gradient ascent. Coefficients are 0, 0.05, …, 1, on test data. Figure 11 shows the
drop of negation, at the coefficients of Table 1, by the gain of fine-tuning.

Published, as plots only: "for task vectors, performance on the target tasks initially
decreases faster than performance on the control task"; with random vectors it does not.
Interpolations with gradient ascent are "even better accuracy trade-offs". Gain and drop
have "a positive correlation". The paper does not name its CLIP; we take ViT-L-14.
"""

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from experiments.editing import forgetting
from jaxarith import metrics, plots


class Config(options.LargeModel): ...


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.started(config)
    setup = setups.load(config, config.model)
    nonlinear = vectors.vectors(setup, "nonlinear")
    negative = forgetting.negation(setup, nonlinear)
    coefs = scores.coefs_of(config, scores.COEFS)
    directions = {
        "negative task vector": (nonlinear, -coefs),
        "random vector": (vectors.vectors(setup, "random"), -coefs),
        "gradient ascent": (vectors.vectors(setup, "gradient_ascent"), coefs),
    }
    curves = {
        name: 100 * forgetting.curves(setup, *direction)
        for name, direction in directions.items()
    }
    tuned = 100 * forgetting.curves(setup, nonlinear, [1.0])[:, 0, 0]
    before, after = 100 * negative.accuracies[:, 0, 0], negative.accuracies[:, 0, 2]
    rows = [
        {"task": name, "gain": float(gain), "drop": float(drop), "coefficient": coef}
        for name, gain, drop, coef in zip(
            setup.names,
            tuned - before,
            before - 100 * after,
            negative.coefs,
            strict=True,
        )
    ]
    gains, drops = ([row[name] for row in rows] for name in ("gain", "drop"))
    defined = len(set(gains)) > 1 and len(set(drops)) > 1
    correlation = float(metrics.pearson(gains, drops)) if defined else None
    means = [
        {"direction": name, "coefficient": float(coef), "target": t, "control": c}
        for name, found in curves.items()
        for coef, (t, c) in zip(coefs, found.mean(0).T.tolist(), strict=True)
    ]
    if runs.is_first():
        draw(setup, curves, (gains, drops))
    results = {
        "rows": rows,
        "pearson": correlation,
        "means": means,
        "curves": {name: found.tolist() for name, found in curves.items()},
    }
    shown = {
        "Figures 9 and 10: test accuracies in percent, mean over tasks.": means,
        f"Figure 11: points of accuracy; Pearson correlation {correlation}.": rows,
    }
    title = "Curves of forgetting (editing paper, Figures 9, 10, 11)"
    return tables.write(config.out, title, shown, results, digits=2)


def draw(setup: setups.Setup, curves: dict[str, np.ndarray], points):
    """Draws the three figures."""
    out = setup.options.out
    axes = {"x": "control accuracy, percent", "y": "target accuracy, percent"}
    for figure, other in ((9, "random vector"), (10, "gradient ascent")):
        panels = {
            title: {
                name: (curves[name][i, 1], curves[name][i, 0])
                for name in ("negative task vector", other)
            }
            for i, title in enumerate(setup.titles)
        }
        plots.scatter(out / f"figure{figure}.png", panels, **axes)
    tasks = {
        title: ([gain], [drop])
        for title, gain, drop in zip(setup.titles, *points, strict=True)
    }
    plots.scatter(
        out / "figure11.png",
        {setup.title: tasks},
        x="gain of fine-tuning, points",
        y="drop of negation, points",
    )


if __name__ == "__main__":
    script.run(Config, main)
