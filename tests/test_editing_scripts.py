"""The image scripts of Ilharco et al. (2023) run, and measure what the paper does."""

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import smoke
from PIL import Image

from experiments.common.vision import options, pairwise
from experiments.editing import (
    custom,
    figure2_subsets,
    figure7_during_training,
    ocr,
    table1_forgetting,
    table8_class_overlap,
    table12_subpopulations,
)
from jaxarith.models import clip

TABLES = {  # and which fields of a row are a key of PUBLISHED
    "table1_forgetting": ("method",),
    "table11_kings_and_queens": ("method", "place"),
    "table12_subpopulations": ("samples", "task vectors"),
}
FIGURES = (
    "figure2_subsets",
    "figure5_cosine",
    "figure7_during_training",
    "figure8_ensembles",
    "figure9_forgetting_curves",
    "figure12_more_tasks",
    "figure17_imagenet",
)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_rows_of_the_paper_in_its_order(
    name, shared_bank, tmp_path, monkeypatch
):
    script = importlib.import_module(f"experiments.editing.{name}")
    # As one of the paper's models, so that its figures stand beside.
    monkeypatch.setitem(options.TITLES, str(clip.TINY_CLIP), "ViT-B-32")
    out = tmp_path / "out"
    found = smoke.run(f"editing.{name}", out, bank=shared_bank)
    printed = [tuple(row[key] for key in TABLES[name]) for row in found["rows"]]
    wanted = [key[1:] for key in script.PUBLISHED if key[0] == "ViT-B-32"]
    assert printed == [key for key in wanted if key in printed]
    assert len(printed) >= 4 and "published" in (out / "report.md").read_text()


def test_class_overlap_filters_the_control_alone(shared_bank, tmp_path):
    found = smoke.run("editing.table8_class_overlap", tmp_path / "o", bank=shared_bank)
    rows = found["rows"]
    assert [row["filtering"] for row in rows] == ["no"] * 6 + ["yes"] * 6
    for before, after in zip(rows[:6], rows[6:], strict=True):
        assert before["task"] == after["task"] and before["method"] == after["method"]
        if before["method"] != "Negative task vector":
            assert before["target"] == after["target"]
    assert {len(names) for names in found["excluded"].values()} == {2}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn(name, shared_bank, tmp_path):
    found = smoke.run(f"editing.{name}", tmp_path / "out", bank=shared_bank)
    assert found["rows"]


def test_a_script_whose_trainings_have_other_options_goes_on_in_its_folder(
    shared_bank, tmp_path
):
    found = smoke.run("editing.figure6_variations", tmp_path, bank=shared_bank)
    assert found["rows"]
    assert smoke.run("editing.figure6_variations", tmp_path, bank=shared_bank) == found


def test_published_means_are_those_of_the_published_tasks():
    published = table1_forgetting.PUBLISHED
    for key in {key[:2] for key in table1_forgetting.PUBLISHED_TASKS}:
        own = [v for k, v in table1_forgetting.PUBLISHED_TASKS.items() if k[:2] == key]
        assert len(own) == 8
        np.testing.assert_allclose(np.mean(own, 0), published[key], atol=0.11)


def test_published_averages_are_those_of_the_published_subpopulations():
    for *own, mean in table12_subpopulations.PUBLISHED.values():
        np.testing.assert_allclose(np.mean(own), mean, atol=1.1e-3)


def test_subsets_are_all_by_size_and_in_order():
    found = pairwise.subsets(4)
    every = {tuple(row) for row in itertools.product((0, 1), repeat=4)}
    assert found.shape == (16, 4) and {tuple(row) for row in found} == every
    assert list(found.sum(1)) == sorted(found.sum(1))
    assert [list(np.flatnonzero(row)) for row in found if row.sum() == 2] == [
        list(pair) for pair in pairwise.pairs(4)
    ]


def test_a_subset_takes_the_coefficient_that_is_best_for_the_tasks_that_count():
    rng = np.random.default_rng(0)
    curves, members = rng.random((8, 5, 3)), pairwise.subsets(3)
    found = figure2_subsets.choose(curves, members)
    for i, own in enumerate(members):
        means = [np.mean(row[own == 1]) if own.any() else 0.0 for row in curves[i]]
        assert found[i] == int(np.argmax(means))


def test_an_analogy_is_exact_where_differences_are():
    base, row, column = np.random.default_rng(0).normal(size=(3, 5)).astype("f4")
    values = (base, base + column, base + row, base + row + column)
    taus = [{"w": value} for value in values]
    for i, tau in enumerate(taus):
        others = [{"w": np.full(5, np.nan, "f4")} if i == j else x
                  for j, x in enumerate(taus)]  # fmt: skip
        found = custom.analogy(others, i)["w"]
        np.testing.assert_allclose(found, tau["w"], atol=1e-5)


def test_a_class_that_is_left_out_leaves_the_others_in_their_order():
    source = [{"image": i, "label": i % 4} for i in range(10)]
    found = custom.some_classes(source, [3, 1])
    assert [found[i]["image"] for i in range(len(found))] == [1, 3, 5, 7, 9]
    assert found.labels.tolist() == [1, 0, 1, 0, 1]
    drawn = custom.per_class(source, 2, seed=0)
    assert np.bincount(drawn.labels).tolist() == [2, 2, 2, 2]


def test_what_is_written_is_never_what_the_image_shows():
    gray = Image.new("RGB", (64, 48), (128, 128, 128))
    source = [{"image": gray, "label": i % 3} for i in range(60)]
    found = ocr.Written(source, ("church", "a long name of a place", "sea"), seed=0)
    shown = np.array([sample["label"] for sample in source])
    assert len(found) == 60 and not (found.labels == shown).any()
    assert set(found.labels) == {0, 1, 2}
    sample = found[7]
    assert sample["label"] == found.labels[7] and sample["image"].size == gray.size
    assert (np.asarray(sample["image"]) != 128).any()
    assert (np.asarray(found[7]["image"]) == np.asarray(sample["image"])).all()


def test_classes_that_the_control_lacks_are_an_error(tmp_path):
    file = Path(tmp_path / "excluded.json")
    file.write_text(json.dumps({"sun397": ["a class of nothing"]}))
    config = table8_class_overlap.Config(tasks=("sun397",), excluded=file)
    with pytest.raises(ValueError, match="a class of nothing"):
        table8_class_overlap.excluded_classes(config, ["tench", "jeep"])
    file.write_text(json.dumps({"sun397": ["jeep"]}))
    found = table8_class_overlap.excluded_classes(config, ["tench", "jeep"])
    assert found == {"sun397": {1}}


@pytest.mark.parametrize(
    ("steps", "snapshots", "message"),
    [([5, 5], 5, "1 to 4"), ([5, 5], 0, "1 to 4"), ([5, 6], 1, "same step")],
)
def test_a_curve_needs_vectors_of_the_same_steps(steps, snapshots, message):
    figure7_during_training.check_steps([5, 5], 4)
    with pytest.raises(ValueError, match=message):
        figure7_during_training.check_steps(steps, snapshots)
