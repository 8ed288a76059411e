"""The sizes of the papers' language models, for code that needs no weights."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxarith import hub
from jaxarith.models import bert, gpt2, t5

_FLAN = {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
_FLAN |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
_T5_LARGE = {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}
_GPT2_MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
_GPT2_LARGE = {"n_embd": 1280, "n_layer": 36, "n_head": 20}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
_ROBERTA_LARGE = {"hidden_size": 1024, "intermediate_size": 4096}
_ROBERTA_LARGE |= {"num_hidden_layers": 24, "num_attention_heads": 16}

# The entries of their config.json that differ from the defaults of the config class.
SIZES: dict[str, dict[str, Any]] = {
    "google/flan-t5-small": {"model_type": "t5", **_FLAN},
    "google-t5/t5-small": {"model_type": "t5"},
    "google-t5/t5-base": {"model_type": "t5", **_T5_BASE},
    "google-t5/t5-large": {"model_type": "t5", **_T5_LARGE},
    "openai-community/gpt2": {"model_type": "gpt2"},
    "openai-community/gpt2-medium": {"model_type": "gpt2", **_GPT2_MEDIUM},
    "openai-community/gpt2-large": {"model_type": "gpt2", **_GPT2_LARGE},
    "FacebookAI/roberta-base": {"model_type": "roberta", **_ROBERTA},
    "FacebookAI/roberta-large": {
        **{"model_type": "roberta", **_ROBERTA},
        **_ROBERTA_LARGE,
    },
    "unitary/toxic-bert": {"model_type": "bert", "num_labels": 6},
}


def t5_of(model: str) -> t5.T5Config:
    """Returns the configuration of a T5, see `_raw`."""
    return t5.T5Config.from_json(_raw(model))


def gpt2_of(model: str) -> gpt2.GPT2Config:
    """Returns the configuration of a GPT-2, see `_raw`.

    Example:
      >>> gpt2_of("openai-community/gpt2-large").n_layer
      36
    """
    return gpt2.GPT2Config.from_json(_raw(model))


def bert_of(model: str, outputs: int | None = None) -> bert.BertConfig:
    """Returns the configuration of a BERT or RoBERTa, see `_raw`.

    Args:
      model: the model.
      outputs: number of outputs of the classification head; by default the model's own.
    """
    config = bert.BertConfig.from_json(_raw(model))
    return dataclasses.replace(config, num_labels=outputs or config.num_labels)


def _raw(model: str) -> dict[str, Any]:
    """Returns the config.json of a model: a folder, or one of `SIZES`.

    Raises:
      ValueError: the model is neither.
    """
    if (Path(model) / "config.json").is_file():
        return hub.read_json(Path(model))
    if model in SIZES:
        return SIZES[model]
    raise ValueError(
        f"{model} has no config.json, so its sizes are not known. Name a folder that "
        f"has one, or one of {', '.join(SIZES)}."
    )
