"""Writes `tests/layouts/*.json`, `{path: shape}` of checkpoints, from PyTorch's models.

    python tests/layouts/generate.py

The oracle is transformers' classes, and the names are converted by a table of their
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

_ROBERTA_BASE = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}

# The language models: their class, what a `config.json` says of their sizes, and the
# parameters that are tied to others, which are not in the files.
LANGUAGE_MODELS = {
    "t5-small": (
        "T5ForConditionalGeneration",
        {
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": 8,
            "relative_attention_num_buckets": 32,
        },
        (
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
    ),
    "flan-t5-small": (
        "T5ForConditionalGeneration",
        {
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 1024,
            "num_layers": 8,
            "num_decoder_layers": 8,
            "num_heads": 6,
            "relative_attention_num_buckets": 32,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "model_type": "gpt2",
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
        },
        ("lm_head.weight",),
    ),
    "bert-base-uncased": (
        "BertForMaskedLM",
        {
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
        },
        ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    ),
    "roberta-base": (
        "RobertaForMaskedLM",
        {"model_type": "roberta", **_ROBERTA_BASE},
        ("lm_head.decoder.weight", "lm_head.decoder.bias"),
    ),
    "roberta-large": (
        "RobertaForMaskedLM",
        {
            "model_type": "roberta",
            **_ROBERTA_BASE,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        ("lm_head.decoder.weight", "lm_head.decoder.bias"),
    ),
}

# What ends the name in PyTorch, what ends it in Flax, and the axes in Flax's order. The
# first row that fits counts.
TABLE = [
    # T5's norms have no bias, and keep the name.
    (r"(layer\.\d\.layer_norm|(?:en|de)coder\.final_layer_norm)\.weight", "weight"),
    (
        r"(layer_norm[12]?|pre_layrnorm|post_layernorm|final_layer_norm)\.weight",
        "scale",
    ),
    (r"(LayerNorm|ln_[12f])\.weight", "scale"),
    (r"(token_embedding|position_embedding)\.weight", "embedding"),
    (r"((?:word|position|token_type)_embeddings|wte|wpe|shared)\.weight", "embedding"),
    (r"(relative_attention_bias)\.weight", "embedding"),
    (r"(patch_embedding)\.weight", "kernel", (2, 3, 1, 0)),
    (r"([qkv]_proj|out_proj|fc[12]|\w+_projection)\.weight", "kernel", (1, 0)),
    (r"(query|key|value|dense|[qkvo]|w[io](?:_[01])?)\.weight", "kernel", (1, 0)),
    (r"(lm_head)\.weight", "kernel", (1, 0)),
    # PyTorch's is [in, out] here, alone, and Flax's [out, in], alone.
    (r"(c_attn|c_proj|c_fc)\.weight", "kernel", (1, 0)),
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
    import transformers

    if name in CONFIGS:
        kind, raw = "CLIPModel", CONFIGS[name]
    else:
        kind, raw, _ = LANGUAGE_MODELS[name]
    kind = getattr(transformers, kind)
    with torch.device("meta"):
        return kind(kind.config_class(**raw))


def state_dict(name):
    """The parameters of the model that are in its files."""
    weights = meta_model(name).state_dict()
    if name in LANGUAGE_MODELS:
        for tied in LANGUAGE_MODELS[name][2]:
            del weights[tied]
    return weights


def main():
    for name in (*CONFIGS, *LANGUAGE_MODELS):
        layout = flax_layout(state_dict(name))
        rows = [f"{json.dumps(path)}: {shape}" for path, shape in layout.items()]
        text = "{\n" + ",\n".join(rows) + "\n}\n"
        (FOLDER / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
