"""Writes `tests/layouts/*.json`, `{path: shape}` of three CLIPs, from PyTorch's models.

    python tests/layouts/generate.py

The oracle is transformers' `CLIPModel`, and the names are converted by a table of their
own: nothing here imports jaxarith. Weights are not needed, so none are downloaded.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent

# What differs from the defaults of transformers' CLIPConfig, which are ViT-B/32.
CONFIGS = {
    "clip-vit-base-patch32": {"vision_config": {"patch_size": 32}},
    "clip-vit-base-patch16": {"vision_config": {"patch_size": 16}},
    "clip-vit-large-patch14": {
        "projection_dim": 768,
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
        },
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
    },
}

# What ends the name in PyTorch, what ends it in Flax, and the axes in Flax's order.
TABLE = [
    (r"(layer_norm[12]|pre_layrnorm|post_layernorm|final_layer_norm)\.weight", "scale"),
    (r"(token_embedding|position_embedding)\.weight", "embedding"),
    (r"(patch_embedding)\.weight", "kernel", (2, 3, 1, 0)),
    (r"([qkv]_proj|out_proj|fc[12]|\w+_projection)\.weight", "kernel", (1, 0)),
    (r"(\w+)\.bias", "bias"),
]


def flax_layout(state_dict) -> dict[str, list[int]]:
    """`{slash path: shape}` of a state dict without its buffers."""
    layout = {}
    for name, tensor in state_dict.items():
        shape = tuple(tensor.shape)
        if name.endswith("position_ids"):
            continue
        if name not in ("logit_scale", "vision_model.embeddings.class_embedding"):
            name, shape = _convert(name, shape)
        layout[name.replace(".", "/")] = list(shape)
    return dict(sorted(layout.items()))


def _convert(name, shape):
    for pattern, leaf, *axes in TABLE:
        if match := re.search(rf"(^|\.){pattern}$", name):
            shape = tuple(shape[axis] for axis in axes[0]) if axes else shape
            return f"{name[: match.end(2)]}.{leaf}", shape
    raise ValueError(f"the table has no row for {name}")


def meta_model(name):
    """The model without memory for its weights."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        return CLIPModel(CLIPConfig(**CONFIGS[name]))


def main():
    for name in CONFIGS:
        layout = flax_layout(meta_model(name).state_dict())
        rows = [f"{json.dumps(path)}: {shape}" for path, shape in layout.items()]
        text = "{\n" + ",\n".join(rows) + "\n}\n"
        (FOLDER / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
