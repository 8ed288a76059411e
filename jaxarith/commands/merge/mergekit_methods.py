"""mergekit's merge methods by name, with mergekit's options and defaults."""

import functools
from collections.abc import Mapping

from jaxarith.commands.merge.methods import (
    INTEGER,
    NUMBER,
    SWITCH,
    Method,
    Option,
)
from jaxarith.merge import mergekit
from jaxarith.merge.mergekit.arithmetic import MethodName

# mergekit sets this option for each model, layer or filter, and requires it.
_WEIGHT = Option(float, each=True, by_path=True, required=True)
_GENERAL = {
    "weight": _WEIGHT,
    "density": Option(float, each=True, by_path=True, default=1.0),
    "normalize": SWITCH,
    "rescale": SWITCH,
    "lambda": Option(float, by_path=True, keyword="coef", default=1.0),
    "int8_mask": Option(bool, keyword=""),
}
_GAMMA = {"gamma": Option(float, each=True, by_path=True, default=0.01)}
_EPSILON = {"epsilon": Option(float, each=True, by_path=True, default=0.15)}
_L1 = "kept entries are scaled to the tensor's L1 norm, as in mergekit, not by 1/p"


def _general(
    method: MethodName,
    options: Mapping[str, Option] | None = None,
    *,
    note: str = "",
    random: bool = False,
) -> Method:
    merge_leaves = functools.partial(
        mergekit.generalized_task_arithmetic, method=method
    )
    return Method(
        merge_leaves, {**_GENERAL, **(options or {})}, random=random, note=note
    )


MERGEKIT = {
    "linear": Method(
        mergekit.linear, {"weight": _WEIGHT, "normalize": SWITCH}, base="input"
    ),
    "passthrough": Method(
        mergekit.passthrough,
        {"scale": Option(float, each=True, by_path=True, default=1.0)},
        base="input",
        models=1,
    ),
    "slerp": Method(
        mergekit.slerp, {"t": Option(float, by_path=True, required=True)}, base="input"
    ),
    "nuslerp": Method(
        mergekit.nuslerp,
        {
            "weight": _WEIGHT,
            "nuslerp_flatten": Option(bool, keyword="flatten"),
            "nuslerp_row_wise": Option(bool, keyword="row_wise"),
        },
        base="optional",
    ),
    "multislerp": Method(
        mergekit.multislerp,
        {
            "weight": _WEIGHT,
            "normalize_weights": Option(bool, keyword="normalize"),
            "eps": NUMBER,
        },
        base="optional",
    ),
    "karcher": Method(
        mergekit.karcher, {"max_iter": INTEGER, "tol": NUMBER}, base="input"
    ),
    "task_arithmetic": _general("task_arithmetic"),
    "ties": _general(
        "ties",
        note=(
            "trims every tensor separately and takes a weighted mean, as in mergekit; "
            "`preset: paper` has one threshold for the whole model"
        ),
    ),
    "dare_linear": _general("dare_linear", note=_L1, random=True),
    "dare_ties": _general("dare_ties", note=_L1, random=True),
    "breadcrumbs": _general("breadcrumbs", _GAMMA),
    "breadcrumbs_ties": _general("breadcrumbs_ties", _GAMMA),
    "della": _general("della", _EPSILON, note=_L1, random=True),
    "della_linear": _general("della_linear", _EPSILON, note=_L1, random=True),
    "model_stock": Method(
        mergekit.model_stock,
        {"filter_wise": SWITCH},
        note=(
            "moves away from the mean where the mean cosine is negative, as in "
            "mergekit; `preset: paper` stays at the base there"
        ),
    ),
    "sce": Method(
        mergekit.sce,
        {
            "select_topk": Option(float, by_path=True, default=1.0),
            "int8_mask": Option(bool, keyword=""),
        },
    ),
    "nearswap": Method(
        mergekit.nearswap, {"t": Option(float, by_path=True, required=True)}
    ),
    "arcee_fusion": Method(
        mergekit.arcee_fusion,
        {},
        note=(
            "its quantiles use all entries; mergekit draws a million of them without a "
            "seed"
        ),
    ),
    "ram": Method(mergekit.ram, {"epsilon": NUMBER}),
    "ramplus_tl": Method(
        mergekit.ramplus_tl, {"r": NUMBER, "alpha": NUMBER, "epsilon": NUMBER}
    ),
}
