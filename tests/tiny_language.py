"""Folders of tiny classifiers with tokenizers, in every variant."""

import json

from tiny import random_params

from jaxarith import hub
from jaxarith.models import bert

CLASSIFIER = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "id2label": {"0": "severe", "1": "toxic", "2": "threat"},
    "label2id": {"severe": 0, "toxic": 1, "threat": 2},
    "problem_type": "multi_label_classification",
}


_ROBERTA = {
    "architectures": ["RobertaForSequenceClassification"],
    "type_vocab_size": 1,
    "pad_token_id": 1,
}


def write_classifier(folder, transformers, **fields):
    """Random weights; a tokenizer of letters, a few words and the special tokens.

    Fields that are None are left out of `config.json`.
    """
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    roberta = fields.get("model_type") == "roberta"
    raw = {**CLASSIFIER, **(_ROBERTA if roberta else {}), **fields}
    raw = {key: value for key, value in raw.items() if value is not None}
    config = bert.BertConfig.from_json(raw)
    layout = bert.layout(config, "classifier")
    hub.save(folder, random_params(3, layout), raw, overwrite=True)
    if roberta:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ"]
        vocab = {token: i for i, token in enumerate([*special, *letters])}
        tokenizer = transformers.RobertaTokenizer(vocab=vocab, merges=[])
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hate", "love", "you"]
        vocab = {token: i for i, token in enumerate([*special, *letters])}
        tokenizer = transformers.BertTokenizer(vocab=vocab)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder
