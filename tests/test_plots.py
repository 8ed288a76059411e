"""Figures: one style for all, which grey and colour-blind readers can read."""

import itertools

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb

from experiments.common import study_merges
from experiments.common.studies import report
from jaxarith import plots
from jaxarith.plots import style

TASKS = ["one", "two", "three"]


def test_every_family_has_its_own_look_in_grey_too():
    for first, second in itertools.combinations(style.FAMILIES.values(), 2):
        assert first.color != second.color and first.marker != second.marker
        assert (first.dash, lightness(first)) != (second.dash, lightness(second))
        hatches = first.hatch != second.hatch
        assert hatches or abs(lightness(first) - lightness(second)) > 0.2


def lightness(own):
    return round(float(np.dot(to_rgb(own.color), (0.3, 0.59, 0.11))), 2)


FAMILIES = {
    "zero-shot": "alone",
    "pre-trained": "alone",
    "individual_linear": "alone",
    "ordinary": "ordinary sum",
    "nonlinear, task arithmetic": "ordinary sum",
    "AWD": "ordinary sum",
    "linearised": "linearised",
    "linearised + τJp": "τJp",
    "linearised + cyclic τJp": "τJp",
    "linearised + curvature": "curvature",
    "ordinary, DARE and TIES": "sign or trim",
    "TSV-M": "spectral",
    "Iso-CTS": "spectral",
    "AdaMerging, layer-wise": "data",
    "mnist": None,
    "seed 1": None,
}


@pytest.mark.parametrize("label", FAMILIES)
def test_a_label_tells_its_family(label):
    assert style.family(label) == FAMILIES[label]


def test_every_merge_of_a_study_has_a_name_and_a_family():
    for merge in ("task_arithmetic", *study_merges.ALL):
        assert style.family(report.name_of("nonlinear", merge))


def test_labels_of_one_figure_all_differ():
    labels = ["TIES", "DARE", "Consensus", "ordinary", *(f"task {i}" for i in range(9))]
    found = style.styles(labels)
    assert list(found) == labels and len(set(found.values())) == len(labels)
    assert found["TIES"] == style.FAMILIES["sign or trim"]
    # A figure without families takes their colours in order.
    assert [*style.styles(TASKS).values()] == [*style.FAMILIES.values()][:3]


def test_places_are_apart_and_as_near_as_can_be():
    rng = np.random.default_rng(0)
    for places in (rng.random(12), np.full(5, 0.3), np.arange(4.0)):
        found = np.array(style.spread(list(places), 0.08))
        assert (np.diff(np.sort(found)) > 0.08 - 1e-5).all()
        assert (np.diff(found[np.argsort(places, kind="stable")]) > 0).all()
        assert found.mean() == pytest.approx(places.mean(), abs=1e-5)
    assert style.spread([0.9, 0.1], 0.2) == [0.9, 0.1]


def test_the_figures_show_every_sum_and_the_best_of_the_other_families():
    def row(method, merge, searched, absolute):
        return dict(method=method, merge=merge, searched=searched, absolute=absolute)

    rows = [
        row("zero_shot", "none", False, 0.6),
        row("individual_nonlinear", "none", False, 0.95),
        row("nonlinear", "task_arithmetic", False, 0.3),
        row("nonlinear", "task_arithmetic", True, 0.7),
        row("nonlinear", "awd", True, 0.72),
        row("nonlinear", "ties", False, 0.9),
        row("nonlinear", "ties", True, 0.74),
        row("nonlinear", "consensus", True, 0.75),
        row("nonlinear", "fisher", False, 0.71),
        row("curvature", "task_arithmetic", True, 0.86),
    ]
    found = report.best_of_families(rows)
    assert {name: r["absolute"] for name, r in found.items()} == {
        "linearised + curvature, sum": 0.86,
        "ordinary, Consensus": 0.75,
        "ordinary, Fisher": 0.71,
        "ordinary, sum": 0.7,
        "zero-shot": 0.6,
    }
    assert list(found)[0] == "linearised + curvature, sum"


def draw(name, path):
    """One figure of each kind that no other test draws."""
    values = {"ordinary": [0.3, 0.4, 0.5], "TIES": [0.5, 0.2, 0.1]}
    grid, coefs = np.ones((3, 3)), np.linspace(-1, 1, 3)
    one = {label: own[0] for label, own in values.items()}
    return {
        "by_task": lambda: plots.by_task(path, values, TASKS, x="a"),
        "horizontal_bars": lambda: plots.horizontal_bars(path, values, TASKS, x="a"),
        "ranked": lambda: plots.ranked(path, one, x="a"),
        "overview": lambda: plots.overview(
            path, {"x": grid}, coefs, ("a", "b"), one, one, x="a", tick="b"
        ),
        "bands": lambda: plots.bands(
            path, {"x": ([1, 2], [0.1, 0.2], [0.1, 0.1])}, x="a", y="b", interval="c"
        ),
        "repeated": lambda: plots.repeated(
            path, [1, 2], {"x": [[0.1, 0.2], [0.3]]}, {"level": 0.2}, x="a", y="b"
        ),
        "points": lambda: plots.scatter(
            path, {"x": {"a": ([1], [2]), "b": ([2], [2.1])}}, x="a", y="b"
        ),
    }[name]()


@pytest.mark.parametrize(
    "name",
    ["by_task", "horizontal_bars", "ranked", "overview", "bands", "repeated", "points"],
)
def test_a_figure_is_a_picture_with_ink_on_white(name, tmp_path):
    picture = draw(name, tmp_path / "x.png")
    assert picture == tmp_path / "x.png" and list(tmp_path.iterdir()) == [picture]
    assert picture._repr_png_().startswith(b"\x89PNG")
    pixels = image.imread(picture)[..., :3]
    assert 0.003 < np.mean(pixels.min(axis=-1) < 0.9) < 0.7
    # Nothing is cut: the rim is white.
    rim = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all(np.all(side > 0.99) for side in rim)
