"""Figure: accuracy by the number of probes and images that measure the curvature.

Porrello et al. Dataless Weight Disentanglement in Task Arithmetic via
Kronecker-Factored Approximate Curvature (TAK). ICLR 2026. arXiv:2602.17385.

    python -m experiments.curvature.figure_probes_samples --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

The script varies the random probes per image, 1, 2, 4 and 8, with --curvature-samples
images; and the images per task, 32, 64, 128 and 256, with 1 probe. The weight λ stays
the same: factors are means over probes and images.

Published, as plots only, and known from secondary texts: accuracy saturates at 128 to
256 images; 1 or 2 probes are best, and more are worse and noisier. The released code
adds up the probes without dividing by their number, so its λ grows with them.
"""

import dataclasses
from collections.abc import Sequence

from experiments.common import runs, script, tables
from experiments.common.vision import curved, options, scores, setups, vectors
from jaxarith import plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    probes: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of probes per image."""
    images: tuple[int, ...] = (32, 64, 128, 256)
    """Numbers of images per task."""


def measured(setup: setups.Setup, probes: int, images: int) -> dict:
    """Returns the accuracies with curvature from these numbers of probes and images."""
    config = dataclasses.replace(setup.options, curvature_samples=images)
    own, default = setup._replace(options=config), setup.options.curvature_samples
    is_default = (probes, images) == (1, default)
    taus = vectors.of_tasks(
        own,
        "curvature",
        setup.tasks,
        # With the default numbers, the vectors of the tables are used.
        folder=None if is_default else f"curvature_probes_{probes}_samples_{images}",
        kind=dataclasses.replace(curved.KINDS["curvature"], probes=probes),
    )
    found = scores.addition(own, taus, linearized=True)
    return {
        "probes": probes,
        "images": images,
        "single": scores.means(found.single),
        "abs": found.row(searched=False)["abs"],
        "norm": found.row(searched=False)["norm"],
        "best coefficient": found.search.coef,
    }


def draw(config: Config, rows: Sequence[dict], varied: str) -> None:
    """Draws the accuracy of the sum and of single tasks by one of the two numbers."""
    labels = {"abs": "sum at coefficient 1", "single": "single tasks"}
    plots.repeated(
        config.out / f"figure_{varied}.png",
        [row[varied] for row in rows],
        {label: [[row[name]] for row in rows] for name, label in labels.items()},
        {},
        x={"probes": "probes per image", "images": "images per task"}[varied],
        y="mean test accuracy, %",
    )


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config, probes=(1, 2), images=(4, 8))
    setup = setups.load(config, config.model)
    default = config.curvature_samples
    pairs = [(probes, default) for probes in config.probes]
    pairs += [(1, images) for images in config.images]
    by_pair = {pair: measured(setup, *pair) for pair in dict.fromkeys(pairs)}
    rows = [by_pair[pair] for pair in pairs]
    by_probes, by_images = rows[: len(config.probes)], rows[len(config.probes) :]
    if runs.is_first():
        draw(config, by_probes, "probes")
        draw(config, by_images, "images")
    return tables.write(
        config.out,
        "Probes and images of curvature (TAK)",
        {
            f"{setup.title}: test accuracy in percent, by probes per image.": by_probes,
            "By images per task.": by_images,
        },
        {"probes": by_probes, "images": by_images},
    )


if __name__ == "__main__":
    script.run(Config, main)
