"""Checkpoints as the Hub has them: round trips, and saves that fail."""

import os
import tempfile
from typing import NamedTuple

import clip_checkpoint
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checks import assert_same
from clip_checkpoint import CONFIG, LAYOUT, rewrite, write_shards
from flax import serialization
from safetensors.numpy import load_file
from tiny import tiny_clip

from jaxarith import hub, tree
from jaxarith.hub import layouts, writing
from jaxarith.models import clip

params, checkpoint = clip_checkpoint.params, clip_checkpoint.checkpoint  # fixtures


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
    hub.save(tmp_path, params, CONFIG, dtype=dtype, overwrite=True)
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
    negative = jax.tree.map(np.negative, params)
    hub.save(checkpoint, negative, CONFIG, overwrite=True)
    assert (checkpoint / "report.md").read_text() == "mine"
    expected = jax.tree.map(np.negative, params)
    assert_same(hub.load(checkpoint, LAYOUT), expected)
    assert {file.name for file in checkpoint.iterdir()} == {
        *("report.md", "config.json", "model.safetensors")
    }


@pytest.mark.parametrize("save", [hub.save, hub.write])
@pytest.mark.parametrize("folder", ["clip", "empty"])
def test_an_existing_folder_is_refused_unless_told(
    checkpoint, params, tmp_path, save, folder
):
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    leaves = layouts.to_torch(tree.flatten(params)) if save is hub.write else params
    with pytest.raises(FileExistsError, match=f"{folder} exists.*overwrite=True"):
        save(tmp_path / folder, leaves, CONFIG)
    assert snapshot(tmp_path) == before
    save(tmp_path / folder, leaves, CONFIG, overwrite=True)
    assert_same(hub.load(tmp_path / folder, LAYOUT), params)


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


class Pair(NamedTuple):
    first: dict
    second: list


def test_a_tree_loads_in_the_structure_that_it_is_like(tmp_path):
    start = Pair({"a/b": np.ones(2), "c": np.ones(3)}, [np.ones(4), {"d": np.ones(5)}])
    tau = jax.tree.map(lambda leaf: 2 * leaf, start)
    hub.save_tree(tmp_path / "tau.safetensors", tau)
    loaded, _ = hub.load_tree(tmp_path / "tau.safetensors", like=start)
    assert jax.tree.structure(loaded) == jax.tree.structure(start)
    jax.tree.map(np.testing.assert_array_equal, loaded, tau)


def test_a_part_of_a_tree_loads_as_a_part(tmp_path):
    start = {"a": {"w": np.ones(2), "v": np.ones(2)}, "b": np.ones(3)}
    hub.save_tree(tmp_path / "tau.safetensors", {"a": {"v": np.zeros(2)}})
    loaded, _ = hub.load_tree(tmp_path / "tau.safetensors", like=start)
    assert_same(loaded, {"a": {"v": np.zeros(2)}})


@pytest.mark.parametrize("like", [{"w": np.ones(3)}, {"v": np.ones(2)}])
def test_a_tree_that_is_not_like_it_is_refused_with_the_path(tmp_path, like):
    hub.save_tree(tmp_path / "tau.safetensors", {"w": np.ones(2)})
    with pytest.raises(ValueError, match=r"tau.safetensors does not fit .*\n.* w"):
        hub.load_tree(tmp_path / "tau.safetensors", like=like)


def test_a_leaf_with_the_name_of_the_metadata_is_refused(tmp_path):
    with pytest.raises(ValueError, match="called __metadata__"):
        hub.save_tree(tmp_path / "tau.safetensors", {"__metadata__": np.ones(2)})
    assert snapshot(tmp_path) == {}


def test_tree_without_metadata_loads_with_none(tmp_path):
    hub.save_tree(tmp_path / "tau.safetensors", {"w": np.ones(2)})
    assert hub.load_tree(tmp_path / "tau.safetensors")[1] == {}


# Saving that fails leaves what was there.


def unsavable(params):
    bad = {**params, "logit_scale": np.float32(np.nan)}
    text = {**params, "logit_scale": "text"}
    double = {**params, "visual_projection": {"kernel": np.ones(2), "scale": 1.0}}
    return {
        "non-finite": (bad, r"the tree has NaN or infinite .* logit_scale \(1 of 1\)"),
        "no array": (text, "logit_scale has the dtype .*expected an array"),
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
            hub.save(folder, tree_, CONFIG, overwrite=True)
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
        negative = jax.tree.map(np.negative, params)
        hub.save(tmp_path / target, negative, CONFIG, overwrite=True)
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
