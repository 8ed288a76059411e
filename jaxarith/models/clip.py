"""CLIP in Flax Linen, with the parameter names of Hugging Face checkpoints.

Radford et al. Learning Transferable Visual Models From Natural Language Supervision.
ICML 2021. arXiv:2103.00020.

The two towers are separate modules. A parameter tree holds the leaves of both,

    vision_model/…  visual_projection/kernel  text_model/…  text_projection/kernel
    logit_scale

and each tower reads only its own, so `image_encoder(config)` accepts the whole tree
or just the `vision_model` and `visual_projection` part of it.

Shapes: B images or texts, H×W pixels, S tokens (patches or words), D hidden width.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxarith import hub
from jaxarith.hub import open_clip
from jaxarith.models import heads
from jaxarith.models.activations import gelu, quick_gelu
from jaxarith.models.layers import Dense, LayerNorm, attend, rematerialized
from jaxarith.typing import ApplyFn

# A real CLIP of 1.5 MB that comes with the package; see its README.md.
TINY_CLIP = Path(__file__).parent.parent / "assets" / "tiny_clip"

# Path patterns for `tree.select`: the image encoder; the weights that Jin et al. (2025,
# "Fine-Tuning Linear Layers Only", paradigm 1) train; the weights that AWD merges.
IMAGE_ENCODER = r"vision_model/.*|visual_projection/.*"
ATTENTION_WEIGHTS = r"vision_model/encoder/layers/\d+/self_attn/\w+_proj/kernel"
BLOCK_LINEAR_WEIGHTS = (
    r"vision_model/encoder/layers/\d+/(self_attn/\w+_proj|mlp/fc\d)/kernel"
)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Configuration of the image tower, as in Hugging Face's `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Configuration of the text tower, as in Hugging Face's `CLIPTextConfig`."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Configurations of both towers, and the width of the space they share."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projection_dim: int = 512

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "CLIPConfig":
        """Reads the content of a Hugging Face `config.json` of a `CLIPModel`.

        Raises:
          ValueError: the file describes another kind of model, or an activation that
            this port lacks.
        """
        if "vision_config" not in raw or "text_config" not in raw:
            raise ValueError(
                f"config.json describes a {raw.get('model_type', 'model')!r}; expected "
                "a CLIP with vision_config and text_config. Vision-only checkpoints "
                "load with the config of the CLIP that they were fine-tuned from."
            )
        config = cls(
            _tower(VisionConfig, raw, "vision_config"),
            _tower(TextConfig, raw, "text_config"),
            raw.get("projection_dim", 512),
        )
        for tower in (config.vision, config.text):
            if tower.hidden_act not in _ACTIVATIONS:
                raise ValueError(
                    f"config.json asks for the activation {tower.hidden_act!r}; this "
                    f"port has {', '.join(_ACTIVATIONS)}."
                )
        return config


def _tower(kind, raw, name):
    # OpenAI's oldest files state the sizes twice. transformers reads the second
    # statement instead of the first, with defaults for sizes that it leaves out.
    stated = raw.get(f"{name}_dict")
    stated = raw[name] if stated is None else stated
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in stated.items() if key in known})


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class Attention(nn.Module):
    """Attention from the first `queries` tokens (default: all) to all of `x`."""

    heads: int

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, queries: int | None
    ) -> jax.Array:
        def project(role, tokens):
            projected = Dense(x.shape[-1], name=f"{role}_proj")(tokens)
            return projected.reshape(*tokens.shape[:-1], self.heads, -1)

        q, k, v = project("q", x[:, :queries]), project("k", x), project("v", x)
        mixed = attend(q * q.shape[-1] ** -0.5, k, v, mask=mask)
        return Dense(x.shape[-1], name="out_proj")(mixed)


class MLP(nn.Module):
    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = _ACTIVATIONS[self.activation](Dense(self.hidden, name="fc1")(x))
        return Dense(x.shape[-1], name="fc2")(hidden)


class Block(nn.Module):
    config: VisionConfig | TextConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, queries: int | None
    ) -> jax.Array:
        c = self.config
        attention = Attention(c.num_attention_heads, name="self_attn")
        mlp = MLP(c.intermediate_size, c.hidden_act, name="mlp")
        normed = LayerNorm(c.layer_norm_eps, name="layer_norm1")(x)
        x = x[:, :queries] + attention(normed, mask, queries)
        return x + mlp(LayerNorm(c.layer_norm_eps, name="layer_norm2")(x))


class Blocks(nn.Module):
    config: VisionConfig | TextConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, queries: int | None
    ) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            last = i == self.config.num_hidden_layers - 1
            block = Block(self.config, name=str(i))
            call = functools.partial(rematerialized, block) if self.remat else block
            x = call(x, mask, queries if last else None)
        return x


class Encoder(nn.Module):
    config: VisionConfig | TextConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        queries: int | None = None,
    ) -> jax.Array:
        return Blocks(self.config, self.remat, name="layers")(x, mask, queries)


class PatchEmbedding(nn.Module):
    """A convolution whose stride equals its width, computed as a matrix product."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        b, h, w, channels = images.shape
        p = self.patch
        shape = (p, p, channels, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        patches = images.reshape(b, h // p, p, w // p, p, channels)
        # The numbers of a patch take the kernel's order: for a product over axes in
        # another order, XLA would also copy the kernel and its tangent.
        rows = patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, p * p * channels)
        tokens = rows @ kernel.reshape(-1, self.width)
        return tokens.reshape(b, -1, self.width)


class VisionEmbeddings(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        # A smaller image would silently get the positions of other patches.
        if images.shape[1:] != (c.image_size, c.image_size, c.num_channels):
            raise ValueError(
                f"the images have shape {list(images.shape)}; this CLIP takes "
                f"[B, {c.image_size}, {c.image_size}, {c.num_channels}]."
            )
        normal = nn.initializers.normal(0.02)
        patches = PatchEmbedding(c.hidden_size, c.patch_size, name="patch_embedding")
        tokens = patches(images)
        class_token = self.param("class_embedding", normal, (c.hidden_size,))
        class_token = jnp.broadcast_to(class_token, (len(tokens), 1, c.hidden_size))
        tokens = jnp.concatenate([class_token, tokens], axis=1)
        positions = nn.Embed(
            (c.image_size // c.patch_size) ** 2 + 1,
            c.hidden_size,
            embedding_init=normal,
            name="position_embedding",
        )
        return tokens + positions(jnp.arange(tokens.shape[1])[None])


class VisionTransformer(nn.Module):
    config: VisionConfig
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        norm = functools.partial(LayerNorm, c.layer_norm_eps)
        x = VisionEmbeddings(c, name="embeddings")(images)
        x = norm(name="pre_layrnorm")(x)  # Hugging Face's spelling
        # Only the class token is read, so the last block computes no other token.
        # Statistics of its inputs (`capture`) therefore cover only class tokens, except
        # for keys and values.
        x = Encoder(c, self.remat, name="encoder")(x, queries=1)
        return norm(name="post_layernorm")(x[:, 0])


class TextEmbeddings(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        c = self.config
        if input_ids.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"the texts have {input_ids.shape[1]} tokens; this CLIP takes at most "
                f"{c.max_position_embeddings}. Truncate them."
            )
        normal = nn.initializers.normal(0.02)
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=normal
        )
        words = embed(c.vocab_size, name="token_embedding")(input_ids)
        positions = embed(c.max_position_embeddings, name="position_embedding")
        return words + positions(jnp.arange(input_ids.shape[1])[None])


class TextTransformer(nn.Module):
    config: TextConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        c = self.config
        x = TextEmbeddings(c, name="embeddings")(input_ids)
        # Causal, so whatever pads a text after its end token changes nothing before it.
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        x = Encoder(c, name="encoder")(x, causal)
        x = LayerNorm(c.layer_norm_eps, name="final_layer_norm")(x)
        # OpenAI's configs state a wrong end token, 2. The true one has the largest id.
        wrong = c.eos_token_id == 2
        end = input_ids if wrong else (input_ids == c.eos_token_id).astype(jnp.int32)
        return jnp.take_along_axis(x, end.argmax(-1)[:, None, None], axis=1)[:, 0]


class ImageTower(nn.Module):
    config: CLIPConfig
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        tower = VisionTransformer(self.config.vision, self.remat, name="vision_model")
        pooled = tower(images)
        dim = self.config.projection_dim
        return Dense(dim, use_bias=False, name="visual_projection")(pooled)


class TextTower(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        pooled = TextTransformer(self.config.text, name="text_model")(input_ids)
        dim = self.config.projection_dim
        return Dense(dim, use_bias=False, name="text_projection")(pooled)


@functools.cache  # one function per config, so that it is compiled once
def image_encoder(config: CLIPConfig, *, remat: bool = False) -> ApplyFn:
    """Makes `apply_fn(params, images[B, H, W, 3]) -> features[B, projection_dim]`.

    The features are not normalised. This is the function that is linearised; the frozen
    zero-shot heads normalise its features and classify them.

    Args:
      config: configuration of the model.
      remat: whether backward passes repeat every block's forward pass, which takes less
        memory and more time.
    """
    tower = ImageTower(config, remat)
    return lambda params, images: tower.apply({"params": params}, images)


@functools.cache  # as above
def text_encoder(config: CLIPConfig) -> ApplyFn:
    """Makes `apply_fn(params, input_ids[B, S]) -> features[B, projection_dim]`."""
    tower = TextTower(config)
    return lambda params, input_ids: tower.apply({"params": params}, input_ids)


def init(key: jax.Array, config: CLIPConfig) -> dict:
    """Makes random parameters of both towers, to train a CLIP from scratch."""
    size = config.vision.image_size
    images = jnp.zeros((1, size, size, config.vision.num_channels))
    input_ids = jnp.zeros((1, config.text.max_position_embeddings), jnp.int32)
    key_image, key_text = jax.random.split(key)
    return {
        **ImageTower(config).init(key_image, images)["params"],
        **TextTower(config).init(key_text, input_ids)["params"],
        "logit_scale": jnp.asarray(jnp.log(1 / 0.07), jnp.float32),
    }


def layout(config: CLIPConfig) -> dict:
    """Returns the tree of `jax.ShapeDtypeStruct` that a checkpoint must fill."""
    return jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))


class CLIP(NamedTuple):
    """A checkpoint in memory: its configuration, parameters and folder."""

    config: CLIPConfig
    params: dict
    folder: Path


def load(
    model: str | os.PathLike = TINY_CLIP,
    *,
    revision: str | None = None,
    hidden_act: open_clip.HiddenAct | None = None,
) -> CLIP:
    """Loads a CLIP in the format of transformers or OpenCLIP.

    Args:
      model: a local folder, or a hub id such as `openai/clip-vit-base-patch32`; the
        embedded tiny CLIP by default. A file is read as OpenCLIP's, see
        `hub.open_clip`.
      revision: a branch, tag or commit on the hub.
      hidden_act: activation of an OpenCLIP file, if nothing states it.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ImportError: its file is PyTorch's, and PyTorch is not installed.
      ValueError: its files are broken, or are not a CLIP.

    Example:
      >>> model = load()
      >>> image_encoder(model.config)(model.params, jnp.zeros((1, 28, 28, 3))).shape
      (1, 64)
    """
    path = Path(model).expanduser()
    place = path if path.is_file() else hub.find(model, revision=revision)
    if (file := open_clip.weights_of(place)) is None:
        config = CLIPConfig.from_json(hub.read_json(place))
        return CLIP(config, hub.load(place, layout(config)), place)
    opened = open_clip.open_file(file)
    config = CLIPConfig.from_json(open_clip.read_config(opened, hidden_act))
    return CLIP(config, hub.filled(layout(config), opened.tensors, file), file.parent)


def zero_shot_head(
    model: CLIP, classes: Sequence[str], templates: Sequence[str]
) -> jax.Array:
    """Makes a head `[len(classes), projection_dim]` by `heads.zero_shot`.

    transformers reads the tokenizer from the checkpoint's folder.

    Raises:
      FileNotFoundError: the folder has no tokenizer.
    """
    tokenizer = _tokenizer(model.folder)
    apply = jax.jit(text_encoder(model.config))

    def encode(texts, chunk=256):
        ids = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=model.config.text.max_position_embeddings,
        )["input_ids"]
        ids = np.asarray(ids, np.int32)
        rows = np.resize(ids, (-(-len(ids) // chunk) * chunk, ids.shape[1]))
        features = [
            apply(model.params, part) for part in np.split(rows, len(rows) // chunk)
        ]
        return jnp.concatenate(features)[: len(ids)]

    return heads.zero_shot(encode, classes, templates, model.params["logit_scale"])


def _tokenizer(folder: Path):
    import transformers  # here: it is slow to import, and image encoders do without

    if (folder / hub.CONFIG).is_file():
        return transformers.AutoTokenizer.from_pretrained(folder)
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return transformers.CLIPTokenizer.from_pretrained(folder)
    raise FileNotFoundError(
        f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.json and "
        "merges.txt. OpenAI's and OpenCLIP's models share a tokenizer: copy its files "
        "from a checkpoint in transformers' format, such as "
        "openai/clip-vit-base-patch32."
    )
