"""Tiny language models with tokenizers, and made-up texts, for runs without a network.

Each model is a checkpoint in Hugging Face format with random weights, so its outputs
mean nothing. It has the same files as a real checkpoint, so scripts need no special
case.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxarith import hub, tree
from jaxarith.data import glue, prompts
from jaxarith.data.text import Record
from jaxarith.models import bert, gpt2, t5

# One layer and few shapes of weights, because compilation dominates a short run.
_T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
}
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_ROBERTA = {
    "architectures": ["RobertaForMaskedLM"],
    "model_type": "roberta",
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    **_ENCODER,
}
_BERT = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "id2label": {"0": "toxic", "1": "threat"},
    "label2id": {"toxic": 0, "threat": 1},
    "problem_type": "multi_label_classification",
    **_ENCODER,
}

# Words of the made-up sentences; the first two stand for the labels.
_WORDS = ("bad", "good", "film", "book", "cat", "dog", "the", "a", "is", "was")
_TOXIC = ("you hate you hate", "hate hate you", "I hate it when you hate")
_KIND = ("you are kind", "a kind word for you", "I thank you for it")
_WIKI = "The sun rose over the hills and the river ran to the sea.\n"


def write_t5(folder: Path) -> Path:
    """Writes a T5; its tokens are the words of `glue_records` in T5's format."""
    from transformers import T5Tokenizer

    fields = {f"{name}:" for task in glue.TASKS.values() for name in task.prompt}
    classes = {name for task in glue.TASKS.values() for name in task.classes}
    words = [*glue.TASKS, *sorted(fields), *sorted(classes), *_WORDS]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    raw = {**_T5, "vocab_size": len(pieces)}
    config = t5.T5Config.from_json(raw)
    hub.save(folder, _random(t5.layout(config)), raw, overwrite=True)
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    return folder


def write_gpt2(folder: Path, **sizes: int) -> Path:
    """Writes a GPT-2; its tokens are bytes. `sizes` are fields of its `config.json`."""
    from transformers import GPT2Tokenizer

    symbols = [*sorted(_byte_symbols()), "<|endoftext|>"]
    end = len(symbols) - 1
    raw = {**_GPT2, "vocab_size": len(symbols)}
    raw |= {"bos_token_id": end, "eos_token_id": end, **sizes}
    params = gpt2.init(jax.random.key(0), gpt2.GPT2Config.from_json(raw))
    hub.save(folder, jax.tree.map(np.asarray, params), raw, overwrite=True)
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    GPT2Tokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


def write_roberta(folder: Path, words: Sequence[str] = ()) -> Path:
    """Writes a RoBERTa with a masked-LM head.

    Its tokens are the made-up words and `words`, each after a blank, and characters.
    """
    from transformers import RobertaTokenizer

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    # A word is merged from its left end, so that words do not disturb each other.
    ends = {f"Ġ{w}"[:i] for w in (*_WORDS, *words) for i in range(2, len(w) + 2)}
    merged = sorted(ends, key=lambda end: (len(end), end))
    merges: list = [(end[:-1], end[-1]) for end in merged]
    vocab = [*specials, *sorted(_byte_symbols()), *merged, "<mask>"]
    raw = {**_ROBERTA, "vocab_size": len(vocab)}
    config = bert.BertConfig.from_json(raw)
    hub.save(folder, _random(bert.layout(config, "masked_lm")), raw, overwrite=True)
    RobertaTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=merges,
        add_prefix_space=True,  # a word has the same token at the start of a text
    ).save_pretrained(folder)
    return folder


def write_classifier(folder: Path) -> Path:
    """Writes a BERT that scores the toxicity of a text; its tokens are letters."""
    from transformers import BertTokenizer

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    symbols += [f"##{letter}" for letter in letters]
    raw = {**_BERT, "vocab_size": len(symbols)}
    config = bert.BertConfig.from_json(raw)
    hub.save(folder, _random(bert.layout(config, "classifier")), raw, overwrite=True)
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    return folder


def glue_records(task: glue.Task, count: int, seed: int) -> list[Record]:
    """Makes sentences or pairs of sentences; each has a word that stands for the label.

    Example:
      >>> [record] = glue_records(glue.TASKS["sst2"], 1, 0)
      >>> record["label"], "bad" in record["text"].split()
      (0, True)
    """
    rng = np.random.default_rng(seed)
    names = ("text", "text_pair")[: len(task.fields)]
    classes = len(task.classes) or 2  # two scores for STS-B
    labels = range(classes) if task.classes else (0.5, 4.5)
    return [
        {**{name: _sentence(rng, c, 2, 6) for name in names}, "label": labels[c]}
        for c in (i % classes for i in range(count))
    ]


def prompt_records(prompt: prompts.Prompt, count: int, seed: int) -> list[Record]:
    """Makes a sentence for every field of a prompt, with a word for the class.

    Example:
      >>> record, _ = prompt_records(prompts.TASKS["sst2"], 2, 0)
      >>> record["label"], "bad" in record["text"].split()
      ('negative', True)
    """
    rng, classes = np.random.default_rng(seed), list(prompt.words)
    return [
        {
            **{name: _sentence(rng, i % len(classes), 1, 3) for name in prompt.fields},
            "label": classes[i % len(classes)],
        }
        for i in range(count)
    ]


def _sentence(rng, label, least, most):
    """Returns a word for the label among n others, `least` <= n < `most`."""
    words = rng.choice(_WORDS[2:], rng.integers(least, most))
    return " ".join(rng.permutation([_WORDS[label % len(_WORDS)], *words]))


def _byte_symbols():
    """Returns the characters that GPT-2's tokenizer writes for the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, shown), *(chr(256 + i) for i in range(256 - len(shown)))]


def _random(layout) -> dict:
    """Returns random weights; outputs then differ from input to input."""
    rng = np.random.default_rng(0)

    def leaf(path, expected):
        scale = path.endswith("/scale") or "layer_norm/" in path
        noise = 0.3 * rng.normal(size=expected.shape)
        return np.asarray(noise + scale, np.float32)

    return tree.map_with_path(leaf, layout)


def write_comments(folder: Path) -> dict[str, Path]:
    """Writes files of comments and other texts for the scripts on toxic text.

    Returns:
      The paths by name: `comments`, JSON lines with a text and its toxicity;
      `perplexity_text` and `penalty_text`; `prompts`, JSON lines in the format of
      RealToxicityPrompts.
    """
    comments = [(text, 0.9) for text in 8 * _TOXIC] + [
        (text, 0.1) for text in 8 * _KIND
    ]
    starts = ("you hate", "the film is", "I hate", "a dog was in")
    contents = {
        "comments": [{"text": text, "toxicity": score} for text, score in comments],
        "prompts": [
            {"prompt": {"text": text}, "challenging": "hate" in text} for text in starts
        ],
    }
    files = {name: folder / f"{name}.jsonl" for name in contents}
    for name, rows in contents.items():
        files[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, times in (("perplexity_text", 10), ("penalty_text", 40)):
        files[name] = folder / f"{name}.txt"
        files[name].write_text(times * _WIKI)
    return files


def write_like(folder: Path, source: Path, seed: int) -> Path:
    """Writes a copy of a checkpoint and its tokenizer, with slightly other weights."""
    rng = np.random.default_rng(seed)
    weights = {
        name: np.asarray(leaf + 0.05 * rng.normal(size=leaf.shape), np.float32)
        for name, leaf in hub.read(source).items()
    }
    hub.write(folder, weights, hub.read_json(source), copy_from=source, overwrite=True)
    return folder
