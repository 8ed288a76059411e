"""Table 3: loss gaps between the merged model and each task's own model.

Zeng et al. Task Vector Bases. arXiv:2502.01015: section 6.2.2.

    python -m experiments.bases.table3_loss_gap --data-dir DATA

Data: the eight image tasks. The vectors are those of `tau_jp.table1_addition`.

Published, L_i(θ_TA) - L_i(θ_i) with ViT-B/16:

    task      gap
    mnist     0.12
    eurosat   1.00
    stanford_cars  0.15
    dtd       1.11
    gtsrb     0.80
    resisc45  0.84
    sun397    5.02
    svhn      0.60

The loss is the mean cross-entropy on test data. The paper states neither the split, nor
the coefficient of Task Arithmetic, nor the source of the ViT-B/16. We search the
coefficient in 0, 0.05, …, 1 on validation data, and use OpenAI's model. The paper's
"LC(1+ε) ≈ 5" uses L = 1, C = 4 and ε = 0.2, which it calls reasonable and does not
measure.
"""

import dataclasses

from tqdm import tqdm

from experiments.bases import two_models
from experiments.common import script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import task_vectors

# In the order of the paper's rows.
PUBLISHED = tables.published(__doc__, "task")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    model: str = options.B16
    tasks: tuple[str, ...] = tuple(PUBLISHED)


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    setup = setups.load(config, config.model, control=False)
    taus = vectors.vectors(setup, "nonlinear")
    found = scores.addition(setup, taus, linearized=False)
    total, coef = task_vectors.add(taus), found.search.coef
    rows = []
    progress = tqdm(setup.tasks, desc="losses", unit="task")
    for i, (task, tau) in enumerate(zip(progress, taus, strict=True)):
        merged, own = two_models.losses(
            setup, task, [total, tau], [[coef, 0], [0, 1]]
        ).tolist()
        rows.append(
            {
                "task": task.name,
                "gap": merged - own,
                "merged": merged,
                "own": own,
                "accuracy": 100 * float(found.searched[i]),
            }
        )
    return tables.compared(
        config.out,
        "Loss gaps of addition (bases paper, Table 3)",
        "Loss gap, losses of the merged and of the own model, and accuracy of the "
        f"merged model in percent, at coefficient {coef:.2f}.",
        rows,
        PUBLISHED,
        keys=["task", "merged", "own", "accuracy"],
        values=["gap"],
        published_keys=["task"],
        digits=2,
        results={"coefficient": coef},
    )


if __name__ == "__main__":
    script.run(Config, main)
