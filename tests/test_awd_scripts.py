"""The scripts on AWD run, and their rows are those of the paper in its order."""

import importlib

import jax
import numpy as np
import pytest
import smoke
from scipy import stats

from experiments.awd import (
    beyond,
    disentangled,
    figure3_number_of_tasks,
    figure5_landscape,
    solving,
    table1_addition,
    table5_cost,
    table6_reversed,
    table10_unseen,
    table_scopes,
)
from experiments.common.vision import options as vision
from experiments.common.vision import setups
from jaxarith import evaluate, merge, task_vectors, tree
from jaxarith.models import clip

HOW = solving.Options()
MODEL = str(clip.TINY_CLIP)


@pytest.fixture
def as_b32(monkeypatch):
    """The tiny CLIP counts as ViT-B-32, so that its published values stand beside."""
    monkeypatch.setitem(vision.TITLES, MODEL, "ViT-B-32")


@pytest.mark.parametrize(
    ("script", "keys"),
    [(table1_addition, ["method"]), (table6_reversed, ["objective", "method"])],
)
def test_the_rows_of_every_method_are_the_papers_in_its_order(
    script, keys, as_b32, shared_bank, tmp_path
):
    name = script.__name__.removeprefix("experiments.")
    # What is not in the paper has a test of its own below.
    options = {"beyond_paper": False} if script is table1_addition else {}
    found = smoke.run(name, tmp_path / "out", bank=shared_bank, **options)
    beside = [row for row in found["rows"] if row["cosine with sum"] is not None]
    assert {row["method"] for row in beside} == {"AWD Task Arithmetic"}
    assert all(0 < row["cosine with sum"] < 1.0001 for row in beside)
    rows = [tuple(row[key] for key in keys) for row in found["rows"]]
    published = script.PUBLISHED["ViT-B-32"]
    expected = [key if isinstance(key, tuple) else (key,) for key in published]
    assert rows == expected
    text = (tmp_path / "out" / "report.md").read_text()
    for values in published.values():
        assert f" {values[-1]} " in text
        assert f" {values[disentangled.TASKS.index('mnist')]} " in text


def test_published_values_are_the_means_that_the_paper_prints():
    for table in (table1_addition.PUBLISHED, table6_reversed.PUBLISHED):
        for model, rows in table.items():
            for row, (*values, mean) in rows.items():
                assert len(values) == 8
                assert abs(np.mean(values) - mean) < 0.45, (model, row)
    for row in table10_unseen.PUBLISHED.values():
        assert len(row) == 10 and abs(np.mean(row[7:9]) - row[9]) < 0.11


def test_the_tasks_that_are_not_merged_stand_beside_those_that_are(
    shared_bank, tmp_path
):
    found = smoke.run("awd.table10_unseen", tmp_path / "out", bank=shared_bank)
    assert [row["method"] for row in found["rows"]] == [
        "Task Arithmetic",
        "AWD Task Arithmetic",
    ]
    assert [row["cosine with sum"] is None for row in found["rows"]] == [True, False]
    for row in found["rows"]:
        seen = [row["mnist"], row["mnist_rotated"]]
        np.testing.assert_allclose(row["mean of the seen"], np.mean(seen))
        assert row["mean of the unseen"] == row["uci_digits"]


def test_the_cost_of_both_solvers_is_measured_beside_the_published(tmp_path):
    found = smoke.run("awd.table5_cost", tmp_path / "out")
    solvers = ("gradient_descent", "adam")
    expected = [(model, s) for model in table5_cost.PUBLISHED for s in solvers]
    assert [(row["model"], row["solver"]) for row in found["rows"]] == expected
    layers, width, hidden = table5_cost.SMOKE
    entries = layers * (4 * width**2 + 2 * width * hidden)
    for row in found["rows"]:
        assert row["parameters"] == entries and row["seconds"] > 0
        assert row["GB"] >= 4 * 10 * entries / 1e9  # nine arguments and the result


def test_drawn_vectors_have_the_shapes_of_the_linear_weights_of_a_clip():
    checkpoint = clip.load(MODEL)
    weights = tree.flatten(tree.select(checkpoint.params, clip.BLOCK_LINEAR_WEIGHTS))
    config = checkpoint.config.vision
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    [tau] = table5_cost.vectors_of(shape, 1)
    found = {path: leaf.shape for path, leaf in tree.flatten(tau).items()}
    assert found == {path: leaf.shape for path, leaf in weights.items()}


def test_accuracy_by_the_number_of_tasks_is_the_mean_over_their_subsets(
    as_b32, shared_bank, tmp_path
):
    out = tmp_path / "out"
    found = smoke.run("awd.figure3_number_of_tasks", out, bank=shared_bank)
    expected = [(n, m) for n in (2, 3) for m in figure3_number_of_tasks.METHODS]
    assert [(row["number"], row["method"]) for row in found["rows"]] == expected
    assert [row["subsets"] for row in found["rows"]] == 4 * [3] + 4 * [1]
    for row in found["rows"]:
        assert (row["effective λ"] is None) == (row["method"] != "AWD Task Arithmetic")
        own = [
            subset["mean"]
            for subset in found["subsets"]
            if (subset["number"], subset["method"]) == (row["number"], row["method"])
        ]
        np.testing.assert_allclose(row["mean"], np.mean(own))
    # At λ = 0 every method is the pre-trained model.
    assert len({curve[0] for curve in found["curves"].values()}) == 1
    assert "92.6" in (out / "report.md").read_text()


def test_subsets_of_the_papers_tasks_are_those_that_it_lists():
    found = figure3_number_of_tasks.subsets_of(disentangled.TASKS, seed=0)
    sizes = [len(subset) for subset in found]
    assert sizes == [n for n in range(2, 8) for _ in range(8)] + [8]
    for subset in found:
        assert set(subset) <= set(disentangled.TASKS)
        assert len(set(subset)) == len(subset)


def test_subsets_of_other_tasks_are_all_or_eight_drawn_of_each_size():
    found = figure3_number_of_tasks.subsets_of("abcdef", seed=0)
    assert [len(x) for x in found] == [2] * 8 + [3] * 8 + [4] * 8 + [5] * 6 + [6]
    assert len(set(found)) == len(found)
    assert found == figure3_number_of_tasks.subsets_of("abcdef", seed=0)
    assert found != figure3_number_of_tasks.subsets_of("abcdef", seed=1)


def test_the_interval_is_that_of_students_t():
    values = np.random.default_rng(0).normal(size=8)
    mean, scale = values.mean(), values.std(ddof=1) / np.sqrt(8)
    low, high = stats.t.interval(0.95, 7, loc=mean, scale=scale)
    expected = (high - low) / 2
    np.testing.assert_allclose(figure3_number_of_tasks.interval(values), expected, 1e-5)
    assert figure3_number_of_tasks.interval([3.0]) == 0


@pytest.mark.parametrize(
    "name", ["figure2_single_models", "figure4_cosines", "figure5_landscape"]
)
def test_a_smoke_run_draws_the_figures(name, as_b32, shared_bank, tmp_path):
    found = smoke.run(f"awd.{name}", tmp_path / "out", bank=shared_bank)
    drawn = len(list((tmp_path / "out").glob("*.png")))
    assert drawn == (1 if name == "figure5_landscape" else 2)
    beside = found["rows" if name == "figure4_cosines" else "merged"]
    for row in [beside] if isinstance(beside, dict) else beside:
        assert 0 < row["cosine with sum"] < 1.0001
    if name == "figure4_cosines":
        [matrices] = found["matrices"]
        assert np.allclose(np.diag(matrices["disentangled"]), 1, atol=1e-5)
        before, after = (
            np.mean(np.abs(np.array(matrices[of])[~np.eye(3, dtype=bool)]))
            for of in ("task vectors", "disentangled")
        )
        assert after < before
    if name == "figure5_landscape":
        [grid] = found["grids"]
        # The coefficients are -0.5, 0.5 and 1.5: no loss is that of another vector.
        assert np.shape(grid["task vectors"]) == (3, 3)
        assert grid["task vectors"] != grid["disentangled"]


def test_every_table_and_figure_of_the_paper_on_images_is_named_by_a_script():
    scripts = {
        "table1_addition": ("Tables 1", "2 ", "4:"),
        "table5_cost": ("Table 5",),
        "table6_reversed": ("Tables 6", "7:"),
        "table10_unseen": ("Table 10",),
        "figure2_single_models": ("Figures 2", "7"),
        "figure3_number_of_tasks": ("Table 11", "Figure 3"),
        "figure4_cosines": ("Figures 4", "6"),
        "figure5_landscape": ("Figure 5",),
    }
    for name, numbers in scripts.items():
        module = importlib.import_module(f"experiments.awd.{name}")
        text = module.__doc__.splitlines()[0]
        assert all(number in text for number in numbers), name


class TestDisentangled:
    """`disentangled.disentangled` gives τ_i - δ, and not only their sum."""

    def setup_and_vectors(self):
        rng = np.random.default_rng(0)
        layer = "vision_model/encoder/layers/0"
        paths = [f"{layer}/mlp/fc1/kernel", f"{layer}/mlp/fc1/bias"]

        def drawn():
            return {path: rng.normal(size=(6, 5)).astype("f4") for path in paths}

        shared = drawn()
        taus = [
            tree.unflatten({path: shared[path] + leaf for path, leaf in own.items()})
            for own in (drawn() for _ in range(3))
        ]
        params_0 = tree.unflatten(drawn())

        class Setup:
            pass

        Setup.params_0 = params_0
        return Setup, taus, paths

    def test_the_vectors_lack_one_and_the_same_part_and_only_linear_weights_are_left(
        self,
    ):
        setup, taus, paths = self.setup_and_vectors()
        found = disentangled.disentangled(setup.params_0, taus, HOW, alpha=1e-3)
        for own in found:
            assert list(tree.flatten(own)) == paths[:1]
        deltas = [
            tree.flatten(tau)[paths[0]] - tree.flatten(own)[paths[0]]
            for tau, own in zip(taus, found, strict=True)
        ]
        assert np.abs(deltas[0]).max() > 0.01
        for delta in deltas[1:]:
            np.testing.assert_allclose(delta, deltas[0], atol=1e-5)
        parts = disentangled.linear_weights(taus)
        assert disentangled.mean_cosine(found) < disentangled.mean_cosine(parts)

    def test_their_sum_is_what_the_operator_merges(self):
        setup, taus, paths = self.setup_and_vectors()
        parts = disentangled.linear_weights(taus)
        expected = merge.awd(setup.params_0, parts, coef=0.3, alpha=1e-3, steps=1000)
        own = disentangled.disentangled(setup.params_0, taus, HOW, alpha=1e-3)
        found = task_vectors.apply(setup.params_0, task_vectors.add(own), 0.3)
        for path, leaf in tree.flatten(expected).items():
            np.testing.assert_allclose(tree.flatten(found)[path], leaf, atol=1e-5)

    def test_reversed_they_are_less_orthogonal(self):
        setup, taus, _ = self.setup_and_vectors()
        parts = disentangled.linear_weights(taus)
        found = disentangled.disentangled(
            setup.params_0, taus, HOW, alpha=1e-2, objective="reverse"
        )
        assert disentangled.mean_cosine(found) > disentangled.mean_cosine(parts)


class TestBesideTheSum:
    """How far AWD's merged vector is from the plain sum."""

    taus = [
        {"block": {"kernel": row.reshape(3, 4)}, "head": row[:2]}
        for row in np.random.default_rng(0).normal(size=(3, 12)).astype("f4")
    ]

    def flat(self, vector):
        return np.concatenate([vector["block"]["kernel"].ravel(), vector["head"]])

    def test_the_cosine_and_the_projection_are_those_of_flat_vectors(self):
        weights = [0.5, -1.0, 2.0]
        vector = solving.weighted_sum(self.taus, weights)
        flat = np.stack([self.flat(tau) for tau in self.taus])
        merged, total = weights @ flat, flat.sum(0)
        np.testing.assert_allclose(self.flat(vector), merged, rtol=1e-5)
        found = solving.beside_sum(vector, task_vectors.add(self.taus), 0.3)
        norms = np.linalg.norm(merged) * np.linalg.norm(total)
        expected = [merged @ total / norms, 0.3 * merged @ total / (total @ total)]
        np.testing.assert_allclose(list(found.values()), expected, rtol=1e-5)

    @pytest.mark.parametrize("scope", ["global", "layer", "row"])
    def test_the_options_are_those_of_the_merge(self, scope):
        params_0 = jax.tree.map(np.ones_like, self.taus[0])
        given = {"scope": scope, "solver": "momentum", "step_size": 0.02}
        how = solving.Options(**given, awd_steps=7)
        found = solving.merged(params_0, self.taus, how, alpha=0.1, coef=0.5)
        expected = merge.awd(params_0, self.taus, alpha=0.1, coef=0.5, steps=7, **given)
        np.testing.assert_allclose(self.flat(found), self.flat(expected) - 1, atol=1e-6)


class TestBeyondThePaper:
    """Rows that the paper's tables lack."""

    def test_the_ascent_is_that_of_the_library_with_fewer_calls(self):
        rng, calls = np.random.default_rng(0), []
        scale, centre = rng.normal(size=(4, 4)), rng.uniform(size=4)

        def accuracies_at(coefs):
            return 1 - (scale @ (coefs - centre)) ** 2 / 9

        def means(rows):
            calls.append(len(rows))
            return np.array([accuracies_at(row).mean() for row in rows])

        expected = evaluate.search_per_task(
            accuracies_at, np.ones(4), beyond.TENTHS, sweeps=beyond.SWEEPS
        )
        shared = evaluate.search(
            lambda c: accuracies_at(np.full(4, c)), np.ones(4), beyond.TENTHS
        )
        found = beyond.ascent(means, 4, shared.coef)
        np.testing.assert_array_equal(found, expected.coefs)
        assert len(set(found)) > 1
        assert set(calls) == {12} and len(calls) <= 4 * beyond.SWEEPS

    def test_published_rows_name_their_source(self):
        own = ["WUDI, spectral filter"]
        names = [name for name in (*beyond.MERGES, beyond.ESM) if name not in own]
        assert sorted(beyond.published("ViT-B-32")) == sorted(names)
        assert beyond.published("ViT-L-14")["WUDI"] == (92.6, "WUDI's README")
        assert beyond.published("ViT-B-16")["Iso-CTS"] == (91.1, "arXiv:2606.19164")
        assert "WUDI" not in beyond.published("ViT-B-16")

    def test_gains_are_those_over_task_arithmetic_with_the_same_seed(self):
        columns = ("coef", "cosine left", "cosine with sum", "effective λ")
        none = dict.fromkeys(columns)
        rows = [
            {"method": method, "seed": seed, "mean": mean} | none
            for method, means in (
                (table_scopes.PLAIN, (70.0, 72.0)),
                ("AWD", (73.0, 71.0)),
            )
            for seed, mean in enumerate(means)
        ]
        plain, awd = table_scopes.over_seeds(rows)
        assert (plain["mean"], plain["spread"], plain["gain"]) == (71.0, 2.0, 0.0)
        assert (awd["mean"], awd["spread"], awd["gain"]) == (72.0, 2.0, 1.0)
        assert awd["smallest gain"] == -1.0


def test_table_1_has_what_the_paper_lacks_below_its_rows(as_b32, shared_bank, tmp_path):
    options = {"others": ("linear_layers_1", "tau_jp_cyclic"), "scope": "layer"}
    out = tmp_path / "out"
    found = smoke.run("awd.table1_addition", out, bank=shared_bank, **options)
    rows = {row["method"]: row for row in found["beyond"]}
    others = [
        f"{method}, {name}"
        for name in beyond.NAMES.values()
        for method in ("Task Arithmetic", "AWD")
    ]
    merges = [*beyond.MERGES, beyond.ESM]
    assert list(rows) == [*merges, beyond.PLAIN, beyond.SEARCHED, *others]
    plain = rows[beyond.PLAIN]
    np.testing.assert_allclose(plain["cosine with sum"], 1, rtol=1e-5)
    np.testing.assert_allclose(plain["effective λ"], plain["coef"], rtol=1e-5)
    assert len(rows[beyond.SEARCHED]["weights"].split()) == 3
    text = (out / "report.md").read_text()
    assert "arXiv:2606.19164" in text and " 85.9 " in text


def test_the_table_of_scopes_has_a_row_of_each_seed(tmp_path):
    found = smoke.run("awd.table_scopes", tmp_path / "out", bank=tmp_path / "bank")
    methods = [row["method"] for row in found["means"]]
    assert methods == [
        *(table_scopes.PLAIN, beyond.PLAIN, beyond.SEARCHED),
        "AWD, row, momentum",
    ]
    assert len(found["rows"]) == 2 * len(methods)
    assert found["means"][-1]["cosine left"] < 1


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (table10_unseen, {"unseen": ("cats",)}, "cats"),
        (table10_unseen, {"tasks": ("mnist", "svhn"), "unseen": ("svhn",)}, "fewer"),
        (figure5_landscape, {"pairs": ("mnist",)}, "expected two of the tasks"),
        (figure5_landscape, {"pairs": ("mnist,mnist",)}, "expected two of the tasks"),
        (figure3_number_of_tasks, {"tasks": ("mnist",)}, "expected two or more"),
    ],
)
def test_wrong_options_are_one_error_before_anything_is_written(
    script, options, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(setups, "load", lambda *_, **__: pytest.fail("loaded"))
    config = script.Config(out=tmp_path / "out", bank=tmp_path / "bank", **options)
    with pytest.raises(ValueError, match=message):
        script.main(config)
    assert not list(tmp_path.iterdir())
