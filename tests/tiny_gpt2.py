"""A small GPT-2 with random weights, for the tests of its port."""

import numpy as np

from jaxarith import tree
from jaxarith.models import gpt2

V, PAD, EOS = 61, 60, 59


def tiny_config(architecture="GPT2LMHeadModel") -> dict:
    """The `config.json` of a GPT-2 whose inner width is not four times its width."""
    return {
        "architectures": [architecture],
        "model_type": "gpt2",
        "vocab_size": V,
        "n_positions": 40,
        "n_embd": 18,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 30,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
    }


CONFIG = gpt2.GPT2Config.from_json(tiny_config())


def random_params(seed=2, classifier=False, config=CONFIG, scale=0.3):
    """Weights of which none is zero or one; the scales of the norms are near one.

    Positions matter much and biases little, so greedy decoding does not repeat itself.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, expected):
        factor = 3.0 if "/wpe/" in path else 0.3 if path.endswith("/bias") else 1.0
        noise = factor * scale * rng.normal(size=expected.shape)
        return np.asarray(noise + path.endswith("/scale"), np.float32)

    layout = gpt2.layout(config, classifier=classifier)
    return tree.map_with_path(leaf, layout)


PARAMS = random_params()


def random_tokens(length=24):
    """Texts padded nowhere, after, before and on both sides."""
    rng = np.random.default_rng(1)
    input_ids = rng.integers(0, EOS, size=(4, length))
    mask = np.ones_like(input_ids)
    mask[1, length // 2 :] = 0
    mask[2, : length // 3] = 0
    mask[3, :3] = mask[3, -5:] = 0
    return np.where(mask, input_ids, PAD), mask
