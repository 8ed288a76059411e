"""Five mistakes of a user; pyright must find each of them, and nothing else."""

from typing import Any

from jaxarith import merge, tau_jp, train


def merged(params_0: Any, taus: list[Any]) -> list[Any]:
    return [
        merge.ties(params_0, taus, preset="offical"),  # wrong: the preset
        merge.task_arithmetic(params_0, taus, coef="0.3"),  # wrong: a string
        merge.topk(params_0, taus, density=[0.1, 0.2]),  # wrong: one number
        merge.awd(params_0, taus, solver="direct", coef=[0.3, 0.4]),
    ]


def config() -> train.TrainConfig:
    return train.TrainConfig(step=200)  # wrong: the field is `steps`


def tasks_of_a_step() -> Any:
    return tau_jp.draw("cylic", step=0, tasks=3, batch=8)  # wrong: the mode
