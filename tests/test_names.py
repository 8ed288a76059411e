"""Names that mean the same are reconciled and reported; most of a model has a place."""

import functools

import checkpoints
import numpy as np
import pytest
from test_policies import expected, f32, merged

from jaxarith.stream import names, policies

BERT = "bert.encoder.layer.0.output.LayerNorm"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (f"{BERT}.gamma", f"{BERT}.weight"),
        (f"{BERT}.beta", f"{BERT.removeprefix('bert.')}.bias"),
        ("conv.parametrizations.weight.original0", "conv.weight_g"),
        ("conv.weight_v", "conv.parametrizations.weight.original1"),
        ("model.language_model.layers.0.w", "model.layers.0.w"),
        ("model.layers.0.w", "language_model.model.layers.0.w"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("visual.blocks.0.w", "model.visual.blocks.0.w"),
    ],
)
def test_names_that_mean_the_same_are_found(ours, theirs):
    others = [f"bert.{i}.w" for i in range(3)] if "bert" in ours else ["other"]
    more = [x.removeprefix("bert.") for x in others] if "bert" not in theirs else others
    found, notes = names.match([ours, *others], [theirs, *more], "m")
    assert found[theirs] == ours
    assert notes


def test_names_that_would_become_anothers_stay():
    found, notes = names.match(["model.w", "model.v"], ["model.w", "w"], "m")
    assert found == {"model.w": "model.w", "w": "w"} and not notes
    tower = ["model.layers.0.w", "language_model.layers.0.w"]
    found, _ = names.match(tower, ["layers.0.w"], "m")
    assert found == {"layers.0.w": "model.layers.0.w"} or found["layers.0.w"] in tower
    assert names.match(["layer.gamma"], ["layer.weight"], "m")[0]["layer.weight"] == (
        "layer.weight"  # a scale of a layer, not of a norm
    )


def test_a_merge_under_other_names_keeps_the_bases(tmp_path):
    def inner(tensors):
        return {
            n.replace("model.", "model.language_model."): x for n, x in tensors.items()
        }

    base, model = inner(f32(0)), f32(1)
    found, notes = merged(tmp_path, base, model)
    assert found.keys() == base.keys()
    name = "model.layers.0.norm.weight"
    want = expected(f32(0)[name], model[name])
    np.testing.assert_array_equal(found[inner({name: 0}).popitem()[0]], want)
    assert (
        "spelled differently: model.embed_tokens.weight is model.language_model"
        in notes
    )


def test_buffers_of_floating_point_are_the_bases_and_reported(tmp_path):
    mask = np.tril(np.ones((1, 1, 4, 4), np.float32))
    buffers = {
        "h.0.attn.bias": mask,
        "h.0.attn.masked_bias": np.array(-1e4, np.float32),
        "rotary_emb.inv_freq": np.arange(4, dtype=np.float32),
    }
    other = {name: np.array(value * 2) for name, value in buffers.items()}
    found, notes = merged(tmp_path, f32(0) | buffers, f32(1) | other)
    for name, value in buffers.items():
        np.testing.assert_array_equal(found[name], value)
    assert "buffers or integers that differ" in notes
    # One side alone may have them.
    merged(tmp_path / "without", f32(0) | buffers, f32(1))
    _, notes = merged(tmp_path / "more", f32(0), f32(1) | buffers)
    assert "attn.masked_bias" in notes and "left out" in notes


def test_the_bias_of_attention_is_no_mask():
    bias = functools.partial(np.zeros, dtype=np.float32)
    assert names.is_buffer("h.0.attn.bias", bias((1, 1, 4, 4)))
    assert not names.is_buffer("h.0.attn.bias", bias((4,)))
    assert not names.is_buffer("h.0.attn.c_attn.bias", bias((4,)))


def test_integers_that_differ_are_reported(tmp_path):
    base, model = f32(0), f32(1)
    assert base[checkpoints.COUNTER] != model[checkpoints.COUNTER]
    _, notes = merged(tmp_path, base, model)
    assert checkpoints.COUNTER in notes


def test_missing_base_is_for_a_few_tensors(tmp_path):
    model = {name.replace("mlp", "ffn"): value for name, value in f32(1).items()}
    few = {name: value for name, value in model.items() if "embed" not in name}
    few.pop("lm_head.weight")
    with pytest.raises(ValueError, match="4 tensors .* have no place in it, only"):
        merged(tmp_path, f32(0), few, missing="base")


def test_no_base_tensor_is_found_twice():
    base = {"model.w": np.zeros(2), "model.v": np.zeros(2)}
    with pytest.raises(ValueError, match=r"\+ w"):
        policies.fit(wrap(base), wrap({**base, "w": np.ones(2)}), "m")


def wrap(tensors):
    from jaxarith.hub import Stored

    return {
        name: Stored.made(np.float32, x.shape, functools.partial(np.float32, x))
        for name, x in tensors.items()
    }
