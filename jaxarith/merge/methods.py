"""All merges by name, with the facts that a sweep over them needs.

    for name, method in merge.METHODS.items():
        if method.data or method.returns != "params":
            continue
        options = {"key": key} if method.key else {}
        for coef in method.search:
            params = method.function(
                params_0, taus[: method.most], coef=coef, **options
            )
            print(name, coef, score(params))

The table only describes the functions. Other code calls them by name, not through the
table. The guide's table and the command's help are made from it.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from jaxarith.merge.ace import ace
from jaxarith.merge.adamerging import adamerging
from jaxarith.merge.adamerging_tangent import adamerging_tangent
from jaxarith.merge.adarank import adarank
from jaxarith.merge.average import average
from jaxarith.merge.awd import awd
from jaxarith.merge.bases import bases, basis_vectors
from jaxarith.merge.breadcrumbs import breadcrumbs
from jaxarith.merge.cart import cart
from jaxarith.merge.consensus import consensus
from jaxarith.merge.curvature import curvature
from jaxarith.merge.dare import dare
from jaxarith.merge.dc_merge import dc_merge
from jaxarith.merge.della import della
from jaxarith.merge.emr import emr, emr_masks
from jaxarith.merge.esm import esm
from jaxarith.merge.fisher import fisher
from jaxarith.merge.greedy_soup import greedy_soup
from jaxarith.merge.iso_c import iso_c
from jaxarith.merge.iso_cts import iso_cts
from jaxarith.merge.isotropise import isotropise
from jaxarith.merge.karcher import karcher
from jaxarith.merge.lines import lines
from jaxarith.merge.localize_and_stitch import localize_and_stitch
from jaxarith.merge.magmax import magmax
from jaxarith.merge.model_stock import model_stock
from jaxarith.merge.pcb import pcb
from jaxarith.merge.polarize import polarize
from jaxarith.merge.regmean import regmean
from jaxarith.merge.regmean_plusplus import regmean_plusplus
from jaxarith.merge.slerp import slerp
from jaxarith.merge.stitch_twice import stitch_twice
from jaxarith.merge.subspace_boosting import subspace_boosting
from jaxarith.merge.surgery import surgery
from jaxarith.merge.svc import svc
from jaxarith.merge.tall_masks import tall_masks
from jaxarith.merge.task_arithmetic import task_arithmetic
from jaxarith.merge.ties import ties
from jaxarith.merge.topk import topk
from jaxarith.merge.tsv import tsv
from jaxarith.merge.wise_ft import wise_ft
from jaxarith.merge.wudi import wudi

Returns = Literal["params", "masks", "bases", "coefs", "soup", "surgery"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The facts about one merge, for a sweep or a table.

    Attributes:
      function: the merge, called as `function(params_0, taus, ...)`. Two take other
        arguments: `adamerging_tangent` takes outputs, and `surgery` takes features.
      paper: authors and year, and an arXiv number if the year is not enough.
      cost: how often the task vectors are read, and the other work.
      data: what it needs besides task vectors; "" if nothing.
      key: whether it takes the `key` of its random draws.
      least: the fewest task vectors that it merges.
      most: the most task vectors that it merges; None for any number.
      coef: default of the coefficient, which is the published value; None if the method
        has no coefficient.
      grid: the coefficients that the authors try on validation data; empty if none.
      returns: kind of the result; "params" is a tree with the structure of `params_0`.
    """

    function: Callable[..., Any]
    paper: str
    cost: str
    data: str = ""
    key: bool = False
    least: int = 1
    most: int | None = None
    coef: float | None = 1.0
    grid: tuple[float, ...] = ()
    returns: Returns = "params"

    @property
    def search(self) -> tuple[float, ...]:
        """The coefficients to try: the authors' grid, or else the published value."""
        return self.grid or (() if self.coef is None else (self.coef,))


def _grid(first: float, last: float, step: float) -> tuple[float, ...]:
    count = round((last - first) / step) + 1
    return tuple(round(float(x), 4) for x in np.linspace(first, last, count))


_WANG = "Wang et al. 2024"
_ZENG = "Zeng et al. 2025"
_MARCZAK = "Marczak et al. 2025"
_YANG = "Yang et al. 2024, arXiv:2310.02575"

METHODS: Mapping[str, Method] = types.MappingProxyType(
    {
        "average": Method(function=average, paper="Wortsman et al. 2022", cost="1"),
        "greedy_soup": Method(
            function=greedy_soup,
            paper="Wortsman et al. 2022, Recipe 1",
            cost="1 per candidate",
            data="a held-out score",
            coef=None,
            returns="soup",
        ),
        "wise_ft": Method(
            function=wise_ft,
            paper="Wortsman et al. 2022, arXiv:2109.01903",
            cost="1",
            most=1,
            coef=0.5,
            grid=_grid(0.0, 1.0, 0.1),
        ),
        "slerp": Method(
            function=slerp,
            paper="Shoemake 1985, as mergekit",
            cost="3",
            least=2,
            most=2,
        ),
        "karcher": Method(
            function=karcher, paper="Riemannian mean, as mergekit", cost="3"
        ),
        "model_stock": Method(
            function=model_stock, paper="Jang et al. 2024", cost="3", least=2
        ),
        "task_arithmetic": Method(
            function=task_arithmetic,
            paper="Ilharco et al. 2023",
            cost="1",
            grid=_grid(0.0, 1.0, 0.05),
        ),
        "ties": Method(
            function=ties,
            paper="Yadav et al. 2023",
            cost="8 to 15; 4 of large models in bfloat16",
            grid=_grid(0.8, 2.5, 0.1),
        ),
        "dare": Method(
            function=dare,
            paper="Yu et al. 2024",
            cost="2, and random numbers",
            key=True,
            grid=(0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        ),
        "della": Method(
            function=della,
            paper="Deep et al. 2024",
            cost="3, random numbers and ranks",
            key=True,
        ),
        "breadcrumbs": Method(
            function=breadcrumbs,
            paper="Davari, Belilovsky 2024",
            cost="16 to 24",
            coef=0.3,
        ),
        "magmax": Method(
            function=magmax,
            paper="Marczak et al. 2024",
            cost="2",
            coef=0.5,
        ),
        "topk": Method(function=topk, paper=_ZENG + ", appendix C.5", cost="7 to 14"),
        "pcb": Method(
            function=pcb,
            paper="Du et al. 2024",
            cost="24 to 46",
            grid=_grid(0.8, 1.3, 0.1),
        ),
        "emr": Method(
            function=emr, paper="Huang et al. 2024, the elected vector", cost="2"
        ),
        "emr_masks": Method(
            function=emr_masks,
            paper="Huang et al. 2024",
            cost="2",
            coef=None,
            returns="masks",
        ),
        "tall_masks": Method(
            function=tall_masks,
            paper=_WANG,
            cost="2, or TIES'",
            coef=None,
            returns="masks",
        ),
        "consensus": Method(
            function=consensus,
            paper=_WANG,
            cost="2, or TIES'",
            least=2,
            grid=_grid(0.1, 1.0, 0.1),
        ),
        "awd": Method(
            function=awd,
            paper="Xiong et al. 2024",
            cost="3",
            least=2,
            coef=0.3,
        ),
        "tsv": Method(
            function=tsv,
            paper="Gargiulo et al. 2025",
            cost="2, and SVDs of every matrix of every task",
        ),
        "dc_merge": Method(
            function=dc_merge,
            paper="Zhang et al. 2026, arXiv:2603.06242",
            cost="2, and SVDs of every matrix of every task",
        ),
        "cart": Method(
            function=cart,
            paper="Choi et al. 2024, arXiv:2412.12153",
            cost="2, and SVDs of every matrix of every task",
            coef=2.3,
        ),
        "iso_c": Method(
            function=iso_c, paper=_MARCZAK, cost="2, and an SVD of every matrix"
        ),
        "iso_cts": Method(
            function=iso_cts,
            paper=_MARCZAK,
            cost="2, and SVDs of every matrix of every task",
        ),
        "esm": Method(
            function=esm,
            paper="Li et al. 2026, arXiv:2602.20208, with Gram matrices or without",
            cost="3, and SVDs of every matrix of every task, twice",
        ),
        "ace": Method(
            function=ace,
            paper="Xu et al. 2026, arXiv:2603.02945",
            cost="2, and a product of every matrix of every task with itself",
        ),
        "wudi": Method(
            function=wudi,
            paper="Cheng et al. 2025",
            cost="2, and 300 steps on every matrix",
        ),
        "bases": Method(
            function=bases, paper=_ZENG, cost="2, and the inner merges", least=3
        ),
        "basis_vectors": Method(
            function=basis_vectors,
            paper=_ZENG,
            cost="2, and the inner merges",
            least=3,
            coef=None,
            returns="bases",
        ),
        "localize_and_stitch": Method(
            function=localize_and_stitch,
            paper="He et al. 2024, without data or with masks of `localize`",
            cost="7 to 12",
        ),
        "stitch_twice": Method(
            function=stitch_twice,
            paper=_ZENG,
            cost="2",
            data="masks of `localize`",
            coef=None,
        ),
        "fisher": Method(
            function=fisher,
            paper="Matena, Raffel 2022",
            cost="2; a backward pass per sample and class for `fisher_diagonal`",
            data="Fishers of unlabelled samples",
            coef=None,
        ),
        "regmean": Method(
            function=regmean,
            paper="Jin et al. 2023; LOT, Sun et al. 2025, by `on`",
            cost="2; a forward pass per sample for `capture.input_grams`",
            data="Gram matrices of unlabelled samples",
        ),
        "regmean_plusplus": Method(
            function=regmean_plusplus,
            paper="Nguyen et al. 2026",
            cost="half as many passes over the samples as layers",
            data="unlabelled samples",
            coef=None,
        ),
        "curvature": Method(
            function=curvature,
            paper="ours, after Tam et al. 2024",
            cost="2; 100 products with T curvatures",
            data="curvature of every task at the pre-trained model",
        ),
        "adamerging": Method(
            function=adamerging,
            paper=_YANG,
            cost="500 training steps",
            data="unlabelled samples",
            coef=None,
            returns="coefs",
        ),
        "adamerging_tangent": Method(
            function=adamerging_tangent,
            paper=_YANG + ", for linearised vectors",
            cost="500 steps of the heads alone",
            data="cached tangents",
            coef=None,
            returns="coefs",
        ),
        "adarank": Method(
            function=adarank,
            paper="Lee et al. 2026, arXiv:2503.22178",
            cost="10 000 training steps, and SVDs of every matrix of every task",
            data="unlabelled samples",
            coef=None,
            returns="coefs",
        ),
        "surgery": Method(
            function=surgery,
            paper="Yang et al. 2024, arXiv:2402.02705",
            cost="a small layer per task",
            data="unlabelled features",
            coef=None,
            returns="surgery",
        ),
    }
)
"""Every merge; an immutable mapping from the names of the functions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """The facts about one wrapper, for a sweep or a table.

    Attributes:
      function: the wrapper: `function(params_0, taus, merged, ...) -> params`.
      paper: authors and year, and an arXiv number if the year is not enough.
      does: its effect, in a few words.
      option: the option that is chosen on validation data.
    """

    function: Callable[..., Any]
    paper: str
    does: str
    option: str = "coef"


WRAPPERS: Mapping[str, Wrapper] = types.MappingProxyType(
    {
        "svc": Wrapper(
            function=svc,
            paper="Li et al. 2026",
            does="shortens directions that the tasks share",
        ),
        "lines": Wrapper(
            function=lines,
            paper="Wang et al. 2025, arXiv:2410.17146",
            does="larger coefficients for deeper blocks",
            option="beta",
        ),
        "subspace_boosting": Wrapper(
            function=subspace_boosting,
            paper="Skorobogat et al. 2025",
            does="raises small singular values",
        ),
        "isotropise": Wrapper(
            function=isotropise,
            paper=_MARCZAK,
            does="one singular value for each matrix",
        ),
        "polarize": Wrapper(
            function=polarize,
            paper="ESM, CVPR 2026, arXiv:2602.20208",
            does="large columns and layers grow, small ones shrink",
        ),
    }
)
"""Every wrapper. A wrapper changes the result of a merge; none needs data."""


def wrapper_table() -> str:
    """Returns `WRAPPERS` as a Markdown table."""
    lines = ["| wrapper | paper | what it does | chosen on validation data |"]
    lines += ["|:--|:--|:--|:--|"]
    for name, wrapper in WRAPPERS.items():
        chosen = f"`{wrapper.option}`"
        lines.append(f"| `{name}` | {wrapper.paper} | {wrapper.does} | {chosen} |")
    return "\n".join(lines)


def table() -> str:
    """Returns `METHODS` as a Markdown table."""
    lines = [
        "| method | paper | needs | coefficient: default, authors' range | cost |",
        "|:--|:--|:--|:--|:--|",
    ]
    for name, method in METHODS.items():
        needs = ", ".join(filter(None, [method.data, _number(method), _key(method)]))
        row = name, method.paper, needs, _coefficient(method), method.cost
        lines.append("| `{}` | {} | {} | {} | {} |".format(*row))
    return "\n".join(lines)


def _key(method):
    return "a random key" if method.key else ""


def _number(method):
    if method.least == method.most:
        return f"exactly {method.least} task vector{'s' * (method.least > 1)}"
    return f"{method.least} task vectors or more" if method.least > 1 else ""


def _coefficient(method):
    if method.coef is None:
        return ""
    if len(method.search) == 1:
        return f"{method.coef:g}"
    first, *_, last = method.search
    return f"{method.coef:g}; {first:g} to {last:g}, {len(method.search)} values"
