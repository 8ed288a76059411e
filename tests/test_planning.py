"""`--plan`: what a script says it costs, from stand-ins alone."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import finetune
from experiments.awd import disentangled, figure3_number_of_tasks, table10_unseen
from experiments.awd import figure5_landscape as awd_landscape
from experiments.bases import figure4_two_checkpoints, table3_loss_gap
from experiments.bases import table7_generalization as generalization
from experiments.common import planning
from experiments.common.vision import architectures, raw_tasks, stand_ins
from experiments.editing import figure5_cosine as ordinary_cosine
from experiments.linear_layers import figure5_cosine
from jaxarith.data import vision
from jaxarith.models import clip

TINY = str(clip.TINY_CLIP)


def planned(script, tmp_path, **given):
    options = {"plan": 1, "bank": tmp_path / "bank", "out": tmp_path / "out"}
    options |= {"tasks": ("mnist", "dtd"), "batch_size": 16}
    fields = {field.name for field in dataclasses.fields(script.Config)}
    options |= {"model": TINY} if "model" in fields else {"models": (TINY,)}
    return planning.run(script.main, script.Config(**(options | given)))


def test_a_plan_counts_what_is_trained_and_evaluated(tmp_path, capsys):
    found = planned(figure5_cosine, tmp_path, plan_memory=0)
    rows = {row["method"]: row for row in found["rows"]}
    assert {row["to train"] for row in rows.values()} == {2}
    assert {row["steps"] for row in rows.values()} == {2 * 2000}
    model, params = clip.load()[:2]
    size = model.vision.image_size
    image = jax.ShapeDtypeStruct((size, size, 3), "f4")
    encode = clip.image_encoder(model)
    pass_ = planning.pass_flops(
        planning.Full("", encode, encode, params, {"image": image})
    )
    step = rows["nonlinear"]["TFLOP a step"] * 1e12
    # A forward and a backward pass of 16 samples; then the optimizer and the head.
    assert 2.5 < step / (16 * pass_) < 4
    assert rows["linear"]["TFLOP a step"] > 1.3 * rows["nonlinear"]["TFLOP a step"]
    hours = found["device hours"]
    np.testing.assert_allclose(
        hours["A100"] * 3600 * 19.5e12 * planning.UTILISATION,
        (found["EFLOP of training"] + found["EFLOP of evaluation"]) * 1e18,
    )
    assert not list(tmp_path.iterdir())  # nothing is written
    assert "Plan for 1 devices" in capsys.readouterr().out


def test_vectors_of_the_bank_are_not_planned(tmp_path):
    folder = tmp_path / "bank" / clip.TINY_CLIP.name / "nonlinear"
    folder.mkdir(parents=True)
    (folder / "dtd.safetensors").touch()
    [row] = planned(ordinary_cosine, tmp_path, plan_memory=0)["rows"]
    assert (row["to train"], row["in the bank"]) == (1, 1)


def test_what_does_not_fit_is_refused_with_what_helps(tmp_path):
    with pytest.raises(ValueError, match=r"needs .* GB on a device.*--remat.*--micro"):
        planned(ordinary_cosine, tmp_path, plan_memory=1e-6)


@pytest.mark.devices
def test_devices_that_share_a_batch_need_less_memory_than_one(tmp_path):
    given = {"batch_size": 64, "tasks_together": False}
    one = planned(ordinary_cosine, tmp_path, **given)["rows"]
    eight = planned(ordinary_cosine, tmp_path, **given, plan=8)["rows"]
    for row, other in zip(one, eight, strict=True):
        assert other["GB a device"] < 0.5 * row["GB a device"]
        assert other["TFLOP a step"] == row["TFLOP a step"]


def test_multi_task_training_is_one_vector_of_all_tasks(tmp_path):
    def row_of(method):
        config = finetune.Config(
            **{"plan": 1, "task": "dtd", "method": method, "model": TINY},
            plan_memory=0,
            **{"tasks": ("mnist", "dtd", "svhn"), "bank": tmp_path, "batch_size": 16},
        )
        [row] = planning.run(finetune.main, config)["rows"]
        return row

    joint, alone = row_of("multi_task"), row_of("nonlinear")
    assert (joint["to train"], joint["together"], joint["steps"]) == (1, 1, 2000)
    assert alone["to train"] == 1
    assert 2.8 < joint["TFLOP a step"] / alone["TFLOP a step"] < 3.2


def test_known_tasks_stand_in_with_their_published_sizes(tmp_path):
    options = figure5_cosine.Config(plan=1)
    task = raw_tasks.named("svhn", options)
    assert len(task.train) == 73257 - 5000
    assert (task.test.stands_for, len(task.test)) == (26032, 8)
    assert len(raw_tasks.named("eurosat", options).train) == 21600
    few = raw_tasks.named("svhn", dataclasses.replace(options, samples=100))
    assert (len(few.train), few.test.stands_for) == (100, 100)
    assert stand_ins.of(task) is task
    with pytest.raises(ValueError, match="unknown task 'cats'"):
        raw_tasks.named("cats", options)


@pytest.mark.parametrize(
    ("model", "layers", "width"),
    [
        ("openai/clip-vit-large-patch14", 24, 768),
        ("timm/vit_base_patch32_clip_224.laion2b_e16", 12, 512),
        ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", 12, 512),
        (TINY, clip.load().config.vision.num_hidden_layers, None),
    ],
)
def test_sizes_of_the_papers_models_are_known(model, layers, width):
    config = architectures.config_of(model)
    assert config.vision.num_hidden_layers == layers
    assert width in (None, config.projection_dim)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="nobody/model has no config.json"):
        architectures.config_of("nobody/model")


def test_all_tasks_have_known_sizes():
    for name, info in vision.TASKS.items():
        assert info.train and info.test, name


def test_tasks_that_scripts_name_are_known():
    subsets = figure3_number_of_tasks.subsets_of(disentangled.TASKS, seed=0)
    named = {
        *disentangled.TASKS,
        *(name for seen in table10_unseen.SEEN.values() for name in seen),
        *(name for pair in awd_landscape.PAIRS for name in pair.split(",")),
        *(name for subset in subsets for name in subset),
        *figure4_two_checkpoints.Config().tasks,
        *table3_loss_gap.Config().tasks,
        *generalization.Config().held_out,
    }
    assert not named - vision.TASKS.keys()
