"""The README's examples run as they stand."""

import dataclasses
import re
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_networks

from jaxarith import curvature, hub, losses, merge, train
from jaxarith.models import clip

README = Path(__file__).parent.parent / "README.md"


def examples():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_example_runs_and_saves_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(examples()[0], "README.md", "exec"), scope)
    assert scope["features"].shape == (1, 64)
    assert np.isfinite(scope["features"]).all()
    saved = clip.load("merged").params["visual_projection"]["kernel"]
    np.testing.assert_array_equal(saved, scope["params"]["visual_projection"]["kernel"])


def test_the_sweep_tries_every_method(capsys):
    params_0 = {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}
    rng = np.random.default_rng(0)
    taus = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params_0)
        for _ in range(3)
    ]
    scope = {
        "jax": jax,
        "merge": merge,
        "params_0": params_0,
        "taus": taus,
        "score": lambda params: float(jnp.sum(params["kernel"])),
    }
    exec(compile(examples()[1], "README.md", "exec"), scope)
    tried = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = [
        [name, str(coef)]
        for name, method in merge.METHODS.items()
        if not method.data and method.returns == "params"
        for coef in method.search
    ]
    assert [found[:2] for found in tried] == expected
    assert np.isfinite([float(found[2]) for found in tried]).all()


def test_the_example_of_curvature_trains_without_samples_of_others():
    encode, params_0, x = tiny_networks.network()
    rng = np.random.default_rng(0)
    x = np.asarray(x, np.float32)
    labels = [rng.integers(3, size=len(x)) for _ in range(2)]
    scope = {
        "curvature": curvature,
        "dataclasses": dataclasses,
        "train": train,
        "encode": encode,
        "params_0": params_0,
        "unlabelled": [[{"image": x}], [{"image": -x}]],
        "key": jax.random.key(0),
        "recipe": train.TrainConfig(steps=3, batch_size=4, learning_rate=0.1),
        "sources": [
            {"image": sign * x, "label": of_task}
            for sign, of_task in zip((1, -1), labels, strict=True)
        ],
        "names": ["plain", "mirrored"],
        "loss": lambda f, batch, _: losses.cross_entropy(f, batch["label"]),
    }
    exec(compile(examples()[2], "README.md", "exec"), scope)
    for tau, others in zip(scope["taus"], scope["others"], strict=True):
        assert float(curvature.penalty(tau, others)) > 0


def test_the_example_of_folders_merges_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, models = checkpoints.family(tmp_path / "in", models=2)
    for place, name in zip(
        (base, *models), ("BASE", "TUNED_1", "TUNED_2"), strict=True
    ):
        place.rename(tmp_path / name)
    exec(compile(examples()[3], "README.md", "exec"), {})
    assert hub.read("MERGED").keys() == hub.read("BASE").keys()


@pytest.mark.devices
def test_the_example_of_many_devices_trains_and_saves_checkpoints(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = clip.load()
    image = np.random.default_rng(0).normal(size=(28, 28, 3)).astype(np.float32)
    scope = {
        "encode": clip.image_encoder(model.config),
        "params_0": model.params,
        "sources": [[{"image": image}]] * 2,
        "names": ["one", "two"],
        "config": train.TrainConfig(
            steps=1, warmup_steps=0, batch_size=8, trained="visual_projection/.*"
        ),
        "loss": lambda features, batch, constants: (features**2).mean(),
        "test_batches": [{"image": image[None], "mask": np.ones(1, bool)}],
    }
    exec(compile(examples()[5], "README.md", "exec"), scope)
    assert scope["mesh"].shape == {"task": 1, "data": 4, "fsdp": 2}
    moved = scope["outputs"]([1.0, 0.0]) - scope["outputs"]([0.0, 0.0])
    assert np.abs(moved).max() > 1e-6
    assert (tmp_path / "runs/a/checkpoints/step_00000001/manifest.json").is_file()


def test_there_are_exactly_two_commands_that_set_everything_up():
    assert (
        len(re.findall(r"^python3 -m venv .*", README.read_text(), re.MULTILINE)) == 2
    )
