"""Figure 8: τJp of two tasks and the cosine of their task vectors, of all 28 pairs.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: Appendix E.4.

    python -m experiments.tau_jp.figure8_tau_jp_and_cosine --data-dir DATA
    python -m experiments.tau_jp.figure8_tau_jp_and_cosine --smoke --out runs/smoke

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Published, as a plot only: "Weak positive correlations were observed between these
values in three model sizes", which is "considered weak in the setting of ViT-L-14". No
correlation is printed, and Linear FT and Ours are in one plot.

The horizontal axis is the mean of ‖J(x)τ‖, as the code of the paper measures it;
report.json has that of the square (Eq. 9) too, and both have their correlations.

Not run at full scale yet.
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, vectors
from experiments.tau_jp import pairs
from jaxarith import plots, task_vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Compare τJp and cosine of every two of the tasks."""

    out: Path = Path("runs/tau_jp/figure8")
    """Folder for figure8.png, report.json and report.md."""


def points_of(setup: options.Setup, method: str) -> list[dict]:
    """τJp and cosine of every pair."""
    taus = vectors.vectors(setup, method)
    cosines = np.asarray(task_vectors.cosine_matrix(taus))
    measured = pairs.tau_jp(setup, taus).of_pairs()
    couples = scores.pairs(len(taus))
    return [
        {
            "pair": [setup.names[i] for i in pair],
            **measures,
            "cosine": float(cosines[pair]),
        }
        for pair, measures in zip(couples, measured, strict=True)
    ]


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = options.started(config)
    points = []
    for setup in options.setups(config, config.models):
        for name, method in pairs.METHODS.items():
            found = points_of(setup, method)
            points += [{"model": setup.title, "method": name} | row for row in found]
    if runs.is_first():
        plots.scatter(
            config.out / "figure8.png",
            pairs.panels(points, "cosine"),
            x="τJp of the pair",
            y="cosine of the task vectors",
        )
    results = {"points": points, "correlations": pairs.correlations(points, "cosine")}
    caption = "Correlation of τJp and of its square with the cosine."
    table = {caption: tables.markdown(results["correlations"], digits=2)}
    tables.write(config.out, "τJp and cosine (τJp, Fig. 8)", table, results)
    return results


if __name__ == "__main__":
    script.run(Config, main)
