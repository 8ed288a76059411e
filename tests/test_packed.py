"""Packed weights are refused by the name of their format, before anything is read."""

import checkpoints
import ml_dtypes
import numpy as np
import pytest

from jaxarith import hub, stream
from jaxarith.hub import packed, stored

X = "model.layers.0.q_proj"
U8, I32, F16, F32 = np.uint8, np.int32, np.float16, np.float32
BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
# By format: the tensors beside plain ones, and quantization_config.
FORMATS = {
    "bitsandbytes": (
        {".weight": (BF16, (64, 1)), ".weight.absmax": (F32, (4,))},
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "bfloat16"},
    ),
    "bitsandbytes, 4": (
        {".weight": (U8, (64, 1)), ".weight.quant_state.bitsandbytes__nf4": (U8, (9,))},
        None,
    ),
    "bitsandbytes, 8": ({".weight": (np.int8, (4, 4)), ".SCB": (F32, (4,))}, None),
    "gptq": (
        {".qweight": (I32, (2, 16)), ".scales": (F16, (1, 16)), ".g_idx": (I32, (16,))},
        {"quant_method": "gptq", "bits": 4},
    ),
    "GPTQ or AWQ": ({".qweight": (I32, (16, 2)), ".scales": (F16, (1, 16))}, None),
    "MXFP4": ({"_blocks": (U8, (2, 4, 1, 16)), "_scales": (U8, (2, 4, 1))}, None),
    "fp8": ({".weight": (F8, (4, 4)), ".weight_scale_inv": (F32, (1, 1))}, None),
    "f8_e4m3 numbers": ({".weight": (F8, (4, 4))}, None),
    "compressed-tensors": (
        {".weight_packed": (I32, (4, 2)), ".weight_scale": (BF16, (4, 1))},
        None,
    ),
    "int-quantized": (
        {".weight": (np.int8, (4, 4)), ".weight_scale": (BF16, (4, 1))},
        {"format": "int-quantized"},
    ),
    "packed in u8 numbers": ({".weight": (U8, (64,))}, None),
}


def tensors(content):
    return {
        X + end: stored.Stored.made(dtype, shape, lambda: None)
        for end, (dtype, shape) in content.items()
    }


@pytest.mark.parametrize("label", FORMATS)
def test_packed_weights_are_refused_by_the_name_of_their_format(label, tmp_path):
    content, said = FORMATS[label]
    config = {} if said is None else {"quantization_config": said}
    with pytest.raises(
        ValueError, match=rf"quantised \({label}.*\): {X}.*--dequantize.*floating"
    ):
        packed.check(tmp_path, tensors(content), config)


def test_the_format_is_found_in_a_part_of_the_configuration():
    config = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    assert packed.stated_format(config) == "awq"
    assert packed.stated_format({"text_config": {"a": 1}}) is None


def test_the_first_part_of_packed_weights_is_found_with_its_format():
    content, said = FORMATS["gptq"]
    config = {"text_config": {"compression_config": said}}
    assert packed.found(tensors(content), config) == (f"{X}.g_idx", "GPTQ")
    assert packed.settings(config) == said
    plain = tensors({".weight": (BF16, (4, 4))})
    assert packed.found(plain, config) is None
    assert packed.settings({"text_config": {}}) is None


def test_plain_numbers_are_not_packed(tmp_path):
    plain = {
        ".weight": (BF16, (4, 4)),
        ".scales": (F32, (4,)),
        ".mask": (U8, (4,)),
        ".k_scale": (F32, (1,)),
        ".num_batches_tracked": (np.int64, ()),
    }
    left_behind = {"quantization_config": {"quant_method": "fp8"}}
    packed.check(tmp_path, tensors(plain), left_behind)


def test_a_packed_base_under_an_adapter_is_said_to_be_quantised(tmp_path):
    weight = np.zeros((64, 1), np.uint8)
    base = checkpoints.write(tmp_path / "base", {f"{X}.weight": weight})
    adapter = checkpoints.write(tmp_path / "adapter", {})
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"base is quantised \(packed in u8"):
        stream.open_models(None, [f"{base}+{adapter}"])
    assert hub.read(base)  # as it is
