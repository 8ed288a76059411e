"""Checkpoints of every packed format become models, and what is not read is refused."""

import json

import checkpoints
import numpy as np
import packing
import pytest
from merge_command import fails
from packing import BF16, F8
from safetensors.numpy import save_file

from jaxarith import hub, lazy, merge, stream
from jaxarith.hub import quantised, stored

X = "model.layers.0.mlp.up_proj"
PLAIN = {
    "model.embed_tokens.weight": (np.arange(96).reshape(12, 8) / 64).astype(BF16),
    "model.norm.weight": np.ones(8, np.float32),
}
SCHEME = {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}}
RNG = np.random.default_rng(0)
Q = RNG.integers(0, 16, (16, 8))
SCALES = RNG.random((2, 8)).astype(np.float16)
ZEROS = RNG.integers(0, 16, (2, 8))
F8S = RNG.normal(size=(8, 16)).astype(F8)
GPTQ = packing.gptq(Q, ZEROS, SCALES, np.arange(16) // 8, 4)
ROWS = RNG.random((8, 1)).astype(np.float32)
NF4 = packing.nf4(RNG.integers(0, 16, 128), ROWS[:2, 0], (8, 16))
# By format: its tensors by what follows the module, and quantization_config.
FORMATS = {
    "fp8": (
        {".weight": F8S, ".weight_scale_inv": np.ones((1, 1), np.float32)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "compressed-tensors": (
        {".weight": F8S, ".weight_scale": ROWS, ".input_scale": ROWS[0]},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": SCHEME,
        },
    ),
    "bitsandbytes": (
        {f".weight{end}": x for end, x in NF4.items()},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "gptq": (
        {f".{end}": x for end, x in GPTQ.items()},
        {"quant_method": "gptq", "bits": 4, "group_size": 8},
    ),
    "awq": (
        {
            ".qweight": packing.awq_words(Q),
            ".qzeros": packing.awq_words(ZEROS),
            ".scales": SCALES,
        },
        {"quant_method": "awq", "bits": 4, "version": "gemm"},
    ),
}


def packed_folder(place, method, **settings):
    arrays, said = FORMATS[method]
    content = PLAIN | {X + end: x for end, x in arrays.items()}
    config = {"model_type": "toy", "quantization_config": said | settings}
    return checkpoints.write(place, content, config=config)


def plain_folder(place, seed=1):
    weight = np.random.default_rng(seed).normal(size=(8, 16)).astype(BF16)
    return checkpoints.write(place, PLAIN | {f"{X}.weight": weight})


def unpacked(folder, dtype=BF16):
    found = hub.open_checkpoint(folder)
    return hub.dequantised(folder, found.tensors, hub.read_json(folder), dtype)


@pytest.mark.parametrize("method", FORMATS)
def test_a_packed_base_has_the_names_of_the_model(method, tmp_path):
    base = packed_folder(tmp_path / "base", method)
    model = plain_folder(tmp_path / "model")
    tensors, notes = unpacked(base)
    assert tensors.keys() == {*PLAIN, f"{X}.weight"}
    assert str(tensors[f"{X}.weight"]) == "bf16[8, 16]"
    assert tensors["model.norm.weight"].dtype == np.float32
    assert f"1 weight of the format {method} is dequantised to bf16" in notes[0]
    assert "1 matrix was not quantised, stays bf16: model.embed_tokens" in notes[1]
    assert len(notes) == 2 + (method == "compressed-tensors")
    if len(notes) == 3:
        assert f"1 scale of activations or of the cache is left out: {X}" in notes[2]

    with pytest.raises(ValueError, match=r"base is quantised .* \(--dequantize\)"):
        stream.open_models(base, [model])
    opened = stream.open_models(base, [model], dequantize="bfloat16")
    assert any("were not quantised together" in note for note in opened.notes)
    stream.merge(merge.task_arithmetic, opened, tmp_path / "out", quiet=True)
    found = hub.read(tmp_path / "out")
    assert {str(x.dtype) for x in found.values()} == {"bfloat16", "float32"}


def test_nothing_is_unpacked_before_it_is_read(tmp_path, monkeypatch):
    base = packed_folder(tmp_path / "base", "gptq")
    calls = []
    made = quantised.gptq.values
    monkeypatch.setattr(
        quantised.gptq, "values", lambda *args: calls.append(0) or made(*args)
    )
    opened = stream.open_models(
        base, [plain_folder(tmp_path / "model")], dequantize="bfloat16"
    )
    assert not calls
    [tau] = opened.taus
    lazy.read(tau[f"{X}.weight"])
    assert calls


def test_adapters_on_a_packed_base_carry_no_rounding(tmp_path):
    base = packed_folder(tmp_path / "base", "awq")
    factors = {
        f"base_model.model.{X}.lora_A.weight": np.ones((2, 16), np.float32),
        f"base_model.model.{X}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    adapter = checkpoints.write(tmp_path / "adapter", {})
    (adapter / "model.safetensors").unlink()
    save_file(factors, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    opened = stream.open_models(base, [adapter], dequantize="float32")
    assert not any("quantised together" in note for note in opened.notes)
    [tau] = opened.taus
    np.testing.assert_allclose(lazy.read(tau[f"{X}.weight"]), np.full((8, 16), 2.0))


def test_a_stale_configuration_changes_nothing(tmp_path):
    folder = plain_folder(tmp_path / "plain")
    said = {"quantization_config": {"quant_method": "hqq"}}
    tensors = hub.open_checkpoint(folder).tensors
    found, notes = hub.dequantised(folder, tensors, said)
    assert found == tensors and notes == ()


def test_scales_of_activations_and_caches_are_left_out():
    names = ("self_attn.k_scale", "attn.kv_scale", "k_proj.output_scale")
    names += ("up_proj.input_activation_scale", "up_proj.input_zero_point")
    one = stored.Stored.made(np.float32, (1,), lambda: np.ones(1, np.float32))
    content, said = FORMATS["fp8"]
    tensors = tensors_of(content) | {f"model.layers.0.{name}": one for name in names}
    tensors |= {"model.layers.0.logit_scale": one}
    config = {"quantization_config": said}
    found, [_, note] = hub.dequantised("model", tensors, config)
    assert found.keys() == {f"{X}.weight", "model.layers.0.logit_scale"}
    assert "5 scales of activations or of the cache are left out" in note


def tensors_of(content):
    return {
        X + end: stored.Stored.made(x.dtype, x.shape, lambda x=x: x)
        for end, x in content.items()
    }


def refusal(content, said, place="model"):
    with pytest.raises(ValueError) as error:
        hub.dequantised(place, tensors_of(content), {"quantization_config": said})
    return str(error.value)


WORDS = np.zeros((4, 2), np.int32)
HALF = np.ones((8, 1), np.float16)
REFUSED = {
    "hqq": (
        {".W_q": WORDS},
        {"quant_method": "hqq"},
        "quantised (hqq), which --dequantize does not read. It reads fp8, compressed-",
    ),
    "unknown method": (
        {".weight": F8S, ".weight_scale": HALF},
        {"quant_method": "modelopt"},
        "quantised (modelopt)",
    ),
    "gptq or awq": ({".qweight": WORDS, ".scales": HALF}, {}, "(GPTQ or AWQ), which"),
    "marlin": (
        FORMATS["gptq"][0],
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "the layout marlin of GPTQ is not supported",
    ),
    "old marlin": (
        FORMATS["gptq"][0],
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
        "the layout marlin of GPTQ is not supported",
    ),
    "5 bits": (
        {end: x for end, x in FORMATS["gptq"][0].items() if end != ".g_idx"},
        {"quant_method": "gptq", "bits": 5},
        "fields of 2, 3, 4, 8 bits",
    ),
    "no zeros": (
        {".qweight": WORDS, ".scales": HALF},
        {"quant_method": "gptq", "bits": 4},
        f"{X}.qweight has no {X}.qzeros",
    ),
    "gemv": (
        FORMATS["awq"][0],
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "AWQ in the layout gemv with 4 bits is not supported, only gemm",
    ),
    "other shapes": (
        FORMATS["awq"][0] | {".scales": HALF},
        {"quant_method": "awq", "bits": 4},
        f"{X}.qzeros is i32[2, 1]; expected i32[8, 1]",
    ),
    "sparse": (
        {".weight_packed": WORDS, ".weight_scale": HALF},
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        "the layout marlin-24 of compressed-tensors is not supported",
    ),
    "rotated": (
        {".weight_packed": WORDS, ".weight_scale": HALF},
        {"quant_method": "compressed-tensors", "transform_config": {"a": 1}},
        "the weights are rotated",
    ),
    "no width": (
        {
            ".weight_packed": WORDS,
            ".weight_scale": HALF[:4],
            ".weight_shape": np.array([4, 16]),
        },
        {"quant_method": "compressed-tensors"},
        "fits none of the bits that config.json states (none)",
    ),
    "arranged for a device": (
        {
            ".weight": np.zeros((8, 16), np.int8),
            ".SCB": ROWS[:, 0],
            ".weight_format": np.array(1, np.uint8),
        },
        {"quant_method": "bitsandbytes"},
        "arranged for one device",
    ),
    "incomplete": (
        {f".weight{end}": x for end, x in NF4.items() if "absmax" not in end},
        {"quant_method": "bitsandbytes"},
        f"lacks {X}.weight.absmax",
    ),
    "scales of another weight": (
        {".weight": F8S, ".weight_scale_inv": np.ones((3, 2), np.float32)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fit none of the blocks that config.json states (128 x 128)",
    ),
    "no scales": (
        {".weight": F8S},
        {"quant_method": "fp8"},
        "not part of a weight",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_by_name(kind):
    content, said, message = REFUSED[kind]
    error = refusal(content, said)
    assert error.startswith("model") and message in error


def test_models_whose_matrices_lie_the_other_way_round_are_refused():
    content, said = FORMATS["gptq"]
    config = {"model_type": "gpt2", "quantization_config": said}
    with pytest.raises(
        ValueError, match=r"a quantised gpt2\. Its matrices are \[in, out\]"
    ):
        hub.dequantised("model", tensors_of(content), config)


def test_adapters_are_not_dequantised(capsys):
    flags = ("--to-adapter", "--dequantize", "--method", "average")
    error = fails(capsys, *flags, "--model", "a", "--out", "b")
    assert "--dequantize is for models" in error


def test_tensors_alone_tell_most_formats():
    for method in ("fp8", "compressed-tensors", "bitsandbytes"):
        tensors = tensors_of(FORMATS[method][0])
        found, notes = hub.dequantised("model", tensors, {})
        assert f"{X}.weight" in found and method in notes[0]


def damaged(method):
    """Contents and configurations with one part or one setting changed."""
    content, said = FORMATS[method]
    for key in (*said, "weight_block_size", "config_groups", "group_size", "bits"):
        for value in (None, 0, -1, 7, "4", [], [0, 0], {"a": 1}, {"a": {}}, 0.5):
            if key != "quant_method":
                yield content, said | {key: value}
    for end, x in content.items():
        yield {e: y for e, y in content.items() if e != end}, said
        for other in (x[:1], x[:0], x.T, x.reshape(-1), x.astype(np.float32), x[None]):
            yield content | {end: np.ascontiguousarray(other)}, said


@pytest.mark.parametrize("method", FORMATS)
def test_what_does_not_go_together_is_one_error_that_names_it(method):
    refused = 0
    for content, said in damaged(method):
        try:
            found, _ = hub.dequantised(
                "model", tensors_of(content), {"quantization_config": said}
            )
            for leaf in found.values():
                assert leaf.read().shape == leaf.shape
        except ValueError as error:
            assert str(error).startswith("model") and "\n" not in str(error)
            refused += 1
    assert refused > 10
