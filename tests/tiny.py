"""Small models and random weights that several test files need."""

import numpy as np

from jaxarith import tree
from jaxarith.models import clip


def tiny_clip_config(hidden_act="quick_gelu", eos_token_id=29) -> dict:
    """The `config.json` of a CLIP of two layers, with towers of unlike widths."""
    common = {"hidden_act": hidden_act, "projection_dim": 12, "layer_norm_eps": 1e-5}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 12,
        "text_config": {
            **common,
            "vocab_size": 30,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 10,
            "bos_token_id": 28,
            "eos_token_id": eos_token_id,
            "pad_token_id": 1,
        },
        "vision_config": {
            **common,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 12,
            "patch_size": 4,
        },
    }


def tiny_clip(hidden_act="quick_gelu", eos_token_id=29) -> clip.CLIPConfig:
    return clip.CLIPConfig.from_json(tiny_clip_config(hidden_act, eos_token_id))


def random_params(seed: int, layout) -> dict:
    """Weights of which none is zero or one, so that every mistake with them shows.

    The scales of LayerNorms are near one: smaller ones would hide the inputs.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, expected):
        noise = 0.3 * rng.normal(size=expected.shape)
        return np.asarray(noise + path.endswith("/scale"), np.float32)

    return tree.map_with_path(leaf, layout)
