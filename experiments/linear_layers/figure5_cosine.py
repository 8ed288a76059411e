"""Figure 5: cosines between the task vectors of three fine-tuning methods.

Jin et al. Fine-Tuning Attention Modules Only. ICLR 2025.

    python -m experiments.linear_layers.figure5_cosine --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used; with
--bank-only no data are needed.

Published as heat maps. The text says that vectors with only the weights of attention
are closer to orthogonal than ordinary vectors and than those of NTK linearisation. It
does not name the model; the paper's other maps are of ViT-B-32. The labels of SUN397
and SVHN may be swapped in the paper: in the authors' public code their order differs
from that of the vectors.
"""

import dataclasses

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import banked, options, pairwise, scores, vectors

METHODS: dict[str, vectors.Method] = {
    "Standard": "nonlinear",
    "NTK linearization": "linear",
    "Ours": "linear_layers_1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(banked.Options, options.OneModel): ...


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    own = banked.load(config, config.model)
    cosines = {
        label: banked.cosines(own.vectors(method)) for label, method in METHODS.items()
    }
    pairs = {label: pairwise.pair_values(found) for label, found in cosines.items()}
    rows = [
        {"method": label, "mean": float(np.mean(of)), "largest": max(of)}
        for label, of in pairs.items()
    ]
    results = {
        "model": own.title,
        "tasks": own.titles,
        "note": banked.note(config),
        "cosines": {label: found.tolist() for label, found in cosines.items()},
        "rows": rows,
    }
    caption = "Cosines between the task vectors of two tasks, over all pairs. "
    caption += banked.note(config)
    title = "Cosines between task vectors (linear-layers paper, Figure 5)"
    tables.write(config.out, title, {caption: rows}, results, digits=3)
    if runs.is_first():
        scores.draw_cosines(config.out / "cosine.png", cosines, own.titles)
    return results


if __name__ == "__main__":
    script.run(Config, main)
