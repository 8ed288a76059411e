"""The code of the README and of the guides runs as it stands, on the embedded CLIP."""

import shutil
from pathlib import Path

import adapter_folders
import checkpoints
import numpy as np
import pytest
from test_docs import DOCS, ROOT, blocks, commands

from jaxarith import cli, curvature, hub, merge
from jaxarith.models import clip

# Fewer steps and fewer leaves, and pages that a test of their own reads.
PROJECTION = "'visual_projection/.*'"
FEWER = {
    "README.md": {"steps=100": f"steps=2, trained={PROJECTION}"},
    "devices.md": {"steps=100": "steps=2"},
    "interference.md": {"steps=100": f"steps=2, trained={PROJECTION}"},
    "task_vectors.md": {"clip.IMAGE_ENCODER": PROJECTION},
}
OWN_TESTS = {"methods.md", "own_images.md"}
PAGES = [
    file.name
    for file in [ROOT / "README.md", *sorted(DOCS.glob("[a-z]*.md"))]
    if blocks(file, "python") and file.name not in OWN_TESTS
]
RECIPE = """
merge_method: linear
models:
  - {model: TUNED_1, parameters: {weight: 1}}
  - {model: TUNED_2, parameters: {weight: 1}}
"""
MADE = ("MERGED", "LORA", "REPORT", "FLAX_FOLDER", "FOLDER")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What the pages call by these names, in the folder where code and commands run."""
    monkeypatch.chdir(tmp_path)
    base, models = checkpoints.family(tmp_path / "in", models=2)
    base.rename("BASE")
    for i, model in enumerate(models, 1):
        model.rename(f"TUNED_{i}")
        shapes = {
            name.removesuffix(".weight"): shape
            for name, shape in checkpoints.SHAPES.items()
            if "proj" in name
        }
        adapter_folders.write(tmp_path / f"LORA_{i}", seed=i, shapes=shapes)
    hub.save_tree("TAU.safetensors", {"model.scale": np.float32(0.5)}, {"task": "t"})
    Path("mergekit.yaml").write_text(RECIPE)


def run(page: str) -> dict:
    """Runs the code of a page from top to bottom, in one namespace."""
    file = ROOT / page if page == "README.md" else DOCS / page
    scope = {"__name__": page}
    for code in blocks(file, "python"):
        for old, new in FEWER.get(page, {}).items():
            code = code.replace(old, new)
        exec(compile(code, page, "exec"), scope)
    return scope


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, folders, shallow_clip, monkeypatch):
    monkeypatch.setattr(clip.load, "__defaults__", (shallow_clip,))
    scope = run(page)
    if page in CHECKS:
        CHECKS[page](scope)


def readme(scope):
    assert scope["features"].shape == (64, 64)
    assert np.isfinite(scope["features"]).all()
    assert clip.load("merged").params.keys() == scope["model"].params.keys()


def task_vectors(scope):
    saved = clip.load("merged").params["visual_projection"]["kernel"]
    np.testing.assert_array_equal(saved, scope["params"]["visual_projection"]["kernel"])


def tangent(scope):
    moved = scope["outputs"] + scope["moved"] - scope["features"]
    assert np.abs(moved).max() < 1e-5


def interference(scope):
    for tau, others in zip(scope["taus"], scope["others"], strict=True):
        assert float(curvature.penalty(tau, others)) > 0
    assert Path("cats.safetensors").is_file()


def folders_page(scope):
    assert hub.read("MERGED").keys() == hub.read("BASE").keys()


def devices(scope):
    assert scope["mesh"].shape == {"task": 1, "data": 4, "fsdp": 2}
    moved = scope["outputs"]([1.0, 0.0]) - scope["outputs"]([0.0, 0.0])
    assert np.abs(moved).max() > 1e-6
    assert Path("runs/a/checkpoints/step_00000002/manifest.json").is_file()


CHECKS = {
    "README.md": readme,
    "task_vectors.md": task_vectors,
    "tangent.md": tangent,
    "interference.md": interference,
    "folders.md": folders_page,
    "devices.md": devices,
}


def test_the_sweep_of_the_guide_tries_every_method(shallow_clip, capsys):
    run("methods.md")
    tried = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert tried == [
        [name, str(coef)]
        for name, method in merge.METHODS.items()
        if not method.data and method.returns == "params"
        for coef in method.search
    ]


def test_commands_run_on_small_folders(folders, capsys):
    ran = []
    for words in commands("jaxarith"):
        if words[0] == "data" or "OPEN_CLIP.pt" in words:
            continue
        if words[0] != "verify":  # which compares what was made before
            for name in {*MADE} & {*words}:
                shutil.rmtree(name, ignore_errors=True)
        # The folders hold no model whose Flax names are known.
        toy = ["--names", "keep"] if words[0] == "convert" else []
        status = cli.main(words + toy)
        error = capsys.readouterr().err
        allowed = (0, 1) if words[0] == "verify" else (0,)
        assert status in allowed, f"{words}: {error}"
        ran.append(words[0])
    assert len(ran) >= 12
    assert set(ran) == {"merge", "recipe", "inspect", "extract", "verify", "convert"}
