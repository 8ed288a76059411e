"""Figure 17: adds the vector of ImageNet to that of each of eight tasks.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023: Appendix D.5.

    python -m experiments.editing.figure17_imagenet --data-dir DATA

Data: the eight tasks, and the training images of ImageNet (the task of --control). On
ImageNet the encoder trains for 4 epochs, "around 40 thousand" steps; the rest of the
recipe is the same. The coefficient of each sum is searched on validation data.

Published, as a plot only: a sum "in most experiments is competitive with the fine-tuned
models on their respective datasets". The paper does not name the CLIP; we take
ViT-L-14.
"""

import dataclasses
import math

from tqdm import tqdm

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import plots
from jaxarith.typing import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.LargeModel):
    epochs: int = 4
    """Number of epochs on ImageNet; --steps overrides it."""


def large_vector(setup: setups.Setup, epochs: int) -> Tree:
    """Returns the vector of the control task, trained for `epochs` epochs."""
    own = setup.options
    control = setup.required_control
    config = vectors.recipe_of(setup, "nonlinear", control)
    name = "nonlinear"
    if own.steps is None:
        name = f"nonlinear/epochs_{epochs}"
        steps = epochs * math.ceil(len(control.train) / own.batch_size)
        config = dataclasses.replace(config, steps=steps)
    wanted = [vectors.wanted_of(setup, name, control, config)]
    [tau] = vectors.trained(setup, name, wanted)
    return tau


@script.full_precision
def main(config: Config) -> dict:
    options.check_control(config)
    config = options.started(config)
    setup = setups.load(config, config.model)
    large = large_vector(setup, config.epochs)
    taus = vectors.vectors(setup, "nonlinear")
    rows = []
    for task, tau in zip(tqdm(setup.tasks, desc="sums"), taus, strict=True):
        pair = setup._replace(tasks=[task, setup.required_control])
        found = scores.addition(pair, [tau, large], linearized=False)
        parts = {
            "zero-shot": found.zero_shot,
            "single": found.single,
            "sum": found.searched,
        }
        for part, values in parts.items():
            row = {"task": task.title, "model": part}
            row |= {"coefficient": found.search.coef if part == "sum" else None}
            row |= {"on the task": 100 * float(values[0])}
            rows.append(row | {"on the control": 100 * float(values[1])})
    if runs.is_first():
        plots.scatter(
            config.out / "figure17.png",
            {
                part: {
                    row["task"]: ([row["on the task"]], [row["on the control"]])
                    for row in rows
                    if row["model"] == part
                }
                for part in ("zero-shot", "single", "sum")
            },
            x="accuracy on the task, percent",
            y=f"accuracy on {setup.required_control.title}, percent",
        )
    caption = "Test accuracy in percent; `single` is each task's own model."
    title = "Sums with ImageNet (editing paper, Figure 17)"
    return tables.write(config.out, title, {caption: rows}, {"rows": rows})


if __name__ == "__main__":
    script.run(Config, main)
