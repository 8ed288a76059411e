"""Figure 2: τJp of two tasks and how well their task vectors add, of all 28 pairs.

Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025: section 3.2.

    python -m experiments.tau_jp.figure2_tau_jp_and_accuracy --data-dir DATA
    python -m experiments.tau_jp.figure2_tau_jp_and_accuracy --smoke --out runs/smoke

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Of every pair the two vectors are added with one coefficient, which is searched in 0,
0.05, …, 1 on validation data. Each pair is a point: τJp of the pair, and the mean
normalised test accuracy of the two tasks.

Published, as a plot only: "Across all model scales, we observed a consistent trend
where task pairs with smaller τJp values tend to exhibit higher normalized accuracy."
Ours is at much smaller τJp than Linear FT. No correlation is printed.

The horizontal axis is the mean of ‖J(x)τ‖, as the code of the paper measures it;
report.json has that of the square (Eq. 9) too, and both have their correlations.

Not run at full scale yet. The images are read once per model, method and split: at all
pairs and coefficients the features are sums of what that pass leaves.
"""

import dataclasses
from pathlib import Path

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, vectors
from experiments.tau_jp import pairs
from jaxarith import plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Add every two of the tasks, with linearised and with τJp vectors."""

    out: Path = Path("runs/tau_jp/figure2")
    """Folder for figure2.png, report.json and report.md."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns what `report.json` holds."""
    config = options.started(config)
    coefs = scores.coefs_of(config, scores.COEFS)
    points = []
    for setup in options.setups(config, config.models):
        for name, method in pairs.METHODS.items():
            found = pairs.additions(setup, vectors.vectors(setup, method), coefs)
            points += [{"model": setup.title, "method": name} | row for row in found]
    if runs.is_first():
        plots.scatter(
            config.out / "figure2.png",
            pairs.panels(points, "norm"),
            x="τJp of the pair",
            y="normalised accuracy, percent",
        )
    results = {"points": points, "correlations": pairs.correlations(points, "norm")}
    caption = "Correlation of τJp and of its square with the normalised accuracy."
    table = {caption: tables.markdown(results["correlations"], digits=2)}
    tables.write(config.out, "τJp and task addition (τJp, Fig. 2)", table, results)
    return results


if __name__ == "__main__":
    script.run(Config, main)
