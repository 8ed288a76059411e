import json
import os
import shutil
import tempfile
import types

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checks import assert_same
from flax import serialization
from safetensors.numpy import load_file, save_file
from tiny import random_params, tiny_clip, tiny_clip_config

from jaxarith import hub, tree
from jaxarith.hub import writing
from jaxarith.models import clip

LAYOUT = clip.layout(tiny_clip())
CONFIG = tiny_clip_config()


@pytest.fixture(scope="module")
def params():
    return random_params(0, LAYOUT)


@pytest.fixture
def checkpoint(tmp_path, params):
    """A good checkpoint, for tests to spoil."""
    hub.save(tmp_path / "clip", params, CONFIG)
    return tmp_path / "clip"


def rewrite(folder, change):
    """Rewrites the tensors of a checkpoint as `change(tensors)` leaves them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def snapshot(folder):
    """Everything below a folder, hidden files too, with its content."""
    return {
        file.relative_to(folder): file.read_bytes() if file.is_file() else None
        for file in folder.rglob("*")
    }


# Round trips.


def test_saved_checkpoint_loads_with_equal_bits(checkpoint, params):
    assert_same(hub.load(checkpoint, LAYOUT), params)


def test_loaded_arrays_are_contiguous_and_writable(checkpoint):
    for leaf in jax.tree.leaves(hub.load(checkpoint, LAYOUT)):
        assert type(leaf) is np.ndarray
        assert leaf.flags.c_contiguous and leaf.flags.writeable


def test_saved_file_has_torch_names_and_orientations(checkpoint, params):
    tensors = load_file(checkpoint / "model.safetensors")
    vision, text = params["vision_model"], params["text_model"]
    layer = "text_model.encoder.layers.0"
    cases = {
        f"{layer}.mlp.fc1.weight": (
            text["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"].T
        ),
        f"{layer}.mlp.fc1.bias": text["encoder"]["layers"]["0"]["mlp"]["fc1"]["bias"],
        f"{layer}.layer_norm1.weight": (
            text["encoder"]["layers"]["0"]["layer_norm1"]["scale"]
        ),
        "text_model.embeddings.token_embedding.weight": (
            text["embeddings"]["token_embedding"]["embedding"]
        ),
        "vision_model.embeddings.class_embedding": (
            vision["embeddings"]["class_embedding"]
        ),
        "logit_scale": params["logit_scale"],
    }
    for name, expected in cases.items():
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)
    kernel = vision["embeddings"]["patch_embedding"]["kernel"]
    weight = tensors["vision_model.embeddings.patch_embedding.weight"]
    assert weight.shape == (24, 3, 4, 4) and kernel.shape == (4, 4, 3, 24)
    assert weight[5, 2, 1, 3] == kernel[1, 3, 2, 5]


def test_saved_config_reads_back(checkpoint):
    assert hub.read_json(checkpoint) == CONFIG
    assert clip.CLIPConfig.from_json(hub.read_json(checkpoint)) == tiny_clip()


def test_msgpack_checkpoint_loads_with_equal_bits(tmp_path, params):
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(serialization.msgpack_serialize(params))
    assert_same(hub.load(tmp_path, LAYOUT), params)


def test_safetensors_are_preferred_to_msgpack(checkpoint, params):
    zeros = jax.tree.map(np.zeros_like, params)
    file = checkpoint / "flax_model.msgpack"
    file.write_bytes(serialization.msgpack_serialize(zeros))
    assert_same(hub.load(checkpoint, LAYOUT), params)


def write_shards(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20]}
    shards["model-00002-of-00002.safetensors"] = names[20:]
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, checkpoint / shard)
    index = {name: shard for shard, held in shards.items() for name in held}
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )


def test_sharded_checkpoint_loads_with_equal_bits(checkpoint, params):
    write_shards(checkpoint)
    assert_same(hub.load(checkpoint, LAYOUT), params)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_tower_alone_loads_with_and_without_its_prefix(checkpoint, params, prefix):
    def keep_vision(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.startswith("vision_model."):
                tensors[prefix + name.removeprefix("vision_model.")] = tensor

    rewrite(checkpoint, keep_vision)
    loaded = hub.load(checkpoint, LAYOUT, select="vision_model/.*")
    assert_same(loaded, tree.select(params, "vision_model/.*"))


def test_text_tower_without_prefix_is_not_taken_for_the_vision_tower(
    checkpoint, params
):
    def keep_text(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.startswith("text_model."):
                tensors[name.removeprefix("text_model.")] = tensor

    rewrite(checkpoint, keep_text)
    loaded = hub.load(checkpoint, LAYOUT, select="text_model/.*")
    assert_same(loaded, tree.select(params, "text_model/.*"))


def test_select_leaves_out_what_else_the_file_holds(checkpoint, params):
    rewrite(checkpoint, lambda t: t.update({"classifier.weight": np.ones((3, 12))}))
    loaded = hub.load(checkpoint, LAYOUT, select=clip.IMAGE_ENCODER)
    assert loaded.keys() == {"vision_model", "visual_projection"}
    assert_same(loaded, tree.select(params, clip.IMAGE_ENCODER))


def test_position_ids_of_older_files_are_dropped(checkpoint, params):
    ids = np.arange(10)[None]
    rewrite(
        checkpoint,
        lambda t: t.update({"text_model.embeddings.position_ids": ids}),
    )
    assert_same(hub.load(checkpoint, LAYOUT), params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_load_as_float32_or_as_they_are(tmp_path, params, dtype):
    hub.save(tmp_path, params, CONFIG, dtype=dtype)
    as_stored = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    assert_same(hub.load(tmp_path, LAYOUT, dtype=None), as_stored)
    as_float32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), as_stored)
    assert_same(hub.load(tmp_path, LAYOUT), as_float32)


def test_bfloat16_msgpack_loads(tmp_path, params):
    half = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(serialization.msgpack_serialize(half))
    assert_same(hub.load(tmp_path, LAYOUT, dtype=None), half)


def test_jax_arrays_save_as_numpy_arrays_do(tmp_path, checkpoint, params):
    hub.save(tmp_path / "jax", jax.tree.map(jnp.asarray, params), CONFIG)
    assert snapshot(tmp_path / "jax") == snapshot(checkpoint)


def test_save_copies_tokenizer_files_and_no_weights(tmp_path, checkpoint, params):
    source = tmp_path / "source"
    source.mkdir()
    names = ["vocab.json", "merges.txt", "spiece.model", "config.json"]
    names += ["pytorch_model.bin", "model.safetensors.index.json", "README.md"]
    for name in names:
        (source / name).write_text(name)
    hub.save(tmp_path / "new", params, CONFIG, copy_from=source)
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        *("vocab.json", "merges.txt", "spiece.model"),
        *("config.json", "model.safetensors"),
    }
    assert hub.read_json(tmp_path / "new") == CONFIG


def test_save_into_a_folder_keeps_its_other_files(checkpoint, params):
    (checkpoint / "report.md").write_text("mine")
    hub.save(checkpoint, jax.tree.map(np.negative, params), CONFIG)
    assert (checkpoint / "report.md").read_text() == "mine"
    expected = jax.tree.map(np.negative, params)
    assert_same(hub.load(checkpoint, LAYOUT), expected)
    assert {file.name for file in checkpoint.iterdir()} == {
        *("report.md", "config.json", "model.safetensors")
    }


def test_saved_files_are_as_readable_as_any_other(checkpoint):
    modes = {file.stat().st_mode for file in checkpoint.iterdir()}
    plain = checkpoint / "plain"
    plain.touch()
    assert modes == {plain.stat().st_mode}


def test_temporary_files_lie_on_the_disk_of_the_target(tmp_path, params, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nowhere")
    hub.save(tmp_path / "clip", params, CONFIG)
    hub.save_tree(tmp_path / "tau.safetensors", params)


def test_saved_tree_loads_with_equal_bits_and_metadata(tmp_path):
    tau = {
        "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T},
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "half": np.ones(2, ml_dtypes.bfloat16),
        "count": np.int32(7),
    }
    hub.save_tree(tmp_path / "deep" / "tau.safetensors", tau, {"task": "mnist"})
    loaded, metadata = hub.load_tree(tmp_path / "deep" / "tau.safetensors")
    assert_same(loaded, tau)
    assert metadata == {"task": "mnist"}
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["tau.safetensors"]


def test_tree_without_metadata_loads_with_none(tmp_path):
    hub.save_tree(tmp_path / "tau.safetensors", {"w": np.ones(2)})
    assert hub.load_tree(tmp_path / "tau.safetensors")[1] == {}


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


def test_pickle_is_never_opened_and_the_error_says_how_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="opens no pickle(.|\n)*weights_only"):
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
    with pytest.raises(ValueError, match="no tree of arrays"):
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
    with pytest.raises(ValueError, match="index.json (is no valid JSON|has no|holds)"):
        hub.load(tmp_path, LAYOUT)


@pytest.mark.parametrize("text", ["{", "", "\x00\x01"])
def test_broken_config_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is no valid JSON"):
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
        'needs none of it, load it by hub.load(folder, layout, select=".*").'
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
    assert "The checkpoint holds only vision_model. Load it by hub.load(" in message
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
    with pytest.raises(ValueError, match="w is of type f8_e4m3"):
        hub.load_tree(tmp_path / "tau.safetensors")


# Saving that fails leaves what was there.


def unsavable(params):
    bad = {**params, "logit_scale": np.float32(np.nan)}
    text = {**params, "logit_scale": "text"}
    double = {**params, "visual_projection": {"kernel": np.ones(2), "scale": 1.0}}
    return {
        "non-finite": (bad, r"the tree has NaN or infinite .* logit_scale \(1 of 1\)"),
        "no array": (text, "logit_scale is of type .*expected an array"),
        "one name for two": (double, "both be saved as visual_projection.weight"),
    }


@pytest.mark.parametrize("case", ["non-finite", "no array", "one name for two"])
def test_unsavable_tree_is_an_error_and_nothing_is_written(
    checkpoint, params, tmp_path, case
):
    tree_, message = unsavable(params)[case]
    before = snapshot(tmp_path)
    for folder in (checkpoint, tmp_path / "new" / "deeper"):
        with pytest.raises(ValueError, match=message):
            hub.save(folder, tree_, CONFIG)
    assert snapshot(tmp_path) == before


def test_value_too_large_for_the_dtype_is_an_error_and_nothing_is_written(
    tmp_path, params
):
    large = {**params, "logit_scale": np.float32(1e6)}
    with pytest.raises(ValueError, match="infinite values in logit_scale"):
        hub.save(tmp_path / "new", large, CONFIG, dtype=np.float16)
    assert snapshot(tmp_path) == {}


def test_config_that_is_no_json_is_an_error_and_nothing_is_written(tmp_path, params):
    with pytest.raises(TypeError, match="not JSON serializable"):
        hub.save(tmp_path / "new", params, {"dtype": np.float32})
    assert snapshot(tmp_path) == {}


def test_save_onto_a_file_is_an_error(tmp_path, params):
    (tmp_path / "clip").write_text("mine")
    with pytest.raises(ValueError, match="clip is a file"):
        hub.save(tmp_path / "clip", params, CONFIG)
    assert (tmp_path / "clip").read_text() == "mine"


def test_missing_source_of_tokenizer_files_is_an_error(tmp_path, params):
    with pytest.raises(FileNotFoundError, match="no folder .*source"):
        hub.save(tmp_path / "new", params, CONFIG, copy_from=tmp_path / "source")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("broken", ["save_file", "replace"])
@pytest.mark.parametrize("target", ["clip", "new"])
def test_interrupted_save_leaves_the_old_files(
    checkpoint, params, tmp_path, monkeypatch, broken, target
):
    def fail(*args):
        raise KeyboardInterrupt

    before = snapshot(tmp_path)
    monkeypatch.setattr(writing if broken == "save_file" else os, broken, fail)
    with pytest.raises(KeyboardInterrupt):
        hub.save(tmp_path / target, jax.tree.map(np.negative, params), CONFIG)
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("broken", ["save_file", "replace"])
def test_interrupted_save_of_a_tree_leaves_the_old_file(tmp_path, monkeypatch, broken):
    def fail(*args):
        raise KeyboardInterrupt

    hub.save_tree(tmp_path / "tau.safetensors", {"w": np.ones(3)})
    before = snapshot(tmp_path)
    monkeypatch.setattr(writing if broken == "save_file" else os, broken, fail)
    with pytest.raises(KeyboardInterrupt):
        hub.save_tree(tmp_path / "tau.safetensors", {"w": np.zeros(3)})
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


def test_non_finite_tree_is_an_error_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"infinite values in a/w \(1 of 2\)"):
        hub.save_tree(tmp_path / "tau.safetensors", {"a": {"w": np.array([1, np.inf])}})
    assert snapshot(tmp_path) == {}


# Finding a checkpoint. The Hub's client is replaced: no test uses the network.


def pretend_hub(monkeypatch, names, downloads):
    """A Hub that holds one repository with files of these names."""

    def model_info(model, *, revision):
        files = [types.SimpleNamespace(rfilename=name) for name in names]
        return types.SimpleNamespace(siblings=files)

    def snapshot_download(model, **options):
        downloads.append((model, options))
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_find_returns_a_local_folder_as_it_is(tmp_path):
    assert hub.find(tmp_path) == tmp_path
    assert hub.find(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "weights, wanted, unwanted",
    [
        (["model.safetensors"], "model*.safetensors", "*.msgpack"),
        (["model.safetensors.index.json"], "model*.safetensors", "*.msgpack"),
        (["flax_model.msgpack"], "flax_model.msgpack", "*.safetensors"),
    ],
)
def test_find_downloads_weights_in_one_format(monkeypatch, weights, wanted, unwanted):
    downloads = []
    others = ["config.json", "pytorch_model.bin", "flax_model.msgpack"]
    pretend_hub(monkeypatch, others + weights, downloads)
    found = hub.find("openai/clip", revision="refs/pr/32")
    [(model, options)] = downloads
    assert str(found) == "/cache/snapshot"
    assert (model, options["revision"]) == ("openai/clip", "refs/pr/32")
    assert wanted in options["allow_patterns"]
    assert {"*.json", "*.txt", "*.model", "*.jinja", "*.py"} < set(
        options["allow_patterns"]
    )
    assert len(options["allow_patterns"]) == 6
    assert unwanted not in options["allow_patterns"]


def test_find_refuses_a_repository_of_pickles_before_any_download(monkeypatch):
    downloads = []
    pretend_hub(monkeypatch, ["config.json", "pytorch_model.bin"], downloads)
    with pytest.raises(ValueError, match="no checkpoint in openai/clip(.|\n)*pickle"):
        hub.find("openai/clip")
    assert downloads == []


def test_find_without_network_uses_the_download_cache(monkeypatch):
    downloads = []
    pretend_hub(monkeypatch, [], downloads)

    def offline(model, *, revision):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    assert str(hub.find("openai/clip")) == "/cache/snapshot"
    assert downloads == [("openai/clip", {"revision": None, "local_files_only": True})]


@pytest.mark.parametrize("model", ["nobody/nothing", "./nowhere", "a b/c/d"])
def test_find_of_what_is_nowhere_is_one_clear_error(monkeypatch, tmp_path, model):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        hub.find(model, revision="v1")
    message = str(error.value)
    assert message.startswith(f"{model!r} at revision 'v1' is not a folder")
    assert "give the path of a folder" in message
