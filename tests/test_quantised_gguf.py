"""GGUF is read as llama.cpp's own package and transformers read it."""

import json
import sys

import numpy as np
import pytest
from merge_command import fails
from packing import BF16
from safetensors.numpy import load_file, save_file

from jaxarith import cli
from jaxarith.hub import quantised

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
PACKINGS = ["Q8_0", "Q4_0", "F16", "BF16", "Q5_1"]


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip(
        "gguf", reason="the reader of GGUF: pip install 'jaxarith[gguf]'"
    )


def of_llama_cpp(name):
    module, _, end = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{end}"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.{end}"


def interleaved(rows, heads):
    """Rows as llama.cpp's converter writes them: the two halves of a head in turn."""
    size = len(rows) // heads
    order = [
        h * size + half * size // 2 + i
        for h in range(heads)
        for i in range(size // 2)
        for half in range(2)
    ]
    return rows[order]


def weights(kind):
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (64, 64), "model.norm": (64,), "lm_head": (64, 64)}
    for i in range(2):
        for name in NAMES:
            if "_norm" in name and kind == "llama":
                continue
            rows = 32 if name in ("self_attn.k_proj", "self_attn.v_proj") else 64
            shape = (16,) if "_norm" in name else (rows, 64)
            shape = (64,) if "layernorm" in name else shape
            shapes[f"model.layers.{i}.{name}"] = shape
    return {
        f"{name}.weight": rng.normal(size=shape).astype(BF16).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(gguf, file, kind, tensors, more=()):
    """A file in GGUF, and its tensors as they come back in float32."""
    writer, expected = gguf.GGUFWriter(file, kind), {}
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_context_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    for number, (name, values) in enumerate(tensors.items()):
        packing = gguf.GGMLQuantizationType[PACKINGS[number % len(PACKINGS)]]
        stored = values
        if values.ndim < 2:
            packing = gguf.GGMLQuantizationType.F32
            stored = values + 1 if kind.startswith("gemma") else values
        if kind == "llama" and ".q_proj" in name:
            stored = interleaved(values, 4)
        if kind == "llama" and ".k_proj" in name:
            stored = interleaved(values, 2)
        packed = gguf.quants.quantize(stored, packing)
        of_file = of_llama_cpp(name)
        writer.add_tensor(of_file, packed, raw_dtype=packing)
        # Rows are packed one by one, so their order does not matter.
        expected[name] = gguf.quants.dequantize(
            gguf.quants.quantize(values, packing), packing
        )
    for name in more:
        writer.add_tensor(name, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_tensors_are_those_of_the_package_under_other_names(kind, gguf, tmp_path):
    file = tmp_path / "model.gguf"
    tensors = weights(kind)
    if kind == "gemma3":
        tensors = {n: x for n, x in tensors.items() if "post_attention" not in n}
    if kind == "llama":
        tensors["model.layers.0.self_attn.k_proj.bias"] = np.arange(
            32, dtype=np.float32
        )
    expected = write(gguf, file, kind, tensors, more=["rope_freqs.weight"])
    found, [note] = quantised.gguf.read(file, np.float32)
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(
            leaf.read(), expected[name], rtol=0, atol=1e-6, err_msg=name
        )
    assert "Q4_0" in note and "dequantised to f32" in note


def test_the_table_has_the_norms_of_gemma(gguf):
    names = quantised.gguf._names(gguf, "gemma3", 1)
    assert names["blk.0.post_attention_norm"].endswith(".post_attention_layernorm")
    assert names["blk.0.ffn_norm"].endswith(".pre_feedforward_layernorm")
    assert names["blk.0.post_ffw_norm"].endswith(".post_feedforward_layernorm")


@pytest.mark.torch
def test_a_model_is_the_one_that_transformers_loads(gguf, torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(gguf, tmp_path / "model.gguf", "llama", weights("llama"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    found, _ = quantised.gguf.read(tmp_path / "model.gguf", np.float32)
    state = theirs.state_dict()
    assert state.keys() == found.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf.read(), state[name].numpy(), err_msg=name)


@pytest.mark.torch
def test_a_folder_with_gguf_merges_into_one_that_loads(gguf, torch, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    base, plain, model = (tmp_path / x for x in ("base", "plain", "model"))
    config = transformers.LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"])
    tensors = weights("llama")
    for folder in (base, plain, model):
        folder.mkdir()
        config.save_pretrained(folder)
    expected = write(gguf, base / "q.gguf", "llama", tensors)
    in_bf16 = {name: x.astype(BF16) for name, x in expected.items()}
    save_file(in_bf16, plain / "model.safetensors", {"format": "pt"})
    moved = {name: (x + 0.01).astype(BF16) for name, x in tensors.items()}
    save_file(moved, model / "model.safetensors", {"format": "pt"})
    options = ("--method", "task_arithmetic", "--coef", "0.5", "--model", str(model))
    for first, out in ((base, "out"), (plain, "expected")):
        arguments = ["merge", "--base", str(first), "--out", str(tmp_path / out)]
        assert cli.main([*arguments, *options, "--quiet", "--dequantize"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, x in load_file(tmp_path / "expected" / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], x)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    texts = torch.arange(3, 13).reshape(2, 5)
    loaded.generate(texts, max_new_tokens=2, do_sample=False, pad_token_id=0)
    record = json.loads((tmp_path / "out" / "jaxarith_merge.json").read_text())
    assert "q.gguf" in record["inputs"][0]["sha256"]
    assert not any("not copied" in note for note in record["notes"])
    assert any("Q8_0" in note for note in record["notes"])
    named = ("--base", base, "--model", model, "--out", tmp_path / "other")
    assert "--dequantize" in fails(capsys, "--method", "average", *named)


def test_what_is_not_known_is_refused(gguf, tmp_path):
    file = tmp_path / "a.gguf"
    write(gguf, file, "mamba", {})
    with pytest.raises(ValueError, match="architecture mamba; supported are llama"):
        quantised.gguf.read(file, BF16)
    write(gguf, file, "qwen2", {}, more=["blk.0.ffn_gate_exps.weight"])
    with pytest.raises(ValueError, match="ffn_gate_exps.weight has no place in qwen2"):
        quantised.gguf.read(file, BF16)
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ValueError, match="2 files in GGUF .* Name one of them"):
        quantised.gguf.find(tmp_path)
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        quantised.gguf.read(tmp_path / "b.gguf", BF16)


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in ("base", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.gguf").write_bytes(b"GGUF")
    named = ("--base", tmp_path / "base", "--model", tmp_path / "model")
    error = fails(
        capsys, "--method", "average", *named, "--out", tmp_path / "o", "--dequantize"
    )
    assert "pip install 'jaxarith[gguf]'" in error and error.count("\n") == 1
