"""The encoders whose derivatives are measured, with random weights and inputs.

An encoder maps inputs to the features `[B, D]` that a frozen head of 100 classes reads.
Features of a language model are the means of its last hidden states over the real
tokens. GPT-2, BERT and T5's encoder alone read 128 tokens. The whole T5 reads 128
tokens and averages the 32 tokens of its decoder.

Every leaf of GPT-2, BERT-base without its pooler, and T5-small takes part. The product
of the hidden states and the vocabulary, which gives the logits of words, does not: for
16 texts of 128 tokens GPT-2's logits take 412 MB a copy.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.vision import vectors
from experiments.common.vision.architectures import VISION
from jaxarith import hub, tree
from jaxarith.models import bert, clip, gpt2, t5
from jaxarith.typing import Tree

Vision = Literal["vit-b-32", "vit-b-16", "vit-l-14", "tiny"]
Name = Literal[Vision, "t5-small-encoder", "t5-small", "gpt2", "gpt2-medium", "bert"]
NAMES: tuple[str, ...] = get_args(Name)
TOKENS = 128  # of a text, if no length is given
TARGET_TOKENS = 32  # of what T5's decoder reads
TEXT = ("ids", "mask", "target_ids", "target_mask")

GPT2 = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
}

# What Jin et al. (2025), "Fine-Tuning Linear Layers Only", train of every block: the
# weights of the attention (1), with biases (2), all linear weights (3), with biases.
CLIP_PARADIGMS = {
    name.removeprefix("linear_layers_"): paths
    for name, paths in vectors.LINEAR_LAYERS.items()
}
GPT2_PARADIGMS = {
    "1": r"transformer/h/\d+/attn/c_\w+/kernel",
    "2": r"transformer/h/\d+/attn/c_\w+/\w+",
    "3": gpt2.BLOCK_LINEAR_WEIGHTS,
    "4": r"transformer/h/\d+/(attn|mlp)/c_\w+/\w+",
}
BERT_PARADIGMS = {
    "1": bert.ATTENTION_WEIGHTS,
    "2": r"bert/encoder/layer/\d+/attention/(self/\w+|output/dense)/\w+",
    "3": bert.BLOCK_LINEAR_WEIGHTS,
    "4": r"bert/encoder/layer/.*/(self/\w+|dense)/\w+",
}
# T5 has no biases.
T5_PARADIGMS = {"1": t5.ATTENTION_WEIGHTS, "3": t5.BLOCK_LINEAR_WEIGHTS}


class Encoder(NamedTuple):
    """An encoder in JAX and what PyTorch needs to build the same.

    Attributes:
      apply_fn: `apply_fn(params, *inputs) -> features[B, D]`.
      rematerialized: the same with `remat`; None where the port has none.
      layout: the shapes of its parameters.
      make_inputs: `make_inputs(rng, B) -> inputs`, NumPy arrays.
      paradigms: patterns of the paths that partial fine-tuning trains.
      config: what config.json of transformers would say.
      tokens: tokens of a sample: of an image its patches and the class token, of T5
        those of the encoder and of the decoder.
      inputs: names of the inputs, for a batch.
    """

    apply_fn: Callable
    rematerialized: Callable | None
    layout: Tree
    make_inputs: Callable
    paradigms: dict[str, str]
    config: dict
    tokens: int
    inputs: tuple[str, ...]


def encoder(name: str, layers: int | None = None, length: int | None = None) -> Encoder:
    """An encoder with random weights and inputs.

    Args:
      name: one of `NAMES`.
      layers: number of transformer blocks, by default the model's own.
      length: tokens of a text, by default `TOKENS`.

    Raises:
      ValueError: images are given a length.
    """
    if name in GPT2:
        return _gpt2(name, layers, length or TOKENS)
    if name in ("t5-small", "t5-small-encoder"):
        return _t5(layers, length or TOKENS, decoder=name == "t5-small")
    if name == "bert":
        return _bert(layers, length or TOKENS)
    if length is not None:
        raise ValueError(
            f"a length of {length} tokens for {name}, which reads images of one size; "
            "leave it out, or take a language model."
        )
    return _vision(name, layers)


def _gpt2(name, layers, length):
    sizes = GPT2[name] | ({} if layers is None else {"n_layer": layers})
    config = gpt2.GPT2Config(**sizes, n_positions=max(1024, length))
    apply_fn, layout = gpt2.encoder(config), gpt2.layout(config)
    return _texts(apply_fn, layout, config, GPT2_PARADIGMS, "GPT2Model", length)


def _bert(layers, length):
    sizes = {} if layers is None else {"num_hidden_layers": layers}
    config = bert.BertConfig(**sizes, max_position_embeddings=max(512, length))
    apply_fn, layout = bert.encoder(config), bert.layout(config)
    return _texts(apply_fn, layout, config, BERT_PARADIGMS, "BertModel", length)


def _t5(layers, length, decoder):
    config = t5.T5Config(**({} if layers is None else {"num_layers": layers}))
    apply_fn, layout = t5.encoder(config), tree.select(t5.layout(config), t5.ENCODER)
    architecture, tokens = "T5EncoderModel", (length,)
    if decoder:
        apply_fn, layout = t5.hidden_states(config), t5.layout(config)
        architecture, tokens = "T5Model", (length, TARGET_TOKENS)
    return _texts(apply_fn, layout, config, T5_PARADIGMS, architecture, *tokens)


def _texts(apply_fn, layout, config, paradigms, architecture, *tokens):
    """Makes an encoder of texts; a sample has one text of each length in `tokens`."""
    return Encoder(
        functools.partial(mean_features, apply_fn),
        None,
        layout,
        functools.partial(random_texts, config.vocab_size, tokens),
        paradigms,
        {"architectures": [architecture], "use_cache": False, **vars(config)},
        sum(tokens),
        TEXT[: 2 * len(tokens)],
    )


def _vision(name, layers):
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
        {"architectures": ["CLIPVisionModelWithProjection"], **fields},
        (model.vision.image_size // model.vision.patch_size) ** 2 + 1,
        ("image",),
    )


def mean_features(apply_fn, params, *inputs):
    """The mean of the hidden states of the real tokens, as the last input has them."""
    hidden = apply_fn(params, *inputs)
    real = inputs[-1][..., None].astype(hidden.dtype)
    return jnp.sum(hidden * real, axis=1) / jnp.sum(real, axis=1)


def random_images(size, rng, batch):
    return (rng.standard_normal((batch, size, size, 3), np.float32),)


def random_texts(vocabulary, tokens, rng, batch):
    """Padded texts: for each T of `tokens` ids `[B, T]` and their mask."""
    inputs = []
    for longest in tokens:
        ids = rng.integers(1, vocabulary, (batch, longest), np.int32)
        lengths = rng.integers(longest // 2, longest + 1, (batch, 1))
        mask = (np.arange(longest)[None] < lengths).astype(np.int32)
        inputs += [ids * mask, mask]
    return tuple(inputs)


def random_params(layout, seed: int, dtype) -> Tree:
    """Gaussian weights as wide as their inputs ask for; scales of norms around 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, expected):
        values = rng.standard_normal(expected.shape, np.float32)
        if path.endswith("/kernel"):
            # GPT-2's kernels are [out, in].
            widths = expected.shape[1:] if "/c_" in path else expected.shape[:-1]
            values /= np.sqrt(np.prod(widths))
            # T5 does not divide its scores by the root of d_kv, 64; its q is smaller.
            values /= 8 if path.endswith("Attention/q/kernel") else 1
        elif not path.endswith("embedding"):
            norm = path.endswith(("/scale", "norm/weight"))
            values = 0.1 * values + np.float32(norm)
        return jnp.asarray(values, dtype)

    return tree.map_with_path(leaf, layout)


def random_tau(params, seed: int) -> Tree:
    """A direction of a hundredth of the size of every leaf's entries."""
    rng = np.random.default_rng(seed)

    def leaf(values):
        noise = rng.standard_normal(values.shape, np.float32)
        scale = 0.01 * np.std(np.asarray(values, np.float32)) + 1e-4
        return jnp.asarray(noise * scale, values.dtype)

    return jax.tree.map(leaf, params)
