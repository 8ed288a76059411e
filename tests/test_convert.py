"""Conversions there and back give the same bits, under the names that models need."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from jaxarith import cli, hub, tree
from jaxarith.models import clip

TINY_CLIP = str(clip.TINY_CLIP)


def convert(source, out, *options):
    return cli.main(["convert", str(source), str(out), *options])


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
        assert actual[name].tobytes() == tensor.tobytes(), name


def there_and_back(folder, tmp_path, *options):
    """The tensors that come back, and those of the msgpack file between."""
    flax, back = tmp_path / "flax", tmp_path / "back"
    assert convert(folder, flax, *options) == 0
    assert convert(flax, back, *options) == 0
    content = serialization.msgpack_restore((flax / "flax_model.msgpack").read_bytes())
    return load_file(back / "model.safetensors"), tree.flatten(content)


def random_like(model, torch):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def checkpoint(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", **config}))
    return folder


@pytest.fixture
def mamba(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "layers.0.weight": rng.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
        "layers.0.scale": rng.normal(size=3).astype(np.float16),
        "layers.1.kernel": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "steps": np.array(7, np.int64),
    }
    return checkpoint(tmp_path / "mamba", tensors)


def test_clip_goes_to_flax_and_back_with_equal_bits(tmp_path):
    back, flax = there_and_back(TINY_CLIP, tmp_path)
    assert_same_bits(back, load_file(f"{TINY_CLIP}/model.safetensors"))
    expected = tree.flatten(clip.load(TINY_CLIP).params)
    assert flax.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(flax[path], leaf, err_msg=path)
    files = {file.name for file in (tmp_path / "flax").iterdir()}
    assert files == {
        *("flax_model.msgpack", "config.json", "tokenizer.json"),
        *("tokenizer_config.json", "preprocessor_config.json"),
    }
    assert hub.read_json(tmp_path / "back") == hub.read_json(TINY_CLIP)


def test_converted_clip_loads(tmp_path):
    assert convert(TINY_CLIP, tmp_path / "flax") == 0
    loaded, expected = clip.load(tmp_path / "flax"), clip.load(TINY_CLIP)
    same = jax.tree.map(np.array_equal, loaded.params, expected.params)
    assert jax.tree.all(same)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_models_go_to_flax_and_back_with_equal_bits(torch, tmp_path, dtype):
    import transformers

    small = {"vocab_size": 40, "num_labels": 3}
    gpt2 = transformers.GPT2Config(
        **small, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    bert = transformers.BertConfig(
        **small, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    models = {
        "gpt2": (transformers.GPT2LMHeadModel(gpt2), "transformer/h/0/attn/c_attn"),
        "bert": (
            transformers.BertForSequenceClassification(bert),
            "bert/encoder/layer/0/output/dense",
        ),
    }
    for name, (model, module) in models.items():
        folder = tmp_path / name
        folder.mkdir()
        random_like(model, torch).to(getattr(torch, dtype)).save_pretrained(folder)
        back, flax = there_and_back(folder, folder)
        tensors = load_file(folder / "model.safetensors")
        assert_same_bits(back, tensors)
        weight = tensors[f"{module.replace('/', '.')}.weight"]
        np.testing.assert_array_equal(flax[f"{module}/kernel"], weight.T)
        loaded, info = type(model).from_pretrained(
            folder / "back", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key].to(value.dtype), value), key


def test_other_architectures_keep_their_names_when_asked(mamba, tmp_path):
    back, flax = there_and_back(mamba, tmp_path, "--names", "keep")
    tensors = load_file(mamba / "model.safetensors")
    assert_same_bits(back, tensors)
    assert flax.keys() == {name.replace(".", "/") for name in tensors}
    assert flax["layers/1/kernel"].shape == (2, 3, 4)


def test_other_architectures_are_refused_otherwise(mamba, tmp_path, capsys):
    assert convert(mamba, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "model_type 'mamba'" in error and "--names keep" in error
    assert {file.name for file in tmp_path.iterdir()} == {"mamba"}


def test_shards_are_read(mamba, tmp_path):
    tensors = load_file(mamba / "model.safetensors")
    (mamba / "model.safetensors").unlink()
    index = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, mamba / f"part-{i}.safetensors")
        index[name] = f"part-{i}.safetensors"
    text = json.dumps({"weight_map": index})
    (mamba / "model.safetensors.index.json").write_text(text)
    back, _ = there_and_back(mamba, tmp_path, "--names", "keep")
    assert_same_bits(back, tensors)
    assert not (tmp_path / "flax" / "model.safetensors.index.json").exists()


def test_dtype_rounds_floating_point_tensors_and_is_stated(tmp_path):
    tensors = {
        "a.weight": np.array([[1.00001, 2, 3]], np.float32),
        "ids": np.arange(3),
    }
    folder = checkpoint(tmp_path / "m", tensors, dtype="float32", torch_dtype=None)
    out = tmp_path / "out"
    assert convert(folder, out, "--names", "keep", "--dtype", "bfloat16") == 0
    content = serialization.msgpack_restore((out / "flax_model.msgpack").read_bytes())
    assert content["a"]["weight"].dtype == ml_dtypes.bfloat16
    assert content["ids"].dtype == tensors["ids"].dtype
    expected = tensors["a.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(content["a"]["weight"], expected)
    assert hub.read_json(out)["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(np.nan, "float32", "a/weight in float32"), (1e6, "float16", "in float16")],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path, capsys, value, dtype, message
):
    tensors = {"a.weight": np.array([0, value], np.float32)}
    folder = checkpoint(tmp_path / "m", tensors)
    options = ("--names", "keep", "--dtype", dtype)
    assert convert(folder, tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"m"}


def test_names_that_cannot_be_nested_are_refused(tmp_path, capsys):
    leaf = np.ones(2, np.float32)
    for i, tensors in enumerate([{"a/b": leaf}, {"a": leaf, "a.b": leaf}]):
        folder = checkpoint(tmp_path / f"m{i}", tensors)
        assert convert(folder, tmp_path / "out", "--names", "keep") == 1
        assert "ename" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused(mamba, capsys):
    before = {file.name for file in mamba.iterdir()}
    assert convert(TINY_CLIP, mamba) == 1
    assert "exists. Name a new folder" in capsys.readouterr().err
    assert {file.name for file in mamba.iterdir()} == before


def test_heads_without_a_place_are_left_out_and_named(torch, tmp_path, capsys):
    import transformers

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "m")
    assert convert(tmp_path / "m", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "left out" in printed and "seq_relationship" in printed


def test_another_dtype_is_that_of_all_configurations(tmp_path):
    config = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "deep_config": {"dtype": "float32"}},
        "vision_config": {"torch_dtype": "float32", "hidden_size": 4},
    }
    folder = checkpoint(tmp_path / "a", {"w": np.ones(2, np.float32)}, **config)
    options = ("--names", "keep", "--dtype", "bfloat16")
    assert convert(folder, tmp_path / "b", *options) == 0
    found = hub.read_json(tmp_path / "b")
    assert json.dumps(found).count("bfloat16") == 4
    assert found["vision_config"]["hidden_size"] == 4


def test_packed_weights_are_not_rounded(tmp_path, capsys):
    tensors = {
        "q.weight": np.ones((8, 1), ml_dtypes.bfloat16),
        "q.weight.absmax": np.ones(1, np.float32),
    }
    folder = checkpoint(tmp_path / "a", tensors)
    options = ("--names", "keep", "--dtype", "float16")
    assert convert(folder, tmp_path / "b", *options) == 1
    assert "is quantised (bitsandbytes" in capsys.readouterr().err


def test_a_stale_quantization_config_is_left_out(tmp_path, capsys):
    said = {"quantization_config": {"quant_method": "fp8"}, "hidden_size": 4}
    plain = checkpoint(
        tmp_path / "a", {"q.weight": np.ones((2, 2), np.float32)}, **said
    )
    assert convert(plain, tmp_path / "flax", "--names", "keep") == 0
    assert "quantised (fp8), but they are not" in capsys.readouterr().out
    assert "quantization_config" not in hub.read_json(tmp_path / "flax")
    assert hub.read_json(tmp_path / "flax")["hidden_size"] == 4

    tensors = {"q.qweight": np.ones((8, 1), np.int32), "q.scales": np.ones((1, 1))}
    packed = checkpoint(tmp_path / "b", tensors, **said)
    for i, folder in enumerate((packed, tmp_path / "0")):  # to Flax, and back
        assert convert(folder, tmp_path / f"{i}", "--names", "keep") == 0
        assert "quantization_config" in hub.read_json(tmp_path / f"{i}")


def test_conversions_list_what_stays_behind(tmp_path, capsys):
    folder = checkpoint(tmp_path / "a", {"w": np.ones(2, np.float32)})
    (folder / "optimizer.pt").write_text("")
    (folder / "LICENSE").write_text("mine")
    assert convert(folder, tmp_path / "b", "--names", "keep") == 0
    assert "not copied: optimizer.pt" in capsys.readouterr().out
    assert (tmp_path / "b" / "LICENSE").read_text() == "mine"
