"""The recipe of a fine-tuning: what is trained, for how long, by which optimizer.

It is that of Ilharco et al. (2023) and Ortiz-Jimenez et al. (2023): AdamW, warm-up and
cosine, gradients clipped to norm 1.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import optax

from jaxarith import tau_jp


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How task vectors are trained; the defaults are the papers' for CLIP.

    Attributes:
      steps: optimizer steps.
      warmup_steps: steps of linear warm-up.
      decay: what follows it: a half cosine or a straight line to zero, or the largest
        rate throughout.
      batch_size: samples per step and task.
      learning_rate: the largest.
      weight_decay: AdamW's, of all trained leaves, towards zero.
      clip_norm: the largest Euclidean norm of a task's gradient; None for any.
      linearized: train the tangent-space model instead of the network.
      penalty: add the τJp penalty, in one of `tau_jp.MODES`.
      penalty_coef: its weight λ (Yoshida et al. 2025: 0.1 with power 1).
      penalty_power: 1 (the code of Yoshida et al.) or 2 (as they print it).
      penalty_batch_size: penalty samples per step; in strict mode per other task.
      trained: pattern of the paths that are trained; the rest is frozen.
      product_dtype: what the operands of tangent products are rounded to, such as
        "bfloat16" on accelerators; None leaves them as they are.
      tasks_at_once: how many tasks a device computes at the same time. More fill a
        large accelerator; 1 needs the least memory and is the fastest on a CPU.
      micro_batches: into how many parts a batch is cut, which are computed one after
        another (gradient accumulation). The step is the same, in less memory, if the
        loss is a mean over samples; a mean over the tokens that count is taken of
        every part, and so weighs texts by those of their part.
      seed: of the order of samples and of penalty draws.
    """

    steps: int = 2000
    warmup_steps: int = 200
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    batch_size: int = 128
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    linearized: bool = False
    penalty: str | None = None
    penalty_coef: float = 0.1
    penalty_power: int = 1
    penalty_batch_size: int = 16
    trained: str = ".*"
    product_dtype: str | None = None
    tasks_at_once: int = 1
    micro_batches: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.penalty is not None and self.penalty not in tau_jp.MODES:
            raise ValueError(
                f"unknown penalty mode {self.penalty!r}; the modes are "
                f"{', '.join(tau_jp.MODES)}."
            )
        if self.penalty is not None and not self.linearized:
            raise ValueError("the τJp penalty needs linearized=True.")
        if self.product_dtype is not None and not self.linearized:
            raise ValueError(
                "product_dtype rounds tangent products; it needs linearized=True."
            )
        if self.product_dtype not in (None, "bfloat16", "float16", "float32"):
            raise ValueError(
                f"product_dtype is {self.product_dtype!r}; it is bfloat16, float16, "
                "float32 or None."
            )
        sizes = ("steps", "batch_size", "penalty_batch_size", "tasks_at_once")
        for name in (*sizes, "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; at least 1 is needed."
                )
        if self.decay not in ("cosine", "linear", "constant"):
            raise ValueError(
                f"decay is {self.decay!r}; it is cosine, linear or constant."
            )
        if self.penalty_power not in (1, 2):
            raise ValueError(f"penalty_power is {self.penalty_power}; it is 1 or 2.")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"{self.warmup_steps} warm-up steps of {self.steps} steps; the warm-up "
                "must be shorter than the training."
            )


def paper() -> TrainConfig:
    """What the papers print for CLIP: 2000 steps, 200 of warm-up, the squared τJp.

    Ortiz-Jimenez et al. (2023); Yoshida et al. (2025), Eq. 10 and App. B.1, who choose
    λ among 0.001, 0.01 and 0.1; Jin et al. (2025), App. A.
    """
    return TrainConfig(penalty_power=2)


def code(samples: int, epochs: int, batch_size: int = 128) -> TrainConfig:
    """What the papers' public code does for CLIP.

    A number of epochs that makes about 2000 steps, 500 of them warm-up, and the τJp
    norm as it is, not squared.

    Args:
      samples: of the training set, without the validation part.
      epochs: those of the task, in `data.vision.TASKS`.
      batch_size: per step. The code takes 128, and of ViT-L/14 64 (τJp: 32) two (four)
        times before a step, whose gradients it sums where `micro_batches` takes their
        mean; clipped to norm 1 and under Adam, that is nearly the same.

    Example:
      >>> code(7330, 35).steps  # Cars
      2030
    """
    steps = epochs * math.ceil(samples / batch_size)
    warmup_steps = min(500, steps - 1)
    return TrainConfig(
        steps=steps, warmup_steps=warmup_steps, batch_size=batch_size, penalty_power=1
    )


def schedule(config: TrainConfig) -> optax.Schedule:
    """The learning rate of step s ≥ 0: warm-up `(s + 1) / W`, then `config.decay`."""

    def learning_rate(step):
        warmup = (step + 1) / max(config.warmup_steps, 1)
        progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        after = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": 1 - progress,
            "constant": 1.0,
        }
        factor = jnp.where(step < config.warmup_steps, warmup, after[config.decay])
        return config.learning_rate * factor

    return learning_rate


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping and AdamW with PyTorch's defaults, as `config` states them."""
    adamw = optax.adamw(schedule(config), weight_decay=config.weight_decay)
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
