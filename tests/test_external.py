"""Fine-tuned checkpoints from outside: into the bank, and out of it into tables."""

import json

import numpy as np
import pytest
import tyro
from safetensors.numpy import load_file, save_file

from experiments import finetune
from experiments.common import bank, tables
from experiments.common.vision import image_encoders
from jaxarith import hub, task_vectors, tree
from jaxarith.models import clip

MODEL = str(clip.TINY_CLIP)


@pytest.fixture(scope="module")
def original():
    return clip.load()


@pytest.fixture(scope="module")
def tuned(original):
    """The parameters of the whole model, the image encoder moved a little."""
    moved = {}
    for i, (path, leaf) in enumerate(tree.flatten(original.params).items()):
        noise = np.random.default_rng(i).normal(size=leaf.shape).astype(np.float32)
        is_image = path.startswith("vis")
        moved[path] = leaf + is_image * 0.01 * noise
    return tree.unflatten(moved)


@pytest.fixture
def whole(tmp_path, original, tuned):
    """A folder of `CLIPModel`."""
    folder = tmp_path / "clip_mnist"
    hub.save(folder, tuned, hub.read_json(original.folder))
    return folder


@pytest.fixture
def tower(tmp_path, original, tuned):
    """A folder of `CLIPVisionModel`, as transformers 5 writes it, with no prefix."""
    folder = tmp_path / "vision_mnist"
    vision = tree.select(tuned, r"vision_model/.*")
    config = hub.read_json(original.folder)["vision_config"]
    hub.save(folder, vision, {**config, "model_type": "clip_vision_model"})
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k.removeprefix("vision_model."): x for k, x in tensors.items()}, file)
    return folder


def config_of(tmp_path, checkpoint, **changes):
    options = {"task": "mnist", "smoke": True, "bank": tmp_path / "bank"}
    options |= {"checkpoint": checkpoint and str(checkpoint), "out": tmp_path / "out"}
    return finetune.Config(**options | changes)


def taken(tmp_path):
    file = bank.vector_file(tmp_path / "bank", MODEL, "nonlinear", "mnist")
    return file, tree.flatten(hub.load_tree(file)[0])


def test_a_whole_model_becomes_a_vector_with_its_accuracies(
    tmp_path, whole, original, tuned
):
    found = finetune.main(config_of(tmp_path, whole))
    file, tau = taken(tmp_path)
    expected = tree.flatten(
        tree.select(task_vectors.difference(tuned, original.params), clip.IMAGE_ENCODER)
    )
    assert tau.keys() == expected.keys()
    for path, leaf in tau.items():
        np.testing.assert_array_equal(leaf, expected[path], path)
    record = bank.record(file)
    assert record["metrics"]["accuracy"] == found
    assert set(found) == {"mnist, validation", "mnist, test"}
    configuration = record["configuration"]
    assert configuration["origin"] == "external" and "recipe" not in configuration
    assert configuration["checkpoint"] == "clip_mnist"
    assert str(tmp_path) not in file.with_suffix(".json").read_text()


def test_what_an_image_tower_lacks_stays_the_bases(tmp_path, tower, tuned, capsys):
    finetune.main(config_of(tmp_path, tower))
    file, tau = taken(tmp_path)
    assert not tau["visual_projection/kernel"].any()
    moved = tree.flatten(tuned)["vision_model/pre_layrnorm/scale"]
    before = tree.flatten(clip.load().params)["vision_model/pre_layrnorm/scale"]
    np.testing.assert_array_equal(
        tau["vision_model/pre_layrnorm/scale"], moved - before
    )
    assert "has no visual_projection/kernel: that of" in capsys.readouterr().out
    record = bank.record(file)["configuration"]
    assert record["from the base"] == ["visual_projection/kernel"]


def test_an_image_tower_may_have_its_projection(tmp_path, tower, tuned):
    """As `CLIPVisionModelWithProjection`."""
    file = tower / "model.safetensors"
    tensors = load_file(file)
    projection = np.ascontiguousarray(tuned["visual_projection"]["kernel"].T)
    save_file({**tensors, "visual_projection.weight": projection}, file)
    finetune.main(config_of(tmp_path, tower))
    assert taken(tmp_path)[1]["visual_projection/kernel"].any()


def open_clip_file(path, tuned):
    """The image tower as `state_dict()` of the papers' image encoders has it."""
    torch = hub.layouts.to_torch(tree.flatten(tree.select(tuned, clip.IMAGE_ENCODER)))
    modules = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found = {"model.visual.proj": torch.pop("visual_projection.weight").T}
    for name, leaf in torch.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [torch[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            leaf = np.concatenate(parts)
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        name = name.removeprefix("vision_model.")
        for old, new in modules.items():
            name = name.replace(old, new)
        found[f"model.visual.{name}"] = leaf
    save_file({name: np.asarray(x, order="C") for name, x in found.items()}, path)
    return path


def test_a_file_of_openclip_gives_the_same_vector(tmp_path, whole, tuned):
    finetune.main(config_of(tmp_path, whole))
    _, expected = taken(tmp_path)
    file = open_clip_file(tmp_path / "finetuned.safetensors", tuned)
    other = tmp_path / "other"
    finetune.main(config_of(other, file))
    _, tau = taken(other)
    for path, leaf in tau.items():
        np.testing.assert_array_equal(leaf, expected[path], path)


@pytest.mark.parametrize("heads", ["same", "other"])
def test_scripts_take_it_whatever_their_recipe_and_say_so(
    tmp_path, tower, heads, capsys
):
    finetune.main(config_of(tmp_path, tower))
    file, expected = taken(tmp_path)
    if heads == "other":
        content = json.loads(file.with_suffix(".json").read_text())
        content["configuration"]["heads"] = [1]
        file.with_suffix(".json").write_text(json.dumps(content))
    out = tmp_path / "again"
    config = config_of(tmp_path, None, out=out, steps=7)
    finetune.main(config)  # which trains where the bank has nothing
    assert not list(out.rglob("*.jsonl"))
    np.testing.assert_equal(taken(tmp_path)[1], expected)
    then = "" if heads == "same" else " (with another head then)"
    line = f"From outside, not trained here: mnist{then} (tiny_clip, nonlinear)."
    assert line in capsys.readouterr().out
    [folder] = out.iterdir()
    tables.write(folder, "A table", {"Of it.": [{"task": "mnist"}]}, {})
    assert (folder / "report.md").read_text().endswith(f"|\n\n{line}\n")


@pytest.fixture
def file(tmp_path):
    file = bank.vector_file(tmp_path, "someone/clip", "nonlinear", "dtd")
    configuration = {"origin": "external", "method": "nonlinear", "params_0": 7}
    tau = {"a": np.ones(2, np.float32)}
    bank.write(file, tau, {**configuration, "heads": [1]}, {})
    return file


def test_the_bank_gives_it_for_any_recipe_but_one_model(file):
    asked = {"method": "nonlinear", "params_0": 7, "recipe": {"steps": 9}}
    assert bank.has(file, asked) and bank.is_external(file)
    with pytest.raises(ValueError, match="params_0: 7 there, 8 here"):
        bank.has(file, asked | {"params_0": 8})
    with pytest.raises(ValueError, match="method: nonlinear there, linear here"):
        bank.has(file, asked | {"method": "linear"})


def refused(tmp_path, checkpoint, said, **changes):
    with pytest.raises(ValueError, match=said):
        finetune.main(config_of(tmp_path, checkpoint, **changes))


def test_another_pre_trained_model_is_refused(tmp_path, whole, original):
    far = {
        path: leaf + np.random.default_rng(0).normal(size=leaf.shape) * 10
        for path, leaf in tree.flatten(original.params).items()
    }
    config = hub.read_json(original.folder)
    hub.save(tmp_path / "far", tree.unflatten(far), config)
    refused(tmp_path, tmp_path / "far", "no fine-tuned copy of the other")
    config = json.loads((whole / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    config["vision_config"].pop("model_type", None)
    (whole / "config.json").write_text(json.dumps(config))
    refused(tmp_path, whole, "hidden_act is gelu, expected quick_gelu")
    assert not (tmp_path / "bank" / "tiny_clip" / "nonlinear").exists()


def test_a_vector_in_the_bank_is_not_replaced(tmp_path, whole, tower):
    finetune.main(config_of(tmp_path, whole))
    refused(tmp_path, tower, "the bank has another vector", out=tmp_path / "b")
    finetune.main(config_of(tmp_path, whole))  # the same again


def test_only_ordinary_vectors_come_from_outside(tmp_path, whole):
    refused(tmp_path, whole, "--from adds a vector with --method", method="linear")


@pytest.mark.torch
def test_a_pickled_image_encoder_is_refused(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "finetuned.pt")
    refused(tmp_path, tmp_path / "finetuned.pt", "runs code when it is opened")


def test_the_option_is_called_from():
    words = ["--task", "mnist", "--from", "somewhere"]
    assert tyro.cli(finetune.Config, args=words).checkpoint == "somewhere"


def test_the_projection_alone_may_be_missing(tmp_path, tower):
    file = tower / "model.safetensors"
    tensors = load_file(file)
    save_file({k: x for k, x in tensors.items() if "post_layer" not in k}, file)
    refused(tmp_path, tower, "in the model but not in the checkpoint")
    assert image_encoders.METHOD == "nonlinear"
