"""Figure 7: disentanglement error ξ of Cars and RESISC45, as in Figure 4.

Jin et al. Fine-Tuning Attention Modules Only: Enhancing Weight Disentanglement in Task
Arithmetic. ICLR 2025.

    python -m experiments.linear_layers.figure7_disentanglement --data-dir DATA

Data: Cars and RESISC45. The task vectors are those of table1_addition, from the bank.

Published as heat maps of ViT-B-32, of which the text says no more; figure4 describes
the two rows and how the authors' code computes them. The red box is the range in which
coefficients are searched.

Not run at full scale yet.
"""

import dataclasses
from pathlib import Path

from experiments.common import script
from experiments.linear_layers import xi


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(xi.Options):
    """ξ maps of ordinary, linearised and attention-only vectors."""

    out: Path = Path("runs/linear_layers/figure7")
    """Folder for report.json, report.md and xi.png."""
    tasks: tuple[str, ...] = ("stanford_cars", "resisc45")
    """The pair: names of jaxarith data check, or NAME=FOLDER."""


@script.full_precision
def main(config: Config) -> dict:
    """Makes the figure; returns what `report.json` holds."""
    return xi.run(config, "Disentanglement error (linear layers, Figure 7)")


if __name__ == "__main__":
    script.run(Config, main)
