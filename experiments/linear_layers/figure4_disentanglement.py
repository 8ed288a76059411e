"""Figure 4: disentanglement error ξ of DTD and SUN397, of representations and labels.

Jin et al. Fine-Tuning Attention Modules Only: Enhancing Weight Disentanglement in Task
Arithmetic. ICLR 2025.

    python -m experiments.linear_layers.figure4_disentanglement --data-dir DATA

Data: DTD and SUN397. The task vectors are those of table1_addition, from the bank.

The upper maps are of the image encoder alone: half the sum of both KL divergences
between the softmax of its features (dist of section 4). The lower ones are with the
head: the share of labels that differ.

Published as heat maps of ViT-B-32. The text says that ξ of representations is small
around the pre-trained model and stays small beyond coefficients of 1, where that of
labels does not, and that linear ways of training enlarge the region of small ξ.

The authors' public code takes the first 16 batches of 128 and divides by the number of
all batches, so its ξ is too small for large test splits: about a tenth of SUN397's is
counted. Ours is the mean over the samples that are drawn.

Not run at full scale yet.
"""

import dataclasses
from pathlib import Path

from experiments.common import script
from experiments.linear_layers import xi


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(xi.Options):
    """ξ maps of ordinary, linearised and attention-only vectors."""

    out: Path = Path("runs/linear_layers/figure4")
    """Folder for report.json, report.md and xi.png."""
    tasks: tuple[str, ...] = ("dtd", "sun397")
    """The pair: names of jaxarith data check, or NAME=FOLDER."""


@script.full_precision
def main(config: Config) -> dict:
    """Makes the figure; returns what `report.json` holds."""
    return xi.run(config, "Disentanglement error (linear layers, Figure 4)")


if __name__ == "__main__":
    script.run(Config, main)
