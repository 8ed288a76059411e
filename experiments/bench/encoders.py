"""The encoders whose derivatives are measured, with random weights and inputs."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxarith import hub, tree
from jaxarith.models import clip, t5

# Of OpenAI's CLIP; projection_dim is the width of the features.
VISION = {
    "vit-b-32": {"patch_size": 32, "projection_dim": 512},
    "vit-b-16": {"patch_size": 16, "projection_dim": 512},
    "vit-l-14": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14},
        **{"num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768},
    },
}
NAMES = (*VISION, "t5-small-encoder", "tiny")
TOKENS = 128  # of a text for T5

# What Jin et al. (2025), "Fine-Tuning Linear Layers Only", train of every block: the
# weights of the attention (1), with biases (2), all linear weights (3), with biases.
CLIP_BLOCK = r"vision_model/encoder/layers/\d+/"
CLIP_PARADIGMS = {
    "1": clip.ATTENTION_WEIGHTS,
    "2": CLIP_BLOCK + r"self_attn/\w+_proj/\w+",
    "3": clip.BLOCK_LINEAR_WEIGHTS,
    "4": CLIP_BLOCK + r"(self_attn/\w+_proj|mlp/fc\d)/\w+",
}
# T5 has no biases.
T5_PARADIGMS = {
    "1": r"encoder/block/\d+/layer/0/SelfAttention/[qkvo]/kernel",
    "3": r"encoder/block/\d+/layer/(0/SelfAttention|1/DenseReluDense)/\w+/kernel",
}


class Encoder(NamedTuple):
    """An encoder in JAX and what PyTorch needs to build the same.

    Attributes:
      apply_fn: `apply_fn(params, *inputs) -> features[B, D]`.
      rematerialized: the same with `remat`; None where the port has none.
      layout: the shapes of its parameters.
      make_inputs: `make_inputs(rng, B) -> inputs`, NumPy arrays.
      paradigms: patterns of the paths that partial fine-tuning trains.
      config: fields of the configuration class of transformers.
    """

    apply_fn: Callable
    rematerialized: Callable | None
    layout: tree.Tree
    make_inputs: Callable
    paradigms: dict[str, str]
    config: dict


def encoder(name: str, layers: int | None = None) -> Encoder:
    """One of `NAMES`; with fewer blocks than the model has, if `layers` says so."""
    shorter = {} if layers is None else {"num_layers": layers}
    if name == "t5-small-encoder":
        config = t5.T5Config(**shorter)
        return Encoder(
            functools.partial(mean_features, t5.encoder(config)),
            None,
            tree.select(t5.layout(config), t5.ENCODER),
            functools.partial(random_texts, config.vocab_size),
            T5_PARADIGMS,
            {"model_type": "t5", **vars(config)},
        )
    if name == "tiny":
        raw = hub.read_json(clip.TINY_CLIP)
        vision = {**raw["vision_config"], "projection_dim": raw["projection_dim"]}
    else:
        vision = dict(VISION[name])
    vision |= {} if layers is None else {"num_hidden_layers": layers}
    text = {"num_hidden_layers": 1}  # not used
    model = clip.CLIPConfig.from_json(
        {
            "vision_config": vision,
            "text_config": text,
            "projection_dim": vision["projection_dim"],
        }
    )
    fields = {**vars(model.vision), "projection_dim": model.projection_dim}
    return Encoder(
        clip.image_encoder(model),
        clip.image_encoder(model, remat=True),
        tree.select(clip.layout(model), clip.IMAGE_ENCODER),
        functools.partial(random_images, model.vision.image_size),
        CLIP_PARADIGMS,
        {"model_type": "clip_vision_model", **fields},
    )


def mean_features(apply_fn, params, input_ids, attention_mask):
    """The mean of the hidden states of the real tokens."""
    hidden = apply_fn(params, input_ids, attention_mask)
    real = attention_mask[..., None].astype(hidden.dtype)
    return jnp.sum(hidden * real, axis=1) / jnp.sum(real, axis=1)


def random_images(size, rng, batch):
    return (rng.standard_normal((batch, size, size, 3), np.float32),)


def random_texts(vocabulary, rng, batch):
    """Texts of different lengths, padded."""
    ids = rng.integers(1, vocabulary, (batch, TOKENS), np.int32)
    lengths = rng.integers(TOKENS // 2, TOKENS + 1, (batch, 1))
    mask = (np.arange(TOKENS)[None] < lengths).astype(np.int32)
    return ids * mask, mask


def random_params(layout, seed: int, dtype) -> tree.Tree:
    """Gaussian weights as wide as their inputs ask for; scales of norms around 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, expected):
        values = rng.standard_normal(expected.shape, np.float32)
        if path.endswith("/kernel"):
            values /= np.sqrt(np.prod(expected.shape[:-1]))
            # T5 does not divide its scores by the root of d_kv, 64; its q is smaller.
            values /= 8 if path.endswith("SelfAttention/q/kernel") else 1
        elif not path.endswith("embedding"):
            norm = path.endswith(("/scale", "norm/weight"))
            values = 0.1 * values + np.float32(norm)
        return jnp.asarray(values, dtype)

    return tree.map_with_path(leaf, layout)


def random_tau(params, seed: int) -> tree.Tree:
    """A direction of a hundredth of the size of every leaf's entries."""
    rng = np.random.default_rng(seed)

    def leaf(values):
        noise = rng.standard_normal(values.shape, np.float32)
        scale = 0.01 * np.std(np.asarray(values, np.float32)) + 1e-4
        return jnp.asarray(noise * scale, values.dtype)

    return jax.tree.map(leaf, params)
