"""Scripts on curvature run; the choice of λ and the bank of factors keep their word."""

import dataclasses
import importlib
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import smoke

from experiments.common import training
from experiments.common.vision import curved, raw_tasks, scores, setups, vectors
from experiments.common.vision import options as vision
from experiments.curvature import (
    choose_coef,
    figure_rescaling,
    table1_addition,
    table2_negation,
    table3_merged,
    table_delta,
)
from jaxarith import curvature, task_vectors, tree
from jaxarith.models import clip

pytestmark = pytest.mark.usefixtures("shallow_clip")


@pytest.fixture
def setup(shared_bank, tmp_path):
    """The setup of a smoke run."""
    config = vision.OneModel(smoke=True, bank=shared_bank, out=tmp_path / "out")
    return setups.load(vision.started(config), config.model)


def test_addition_has_the_rows_of_the_paper_and_its_values(
    shared_bank, tmp_path, monkeypatch
):
    monkeypatch.setitem(vision.TITLES, str(clip.TINY_CLIP), "ViT-B-32")
    out = tmp_path / "out"
    found = smoke.run("curvature.table1_addition", out, bank=shared_bank)
    rows = {(row["method"], row["coefficient"]): row for row in found["rows"]}
    published = [key[1:] for key in table1_addition.PUBLISHED if key[0] == "ViT-B-32"]
    assert [key for key in rows if key in published] == published
    text = (out / "report.md").read_text()
    for value in (85.8, 97.6, 80.1):
        assert f" {value} |" in text
    assert all(0 <= row["abs"] <= 100 for row in rows.values())
    for name in table1_addition.METHODS:
        assert rows[name, "1.0"]["found"] == 1.0
        assert rows[name, "searched"]["found"] in (0.0, 0.5, 1.0)


def test_negation_subtracts_vectors_that_know_the_control(shared_bank, tmp_path):
    name = "curvature.table2_negation"
    found = smoke.run(name, tmp_path / "out", bank=shared_bank)
    methods = [row["method"] for row in found["rows"]]
    expected = [name for name in table2_negation.METHODS for _ in range(2)]
    assert methods == ["Pre-trained", *expected]
    for row in found["rows"][1:]:
        assert len(row["coefs"]) == 3 and 0 <= row["target"] <= 100
        assert row["control kept"] in ("yes", "no")


def test_all_forms_of_merged_curvature_have_rows(shared_bank, tmp_path):
    found = smoke.run("curvature.table3_merged", tmp_path / "out", bank=shared_bank)
    expected = [name for name in table3_merged.METHODS for _ in range(2)]
    assert [row["curvature"] for row in found["rows"]] == expected


def test_distilled_models_are_added_as_ordinary_ones(
    shared_bank, tmp_path, monkeypatch
):
    monkeypatch.setitem(vision.TITLES, str(clip.TINY_CLIP), "ViT-B-32")
    out = tmp_path / "out"
    found = smoke.run("curvature.table_delta", out, bank=shared_bank)
    rows = [(row["method"], row["coefficient"]) for row in found["rows"]]
    published = [key[1:] for key in table_delta.PUBLISHED]
    assert [row for row in rows if row in published] == published
    assert {"TSV-M", "Iso-C", "TIES"} <= {method for method, _ in rows}
    assert " 88.3 |" in (out / "report.md").read_text()


def test_attention_with_curvature_is_ordinary_training_of_its_weights(setup):
    recipe = vectors.recipe_of(setup, "attention_curvature", setup.tasks[0])
    assert recipe.penalty == "kronecker" and not recipe.linearized
    trained = vectors.vectors(setup, "attention_curvature")[0]
    expected = tree.select(setup.params_0, clip.ATTENTION_WEIGHTS)
    assert tree.flatten(trained).keys() == tree.flatten(expected).keys()
    assert any(np.any(leaf) for leaf in jax.tree.leaves(trained))


def test_distillation_knows_the_curvature_of_the_control_alone(setup):
    assert not vectors.is_linearized("delta") and vectors.is_penalised("delta")
    others = vectors.others_of(setup, "delta", setup.tasks[0])
    assert [task.name for task in others] == [vision.SMOKE[-1]]
    recipe = vectors.recipe_of(setup, "delta", setup.tasks[0])
    assert recipe.distill and recipe.penalty == "kronecker" and not recipe.linearized


def test_small_tasks_need_no_data():
    names = {"tasks": ("uci_digits",), "control": "mnist"}
    config = vision.Options(source="small", samples=4, **names)
    found = raw_tasks.of_options(config, control=True)
    assert [task.name for task in found] == ["uci_digits", "mnist"]
    assert [len(task.test) for task in found] == [4, 4]


def test_rescaling_has_a_curve_for_every_method(shared_bank, tmp_path):
    name = "curvature.figure_rescaling"
    found = smoke.run(name, tmp_path / "out", bank=shared_bank)
    assert found["coefs"] == [0.0, 1.0, 2.0]
    merges = ["TSV-M", "Iso-C", "TIES"]
    assert list(found["curves"]) == [*figure_rescaling.LINEARIZED, *merges]
    at_zero = {curve[0] for curve in found["curves"].values()}
    assert len(at_zero) == 1  # all are the pre-trained model there
    for row in found["rows"]:
        curve = found["curves"][row["method"]]
        assert row["best"] == max(curve) and row["at 2.0"] == curve[2]
        assert row["lowest from 0.5, % of best"] == 100 * min(curve[1:]) / max(curve)


def test_probes_and_images_are_varied_one_at_a_time(shared_bank, tmp_path):
    name = "curvature.figure_probes_samples"
    found = smoke.run(name, tmp_path / "out", bank=shared_bank)
    measured = [(row["probes"], row["images"]) for row in found["probes"]]
    assert measured == [(1, 8), (2, 8)]
    measured = [(row["probes"], row["images"]) for row in found["images"]]
    assert measured == [(1, 4), (1, 8)]
    assert found["probes"][0] == found["images"][1]
    assert (tmp_path / "out" / "figure_images.png").exists()


def choose(shared_bank, out, **more):
    """The choice of λ of a smoke run."""
    options = {"coefs": (0.05, 5.0), "bank": shared_bank} | more
    return smoke.run("curvature.choose_coef", out, **options)


@pytest.mark.parametrize("method", ["curvature", "tau_jp_cyclic"])
def test_the_weight_with_the_best_sum_is_chosen_and_its_vectors_are_kept(
    method, setup, shared_bank, tmp_path, monkeypatch
):
    found = choose(shared_bank, tmp_path / "choice", method=method)
    rows = found["rows"]
    assert [row["λ"] for row in rows] == [0.05, 5.0]
    best = max(rows, key=lambda row: row["sum"])["λ"]
    option = vectors.coef_option(method)
    assert found["chosen"] == {"method": method, "option": option, "coef": best}
    flag = f"Chosen: --{option.replace('_', '-')} {best:g}"
    assert flag in (tmp_path / "choice" / "report.md").read_text()
    # The same λ in another script takes these vectors, and trains none.
    monkeypatch.setattr(training.train, "fine_tune", lambda *_, **__: pytest.fail())
    for row in rows:
        config = dataclasses.replace(setup.options, **{option: row["λ"]})
        taus = vectors.vectors(setup._replace(options=config), method)
        total = [task_vectors.add(taus)]
        both = [
            scores.on_all(setup, total, "validation", [[1.0]], linearized=True)[0],
            scores.on_own(setup, taus, "validation", linearized=True)[0],
        ]
        expected = {"sum": scores.means(both[0]), "alone": scores.means(both[1])}
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, atol=1e-4)


def test_one_task_decides_where_it_is_named(shared_bank, tmp_path):
    found = choose(shared_bank, tmp_path / "all")
    one = choose(shared_bank, tmp_path / "one", choose_on="uci_digits")
    assert "on uci_digits" in (tmp_path / "one" / "report.md").read_text()
    assert [row["λ"] for row in one["rows"]] == [row["λ"] for row in found["rows"]]
    assert one["rows"] != found["rows"]


def test_of_equal_weights_the_first_is_chosen():
    accuracies = np.array([[[0.5, 0.7], [0.7, 0.5]], [[1.0, 1.0], [0.9, 0.5]]])
    first, second = choose_coef.rows_of([0.1, 1.0], accuracies)
    assert first == {"λ": 0.1, "sum": 60.0, "normalised": 60.0, "alone": 100.0}
    assert max([first, second], key=lambda row: row["sum"]) is first
    np.testing.assert_allclose(second["normalised"], 100 * (7 / 9 + 1) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefs": (0.0, 1.0)}, "above 0"),
        ({"coefs": (1.0, float("nan"))}, "above 0"),
        ({"coefs": (1.0, float("inf"))}, "above 0"),
        ({"coefs": (1.0, 1.0)}, "each only once"),
        ({"choose_on": "cars"}, "--choose-on cars is not among --tasks"),
    ],
)
def test_a_wrong_candidate_is_found_before_anything_is_read(options, message, tmp_path):
    config = choose_coef.Config(
        smoke=True, out=tmp_path / "out", bank=tmp_path / "bank", **options
    )
    with pytest.raises(ValueError, match=message):
        choose_coef.main(config)
    assert not list(tmp_path.iterdir())


def test_the_bank_gives_factors_again_and_none_of_other_data(setup, monkeypatch):
    kind, task = curved.KINDS["curvature"], setup.tasks[0]
    first = curved.factors_of(setup, kind, task)
    file = curved.file_of(setup, kind, task)
    assert file.parent.name == "factors_whole_samples_8_probes_1_rank_2"
    _, metadata = curvature.load(file, setup.params_0)
    assert metadata["task"] == "mnist"
    monkeypatch.setattr(
        curved.curvatures, "collected", lambda *_, **__: pytest.fail("measured anew")
    )
    again = curved.factors_of(setup, kind, task)
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    other = task._replace(identity=task.identity | {"labels": 1})
    with pytest.raises(
        ValueError, match=r"(?s)measured with another configuration.*task/labels"
    ):
        curved.factors_of(setup, kind, other)


def test_factors_are_those_of_the_first_images_in_the_order_of_the_seed(setup):
    task = setup.tasks[0]
    found = curved.factors_of(setup, curved.Kind(sharing=None), task)
    assert float(found.samples) == 8 and not found.layers and not found.sketch
    # The trace of E[JᵀJ] by one probe: positive for every leaf that moves features.
    squares = {path: leaf.sum() for path, leaf in found.diagonal.items()}
    assert sorted(squares) == sorted(tree.flatten(setup.params_0))
    assert sum(value > 0 for value in squares.values()) > len(squares) / 2


def test_curvature_of_others_is_their_merge_and_shared_is_one_for_all(setup):
    kind = curved.KINDS["curvature"]
    groups = [vectors.others_of(setup, "curvature", task) for task in setup.tasks]
    assert [task.name for task in groups[0]] == [*vision.SMOKE[1:]]
    functions = curved.functions(setup, kind, groups)
    assert len(set(functions)) == 3
    expected = curvature.merge([curved.factors_of(setup, kind, x) for x in groups[0]])
    expected = curvature.calibrate(expected)
    found = functions[0]()
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    shared = [vectors.others_of(setup, "curvature_shared", t) for t in setup.tasks]
    assert [task.name for task in shared[0]] == [*vision.SMOKE]
    assert len(set(curved.functions(setup, kind, shared))) == 1


@pytest.mark.parametrize(("limit", "expected"), [(None, [3]), (1, [1, 1, 1])])
def test_tasks_with_their_own_curvature_train_side_by_side_where_there_is_room(
    limit, expected, setup, monkeypatch
):
    groups = {}

    def vectors_of(options, network, wanted, *, together, observe):
        found = [len(group) for group in training.alike(wanted, together)]
        groups[wanted[0].identity["method"]] = found
        return []

    monkeypatch.setattr(vectors.training, "vectors", vectors_of)
    stats = {} if limit is None else {"bytes_limit": limit}
    device = SimpleNamespace(memory_stats=lambda: stats)
    mesh = SimpleNamespace(shape={"task": 1, "data": 1}, local_devices=[device])
    monkeypatch.setattr(training, "check", lambda *_: None)
    for method in ("curvature", "curvature_shared", "tau_jp_cyclic", "linear"):
        vectors.of_tasks(setup._replace(mesh=mesh), method, setup.tasks, folder=method)
    assert groups.pop("curvature") == expected
    assert list(groups.values()) == [[3], [3], [3]]


def test_eight_devices_give_the_vectors_of_one(setup, tmp_path):
    found = []
    for mesh in ("data=1", "data=4,task=2"):
        place = {"bank": tmp_path / mesh / "bank", "out": tmp_path / mesh / "out"}
        config = dataclasses.replace(
            setup.options, tasks=vision.SMOKE[:2], batch_size=32, mesh=mesh, **place
        )
        own = setups.load(config, setup.model)
        found.append(vectors.vectors(own, "curvature"))
    for one, eight in zip(*found, strict=True):
        # Adam divides by the size of a gradient, however small it is.
        distance = optax.tree.norm(task_vectors.difference(eight, one))
        assert distance < 0.02 * optax.tree.norm(one)


def test_options_of_tau_jp_do_not_tell_vectors_with_curvature_apart(setup):
    config = dataclasses.replace(setup.options, penalty_power=1, penalty_coef=7.0)
    recipes = [
        vectors.recipe_of(setup._replace(options=c), "curvature", setup.tasks[0])
        for c in (setup.options, config)
    ]
    assert recipes[0] == recipes[1]
    assert recipes[0].penalty == "kronecker" and recipes[0].linearized
    assert recipes[0].penalty_coef == setup.options.curvature_coef
    diagonal = vectors.recipe_of(setup, "curvature_diagonal", setup.tasks[0])
    assert diagonal.penalty == "diagonal"
    assert diagonal.penalty_coef == setup.options.diagonal_coef


def test_every_method_is_one_that_finetune_takes():
    finetune = importlib.import_module("experiments.finetune")
    config = finetune.Config(task="dtd", method="curvature")
    needed, control = finetune.needed(config)
    assert control and needed.tasks == config.tasks


@pytest.mark.parametrize(
    "option", ["curvature_coef", "diagonal_coef", "distill_coef", "penalty_coef"]
)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_named(option, value, tmp_path):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} .*0 or more"):
        choose_coef.Config(out=tmp_path, **{option: value})
