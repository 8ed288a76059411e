"""The merge methods by name, with the options that a user can set.

These are the methods of `jaxarith.merge` that need no data and give one model. Tensors
have the names of PyTorch, whose matrices are [output, input].
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax

from jaxarith import merge, tree
from jaxarith.commands.merge.gradients import Value
from jaxarith.merge.bases import cluster
from jaxarith.merge.della import DROP_RATE as DELLA_RATE
from jaxarith.merge.della import EPSILON
from jaxarith.merge.drop import DROP_RATE as DARE_RATE
from jaxarith.merge.drop import Rescale, Strategy
from jaxarith.typing import Params, Taus

Base: TypeAlias = Literal["needed", "optional", "input", "aside"]


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a method.

    Attributes:
      kind: the type of its values, or the words that it accepts.
      each: whether each model may have its own value.
      by_path: whether it may differ between tensors.
      keyword: the parameter of the function, if its name differs; "" if the option has
        no effect here.
      required: whether it must be given.
      default: its value for models and tensors without a value, if it is given for
        others.
      words: words that it accepts besides values of its type.
    """

    kind: type | tuple[str, ...]
    each: bool = False
    by_path: bool = False
    keyword: str | None = None
    required: bool = False
    default: float | None = None
    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Method:
    """A method that merges models into one.

    Attributes:
      merge: `merge(params_0, taus, **options) -> params`.
      options: its options by name.
      passes: about how often the task vectors are read, with the default options.
      base: the role of the base model. "needed": task vectors are measured from it;
        "optional": they are if it is given; "input": it is one of the models to merge;
        "aside": models are merged without it.
      random: whether the function takes a `key`.
      by_shape: whether it can be traced without values.
      note: how it differs from another method of the same name.
      models: the number of models that it takes; None allows any.
    """

    merge: Callable
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    passes: int = 1
    base: Base = "needed"
    random: bool = False
    by_shape: bool = True
    note: str = ""
    models: int | None = None


def converted(value: Any, option: Option) -> Value:
    """Returns a value in the type of an option; texts (as of flags) are parsed.

    Raises:
      ValueError: the value is not valid; the message continues the option's name.
    """
    kind = option.kind
    if isinstance(kind, tuple):
        if value not in kind:
            raise ValueError(f"is {value!r}; it must be one of {', '.join(kind)}.")
        return value
    if isinstance(value, str) and value in option.words:
        return value
    if kind is str and isinstance(value, str):
        return _pattern(value)
    if kind is bool and str(value).lower() in _SWITCHES:
        return _SWITCHES[str(value).lower()]
    if kind in (int, float) and not isinstance(value, bool):
        # YAML reads 1e-4 as a text.
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if abs(number) <= _LARGEST and number == kind(number):
            return kind(number)
        if abs(number) > _LARGEST:
            raise ValueError(f"is {value!r}; it must be a number that float32 holds.")
    known = " or ".join([KINDS[kind], *option.words])
    raise ValueError(f"is {value!r}; it must be {known}.")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(
            f"is {text!r}, which is not a regular expression: {error}."
        ) from error
    return text


# mergekit's files also use numbers for true and false.
_SWITCHES = {"true": True, "1": True, "1.0": True}
_SWITCHES |= {"false": False, "0": False, "0.0": False}
_LARGEST = 3e38  # about the largest float32
KINDS = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
}
NUMBER, INTEGER, SWITCH = map(Option, (float, int, bool))
PATTERN = Option(str)
_COEF = Option(float, by_path=True)
_COEFS = Option(float, each=True, by_path=True)
_WEIGHTS = Option(float, each=True, keyword="weights")
# Methods that merge the sparse vectors of DARE and DELLA.
_INTO_MERGES: dict[str, Callable[..., Params]] = {
    "task_arithmetic": merge.task_arithmetic,
    "average": merge.average,
    "ties": merge.ties,
}
_INTO = Option(tuple(_INTO_MERGES))
_RESCALE = Option(("inverse", "l1", "none"))
# Weights in the layers of a stack; their names contain a number. T5's table of
# positions is one of them by name, but is not a linear layer.
_LINEAR = r"(?!.*relative_attention_bias).*\.\d+\..*weight"
NONE = r"(?!)"  # fits no name: in PyTorch no matrix is [input, output]


def _merged_into(
    into: str, params_0: Params, taus: Taus, coef: Any, density: float | None
) -> Params:
    if density is None:
        return _INTO_MERGES[into](params_0, taus, coef=coef)
    if into != "ties":
        raise ValueError(f"density is for into ties, but into is {into}. Leave it out.")
    return merge.ties(params_0, taus, coef=coef, density=density)


def _dare(
    params_0: Params,
    taus: Taus,
    *,
    drop_rate: float = DARE_RATE,
    strategy: Strategy = "random",
    rescale: Rescale = "inverse",
    into: str = "task_arithmetic",
    coef: Any = 1.0,
    density: float | None = None,
    key: jax.Array,
) -> Params:
    dropped = merge.drop(
        taus, drop_rate=drop_rate, strategy=strategy, rescale=rescale, key=key
    )
    return _merged_into(into, params_0, dropped, coef, density)


def _della(
    params_0: Params,
    taus: Taus,
    *,
    drop_rate: float = DELLA_RATE,
    epsilon: float = EPSILON,
    rescale: Rescale = "inverse",
    into: str = "ties",
    coef: Any = 1.0,
    density: float | None = None,
    key: jax.Array,
) -> Params:
    pruned = merge.magprune(
        taus, drop_rate=drop_rate, epsilon=epsilon, rescale=rescale, key=key
    )
    if density is None and into == "ties":
        density = 1.0  # the paper has no trim
    return _merged_into(into, params_0, pruned, coef, density)


def _bases(
    params_0: Params,
    taus: Taus,
    *,
    coef: float = 1.0,
    clusters: int | None = None,
    negative: float | None = None,
) -> Params:
    # Task arithmetic with the means of clusters, which is one with the task vectors.
    cosines = tree.cosine(tree.gram(taus))
    found = cluster(cosines, clusters, negative=negative)
    size = {task: len(members) for members in found for task in members}
    coefs = [coef / size[task] for task in range(len(taus))]
    return merge.task_arithmetic(params_0, taus, coef=coefs)


_wudi = functools.partial(merge.wudi, matrices=_LINEAR, in_out=NONE)
_iso_cts = functools.partial(merge.iso_cts, in_out=NONE)
_ace = functools.partial(merge.ace, matrices=_LINEAR, in_out=NONE)
_esm = functools.partial(merge.esm, matrices=_LINEAR, in_out=NONE)

PAPER = {
    "ace": Method(
        _ace,
        {
            "coef": _COEF,
            "eps": NUMBER,
            "switch": NUMBER,
            "share": NUMBER,
            "matrices": PATTERN,
            "in_out": PATTERN,
        },
    ),
    "average": Method(merge.average, {"weight": _WEIGHTS}, base="aside"),
    "task_arithmetic": Method(merge.task_arithmetic, {"coef": _COEFS}),
    "ties": Method(
        merge.ties,
        {
            "density": NUMBER,
            "coef": _COEF,
            "weight": _WEIGHTS,
            "trim": Option(("global", "tensor")),
            "aggregate": Option(("mean", "sum", "max")),
        },
        passes=6,
    ),
    "awd": Method(
        merge.awd,
        {
            "coef": _COEFS,
            "alpha": NUMBER,
            "step_size": NUMBER,
            "steps": INTEGER,
            "scope": Option(("global", "layer", "row")),
            "pattern": PATTERN,
            "objective": Option(("reduce", "reverse")),
            "solver": Option(("gradient_descent", "momentum", "direct", "adam")),
        },
        passes=2,
    ),
    "dare": Method(
        _dare,
        {
            "drop_rate": NUMBER,
            "strategy": Option(("random", "magnitude")),
            "rescale": _RESCALE,
            "into": _INTO,
            "coef": _COEFS,
            "density": NUMBER,
        },
        random=True,
    ),
    "della": Method(
        _della,
        {
            "drop_rate": NUMBER,
            "epsilon": NUMBER,
            "rescale": _RESCALE,
            "into": _INTO,
            "coef": _COEFS,
            "density": NUMBER,
        },
        passes=2,
        random=True,
    ),
    "bases": Method(
        _bases,
        {"coef": NUMBER, "clusters": INTEGER, "negative": NUMBER},
        passes=2,
        by_shape=False,
    ),
    "breadcrumbs": Method(
        merge.breadcrumbs, {"beta": NUMBER, "gamma": NUMBER, "coef": _COEFS}, passes=2
    ),
    "cart": Method(merge.cart, {"coef": _COEF, "rank": NUMBER, "matrices": PATTERN}),
    "consensus": Method(
        merge.consensus,
        {
            "least": INTEGER,
            "threshold": Option(float, each=True),
            "coef": _COEF,
            "of": Option(("task_arithmetic", "ties")),
            "density": NUMBER,
        },
    ),
    "dc_merge": Method(
        merge.dc_merge,
        {
            "coef": _COEF,
            "smoothing": Option(("none", "average", "linear")),
            "ratio": NUMBER,
            "keep": NUMBER,
            "matrices": PATTERN,
        },
    ),
    "esm": Method(
        _esm,
        {
            "coef": _COEF,
            "scaling": SWITCH,
            "singular_values": Option(("mean", "one")),
            "matrices": PATTERN,
            "in_out": PATTERN,
        },
        passes=2,
    ),
    "iso_c": Method(merge.iso_c, {"coef": _COEF, "matrices": PATTERN}),
    "iso_cts": Method(
        _iso_cts,
        {"coef": _COEF, "common": NUMBER, "matrices": PATTERN, "in_out": PATTERN},
    ),
    "karcher": Method(
        merge.karcher, {"max_iter": INTEGER, "tol": NUMBER}, base="aside"
    ),
    "magmax": Method(merge.magmax, {"coef": _COEF}),
    "model_stock": Method(merge.model_stock, {"coef": _COEF}),
    "pcb": Method(
        merge.pcb,
        {
            "density": NUMBER,
            "clip": NUMBER,
            "coef": _COEF,
            "cross": Option(("sum", "normalized")),
        },
        passes=45,
    ),
    "slerp": Method(
        merge.slerp,
        {"t": _COEF, "between": Option(("models", "task_vectors"))},
        base="aside",
    ),
    "topk": Method(merge.topk, {"density": NUMBER, "coef": _COEFS}, passes=8),
    "tsv": Method(merge.tsv, {"coef": _COEF, "matrices": PATTERN}),
    "wise_ft": Method(merge.wise_ft, {"coef": _COEF}),
    "wudi": Method(
        _wudi,
        {
            "coef": _COEF,
            "solver": Option(("adam", "closed")),
            "steps": INTEGER,
            "learning_rate": NUMBER,
            "time": NUMBER,
            "rank": Option(int, words=("participation",)),
            "weighting": Option(("norm", "none")),
            "matrices": PATTERN,
            "in_out": PATTERN,
            "others": Option(("pretrained", "average")),
        },
    ),
}
