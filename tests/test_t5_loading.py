"""Leaves, files and configurations of a whole T5: what loads, what is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization
from tiny_t5 import VARIANTS, random_params, tiny_t5, tiny_t5_config

from jaxarith import hub, tree
from jaxarith.models import t5

LAYOUTS = Path(__file__).parent / "layouts"


@pytest.mark.parametrize("name", ["t5-small", "flan-t5-small"])
def test_layout_is_that_of_the_published_model(name):
    flan = {
        **{"d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6},
        **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    }
    raw = {"model_type": "t5", **(flan if name == "flan-t5-small" else {})}
    layout = tree.flatten(t5.layout(t5.T5Config.from_json(raw)))
    expected = json.loads((LAYOUTS / f"{name}.json").read_text())
    assert {path: list(leaf.shape) for path, leaf in layout.items()} == expected


SIZES = {
    "small": (60_506_624, {}),
    "base": (222_903_552, {"d_model": 768, "d_ff": 3072, "num_heads": 12}),
    "large": (737_668_096, {"d_model": 1024, "d_ff": 4096, "num_heads": 16}),
}


@pytest.mark.parametrize("size, layers", [("small", 6), ("base", 12), ("large", 24)])
def test_published_sizes(size, layers):
    parameters, fields = SIZES[size]
    layout = t5.layout(t5.T5Config(num_layers=layers, **fields))
    assert tree.size(layout) == parameters


def test_patterns_select_the_weights_of_both_stacks():
    config = tiny_t5(**VARIANTS["v1.1"])
    layout = t5.layout(config)
    attention = tree.flatten(tree.select(layout, t5.ATTENTION_WEIGHTS))
    assert len(attention) == 4 * 3 + 8 * 2
    linear = tree.flatten(tree.select(layout, t5.BLOCK_LINEAR_WEIGHTS))
    assert len(linear) == (4 + 3) * 3 + (8 + 3) * 2
    kernels = {path for path in tree.flatten(layout) if path.endswith("/kernel")}
    assert kernels == linear.keys() | {"lm_head/kernel"}
    rest = tree.flatten(layout).keys() - tree.flatten(tree.select(layout, t5.BLOCKS))
    norms = {f"{stack}/final_layer_norm/weight" for stack in ("encoder", "decoder")}
    assert rest == {"shared/embedding", "lm_head/kernel"} | norms


def with_extras(folder, params, raw, extras):
    """A checkpoint whose file holds tensors that are no parameters, too."""
    hub.save(folder, params, raw, overwrite=True)
    hub.write(folder, {**hub.read(folder), **extras}, raw, overwrite=True)


JUNK = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.mark.parametrize("head", [True, False])
def test_an_old_file_with_copies_and_a_dead_table_loads(tmp_path, head):
    raw = tiny_t5_config()
    config = t5.T5Config.from_json(raw)
    params = random_params(0, config)
    shared = params["shared"]["embedding"]
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    copies = {name: shared for name in names + ["lm_head.weight"] * head}
    with_extras(tmp_path, params, raw, {JUNK: np.ones((8, 3), np.float32), **copies})
    loaded = t5.load(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_a_head_in_a_flax_file_is_found(tmp_path):
    raw = tiny_t5_config(tie_word_embeddings=False)
    config = t5.T5Config.from_json(raw)
    params = random_params(0, config)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(params))
    loaded = t5.load(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_embeddings_of_a_stack_that_differ_are_refused(tmp_path, stack):
    config = tiny_t5()
    params = random_params(0, config)
    other = np.array(params["shared"]["embedding"])
    other[0, 0] += 1e-3
    name = f"{stack}.embed_tokens.weight"
    with_extras(tmp_path, params, tiny_t5_config(), {name: other})
    with pytest.raises(ValueError, match=f"{stack}/embed_tokens/weight"):
        t5.load(tmp_path)


def test_unknown_and_missing_tensors_are_refused(tmp_path):
    config = tiny_t5()
    params = random_params(0, config)
    extra = {"decoder.block.0.layer.1.adapter.weight": np.ones((2, 2), np.float32)}
    with_extras(tmp_path, params, tiny_t5_config(), extra)
    with pytest.raises(ValueError, match="layer/1/adapter/weight"):
        t5.load(tmp_path)
    table = "decoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"
    part = tree.select(params, f"(?!{table}).*")
    hub.save(tmp_path, part, tiny_t5_config(), overwrite=True)
    with pytest.raises(ValueError, match="SelfAttention/relative_attention_bias"):
        t5.load(tmp_path)


def test_a_head_that_differs_is_untied_and_one_that_is_missing_an_error(tmp_path):
    untied = tiny_t5(tie_word_embeddings=False)
    params = random_params(0, untied)
    raw = tiny_t5_config(scale_decoder_outputs=False)
    hub.save(tmp_path, params, raw, overwrite=True)
    loaded = t5.load(tmp_path)
    assert loaded.config == untied
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    tied = tree.select(params, "(?!lm_head).*")
    raw = tiny_t5_config(tie_word_embeddings=False)
    hub.save(tmp_path, tied, raw, overwrite=True)
    with pytest.raises(ValueError, match="lm_head/kernel"):
        t5.load(tmp_path)


def test_a_head_equal_to_the_embeddings_stays_untied_where_the_config_says_so(tmp_path):
    raw = tiny_t5_config(tie_word_embeddings=False)
    params = random_params(0, t5.T5Config.from_json(raw))
    params["lm_head"]["kernel"] = np.array(params["shared"]["embedding"].T)
    hub.save(tmp_path, params, raw, overwrite=True)
    loaded = t5.load(tmp_path)
    assert not loaded.config.tie_word_embeddings
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.parametrize("kind", ["umt5", "mt5", "t5gemma"])
def test_checkpoints_of_other_models_are_refused(tmp_path, kind):
    raw = tiny_t5_config(model_type=kind)
    hub.save(tmp_path, random_params(0, tiny_t5()), raw, overwrite=True)
    with pytest.raises(ValueError, match=f"describes a '{kind}'; expected a T5"):
        t5.load(tmp_path)


def test_scaling_follows_the_newer_field_where_there_are_two():
    def scale(**fields):
        return t5.T5Config.from_json({"model_type": "t5", **fields})

    assert scale().scale_decoder_outputs and scale().tie_word_embeddings
    old = scale(tie_word_embeddings=False)
    assert not old.scale_decoder_outputs and not old.tie_word_embeddings
    new = scale(tie_word_embeddings=True, scale_decoder_outputs=False)
    assert not new.scale_decoder_outputs and new.tie_word_embeddings
    assert scale(num_layers=3, num_decoder_layers=None).num_decoder_layers == 3
