"""Recipes for fine-tuning: trained leaves, number of steps, optimizer.

The defaults follow Ilharco et al. (2023) and Ortiz-Jimenez et al. (2023): AdamW,
warm-up and cosine decay, gradients clipped to norm 1.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxarith import tau_jp

Decay = Literal["cosine", "linear", "constant"]
ProductDtype = Literal["bfloat16", "float16", "float32"]
# The kinds of `fine_tune(curvature=)`: Kronecker factors, EK-FAC, or only a diagonal.
Form = Literal["kronecker", "eigen", "diagonal"]


@dataclasses.dataclass(frozen=True)
class Distill:
    """Trains an ordinary model to behave as a linearised one; see `train.delta`.

    The metrics of a step are `loss` of the student, `teacher_loss`, `distillation`, and
    `penalty`, which is the sum for both models.

    Attributes:
      coef: weight of the distillation. The paper's code uses 1 for outputs of norm 1;
        for outputs of squared norm n, 1 / n has the same effect.
      low, high: range of the coefficient α of both task vectors, at which the student
        is compared with the teacher. It is drawn uniformly for each step and task.
    """

    coef: float = 1.0
    low: float = 0.5
    high: float = 1.0

    def __post_init__(self):
        if not self.coef >= 0:
            raise ValueError(
                f"coef, the weight of the distillation, is {self.coef}; at least 0 is "
                "needed."
            )
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"distillation draws α from {self.low} to {self.high}; expected "
                "0 <= low <= high."
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options for training task vectors; the defaults are the papers' for CLIP.

    Attributes:
      steps: optimizer steps.
      warmup_steps: steps of linear warm-up; None for a tenth of `steps`, as in the
        papers, see `warmup`.
      decay: learning rate after the warm-up: a half cosine to zero, a straight line to
        zero, or constant.
      batch_size: samples per step and task.
      learning_rate: the largest learning rate.
      weight_decay: AdamW's decay of all trained leaves towards zero.
      clip_norm: the largest Euclidean norm of a task's gradient; None for no limit.
      linearized: train the tangent-space model instead of the network.
      distill: train both, so that the network behaves like the tangent-space model
        (DELTA).
      penalty: the mode of the τJp penalty, see `tau_jp.draw`; or the form of the
        curvature that replaces the other tasks' samples, see `jaxarith.curvature`.
        Ordinary training can use curvature too. None for no penalty.
      penalty_coef: the penalty's weight λ (Yoshida et al. 2025: 0.1 with power 1).
      penalty_power: power of τJp, 1 as in the code of Yoshida et al. or 2 as in their
        paper.
      penalty_norm: norm in τJp, "l2" or "mean_absolute", which the code of Yoshida et
        al. uses for T5; see `tau_jp.penalty`.
      penalty_start: number of first steps without τJp; its samples are read in these
        steps too.
      penalty_batch_size: samples of τJp per step; in strict mode per other task.
      penalty_every: the penalty of curvature acts in one step out of this many, and is
        this many times as strong in that step.
      trained: pattern of the paths that are trained; the rest is frozen.
      product_dtype: dtype that the operands of tangent products are rounded to, such
        as "bfloat16" on accelerators; None leaves them as they are.
      tasks_at_once: number of tasks that a device computes at the same time. A large
        accelerator needs several to be busy; 1 needs the least memory and is the
        fastest on a CPU.
      micro_batches: number of parts of a batch that are computed one after another
        (gradient accumulation). If the loss is a mean over samples, the step is the
        same but needs less memory. A mean over tokens is taken for each part
        separately, so the weight of a text depends on the other texts in its part.
      seed: seed of the order of samples and of penalty draws.
    """

    steps: int = 2000
    warmup_steps: int | None = None
    decay: Decay = "cosine"
    batch_size: int = 128
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    linearized: bool = False
    distill: Distill | None = None
    penalty: tau_jp.Mode | Form | None = None
    penalty_coef: float = 0.1
    penalty_power: tau_jp.Power = 1
    penalty_norm: tau_jp.Norm = "l2"
    penalty_start: int = 0
    penalty_batch_size: int = 16
    penalty_every: int = 1
    trained: str = ".*"
    product_dtype: ProductDtype | None = None
    tasks_at_once: int = 1
    micro_batches: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.penalty not in (None, *tau_jp.MODES, *get_args(Form)):
            raise ValueError(
                f"unknown penalty {self.penalty!r}; the modes of τJp are "
                f"{', '.join(tau_jp.MODES)}, and the forms of curvature are "
                f"{', '.join(get_args(Form))}."
            )
        if not isinstance(self.distill, Distill | None):
            raise ValueError(
                f"distill is {self.distill!r}; expected train.Distill() or None."
            )
        if not self.penalty_coef >= 0:
            raise ValueError(
                f"penalty_coef is {self.penalty_coef}; at least 0 is needed."
            )
        if self.distill and (self.linearized or self.tau_jp_mode):
            raise ValueError(
                "distill trains an ordinary and a linearised model together; leave "
                "linearized=False, and penalty None or a form of curvature: "
                f"{', '.join(get_args(Form))}."
            )
        if self.tau_jp_mode is not None and not self.linearized:
            raise ValueError(
                "the τJp penalty needs linearized=True. The penalty of curvature, "
                'penalty="kronecker", does not.'
            )
        if self.penalty_every > 1 and self.form is None:
            raise ValueError(
                f"penalty_every is {self.penalty_every}; it is for curvature, but "
                f"penalty is {self.penalty!r}. Leave penalty_every=1, or use a form of "
                f"curvature: {', '.join(get_args(Form))}."
            )
        if self.product_dtype and not (self.linearized or self.distill):
            raise ValueError(
                "product_dtype rounds tangent products; it needs linearized=True or "
                "distill."
            )
        if self.product_dtype not in (None, *get_args(ProductDtype)):
            raise ValueError(
                f"product_dtype is {self.product_dtype!r}; expected "
                f"{', '.join(get_args(ProductDtype))} or None."
            )
        sizes = ("steps", "batch_size", "penalty_batch_size", "penalty_every")
        for name in (*sizes, "tasks_at_once", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; at least 1 is needed."
                )
        if self.decay not in get_args(Decay):
            *others, last = get_args(Decay)
            raise ValueError(
                f"decay is {self.decay!r}; expected {', '.join(others)} or {last}."
            )
        if self.penalty_norm not in get_args(tau_jp.Norm):
            raise ValueError(
                f"penalty_norm is {self.penalty_norm!r}; expected "
                f"{' or '.join(get_args(tau_jp.Norm))}."
            )
        if self.penalty_start < 0:
            raise ValueError(
                f"penalty_start is {self.penalty_start}; at least 0 is needed."
            )
        if self.penalty_power not in get_args(tau_jp.Power):
            raise ValueError(f"penalty_power is {self.penalty_power}; expected 1 or 2.")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"{self.warmup} of {self.steps} steps are warm-up; the warm-up must be "
                "shorter than the training. Leave warmup_steps out for a tenth of the "
                "steps."
            )

    @property
    def tau_jp_mode(self) -> tau_jp.Mode | None:
        """The mode of the τJp penalty, which reads samples of other tasks, if any."""
        return cast(tau_jp.Mode, self.penalty) if self.penalty in tau_jp.MODES else None

    @property
    def form(self) -> Form | None:
        """The form of the penalty of curvature, if any."""
        return cast(Form, self.penalty) if self.penalty in get_args(Form) else None

    @property
    def warmup(self) -> int:
        """The number of warm-up steps: the given one, or the share in the papers.

        Example:
          >>> TrainConfig(steps=100).warmup
          10
        """
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """Returns the options of a recipe that the vectors depend on, as plain data.

    A run is continued, and a vector is reused, only if these options are equal.
    """
    options = dataclasses.asdict(config) | {"warmup_steps": config.warmup}
    # These options change how a step is computed, not its result.
    del options["tasks_at_once"], options["micro_batches"]
    # Runs and vectors from before an option existed keep their identity.
    if config.penalty_every == 1:
        del options["penalty_every"]
    if config.penalty_norm == "l2":
        del options["penalty_norm"]
    if config.penalty_start == 0:
        del options["penalty_start"]
    if config.distill is None:
        del options["distill"]
    return options


def paper() -> TrainConfig:
    """Makes the papers' printed recipe for CLIP.

    It has 2000 steps, 200 of them warm-up, and squared τJp. Ortiz-Jimenez et al.
    (2023); Yoshida et al. (2025), Eq. 10 and App. B.1, who choose λ among 0.001, 0.01
    and 0.1; Jin et al. (2025), App. A.
    """
    return TrainConfig(steps=2000, warmup_steps=200, penalty_power=2)


def code(samples: int, epochs: int, batch_size: int = 128) -> TrainConfig:
    """Makes the recipe of the papers' public code for CLIP.

    The epochs amount to about 2000 steps, 500 of them warm-up. The τJp norm is not
    squared.

    Args:
      samples: the size of the training set, without the validation part.
      epochs: the number of epochs for the task, from `data.vision.TASKS`.
      batch_size: samples per step. The code uses 128. For ViT-L/14 it accumulates two
        batches of 64 (τJp: four of 32) before a step and sums their gradients, while
        `micro_batches` takes the mean. After clipping to norm 1, and with Adam, the two
        are nearly the same.

    Example:
      >>> code(7330, 35).steps  # Cars
      2030
    """
    steps, warmup_steps = _length(samples, epochs, batch_size)
    return TrainConfig(
        steps=steps, warmup_steps=warmup_steps, batch_size=batch_size, penalty_power=1
    )


def _length(samples, epochs, batch_size):
    """Returns the steps of these epochs, and the number of warm-up steps."""
    steps = epochs * math.ceil(samples / batch_size)
    return steps, min(500, steps - 1)


def tak(
    samples: int,
    epochs: int,
    batch_size: int = 128,
    *,
    tokens: int = 50,
    tasks: int = 8,
) -> TrainConfig:
    r"""Makes the recipe of TAK for CLIP's image encoder.

    The model is linearised and penalised with the curvature of other tasks, as in
    Porrello et al. (2026), with the optimizer of their public code. Patch and position
    embeddings are frozen, as in that code.

    `penalty_coef` is the code's β = 100 in the unit of `curvature.penalty`, the mean
    over the other tasks of the mean squared change of features. For layers of matrices
    it is :math:`100\,(T-1)/R` for T tasks and R tokens, because the code sums the
    factors B of the other tasks, and divides both A and B by R where one division
    would do. So it is 14 for ViT-B/32, 3.6 for ViT-B/16 and 2.7 for ViT-L/14. Three
    things differ from the code, see `tak_released`:

    - The code collects factors of features of norm 1. Factors of features that are not
      normalised, which `tau_jp` penalises too, are larger by about the squared norm of
      the features. Divide `penalty_coef` by it, or let `apply_fn` normalise.
    - The code weighs the parts of the curvature separately: in this unit, LayerNorm and
      class token by 1000 and the projection by 7, whatever R is.
    - The code's weight decay pulls τ towards zero; here it pulls θ0 + τ. In 2000 steps
      the pull amounts to 3 % of what it acts on, so `weight_decay=0` is closer to the
      code.

    `curvature.collect` with `sharing="expand"`, followed by `curvature.others`, gives
    the code's factors.

    Args:
      samples, epochs, batch_size: as for `code`.
      tokens: R, the number of tokens of an image: 50 for ViT-B/32, 197 for ViT-B/16,
        257 for ViT-L/14.
      tasks: T, the number of tasks; the code's weight grows with it.

    Example:
      >>> tak(7330, 35).penalty_coef, round(tak(7330, 35, tokens=197).penalty_coef, 2)
      (14.0, 3.55)
    """
    steps, warmup_steps = _length(samples, epochs, batch_size)
    return TrainConfig(
        steps=steps,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        learning_rate=3e-4,
        clip_norm=None,
        linearized=True,
        penalty="kronecker",
        penalty_coef=100 * (tasks - 1) / tokens,
        trained=r"(?!vision_model/embeddings/(patch|position)_embedding/).*",
    )


def tak_released(samples: int, epochs: int, batch_size: int = 128) -> TrainConfig:
    """Makes the recipe of TAK for curvature weighted as in TAK's public code.

    Collect factors of normalised features, with tokens apart, and weight each part by
    its `tak_released_weight`. There is no weight decay here; in the code it pulls τ.

    Args:
      samples, epochs, batch_size: as for `code`.

    Example:
      >>> encode = lambda p, x: clip.normalize(f(p, x))  # doctest: +SKIP
      >>> factors = [
      ...     curvature.collect(
      ...         encode, params_0, b, sharing="expand", full_up_to=1024, key=key
      ...     )
      ...     for b in batches
      ... ]  # doctest: +SKIP
      >>> others = [
      ...     curvature.weighted(one, tak_released_weight)
      ...     for one in curvature.others(factors)
      ... ]  # doctest: +SKIP
      >>> tak_released(7330, 35).penalty_coef
      100.0
    """
    config = tak(samples, epochs, batch_size)
    return dataclasses.replace(config, penalty_coef=100.0, weight_decay=0.0)


def tak_released_weight(path: str, *, tokens: int = 50, tasks: int = 8) -> float:
    """Returns the factor of TAK's public code for a part of the mean curvature.

    The code sums B over the other tasks, while A and the blocks of LayerNorm and of the
    class token are means. It divides matrices by the number of tokens once too often,
    and weighs those blocks by 10 and the projection by 0.01.

    Args:
      path: path of a leaf of CLIP's image encoder.
      tokens, tasks: as for `tak`.

    Example:
      >>> tak_released_weight("visual_projection/kernel")
      0.07
    """
    if path.startswith("visual_projection/"):
        return 0.01 * (tasks - 1)
    return (tasks - 1) / tokens if path.endswith("/kernel") else 10.0


def schedule(config: TrainConfig) -> Callable[[ArrayLike], jax.Array]:
    """Returns the learning rate as a function of the step s ≥ 0.

    It grows as `(s + 1) / W` for W warm-up steps, and then follows `config.decay`.
    """

    def learning_rate(step):
        warmup = (step + 1) / max(config.warmup, 1)
        progress = (step - config.warmup) / (config.steps - config.warmup)
        after = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": 1 - progress,
            "constant": 1.0,
        }
        factor = jnp.where(step < config.warmup, warmup, after[config.decay])
        return config.learning_rate * factor

    return learning_rate


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Makes the optimizer of `config`: clipping, and AdamW with PyTorch's defaults."""
    adamw = optax.adamw(schedule(config), weight_decay=config.weight_decay)
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
