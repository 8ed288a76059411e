"""The embedded model and the quickstart: what they promise, and their errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import quickstart
from experiments.common import studies
from experiments.common.studies import report as study_report
from experiments.common.vision import small_tasks
from jaxarith import evaluate, hub, metrics, plots, report, task_vectors, tree
from jaxarith.data import images, pipeline
from jaxarith.models import clip, heads


@pytest.fixture(scope="module")
def model():
    return clip.load()


@pytest.fixture(scope="module")
def preprocess(model):
    return images.Preprocessing.from_folder(model.folder)


def zero_shot_accuracy(model, task):
    batches = pipeline.evaluation_batches(task.test, 128)
    features = evaluate.outputs(clip.image_encoder(model.config), model.params, batches)
    head = clip.zero_shot_head(model, task.classes, task.templates)
    return metrics.accuracy(heads.logits(head, features), evaluate.labels(batches))


def test_the_embedded_model_is_small():
    files = [file for file in clip.TINY_CLIP.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2e6


# Chance is 1/10 and 1/26. The model's own README states what it reaches.
@pytest.mark.parametrize(("name", "least"), [("mnist", 0.7), ("small_letters", 0.8)])
def test_the_embedded_model_reads_what_it_was_not_trained_on(
    model, preprocess, name, least
):
    assert zero_shot_accuracy(model, small_tasks.load(name, preprocess)) > least


def test_no_sample_is_in_two_splits_or_in_both_halves_of_mnist(preprocess):
    upright, turned = (
        small_tasks.load(name, preprocess) for name in ("mnist", "mnist_rotated")
    )
    seen = [
        np.rot90(record["image"], turns).tobytes()
        for task, turns in ((upright, 0), (turned, -1))
        for split in (task.train, task.validation, task.test)
        for record in split
    ]
    assert len(set(seen)) == len(seen) == 5000


def test_every_task_has_all_its_classes_in_every_split(preprocess):
    for name in small_tasks.NAMES:
        task = small_tasks.load(name, preprocess)
        for split in (task.train, task.validation, task.test):
            labels = {int(record["label"]) for record in split}
            assert labels == set(range(len(task.classes))), name


def test_unknown_and_missing_tasks_are_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="unknown task 'cats'; the tasks are mnist,"):
        quickstart.main(quickstart.Config(out=out, tasks=("mnist", "cats"), smoke=True))
    for tasks in ((), ("mnist",), ("mnist", "mnist")):
        with pytest.raises(ValueError, match="at least two tasks, each once"):
            quickstart.main(quickstart.Config(out=out, tasks=tasks))
    assert not out.exists()


METHODS = ["nonlinear", "linear", "curvature", "tau_jp_cyclic"]
# A few merges; the smoke form, which is run on its own, has all of them.
SEARCHED = ["task_arithmetic", "ties"]
FITTED = ["fisher"]


def test_the_quickstart_writes_everything_it_promises(tmp_path, shallow_clip):
    tasks = ("mnist", "inverted_digits")
    config = quickstart.Config(
        out=tmp_path,
        model=shallow_clip,
        tasks=tasks,
        merges=(*SEARCHED[1:], *FITTED),
        smoke=True,
        mesh="data=1",
    )
    result = quickstart.main(config)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content == result
    assert content["tasks"] == list(tasks)
    assert set(content["tau_jp"]) == {"linear", "curvature", "tau_jp_cyclic"}
    assert np.shape(content["tau_jp"]["linear"]) == (2, 2)
    assert content["seconds"]["total"] > 0
    rows = {(r["method"], r["merge"], r["searched"]): r for r in content["rows"]}
    merges = [("nonlinear", merge) for merge in SEARCHED]
    merges += [(method, "task_arithmetic") for method in METHODS[1:]]
    expected = {(*m, searched) for m in merges for searched in (False, True)}
    expected |= {("nonlinear", merge, False) for merge in FITTED}
    alone = ["zero_shot", *(f"individual_{method}" for method in METHODS)]
    expected |= {(method, "none", False) for method in alone}
    assert rows.keys() == expected and len(content["rows"]) == len(expected)
    for row in rows.values():
        assert row["per_task"].keys() == set(tasks)
        mean = np.mean(list(row["per_task"].values()))
        assert row["absolute"] == pytest.approx(mean)
    assert rows["linear", "task_arithmetic", False]["coef"] == 1.0
    assert rows["individual_linear", "none", False]["normalized"] == 1.0
    for figure in ("xi", "tau_jp", "cosine", "coefficients", "tasks", "overview"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000
    # What was saved is what was evaluated.
    chosen = rows["nonlinear", "task_arithmetic", True]["coef"]
    merged, base = clip.load(tmp_path / "merged"), clip.load(shallow_clip)
    folder = tmp_path / "task_vectors" / "nonlinear"
    taus = [hub.load_tree(folder / f"{task}.safetensors")[0] for task in tasks]
    edited = task_vectors.apply(base.params, task_vectors.add(taus), chosen)
    leaves = tree.flatten(merged.params)
    for path, leaf in tree.flatten(edited).items():
        np.testing.assert_allclose(leaves[path], leaf, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("package", ["mlxtend", "matplotlib", "transformers"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path):
    # `python -m` with a package hidden.
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; given = sys.argv[1:]\n"
        "sys.argv = ['-m']; import experiments; sys.argv = ['quickstart', *given]\n"
        "runpy.run_module('experiments.quickstart', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--out", str(tmp_path / "out"), "--smoke"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert package in line and "pip install 'jaxarith[demo]'" in line
    assert not list(tmp_path.iterdir())


def test_the_summary_says_the_three_figures_that_matter():
    def row(method, merge, searched, normalized, coef=1.0):
        return {
            "method": method,
            "merge": merge,
            "searched": searched,
            "normalized": normalized,
            "absolute": 0.9 * normalized,
            "coef": coef,
        }

    rows = [row("zero_shot", "none", False, 0.678, 0)]
    found = {"nonlinear": 0.368, "linear": 0.647, "tau_jp_cyclic": 0.963}
    for method, at_one in found.items():
        rows.append(row(method, "task_arithmetic", False, at_one))
        rows.append(row(method, "task_arithmetic", True, 0.97, 0.35))
    start, ordinary, penalized = study_report.summary(rows)
    assert "pre-trained" in start and "0.678" in start
    assert "ordinary" in ordinary and "0.368 at coefficient 1" in ordinary
    assert "cyclic τJp" in penalized and "0.963 at coefficient 1" in penalized
    assert "0.970 at 0.35" in ordinary and "0.970 at 0.35" in penalized
    rows[0]["normalized"] = None  # a single-task accuracy is zero
    assert "0.331 at coefficient 1" in study_report.summary(rows)[1]


def test_the_worst_pair_has_the_largest_mutual_tau_jp():
    matrix = np.array([[9.0, 1, 2], [1, 9, 4], [0, 5, 9]])
    assert study_report.worst_pair(matrix) == (1, 2)


def test_reports_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    report.write_json(path, {"a": 1.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        report.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1.5}
    assert list(tmp_path.iterdir()) == [path]


def test_tables_are_aligned_markdown():
    rows = [["ties", 0.25, 10], ["awd", None, 2]]
    lines = report.markdown_table(["merge", "value", "n"], rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == "| merge | value |  n |"
    assert re.fullmatch(r"\|:-+\|-+:\|-+:\|", lines[1])
    assert lines[3] == "| awd   |       |  2 |"


def test_figures_are_png_files(tmp_path):
    rng = np.random.default_rng(0)
    names = ["one", "two", "three"]
    matrix, grid = rng.random((3, 3)), rng.random((5, 5))
    files = [tmp_path / f"{i}.png" for i in range(4)]
    labels = {"rows": "a", "columns": "b", "value": "c"}
    plots.matrices(files[0], {"x": matrix, "y": matrix}, names, **labels)
    plots.disentanglement(files[1], {"x": grid}, np.linspace(-2, 2, 5), ("a", "b"))
    plots.curves(files[2], {"x": ([0, 1], [0.1, 0.2])}, x="a", y="b")
    plots.bars(files[3], {"x": [0.1, 0.2, 0.3]}, names, y="b")
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_loss_ignores_padded_classes():
    rng = np.random.default_rng(0)
    features = jax.numpy.asarray(rng.normal(size=(4, 5)), "float32")
    head = jax.numpy.asarray(rng.normal(size=(3, 5)), "float32")
    batch = {"label": np.array([0, 1, 2, 1])}
    study = studies.Study(**dict.fromkeys(studies.Study._fields))
    study = study._replace(logits=heads.logits)
    padded = heads.pad([head, jax.numpy.ones((6, 5))])
    losses = [
        study.loss(features, batch, jax.tree.map(lambda a: a[0], constants))
        for constants in (padded, heads.pad([head]))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_the_asset_says_where_it_comes_from():
    card = Path(clip.TINY_CLIP, "README.md").read_text()
    assert "apache-2.0" in card and "train_tiny_clip" in card
