"""Small T5s with random weights, and T5 written out, for the tests of its port."""

import jax.numpy as jnp
import numpy as np

from jaxarith import tree
from jaxarith.models import t5
from jaxarith.models.t5_stacks import relative_position_bucket

KINDS = ["relu", "gated-gelu"]
START = 2  # of the decoder; the real T5s start with padding, 0, which hides mistakes

# T5 v1.0; v1.1 and FLAN-T5; and a v1.1 as transformers 5 creates one. Their stacks are
# of unlike heights, of which transformers can only generate with the encoder's greater.
heights = {"num_layers": 3, "num_decoder_layers": 2}
VARIANTS = {
    "v1.0": {"kind": "relu", **heights},
    "v1.1": {"kind": "gated-gelu", "tie_word_embeddings": False, **heights},
    "v1.1-tied": {"kind": "gated-gelu", "scale_decoder_outputs": False, **heights},
}


def tiny_t5_config(kind="relu", **fields) -> dict:
    """The `config.json` of a T5 whose heads together are not as wide as its tokens."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": 30,
        "d_model": 16,
        "d_kv": 6,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": kind,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": START,
        **fields,
    }


def tiny_t5(kind="relu", **fields) -> t5.T5Config:
    return t5.T5Config.from_json(tiny_t5_config(kind, **fields))


def random_params(seed, config, scale=0.2, part=".*"):
    """Weights of which none is zero or one; those of the norms are near one."""
    rng = np.random.default_rng(seed)

    def leaf(path, expected):
        noise = scale * rng.normal(size=expected.shape)
        return np.asarray(noise + path.endswith("/weight"), np.float32)

    return tree.map_with_path(leaf, tree.select(t5.layout(config), part))


def random_tokens(length=40, seed=1):
    """Longer than the farthest distance; padded nowhere, after, before, wholly."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(2, 30, size=(4, length))
    mask = np.ones_like(input_ids)
    mask[1, 3 * length // 4 :] = 0
    mask[2, : length // 3] = 0
    mask[3] = 0
    return input_ids, mask


def plain_t5(config, params, input_ids, attention_mask, decoder_input_ids=None):
    """T5 to be differentiated step by step: the encoder's states, or the logits."""
    leaves = tree.flatten(params)

    def normed(x, path):
        root = jnp.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_epsilon)
        return x / root * leaves[f"{path}/weight"][None, None]

    def split(x):
        return x.reshape(*x.shape[:2], config.num_heads, -1).swapaxes(1, 2)

    def gelu(z):
        return z * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2

    def bias(stack, length):
        buckets = relative_position_bucket(
            np.arange(length)[None] - np.arange(length)[:, None],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            stack == "encoder",
        )
        first = f"{stack}/block/0/layer/0/SelfAttention"
        table = leaves[f"{first}/relative_attention_bias/embedding"]
        return jnp.einsum("qkn,nh->hqk", np.eye(len(table))[buckets], table)[None]

    def attended(path, h, source, mask, bias):
        q = split(h @ leaves[f"{path}/q/kernel"])
        k, v = (split(source @ leaves[f"{path}/{role}/kernel"]) for role in "kv")
        weights = jnp.exp(q @ k.mT + bias) * mask
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        mixed = mixed.swapaxes(1, 2).reshape(*h.shape[:2], -1)
        return mixed @ leaves[f"{path}/o/kernel"]

    def fed_forward(path, h):
        w = {
            name: leaves.get(f"{path}/DenseReluDense/{name}/kernel")
            for name in ("wi", "wi_0", "wi_1", "wo")
        }
        gated = config.feed_forward_proj == "gated-gelu"
        h = gelu(h @ w["wi_0"]) * (h @ w["wi_1"]) if gated else jnp.clip(h @ w["wi"], 0)
        return h @ w["wo"]

    def stack(name, blocks, ids, mask, texts=None):
        x = leaves["shared/embedding"][ids]
        relative = bias(name, ids.shape[1])
        for i in range(blocks):
            path = f"{name}/block/{i}/layer"
            h = normed(x, f"{path}/0/layer_norm")
            x = x + attended(f"{path}/0/SelfAttention", h, h, mask, relative)
            if texts is not None:
                h = normed(x, f"{path}/1/layer_norm")
                x = x + attended(f"{path}/1/EncDecAttention", h, *texts, 0)
            path = f"{path}/{1 if texts is None else 2}"
            x = x + fed_forward(path, normed(x, f"{path}/layer_norm"))
        return normed(x, f"{name}/final_layer_norm")

    seen = jnp.asarray(attention_mask)[:, None, None]
    hidden = stack("encoder", config.num_layers, input_ids, seen)
    if decoder_input_ids is None:
        return hidden
    causal = np.tri(decoder_input_ids.shape[1])[None, None]
    blocks = config.num_decoder_layers
    h = stack("decoder", blocks, decoder_input_ids, causal, (hidden, seen))
    h = h / np.sqrt(config.d_model) if config.scale_decoder_outputs else h
    tied = config.tie_word_embeddings
    return h @ (leaves["shared/embedding"].T if tied else leaves["lm_head/kernel"])
