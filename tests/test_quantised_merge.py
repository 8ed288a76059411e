"""`jaxarith merge --dequantize`: models that transformers loads, from packed ones."""

import json

import ml_dtypes
import numpy as np
import packing
import pytest
from merge_command import fails
from safetensors.numpy import load_file, save_file

from jaxarith import cli

BF16 = ml_dtypes.bfloat16
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT_OSS = LLAMA | {
    "intermediate_size": 32,
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}


def folder(place, tensors, config, **more):
    place.mkdir()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config | more))
    return str(place)


def read(place):
    return load_file(f"{place}/model.safetensors")


def pair(place, seed, tensors, config, is_packed, pack, settings):
    """A packed checkpoint, and the same one in bfloat16."""
    rng = np.random.default_rng(seed)
    packed, plain = {}, {}
    for name, tensor in tensors.items():
        if not is_packed(name):
            packed[name] = plain[name] = tensor.astype(BF16)
            continue
        arrays, plain[name] = pack(rng, name, tensor)
        packed |= arrays
    return (
        folder(place / f"packed-{seed}", packed, config, quantization_config=settings),
        folder(place / f"plain-{seed}", plain, config),
    )


def as_gptq(rng, name, weight):
    out, inputs = weight.shape
    groups = rng.permutation(np.arange(inputs) // 16)
    scales = rng.uniform(0.01, 0.02, (inputs // 16, out)).astype(np.float16)
    zeros = rng.integers(0, 16, scales.shape)
    q = rng.integers(0, 16, (inputs, out))
    arrays = packing.gptq(q, zeros, scales, groups, 4)
    values = (q - zeros[groups]) * scales[groups].astype(np.float32)
    module = name.removesuffix("weight")
    found = {module + end: x for end, x in arrays.items()}
    return found, np.ascontiguousarray(values.T).astype(BF16)


def as_mxfp4(rng, name, weight):
    experts, inputs, out = weight.shape
    codes = rng.integers(0, 16, (experts, out, inputs))
    exponents = rng.integers(119, 123, (experts, out, inputs // 32))
    factors = np.repeat(2.0 ** (exponents - 127), 32, axis=-1)
    values = np.array(packing.E2M1)[codes] * factors
    arrays = packing.mxfp4(codes, exponents)
    found = {name + end: x for end, x in arrays.items()}
    return found, np.ascontiguousarray(values.swapaxes(1, 2)).astype(BF16)


# The class, its configuration, which tensors are packed, how, and what says so.
KINDS = {
    "GPTQ": (
        "LlamaForCausalLM",
        LLAMA,
        lambda name: "_proj.weight" in name,
        as_gptq,
        GPTQ,
    ),
    "MXFP4": (
        "GptOssForCausalLM",
        GPT_OSS,
        lambda name: name.endswith(("experts.gate_up_proj", "experts.down_proj")),
        as_mxfp4,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def models(request, tmp_path_factory):
    """Packed and plain folders of a base and a model of one kind."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers")
    name, settings, *how = KINDS[request.param]
    of_kind = getattr(transformers, name)
    place = tmp_path_factory.mktemp(request.param)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        of_kind(of_kind.config_class(**settings)).save_pretrained(place / f"{seed}")
        config = json.loads((place / f"{seed}" / "config.json").read_text())
        config["dtype"] = "float16"
        found.append(pair(place, seed, read(place / f"{seed}"), config, *how))
    return of_kind, found


def merge(base, model, out, *more, coef="0.7"):
    options = ("--method", "task_arithmetic", "--coef", coef, "--quiet", *more)
    named = ("--base", base, "--model", model, "--out", str(out))
    assert cli.main(["merge", *named, *options]) == 0
    return read(out)


@pytest.mark.torch
def test_the_merge_is_that_of_the_dequantised_models_and_loads(models, torch, tmp_path):
    of_kind, [(base, plain_base), (model, plain_model)] = models
    found = merge(base, model, tmp_path / "out", "--dequantize")
    expected = merge(plain_base, plain_model, tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == BF16
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    loaded, info = of_kind.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    texts = torch.arange(3, 13).reshape(2, 5)
    loaded.generate(texts, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for name, tensor in loaded.state_dict().items():
        if name in found:
            values = found[name].astype(np.float32)
            np.testing.assert_array_equal(tensor.float().numpy(), values)


@pytest.mark.torch
def test_what_was_dequantised_is_said(models, tmp_path, capsys):
    _, [(base, plain), (model, _)] = models
    merge(plain, model, tmp_path / "out", "--dequantize")
    record = json.loads((tmp_path / "out" / "jaxarith_merge.json").read_text())
    notes = "\n".join(record["notes"])
    count = sum(f"{x}" in notes for x in ("weights of the format gptq", "mxfp4"))
    assert count == 1 and "are dequantised to bf16" in notes
    assert "matrices were not quantised, stay bf16" in notes
    assert "difference contains the rounding" in notes and base not in notes
    assert "are dequantised to bf16" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.torch
def test_without_the_flag_packed_models_are_refused(models, tmp_path, capsys):
    _, [(base, plain), (model, _)] = models
    for pair in ((base, model), (plain, model), (base, plain)):
        named = ("--base", pair[0], "--model", pair[1], "--out", tmp_path / "out")
        error = fails(capsys, "--method", "average", *named)
        assert "is quantised" in error and "--dequantize" in error


@pytest.mark.torch
def test_slices_of_packed_models(models, tmp_path):
    _, [(base, plain), (model, other)] = models
    parts = [
        {"sources": [{"model": x, "layer_range": [i, i + 1]}]}
        for i, x in enumerate((base, model))
    ]
    recipe = {"merge_method": "passthrough", "slices": parts}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ("merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"))
    assert cli.main([*arguments, "--dequantize", "--quiet"]) == 0
    plain, other, found = read(plain), read(other), read(tmp_path / "out")
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        first = ".layers.0." in name or "embed" in name
        np.testing.assert_array_equal(tensor, (plain if first else other)[name])


@pytest.mark.torch
def test_another_dtype_is_rounded_from_float32(models, tmp_path):
    _, [(base, plain), (model, _)] = models
    flags = ("--dequantize", "--dtype", "float32")
    found = merge(base, model, tmp_path / "out", *flags, coef="0")
    in_bf16 = read(plain)
    for name, tensor in found.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor.astype(BF16), in_bf16[name])
