"""Figure: accuracy of the sum by its coefficient, from 0 to 2.

Porrello et al. Dataless Weight Disentanglement in Task Arithmetic via
Kronecker-Factored Approximate Curvature (TAK). ICLR 2026. arXiv:2602.17385.

    python -m experiments.curvature.figure_rescaling --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

The figure shows sums of linearised vectors (without a penalty, with τJp, and with
curvature) and ordinary vectors merged by TSV-M, Iso-C and TIES. All are measured on
test data; nothing is chosen there. "Lowest from 0.5" is the lowest accuracy at a
coefficient from 0.5 to 2, divided by the accuracy at the best coefficient.

Published, as a plot only, and known from secondary texts: with TAK the curve is flat
from about 0.25 to 2, while TIES, TSV-M and Iso-C have sharp peaks.
"""

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import data_free, options, scores, setups, vectors
from jaxarith import plots, task_vectors

COEFS = np.linspace(0, 2, 21)
LINEARIZED: dict[str, vectors.Method] = {
    "linearised": "linear",
    "linearised + τJp": "tau_jp_cyclic",
    "linearised + curvature": "curvature",
}


class Config(options.OneModel): ...


def curves_of(setup: setups.Setup, coefs: np.ndarray) -> dict[str, np.ndarray]:
    """Returns by method the mean test accuracy in percent at each coefficient."""

    def means(merged, linearized):
        units = np.eye(len(merged))
        rows = np.concatenate([np.outer(coefs, unit) for unit in units])
        taus = list(merged.values())
        found = scores.on_all(setup, taus, "test", rows, linearized=linearized)
        return dict(
            zip(merged, 100 * found.mean(axis=1).reshape(len(taus), -1), strict=True)
        )

    sums = {
        name: task_vectors.add(vectors.vectors(setup, method))
        for name, method in LINEARIZED.items()
    }
    ordinary = data_free.merged(setup, vectors.vectors(setup, "nonlinear"))
    return means(sums, True) | means(ordinary, False)


def row_of(name: str, coefs: np.ndarray, curve: np.ndarray) -> dict:
    """Returns a row: the best coefficient of a method, and accuracies at others."""
    best, one = int(curve.argmax()), int(np.abs(coefs - 1).argmin())
    return {
        "method": name,
        "best coefficient": float(coefs[best]),
        "best": float(curve[best]),
        "at 1.0": float(curve[one]),
        "at 2.0": float(curve[-1]),
        "lowest from 0.5, % of best": 100
        * float(curve[coefs >= 0.5].min())
        / float(curve[best]),
    }


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    setup = setups.load(config, config.model)
    coefs = scores.coefs_of(config, COEFS)
    curves = curves_of(setup, coefs)
    rows = [row_of(name, coefs, curve) for name, curve in curves.items()]
    if runs.is_first():
        plots.curves(
            config.out / "figure_rescaling.png",
            {name: (coefs, curve) for name, curve in curves.items()},
            x="coefficient α",
            y="mean test accuracy, %",
        )
    results = {"coefs": coefs.tolist()}
    results |= {"curves": {name: curve.tolist() for name, curve in curves.items()}}
    caption = f"{setup.title}: mean test accuracy of the sum, percent."
    title = "Accuracy by the coefficient of the sum (TAK)"
    return tables.write(config.out, title, {caption: rows}, {"rows": rows} | results)


if __name__ == "__main__":
    script.run(Config, main)
