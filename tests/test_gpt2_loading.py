"""Leaves, files and configurations of GPT-2: what loads, what is refused."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file
from tiny_gpt2 import CONFIG, PARAMS, random_params, random_tokens, tiny_config

from jaxarith import hub, tree
from jaxarith.models import gpt2


@pytest.mark.parametrize(
    "name, sizes, count",
    [
        ("gpt2", {}, 124_439_808),
        ("medium", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
        ("large", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, sizes, count):
    config = gpt2.GPT2Config.from_json({"model_type": "gpt2", **sizes})
    leaves = tree.flatten(gpt2.layout(config))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == count
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


def test_layout_of_the_smallest_gpt2_is_that_of_transformers():
    file = Path(__file__).parent / "layouts" / "gpt2.json"
    expected = json.loads(file.read_text())
    actual = tree.flatten(gpt2.layout(gpt2.GPT2Config()))
    assert {path: list(leaf.shape) for path, leaf in actual.items()} == expected


def test_layout_of_a_classifier_is_that_of_the_language_model_and_a_score():
    plain = tree.flatten(gpt2.layout(CONFIG))
    whole = tree.flatten(gpt2.layout(CONFIG, classifier=True))
    assert whole.keys() - plain.keys() == {"score/kernel"}
    assert whole["score/kernel"].shape == (CONFIG.n_embd, 3)
    # Each reads its own leaves of a tree that may hold more.
    params = random_params(classifier=True)
    tokens = random_tokens()
    logits = gpt2.language_model(CONFIG)(params, *tokens)
    expected = gpt2.language_model(CONFIG)(
        {"transformer": params["transformer"]}, *tokens
    )
    np.testing.assert_array_equal(logits, expected)


def test_patterns_name_the_blocks_and_their_weights():
    layout = gpt2.layout(CONFIG, classifier=True)
    outside = (
        tree.flatten(layout).keys()
        - tree.flatten(tree.select(layout, gpt2.BLOCKS)).keys()
    )
    assert outside == {
        "transformer/wte/embedding",
        "transformer/wpe/embedding",
        "transformer/ln_f/scale",
        "transformer/ln_f/bias",
        "score/kernel",
    }
    weights = tree.flatten(tree.select(layout, gpt2.BLOCK_LINEAR_WEIGHTS))
    assert len(weights) == 4 * CONFIG.n_layer
    assert all(len(leaf.shape) == 2 for leaf in weights.values())


def saved(folder, *, prefix, extra):
    """PARAMS in a safetensors file with or without a prefix, and more tensors."""
    hub.save(folder, PARAMS, tiny_config(), overwrite=True)
    tensors = load_file(folder / "model.safetensors")
    if not prefix:
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    front = "transformer." if prefix else ""
    tensors |= {front * ("." in k and k[0] == "h") + k: v for k, v in extra.items()}
    save_file(tensors, folder / "model.safetensors")


WTE = PARAMS["transformer"]["wte"]["embedding"]


@pytest.mark.parametrize("prefix", [True, False])
def test_buffers_and_the_copy_of_the_embedding_are_left_out(prefix, tmp_path):
    extra = {f"h.{i}.attn.bias": np.ones((1, 1, 40, 40), "f4") for i in range(2)}
    extra |= {f"h.{i}.attn.masked_bias": np.array(-1e4, "f4") for i in range(2)}
    extra["lm_head.weight"] = WTE
    saved(tmp_path, prefix=prefix, extra=extra)
    assert len(hub.names(tmp_path)) == len(tree.flatten(PARAMS)) + 5
    loaded = gpt2.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_head_of_its_own_and_unknown_tensors_are_refused(prefix, tmp_path):
    saved(tmp_path, prefix=prefix, extra={"lm_head.weight": WTE + 1})
    with pytest.raises(ValueError, match="lm_head"):
        gpt2.load(tmp_path)
    saved(tmp_path, prefix=prefix, extra={"h.0.attn.rotary": np.ones(3, "f4")})
    with pytest.raises(ValueError, match="attn/rotary"):
        gpt2.load(tmp_path)
    saved(tmp_path, prefix=prefix, extra={"score.weight": np.ones((3, 18), "f4")})
    with pytest.raises(ValueError, match="score"):
        gpt2.load(tmp_path)


@pytest.mark.parametrize("prefix", [True, False])
def test_flax_files_load_with_equal_bits(prefix, tmp_path):
    held = PARAMS if prefix else PARAMS["transformer"]
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(held))
    loaded = gpt2.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)


@pytest.mark.torch
def test_random_parameters_have_the_spread_of_those_of_transformers(torch, tmp_path):
    import transformers

    raw = tiny_config("GPT2ForSequenceClassification")
    raw |= {"n_embd": 96, "n_inner": None, "n_layer": 2, "n_positions": 200}
    raw |= {"id2label": {str(i): str(i) for i in range(40)}}
    torch.manual_seed(0)
    raw = {**raw, "label2id": {str(i): i for i in range(40)}}
    config = transformers.GPT2Config(**raw)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    loaded = gpt2.load(tmp_path)
    expected = tree.flatten(loaded.params)
    init = jax.jit(functools.partial(gpt2.init, classifier=True), static_argnums=1)
    actual = tree.flatten(init(jax.random.key(0), loaded.config))
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        if leaf.std() == 0:
            np.testing.assert_array_equal(actual[path], leaf)
        else:
            assert leaf.std() > 0.005
            np.testing.assert_allclose(actual[path].std(), leaf.std(), rtol=0.07)


def test_default_config_equals_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    raw = transformers.GPT2Config().to_dict()
    assert gpt2.GPT2Config.from_json(raw) == gpt2.GPT2Config()
    assert gpt2.GPT2Config.from_json({"model_type": "gpt2"}) == gpt2.GPT2Config()
    # What a file says in place of the number of labels, and what it says of it.
    for stated in ({"id2label": {"0": "x"}}, {"num_labels": 1}):
        config = gpt2.GPT2Config.from_json({"model_type": "gpt2", **stated})
        assert config.num_labels == 1


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "bert"])
def test_config_of_another_model_is_an_error_that_names_it(kind, tmp_path):
    with pytest.raises(ValueError, match=f"describes a '{kind}'; expected a GPT-2"):
        gpt2.GPT2Config.from_json({**tiny_config(), "model_type": kind})
    with pytest.raises(ValueError, match="describes a 'model'; expected a GPT-2"):
        gpt2.GPT2Config.from_json({"n_embd": 512})
    raw = {**tiny_config(), "model_type": kind}
    hub.save(tmp_path, PARAMS, raw, overwrite=True)
    with pytest.raises(ValueError, match=f"describes a '{kind}'; expected a GPT-2"):
        gpt2.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
    ],
)
def test_variants_that_the_port_lacks_are_refused(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name} {value!r}; this port of GPT-2 has"):
        gpt2.GPT2Config.from_json(tiny_config() | change)


def test_heads_that_cannot_share_the_width_are_refused():
    with pytest.raises(ValueError, match="n_embd 18 and n_head 4; expected a width"):
        gpt2.GPT2Config.from_json(tiny_config() | {"n_head": 4})
