"""Small models with layers and tokenizers, and merges of slices and of vocabularies."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH = 8
LAYERS = 3
PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "norm.weight")
TOKENS = {
    "a": ["the", "cat", "sat", "down"],
    "b": ["the", "dog", "ran"],
    "c": ["a", "cat", "the", "ran", "off"],
}


def write(folder: Path) -> None:
    """Three models of three layers, each with words of its own."""
    for number, (name, words) in enumerate(TOKENS.items()):
        rng = np.random.default_rng(number)
        rows = ["model.embed_tokens.weight", "lm_head.weight"]
        layers = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in PARTS]
        shapes = {
            part: (WIDTH,) if "norm" in part else (WIDTH, WIDTH) for part in layers
        }
        shapes |= dict.fromkeys(rows, (len(words), WIDTH))
        shapes["model.norm.weight"] = (WIDTH,)
        tensors = {n: rng.normal(size=x).astype("f4") for n, x in shapes.items()}
        place = folder / name
        place.mkdir(parents=True)
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        config = {"model_type": "x", "num_hidden_layers": LAYERS}
        config["vocab_size"] = len(words)
        (place / "config.json").write_text(json.dumps(config))
        vocabulary = {word: i for i, word in enumerate(words)}
        tokenizer = {"added_tokens": [], "model": {"vocab": vocabulary}}
        (place / "tokenizer.json").write_text(json.dumps(tokenizer))
        decoder = {str(len(words) - 1): {"content": words[-1]}}
        settings = {"added_tokens_decoder": decoder}
        (place / "tokenizer_config.json").write_text(json.dumps(settings))


def slices(folder: Path, method: str, **parameters: float) -> str:
    """The YAML of a merge by slices: two of two models each, on the first one."""

    def source(name, start):
        return {"model": str(folder / name), "layer_range": [start, start + 2]}

    pairs = [[source("a", 0), source("b", 1)], [source("c", 0), source("a", 1)]]
    content = {
        "merge_method": method,
        "base_model": str(folder / "a"),
        "parameters": parameters,
        "slices": [{"sources": pair} for pair in pairs],
        "tokenizer_source": "union",
    }
    return json.dumps(content)  # which is YAML as well


def tokenizers(folder: Path, method: str, **parameters: float) -> str:
    """The YAML of a merge of the three models, with the tokens of all."""
    content = {
        "merge_method": method,
        "base_model": str(folder / "a"),
        "parameters": parameters,
        "models": [{"model": str(folder / name)} for name in "bc"],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 4},
    }
    return json.dumps(content)


PATHS = {"slices": slices, "tokenizers": tokenizers}
