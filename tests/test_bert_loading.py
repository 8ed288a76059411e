"""Leaves, files and configurations of BERT and RoBERTa: what loads, what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from layouts import generate
from safetensors.numpy import load_file, save_file
from tiny_bert import HEADS, KINDS, layout, tiny, tiny_config, tiny_params

from jaxarith import hub, tree
from jaxarith.models import bert

# Layouts and names.


def committed_layout(name):
    return json.loads((generate.FOLDER / f"{name}.json").read_text())


REAL = ["bert-base-uncased", "roberta-base", "roberta-large"]


@pytest.mark.parametrize("name", REAL)
def test_layout_equals_that_of_the_real_checkpoint(name):
    config = bert.BertConfig.from_json(generate.LANGUAGE_MODELS[name][1])
    leaves = tree.flatten(bert.layout(config, "masked_lm"))
    shapes = {path: list(leaf.shape) for path, leaf in leaves.items()}
    assert shapes == committed_layout(name)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


@pytest.mark.torch
@pytest.mark.parametrize("name", REAL)
def test_committed_layout_equals_that_of_transformers(torch, name):
    state_dict = generate.state_dict(name)
    assert generate.flax_layout(state_dict) == committed_layout(name)


@pytest.mark.parametrize("name", REAL)
def test_patterns_select_the_blocks_and_their_matrices(name):
    config = bert.BertConfig.from_json(generate.LANGUAGE_MODELS[name][1])
    leaves = bert.layout(config, "masked_lm", pooler=True)
    count = config.num_hidden_layers

    def selected(pattern):
        return set(tree.flatten(tree.select(leaves, pattern)))

    blocks = selected(bert.BLOCKS)
    assert len(blocks) == 16 * count
    assert all("/encoder/layer/" in path for path in blocks)
    matrices = selected(bert.BLOCK_LINEAR_WEIGHTS)
    assert matrices < blocks and len(matrices) == 6 * count
    attention = selected(bert.ATTENTION_WEIGHTS)
    assert attention < matrices and len(attention) == 4 * count


def test_heads_and_pooler_add_the_leaves_of_hugging_face():
    def added(kind, head, **options):
        config = tiny(kind)
        base = tree.flatten(layout(config)).keys()
        return tree.flatten(layout(config, head, **options)).keys() - base

    pooler = {"bert/pooler/dense/kernel", "bert/pooler/dense/bias"}
    assert added("bert", None, pooler=True) == pooler
    assert added("bert", "classifier") == pooler | {
        "classifier/kernel",
        "classifier/bias",
    }
    assert added("roberta", "classifier") == {
        f"classifier/{layer}/{leaf}"
        for layer in ("dense", "out_proj")
        for leaf in ("kernel", "bias")
    }
    for function in (bert.layout, functools.partial(bert.init, jax.random.key(0))):
        with pytest.raises(ValueError, match="'lm'; expected None, masked_lm or class"):
            function(tiny("bert"), "lm")


def test_random_parameters_have_the_spread_that_the_config_states():
    raw = tiny_config("bert") | {"initializer_range": 0.1, "num_hidden_layers": 1}
    raw |= {"hidden_size": 96, "max_position_embeddings": 90}
    config = bert.BertConfig.from_json(raw)
    params = bert.init(jax.random.key(0), config, "masked_lm")
    for path, leaf in tree.flatten(params).items():
        if path.endswith(("kernel", "embedding")):
            np.testing.assert_allclose(leaf.std(), 0.1, rtol=0.3, err_msg=path)
        else:
            assert (leaf == path.endswith("scale")).all(), path


# Files.


def saved(folder, kind, head, *, pooler=False):
    """A folder to tamper with, and what it holds."""
    params = tiny_params(kind, head, pooler=pooler)
    hub.save(folder, params, tiny_config(kind, head), overwrite=True)
    return params, load_file(folder / "model.safetensors")


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_come_back_as_they_were_saved(kind, head, tmp_path):
    """With the pooler that the file has, though only one model here reads it."""
    params, tensors = saved(tmp_path / "a", kind, head, pooler=True)
    assert f"{kind}.pooler.dense.weight" in tensors
    loaded = bert.load(tmp_path / "a")
    equal(loaded.params, params)
    hub.save(tmp_path / "b", loaded.params, hub.read_json(tmp_path / "a"))
    assert hub.names(tmp_path / "b") == hub.names(tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_what_hub_files_hold_besides_is_left_out(kind, tmp_path):
    params, tensors = saved(tmp_path, kind, "masked_lm")
    words = tensors[f"{kind}.embeddings.word_embeddings.weight"]
    tensors |= {
        f"{kind}.embeddings.position_ids": np.arange(14)[None],
        f"{kind}.embeddings.token_type_ids": np.zeros((1, 14), np.int64),
    }
    if kind == "bert":
        tensors |= {
            "cls.predictions.decoder.weight": words.copy(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].copy(),
            "cls.seq_relationship.weight": np.ones((2, 24), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
        }
    else:
        tensors |= {
            "lm_head.decoder.weight": words.copy(),
            "lm_head.decoder.bias": tensors["lm_head.bias"].copy(),
        }
    save_file(tensors, tmp_path / "model.safetensors")
    equal(bert.load(tmp_path).params, params)

    copy = next(name for name in tensors if name.endswith("decoder.weight"))
    tensors[copy][3, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=copy.replace(".", "[./]")):
        bert.load(tmp_path)
    equal(bert.load(tmp_path, head=None).params, {kind: params[kind]})


def test_older_names_of_norms_load(tmp_path):
    params, tensors = saved(tmp_path, "bert", "masked_lm")
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in older.items():
        tensors = {name.replace(new, old): array for name, array in tensors.items()}
    assert "cls.predictions.transform.LayerNorm.gamma" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    equal(bert.load(tmp_path).params, params)


@pytest.mark.parametrize("kind", KINDS)
def test_bases_without_the_name_in_front_load(kind, tmp_path):
    params, tensors = saved(tmp_path, kind, None, pooler=True)
    tensors = {name.removeprefix(f"{kind}."): array for name, array in tensors.items()}
    tensors["embeddings.position_ids"] = np.arange(14)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    equal(bert.load(tmp_path).params, params)


@pytest.mark.parametrize("prefixed", [True, False])
def test_msgpack_files_of_flax_load(prefixed, tmp_path):
    params, _ = saved(tmp_path, "bert", None, pooler=True)
    (tmp_path / "model.safetensors").unlink()
    content = serialization.msgpack_serialize(params if prefixed else params["bert"])
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    equal(bert.load(tmp_path).params, params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["masked_lm", "classifier"])
def test_bases_load_from_checkpoints_with_any_head(kind, head, tmp_path):
    params, tensors = saved(tmp_path, kind, head)
    base = bert.load(tmp_path, head=None)
    equal(base.params, {kind: params[kind]})
    tensors |= {"qa_outputs.weight": np.ones((2, 24), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    equal(bert.load(tmp_path, head=None).params, {kind: params[kind]})
    raw = hub.read_json(tmp_path) | {"architectures": ["BertForQuestionAnswering"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    equal(bert.load(tmp_path).params, {kind: params[kind]})
    equal(bert.load(tmp_path, head=head).params, params)


def test_pretraining_checkpoints_load_as_masked_lms(tmp_path):
    params, _ = saved(tmp_path, "bert", "masked_lm")
    raw = hub.read_json(tmp_path) | {"architectures": ["BertForPreTraining"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    equal(bert.load(tmp_path).params, params)
    del raw["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    equal(bert.load(tmp_path).params, {"bert": params["bert"]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["masked_lm", "classifier"])
def test_missing_head_is_an_error_that_names_it(kind, head, tmp_path):
    saved(tmp_path, kind, None, pooler=True)
    with pytest.raises(ValueError, match=f"has no {head} head(?s:.*)head=None"):
        bert.load(tmp_path, head=head)
    with pytest.raises(ValueError, match="head 'lm'; expected"):
        bert.load(tmp_path, head="lm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_unknown_and_missing_tensors_are_errors_that_name_them(kind, head, tmp_path):
    _, tensors = saved(tmp_path, kind, head)
    heads = {"bert": ["cls/predictions/extra"], "roberta": ["lm_head/extra"]}
    extra = [f"{kind}/extra", f"{kind}/encoder/layer/2/output/dense/bias", "adapter/up"]
    extra += heads[kind] if head == "masked_lm" else []
    extra += ["classifier/extra"] if head == "classifier" else []
    for name in extra:
        wrong = {**tensors, name.replace("/", "."): np.ones(3, np.float32)}
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"\+ {name}  f32\[3\]"):
            bert.load(tmp_path)
    name = f"{kind}.encoder.layer.1.attention.self.key.bias"
    wrong = {key: array for key, array in tensors.items() if key != name}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"- {name.replace('.', '/')}"):
        bert.load(tmp_path)


def test_classifier_of_a_bert_needs_a_pooler(tmp_path):
    _, tensors = saved(tmp_path, "bert", "classifier")
    wrong = {name: array for name, array in tensors.items() if "pooler" not in name}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="- bert/pooler/dense/kernel"):
        bert.load(tmp_path)


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    _, tensors = saved(tmp_path, "roberta", "masked_lm")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("bert", "masked_lm")))
    with pytest.raises(ValueError, match="has no masked_lm head"):
        bert.load(tmp_path)
    with pytest.raises(ValueError, match=r"does not match(?s:.*)roberta/\.\.\."):
        bert.load(tmp_path, head=None)
    raw = tiny_config("bert", "classifier") | {"id2label": {"0": "a"}}
    saved(tmp_path, "bert", "classifier")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"classifier/kernel: model f32\[24, 1\]"):
        bert.load(tmp_path)


# Configurations.


@pytest.mark.parametrize("kind", KINDS)
def test_default_config_equals_that_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    cls = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
    raw = json.loads(cls().to_json_string(use_diff=False))
    stated = bert.BertConfig.from_json(raw)
    assert stated == bert.BertConfig.from_json({"model_type": kind})
    assert kind == "roberta" or stated == bert.BertConfig()


def test_number_of_labels_is_that_of_their_names():
    def labels(**raw):
        return bert.BertConfig.from_json({"model_type": "bert", **raw}).num_labels

    assert labels() == 2
    assert labels(num_labels=5) == 5
    assert labels(id2label={"0": "a", "1": "b", "2": "c"}) == 3


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"model_type": "t5"}, "describes a 't5'; expected a BERT or RoBERTa"),
        ({"model_type": None}, "describes a 'model'; expected a BERT or RoBERTa"),
        ({"hidden_act": "silu"}, "activation 'silu'; this port has gelu, gelu_new"),
        (
            {"position_embedding_type": "relative_key"},
            "'relative_key'; this port has absolute",
        ),
        ({"is_decoder": True}, "is_decoder: causal attention"),
    ],
)
def test_configs_that_this_port_lacks_are_errors_that_say_so(stated, message):
    with pytest.raises(ValueError, match=message):
        bert.BertConfig.from_json({**tiny_config("bert"), **stated})
