"""`jaxarith inspect`, `extract` and `verify` of packed (quantised) models."""

import json

import ml_dtypes
import numpy as np
import packing
import pytest
from safetensors.numpy import load_file, save_file

from jaxarith import cli

BF16 = ml_dtypes.bfloat16
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}
MODULES = [f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("up", "down")]
WHOLE = "model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path):
    """A folder in GPTQ, and its numbers in float32."""
    rng = np.random.default_rng(0)
    groups = np.arange(32) // 16
    packed = {WHOLE: rng.standard_normal((8, 32)).astype(BF16)}
    numbers = {WHOLE: packed[WHOLE].astype(np.float32)}
    for module in MODULES:
        scales = rng.uniform(0.01, 0.02, (2, 32)).astype(np.float16)
        zeros = rng.integers(0, 16, scales.shape)
        q = rng.integers(0, 16, (32, 32))
        for end, array in packing.gptq(q, zeros, scales, groups, 4).items():
            packed[f"{module}.{end}"] = array
        values = (q - zeros[groups]) * scales[groups].astype(np.float32)
        numbers[f"{module}.weight"] = np.ascontiguousarray(values.T)
    folder = tmp_path / "packed"
    write(folder, packed, quantization_config=GPTQ)
    return folder, numbers


def write(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))


def tuned(numbers, dtype):
    """A change of rank 1 of every module."""
    rng = np.random.default_rng(1)
    found = dict(numbers)
    for module in MODULES:
        delta = np.outer(*rng.standard_normal((2, 32))).astype(np.float32)
        found[f"{module}.weight"] = numbers[f"{module}.weight"] + 0.01 * delta
    return {name: array.astype(dtype) for name, array in found.items()}


def test_the_difference_to_a_packed_base_is_extracted_and_verified(base, tmp_path):
    folder, numbers = base
    model = tmp_path / "tuned"
    write(model, tuned(numbers, np.float32))
    arguments = [str(folder), str(model), "--rank", "1", "--dequantize", "--quiet"]
    lora = tmp_path / "lora"
    assert cli.main(["extract", *arguments, "--out", str(lora)]) == 0
    factors = load_file(lora / "adapter_model.safetensors")
    for module in MODULES:
        a, b = (
            factors[f"base_model.model.{module}.lora_{x}.weight"] for x in ("A", "B")
        )
        wanted = load_file(model / "model.safetensors")[f"{module}.weight"]
        # As close as float32 holds a difference of numbers of size 0.2.
        np.testing.assert_allclose(
            b @ a, wanted - numbers[f"{module}.weight"], atol=1e-6
        )
    merged = tmp_path / "merged"
    both = ["--base", str(folder), "--model", str(lora), "--out", str(merged)]
    for dtype in ("float32", "bfloat16"):
        flags = ["--dequantize", "--dtype", dtype, "--overwrite", "--quiet"]
        assert cli.main(["merge", *both, "--method", "average", *flags]) == 0
        compared = [str(folder), str(lora), str(merged), "--dequantize"]
        assert cli.main(["verify", *compared]) == 0


def test_norms_of_the_difference_to_a_packed_base(base, tmp_path, capsys):
    folder, numbers = base
    model = tmp_path / "tuned"
    write(model, changed := tuned(numbers, np.float32))
    out = tmp_path / "report"
    arguments = [str(model), "--base", str(folder), "--out", str(out)]
    assert cli.main(["inspect", *arguments, "--dequantize"]) == 0
    found = json.loads((out / "report.json").read_text())
    squares = [np.sum((changed[name] - numbers[name]) ** 2) for name in numbers]
    assert found["models"][0]["norm"] == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)
    assert any("are dequantised" in note for note in found["notes"])


@pytest.mark.parametrize("command", ["extract", "verify", "inspect"])
def test_without_the_flag_packed_models_are_refused(base, tmp_path, capsys, command):
    folder, numbers = base
    model = tmp_path / "tuned"
    write(model, tuned(numbers, BF16))
    arguments = {
        "extract": [folder, model, "--rank", 1, "--out", tmp_path / "lora"],
        "verify": [folder, model, model],
        "inspect": [model, "--base", folder],
    }[command]
    assert cli.main([command, *map(str, arguments)]) != 0
    assert "--dequantize" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()
