"""Folders of adapters as PEFT writes them, and what they add."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

PREFIX = "base_model.model."
SHAPES = {
    "model.layers.0.self_attn.q_proj": (6, 6),
    "model.layers.0.mlp.up_proj": (10, 6),
    "model.layers.1.self_attn.q_proj": (6, 6),
    "model.layers.1.mlp.up_proj": (10, 6),
}
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "lora_alpha": 5.0,
    "r": 3,
}


def normal(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def write(folder, seed=0, shapes=SHAPES, rank=3, tensors=(), **config):
    """An adapter of linear layers, by module and [out, in]."""
    folder.mkdir(parents=True)
    found = dict(tensors)
    for i, (module, (outputs, inputs)) in enumerate(shapes.items()):
        key = f"{PREFIX}{module}.lora_"
        found[f"{key}A.weight"] = normal(2 * i + 100 * seed, rank, inputs)
        found[f"{key}B.weight"] = normal(2 * i + 100 * seed + 1, outputs, rank)
    save_file(found, folder / "adapter_model.safetensors")
    content = {**CONFIG, "r": rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return str(folder)


def read(folder):
    """By module, A and B of an adapter of linear layers, and its configuration."""
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    with open(f"{folder}/adapter_config.json") as file:
        config = json.load(file)
    pairs = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            pairs[module] = a.astype(np.float64), b.astype(np.float64)
    return pairs, config


def deltas(folder):
    """By module, what a plain adapter without patterns adds, in float64."""
    pairs, config = read(folder)
    root = np.sqrt if config.get("use_rslora") else float
    scale = config["lora_alpha"] / root(config["r"])
    return {module: scale * b @ a for module, (a, b) in pairs.items()}
