"""What is said of checkpoints that are missing, broken or of another model."""

import json
import shutil

import clip_checkpoint
import ml_dtypes
import numpy as np
import pytest
from checks import assert_same
from clip_checkpoint import LAYOUT, rewrite, write_shards
from flax import serialization
from safetensors.numpy import load_file, save_file

from jaxarith import hub
from jaxarith.hub import pickles

params, checkpoint = clip_checkpoint.params, clip_checkpoint.checkpoint  # fixtures


# Checkpoints that are not there or broken: one error that says what to do.


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        hub.load(tmp_path / "nowhere", LAYOUT)


def test_folder_without_checkpoint_is_an_error_that_lists_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError) as error:
        hub.load(tmp_path, LAYOUT)
    assert "looked for model.safetensors" in str(error.value)
    assert "found config.json" in str(error.value)


def test_without_pytorch_the_error_says_how_to_convert_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "readable", lambda: False)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pip install(.|\n)*weights_only"):
        hub.load(tmp_path, LAYOUT)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"pytorch_model.bin \(0 bytes\) is truncated"), (b"pickle", "not read")],
)
def test_a_file_of_pytorch_that_is_none_is_an_error_that_names_it(
    tmp_path, content, message
):
    pytest.importorskip("torch")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path, LAYOUT)


@pytest.mark.torch
@pytest.mark.parametrize("lost", [1, 30, 500, 5000])
def test_a_truncated_file_of_pytorch_is_an_error_that_names_it(tmp_path, lost):
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-lost])
    with pytest.raises(ValueError, match=r"pytorch_model.bin \(\d+ bytes\) is trunc"):
        hub.load(tmp_path, LAYOUT)


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_truncated_safetensors_is_an_error_that_names_the_file(checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors .* bytes.*truncated"):
        hub.load(checkpoint, LAYOUT)


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_truncated_msgpack_is_an_error_that_names_the_file(tmp_path, params, size):
    content = serialization.msgpack_serialize(params)[:size]
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(ValueError, match="flax_model.msgpack .* bytes.*truncated"):
        hub.load(tmp_path, LAYOUT)


@pytest.mark.parametrize("content", [3, {"a": "text"}, [np.ones(2)]])
def test_msgpack_of_something_else_is_an_error(tmp_path, content):
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(serialization.msgpack_serialize(content))
    with pytest.raises(ValueError, match="not hold a tree of arrays"):
        hub.load(tmp_path, LAYOUT)


def test_index_that_names_a_missing_shard_is_an_error(checkpoint):
    write_shards(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard 'model-00002-of-00002"):
        hub.load(checkpoint, LAYOUT)


def test_index_that_points_out_of_the_folder_is_an_error(checkpoint):
    shutil.move(checkpoint / "model.safetensors", checkpoint.parent / "other")
    (checkpoint / "model.safetensors.index.json").write_text(
        '{"weight_map": {"logit_scale": "../other"}}'
    )
    with pytest.raises(FileNotFoundError, match="not beside it"):
        hub.load(checkpoint, LAYOUT)


def test_index_that_names_tensors_of_no_shard_is_an_error(checkpoint):
    write_shards(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="not in their shards, such as 'ghost'"):
        hub.load(checkpoint, LAYOUT)


def test_the_index_decides_where_a_tensor_stands_that_two_shards_hold(
    checkpoint, params
):
    write_shards(checkpoint)
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    held = [load_file(shard) for shard in shards]
    for shard, own, others in zip(shards, held, reversed(held), strict=True):
        # The index names the other shard for these.
        wrong = {name: np.asarray(x + 1) for name, x in others.items()}
        save_file(own | wrong, shard)
    assert_same(hub.load(checkpoint, LAYOUT), params)


def test_an_index_that_names_the_wrong_shard_is_an_error(checkpoint):
    write_shards(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["logit_scale"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="not in their shards, such as 'logit_scale'"):
        hub.load(checkpoint, LAYOUT)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_broken_index_is_an_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json (is not valid JSON|has no|holds)"):
        hub.load(tmp_path, LAYOUT)


@pytest.mark.parametrize("text", ["{", "", "\x00\x01"])
def test_broken_config_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        hub.read_json(tmp_path)


def test_missing_config_is_an_error_that_lists_the_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="no config.json; it holds notes.txt"):
        hub.read_json(tmp_path)


# Checkpoints of another model: every path at which they differ, and a suggestion.


def test_unexpected_key_is_an_error_with_its_path(checkpoint):
    rewrite(
        checkpoint,
        lambda t: t.update({"classifier.weight": np.ones((3, 12), np.float32)}),
    )
    with pytest.raises(ValueError) as error:
        hub.load(checkpoint, LAYOUT)
    message = str(error.value)
    assert "in the checkpoint but not in the model (1):" in message
    assert "    + classifier/weight  f32[3, 12]" in message
    assert message.endswith(
        'does not need these leaves, use hub.load(folder, layout, select=".*").'
    )
    assert "- " not in message and "! " not in message


def test_missing_key_is_an_error_with_its_path(checkpoint):
    rewrite(checkpoint, lambda t: t.pop("text_projection.weight"))
    with pytest.raises(ValueError) as error:
        hub.load(checkpoint, LAYOUT)
    message = str(error.value)
    assert "in the model but not in the checkpoint (1):" in message
    assert "    - text_projection/kernel  f32[16, 12]" in message


def test_missing_bias_is_no_reason_to_suggest_a_part(checkpoint):
    rewrite(checkpoint, lambda t: t.pop("text_model.final_layer_norm.bias"))
    with pytest.raises(ValueError, match="text_model/final_layer_norm/bias") as error:
        hub.load(checkpoint, LAYOUT)
    assert "select" not in str(error.value)


def test_every_wrong_shape_is_listed_with_both_shapes(checkpoint):
    def spoil(tensors):
        tensors["visual_projection.weight"] = np.ones((12, 20), np.float32)
        tensors["text_model.final_layer_norm.weight"] = np.ones((5,), np.float32)
        tensors["text_projection.weight"] = np.ones((12,), np.float32)

    rewrite(checkpoint, spoil)
    with pytest.raises(ValueError) as error:
        hub.load(checkpoint, LAYOUT)
    message = str(error.value)
    assert "shape or dtype differs (3):" in message
    for path, model, found in [
        ("visual_projection/kernel", "f32[24, 12]", "f32[20, 12]"),
        ("text_model/final_layer_norm/scale", "f32[16]", "f32[5]"),
        ("text_projection/kernel", "f32[16, 12]", "f32[12]"),
    ]:
        assert f"    ! {path}: model {model}, checkpoint {found}" in message


def test_checkpoint_of_one_tower_suggests_to_select_it(checkpoint, params):
    def keep_vision(tensors):
        for name in list(tensors):
            if not name.startswith("vision_model."):
                del tensors[name]

    rewrite(checkpoint, keep_vision)
    with pytest.raises(ValueError) as error:
        hub.load(checkpoint, LAYOUT)
    message = str(error.value)
    assert "- text_model/...  (36 leaves)" in message
    assert "- logit_scale  f32[]" in message
    assert "- visual_projection/kernel  f32[24, 12]" in message
    assert "The checkpoint holds only vision_model. Use hub.load(" in message
    # The suggestion works.
    suggestion = message.split('select="')[1].split('"')[0]
    assert hub.load(checkpoint, LAYOUT, select=suggestion).keys() == {"vision_model"}


def test_integer_weights_are_an_error(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"logit_scale": np.asarray(3)}))
    with pytest.raises(ValueError, match=r"logit_scale: model f32\[\], .* i64\[\]"):
        hub.load(checkpoint, LAYOUT)


def test_weights_of_eight_bits_are_an_error(checkpoint):
    small = np.ones(16, ml_dtypes.float8_e4m3fn)
    name = "text_model.final_layer_norm.bias"
    rewrite(checkpoint, lambda t: t.update({name: small}))
    with pytest.raises(ValueError, match=r"f8_e4m3\[16\]"):
        hub.load(checkpoint, LAYOUT)


def test_two_tensors_for_one_leaf_are_an_error(checkpoint):
    kernel = np.ones((24, 12), np.float32)
    rewrite(checkpoint, lambda t: t.update({"visual_projection.kernel": kernel}))
    with pytest.raises(ValueError, match="not in the model \\(1\\)"):
        hub.load(checkpoint, LAYOUT)


def test_non_finite_weights_are_an_error_with_path_and_count(checkpoint):
    def spoil(tensors):
        tensors["visual_projection.weight"][0, :2] = [np.nan, np.inf]

    rewrite(checkpoint, spoil)
    with pytest.raises(ValueError, match=r"visual_projection/kernel \(2 of 288\)"):
        hub.load(checkpoint, LAYOUT)
    # What is not selected is not looked at.
    hub.load(checkpoint, LAYOUT, select="text_model/.*")


def test_select_that_matches_nothing_is_an_error(checkpoint):
    with pytest.raises(ValueError, match="no leaf matches 'vision'"):
        hub.load(checkpoint, LAYOUT, select="vision")


@pytest.mark.parametrize("size", [0, 10, -1])
def test_truncated_tree_is_an_error_that_names_the_file(tmp_path, size):
    file = tmp_path / "tau.safetensors"
    hub.save_tree(file, {"w": np.ones(3)})
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="tau.safetensors .* bytes.*truncated"):
        hub.load_tree(file)


def test_missing_tree_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*tau.safetensors"):
        hub.load_tree(tmp_path / "tau.safetensors")


def test_tree_of_an_unreadable_type_is_an_error(tmp_path):
    save_file({"w": np.ones(2, ml_dtypes.float8_e4m3fn)}, tmp_path / "tau.safetensors")
    with pytest.raises(ValueError, match="w has the dtype f8_e4m3"):
        hub.load_tree(tmp_path / "tau.safetensors")
