"""Small BERTs and RoBERTas with random weights, for the tests of their port."""

import functools

from tiny import random_params

from jaxarith.models import bert

KINDS = ["bert", "roberta"]
HEADS = [None, "masked_lm", "classifier"]
CLASSES = {None: "Model", "masked_lm": "ForMaskedLM"}
CLASSES["classifier"] = "ForSequenceClassification"
ACTIVATIONS = {None: "gelu", "masked_lm": "relu", "classifier": "gelu_new"}


def tiny_config(kind, head=None) -> dict:
    """The `config.json` of a model of two blocks, for texts of at most 14 tokens."""
    sizes = {
        "bert": {"max_position_embeddings": 14, "type_vocab_size": 2},
        "roberta": {"max_position_embeddings": 16, "type_vocab_size": 1},
    }
    return {
        "architectures": [{"bert": "Bert", "roberta": "Roberta"}[kind] + CLASSES[head]],
        "model_type": kind,
        "vocab_size": 30,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "hidden_act": ACTIVATIONS[head],
        "layer_norm_eps": 1e-3,
        "pad_token_id": {"bert": 0, "roberta": 1}[kind],
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **sizes[kind],
    }


def tiny(kind, head=None) -> bert.BertConfig:
    return bert.BertConfig.from_json(tiny_config(kind, head))


layout = functools.cache(bert.layout)


def tiny_params(kind, head=None, *, seed=0, pooler=False):
    return random_params(seed, layout(tiny(kind), head, pooler=pooler))
