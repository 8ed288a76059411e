"""Files with the structures of mergekit's examples run, or are refused by a line."""

import json
import re

import numpy as np
import pytest
from merge_command import fails, write
from safetensors.numpy import load_file, save_file

from jaxarith import cli

LAYERS = 4
PARTS = {"self_attn.q_proj": (6, 6), "mlp.up_proj": (8, 6), "input_layernorm": (6,)}


def tensors(seed, prefix="model.", extra=()):
    rng = np.random.default_rng(seed)
    shapes = {f"{prefix}embed_tokens.weight": (10, 6), "lm_head.weight": (10, 6)}
    for i in range(LAYERS):
        shapes |= {f"{prefix}layers.{i}.{x}.weight": y for x, y in PARTS.items()}
    shapes |= {f"{prefix}norm.weight": (6,)} | dict(extra)
    return {name: rng.normal(size=x).astype("f2") for name, x in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Language models a, b, c; models u and v that see images; g, shaped as GPT-2."""
    root = tmp_path_factory.mktemp("models")
    vision = {f"visual.blocks.{i}.attn.qkv.weight": (9, 3) for i in range(3)}
    found = {name: tensors(i) for i, name in enumerate("abc")}
    found |= {name: tensors(i, extra=vision) for i, name in enumerate("uv")}
    for name, content in found.items():
        config = {"num_hidden_layers": LAYERS, "model_type": "toy", "vocab_size": 10}
        written(root / name, content, {**config, "tie_word_embeddings": False})
    rng = np.random.default_rng(0)
    names = {"wte.weight": (10, 6), "ln_f.weight": (6,)}
    names |= {f"h.{i}.attn.c_attn.weight": (6, 18) for i in range(LAYERS)}
    content = {name: rng.normal(size=x).astype("f4") for name, x in names.items()}
    written(root / "g", content, {"model_type": "gpt2", "n_layer": LAYERS})
    return root


def written(folder, content, config):
    folder.mkdir()
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


GRADIENT = """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.4, 0.9, 1]}
    - {filter: mlp, value: [1, 0.6, 0]}
    - value: 0.5
dtype: float16
"""
RUN = {
    "fusion": "models: [{model: a}, {model: b}]\n"
    "merge_method: arcee_fusion\nbase_model: a\ndtype: bfloat16\n",
    "ties of two beside the base": """
merge_method: ties
base_model: a
models:
  - {model: b, parameters: {density: 0.4, weight: 0.6}}
  - {model: c, parameters: {density: 0.6, weight: 0.4}}
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
    "the first layers": "merge_method: passthrough\ndtype: float16\n"
    "slices: [{sources: [{model: g, layer_range: [0, 2]}]}]\n",
    "gradients of slerp": GRADIENT,
    "linear": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.2}}
  - {model: c, parameters: {weight: 0.4}}
dtype: float16
""",
    "layers of one after another's": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
dtype: float16
""",
    "images and language, linear": """
merge_method: linear
models:
  - {model: u, parameters: {weight: 1.0}}
  - {model: v, parameters: {weight: 1.0}}
dtype: float32
""",
    "images and language, gradients of ties": """
merge_method: ties
base_model: v
models:
  - {model: u, parameters: {density: [1, 0.5, 0.2], weight: 1.0}}
  - {model: v, parameters: {density: 0.5, weight: [0, 0.4, 1]}}
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "gradients and filters of ties": """
merge_method: ties
base_model: c
models:
  - {model: a, parameters: {density: [1, 0.5, 0.2], weight: 1.0}}
  - model: b
    parameters:
      density: 0.3
      weight: [{filter: mlp, value: 0.4}, {value: 0}]
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "a result by its name": GRADIENT
    + """name: first
---
merge_method: ties
base_model: c
models:
  - {model: first, parameters: {density: [1, 0.5, 0.2], weight: 1.0}}
  - {model: b, parameters: {density: 0.3, weight: 0.5}}
dtype: float16
name: second
""",
}


@pytest.mark.parametrize("text", RUN.values(), ids=RUN)
def test_examples_run(folder, tmp_path, monkeypatch, text):
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    arguments = [write(tmp_path / "config.yaml", text), str(out), "--quiet"]
    assert cli.main(["merge", *arguments]) == 0
    assert cli.main(["recipe", "check", arguments[0]]) == 0
    found = load_file(out / "model.safetensors")
    assert {str(x.dtype) for x in found.values()} == {
        text.split("dtype: ")[-1].split()[0]
    }
    assert all(np.isfinite(x.astype("f4")).all() for x in found.values())
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


PAIR = "models: [{model: a}, {model: b}]\n"
REFUSED = {
    "a pattern, as filters were once called": (
        GRADIENT.replace("filter: mlp", "pattern: mlp"),
        "line 9: the key 'pattern' of t is not supported; supported are filter, value",
    ),
    "folders named in the file": (
        GRADIENT + "out_path: ./first\n---\n" + PAIR,
        "line 12: the key 'out_path' of the file is not supported: .* by that",
    ),
    "measures": (
        PAIR + "metric_method: all\ndtype: float32\n",
        "line 2: the key 'metric_method' .*jaxarith inspect",
    ),
    "evolution": ("genome: {models: [a]}\ntasks: []\n", "line 1: the key 'genome'"),
    "aligned weights": (
        PAIR + "merge_method: ties\nbase_model: c\nalign_weights: zipit\n",
        "line 4: the key 'align_weights' of the file .* Leave it out",
    ),
    "keys of a method that is not there": (
        PAIR + "merge_method: cabs\ndefault_n_val: 8\npruning_order: [a, b]\n",
        "line 3: the key 'default_n_val' of the file is not supported",
    ),
    "methods that are not there": (
        PAIR + "merge_method: encoder_decoder_weighted\n",
        "line 2: there is no method 'encoder_decoder_weighted'; known are .*ties",
    ),
    "parameters that a method lacks": (
        PAIR + "merge_method: nuslerp\nparameters:\n  geodesic: true\n",
        "line 4: the key 'geodesic' of parameters of nuslerp is not supported",
    ),
    "an adapter beside a model": (
        "merge_method: slerp\nmodels:\n- model: a\n  lora: b\n",
        "line 4: the key 'lora' .* supported are model, parameters",
    ),
    "slerp without t": (
        "merge_method: slerp\nbase_model: a\n" + PAIR,
        "line 1: slerp needs t, which is not given",
    ),
    "slerp with weights": (
        "merge_method: slerp\nmodels:\n- {model: a, parameters: {weight: 1}}\n",
        "line 3: the key 'weight' of parameters of slerp is not supported",
    ),
    "modules": ("modules: {text: {}}\nmerge_method: linear\n", "line 1: the key 'modu"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_examples_are_refused_with_the_line(
    folder, tmp_path, capsys, monkeypatch, text, message
):
    monkeypatch.chdir(folder)
    path = write(tmp_path / "config.yaml", text)
    error = fails(capsys, path, tmp_path / "out")
    assert re.search(rf"config\.yaml, {message}", error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
