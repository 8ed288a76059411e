"""Figure 3: continues the training of linearised vectors, with the τJp penalty.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025: section 4.3.2.

    python -m experiments.tau_jp.figure3_continued --data-dir DATA

Data: EuroSAT and SVHN. Training starts from the vectors of Linear FT in the bank.

Training takes 1000 more steps, with a new optimizer and a new schedule. T_orth is only
the other task of the pair, as in the code. The warm-up is that of the protocol, 200
steps for `paper` and 500 for `code`; the paper does not state it. Every 100 steps the
two vectors are added with a coefficient searched on validation data. Normalised
accuracy is relative to the single models of the same step.

Published, as a plot only, with ViT-B-32: "both metrics improve sharply within the first
100 steps, with normalized accuracy exceeding 99%. Afterward, the improvement is more
gradual."
"""

import dataclasses

from experiments.common import runs, script, tables
from experiments.common.vision import options, scores, setups, vectors
from experiments.tau_jp import pairs
from jaxarith import plots, sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    tasks: tuple[str, ...] = ("eurosat", "svhn")
    """The two tasks."""
    more_steps: int = 1000
    """Number of steps after the training of Linear FT (whose steps are --steps)."""
    snapshots: int = 100
    """Number of steps from one measurement to the next."""


def continued(setup: setups.Setup, config: Config) -> dict[int, list]:
    """Returns the task vectors by step, from 0 on."""
    method = "tau_jp_continued"
    # T_orth depends on the pair, so each pair has its own folder.
    folder = f"{method}_{'-'.join(setup.names)}"
    steps = range(config.snapshots, config.more_steps + 1, config.snapshots)
    start = vectors.vectors(setup, "linear")
    wanted = [
        vectors.wanted_of(
            setup,
            folder,
            task,
            dataclasses.replace(
                vectors.recipe_of(setup, method, task), steps=config.more_steps
            ),
            vectors.others_of(setup, method, task),
            start=tau,
            observed=steps,
        )
        for task, tau in zip(setup.tasks, start, strict=True)
    ]
    vectors.trained(setup, folder, wanted)
    return {0: start} | {
        step: [
            sharding.shard(vectors.snapshot(one, step), setup.mesh) for one in wanted
        ]
        for step in steps
    }


@script.full_precision
def main(config: Config) -> dict:
    pair = options.SMOKE[:2]
    config = options.smoke(config, tasks=pair, more_steps=4, snapshots=2)
    if len(config.tasks) != 2:
        raise ValueError(f"--tasks names {config.tasks}; expected two tasks.")
    if not 1 <= config.snapshots <= config.more_steps:
        raise ValueError(
            f"--snapshots {config.snapshots}: expected a number from 1 to --more-steps "
            f"{config.more_steps}."
        )
    runs.start(config)
    coefs = scores.coefs_of(config, scores.COEFS)
    # T_orth is only the other task, so no control is needed.
    setup = setups.load(config, config.model, control=False)
    rows = []
    for step, taus in continued(setup, config).items():
        [row] = pairs.additions(setup, taus, coefs)
        rows.append({"step": step} | row)
    steps = [row["step"] for row in rows]
    if runs.is_first():
        plots.two_scales(
            config.out / "figure3.png",
            steps,
            ("normalised accuracy, percent", [row["norm"] for row in rows]),
            ("τJp", [row["tau_jp"] for row in rows]),
            x="additional steps",
        )
    names = ("step", "tau_jp", "tau_jp_squared", "coefficient", "abs", "norm")
    shown = [{name: row[name] for name in names} for row in rows]
    caption = f"{pairs.title(setup.titles, (0, 1))}: addition by additional steps."
    title = "Continued with τJp (τJp paper, Figure 3)"
    return tables.write(config.out, title, {caption: shown}, {"rows": rows}, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
