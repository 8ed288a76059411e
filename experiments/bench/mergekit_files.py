"""Merges whole mergekit files by the code of its command and by `jaxarith merge`.

The merged folders are compared: every tensor, the number of layers, the vocabulary and
its ids. The models are Llamas of four layers, each with its own tokenizer; the
tokenizer of `chat` has words that the base lacks.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.bench.mergekit_runs import run_mergekit
from jaxarith import cli, hub, report

LIMIT = 1e-6  # as in `against_mergekit`
_TOKENIZER = "tokenizer.json"
SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = {
    "base": ("the", "cat", "sat", "on", "mat"),
    "code": ("the", "cat", "sat", "on", "mat"),
    "chat": ("the", "cat", "dog", "on", "mat", "ran"),
}


def cut(name: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    """Makes a source of a slice."""
    source: dict[str, Any] = {"model": name, "layer_range": [first, last]}
    return source | ({"parameters": parameters} if parameters else {})


def slices(*groups: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    return {"slices": [{"sources": group} for group in groups], **others}


SILENT = [
    {"filter": "o_proj", "value": 0.0},
    {"filter": "down_proj", "value": 0.0},
    {"value": 1.0},
]
_MEAN = {"merge_method": "linear", "parameters": {"weight": 0.5}}
_TWO = [{"model": "base"}, {"model": "chat"}]
# Names of models stand for their folders.
FILES: dict[str, dict[str, Any]] = {
    "passthrough, layers of two models": slices(
        [cut("base", 0, 3)], [cut("code", 1, 4)], merge_method="passthrough"
    ),
    "passthrough, silent copies": slices(
        [cut("base", 0, 2)],
        [cut("base", 1, 2, scale=SILENT)],
        [cut("base", 2, 4)],
        merge_method="passthrough",
    ),
    "slerp of slices": slices(
        [cut("base", 0, 2), cut("code", 2, 4)],
        [cut("base", 2, 4), cut("code", 0, 2)],
        merge_method="slerp",
        base_model="base",
        parameters={"t": [{"filter": "mlp", "value": [0.0, 0.6]}, {"value": 0.3}]},
    ),
    "ties of slices": slices(
        [cut("base", 0, 4), cut("code", 0, 4, weight=0.7, density=0.5)],
        merge_method="ties",
        base_model="base",
    ),
    "tokenizer of the base": _MEAN
    | {"models": _TWO, "base_model": "base", "tokenizer_source": "base"},
    "tokenizer of a model": _MEAN
    | {"models": _TWO, "base_model": "base", "tokenizer_source": "chat"},
    "union of tokenizers": _MEAN
    | {"models": _TWO, "base_model": "base", "tokenizer_source": "union"},
    "union, padded, tokens chosen": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "chat", "parameters": {"weight": 0.6}}],
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 8,
            "tokens": {
                "dog": {"source": {"kind": "zero"}, "force": True},
                "cat": {"source": "chat", "force": True},
            },
        },
    },
}


def make(folder: Path) -> dict[str, str]:
    """Makes the models; returns their folders by name."""
    import tokenizers
    import torch
    import transformers

    made = {}
    for i, (name, words) in enumerate(WORDS.items()):
        ids = {token: place for place, token in enumerate((*SPECIAL, *words))}
        model = tokenizers.models.WordLevel(ids, unk_token="<unk>")
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        named = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
        whole = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
        whole.save_pretrained(folder / name)
        torch.manual_seed(i)
        config = transformers.LlamaConfig(
            vocab_size=len(ids),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            dtype="float32",
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        made[name] = str(folder / name)
    return made


def named(content: Any, places: dict[str, str]) -> Any:
    """Replaces the names of models in a recipe by their folders."""
    if isinstance(content, dict):
        keys = ("model", "base_model", "source", "tokenizer_source")
        return {
            key: places.get(value, value)
            if key in keys and isinstance(value, str)
            else named(value, places)
            for key, value in content.items()
        }
    if isinstance(content, list):
        return [named(item, places) for item in content]
    return content


def compared(programs: Path | None, folder: Path) -> list[dict[str, Any]]:
    """Merges every file and returns a row for each.

    Args:
      programs: the folder of programs in mergekit's environment; None merges only with
        our code.
      folder: folder for models and merges.
    """
    places = make(folder)
    recipes = {
        name: named(content, places) | {"dtype": "float32"}
        for name, content in FILES.items()
    }
    jobs = {
        name: (content, str(folder / f"theirs_{i}"))
        for i, (name, content) in enumerate(recipes.items())
    }
    errors = {} if programs is None else run_mergekit(programs, jobs, folder)
    rows = []
    for i, (name, content) in enumerate(recipes.items()):
        file, out = folder / f"{i}.yaml", folder / f"ours_{i}"
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        row: dict[str, Any] = {"file": name, "same": None}
        if cli.main(["merge", str(file), str(out), "--quiet"]):
            raise RuntimeError(f"jaxarith merge failed at {name!r}.")
        if programs is None:
            row["error"] = "mergekit was not run"
        elif name in errors:
            row["error"] = errors[name]
        else:
            row |= differences(out, Path(jobs[name][1]))
        rows.append(row)
    return rows


def differences(ours: Path, theirs: Path) -> dict[str, Any]:
    """Compares two merged folders; rows of embeddings are matched by their tokens."""
    # mergekit writes no tokenizer if the file asks for none.
    mine, other = (ids(x) if (x / _TOKENIZER).is_file() else {} for x in (ours, theirs))
    mine = mine if other else {}
    tensors = [hub.read(folder) for folder in (ours, theirs)]
    for found, of in zip(tensors, (mine, other), strict=True) if other else ():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = [of[token] for token in sorted(mine.keys() & other.keys())]
            found[name] = found[name][rows]
    names = sorted(tensors[0].keys() & tensors[1].keys())
    apart = max(float(np.abs(tensors[0][n] - tensors[1][n]).max()) for n in names)
    layers = [hub.read_json(x)["num_hidden_layers"] for x in (ours, theirs)]
    odd = len(tensors[0].keys() ^ tensors[1].keys()) + len(mine.keys() ^ other.keys())
    return {
        "tensors": len(names),
        "in one only": odd,
        "layers": layers[0],
        "difference": apart,
        "same": apart <= LIMIT and not odd and layers[0] == layers[1],
    }


def ids(folder: Path) -> dict[str, int]:
    """Returns the ids of all tokens."""
    content = json.loads((folder / _TOKENIZER).read_text(encoding="utf-8"))
    added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    return content["model"]["vocab"] | added


def table(rows: list[dict[str, Any]]) -> str:
    words = {True: "same", False: "differs"}
    header = ["file", "tensors", "layers", "largest difference", "verdict"]
    cells = [
        [
            *(row["file"], row.get("tensors"), row.get("layers")),
            f"{row['difference']:.1e}" if "difference" in row else None,
            words.get(row["same"], row.get("error")),
        ]
        for row in rows
    ]
    return report.markdown_table(header, cells)
