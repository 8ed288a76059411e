"""Small checkpoints of no particular model, in the true format."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHAPES = {
    "model.embed_tokens.weight": (48, 8),
    "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 24),
    "model.layers.0.norm.weight": (8,),
    "model.layers.1.mlp.up_proj.weight": (24, 8),
    "model.layers.1.mlp.down_proj.weight": (8, 24),
    "model.layers.1.norm.weight": (8,),
    "model.scale": (),
    "model.empty": (0, 8),
    "lm_head.weight": (48, 8),
}
COUNTER = "model.num_batches_tracked"
TYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}


def tensors(model: int, dtype: str = "bf16", shapes=SHAPES) -> dict[str, np.ndarray]:
    """The base is model 0; every other one is near it."""
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        values = np.random.default_rng(number).normal(size=shape)
        if model:
            values += 0.1 * np.random.default_rng([model, number]).normal(size=shape)
        found[name] = np.asarray(values, np.float32).astype(TYPES[dtype])
    return found | {COUNTER: np.array(7 + model)}


def write(folder, content, *, shards: int = 1, config=None):
    """A checkpoint in one file, or in several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "toy"}))
    if shards == 1:
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(content)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: content[n] for n in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def family(folder, models: int = 3, dtype: str = "bf16", shards: int = 1):
    """A base and fine-tuned models; returns the folder of the base, and of each."""
    places = [
        write(folder / ("base" if i == 0 else f"model-{i}"), tensors(i, dtype))
        if shards == 1
        else write(folder / f"{i}", tensors(i, dtype), shards=shards)
        for i in range(models + 1)
    ]
    return places[0], places[1:]
