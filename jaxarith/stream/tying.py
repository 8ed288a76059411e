"""Heads that are tied to embeddings, and adapters that move one of the two.

A file may hold a tied matrix once, under the embedding's name. An adapter then names a
head that the file lacks, or moves the embedding alone and unties the two. What comes
out is what PEFT's `merge_and_unload` makes, saved: a matrix of `modules_to_save` is a
new one, which unties; factors move the one matrix that both are.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxarith.hub import Stored
from jaxarith.hub.lora import Adapter
from jaxarith.stream.policies import same_values

_EMBEDDING = re.compile(
    r"(.*\.)?(shared|embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight"
)
_OF_STACK = re.compile(r"(.*\.)?(encoder|decoder)\.embed_tokens\.weight")
_HEAD = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|predictions\.decoder|proj_out|embed_out|"
    r"vocab_projector|output)\.weight"
)
_HAS_HEAD = re.compile(
    r".*(CausalLM|LMHead|LMHeadModel|Generation|MaskedLM|PreTraining)"
)
KEY = "tie_word_embeddings"


class Pair(NamedTuple):
    """The names of an embedding and of the head that is tied to it."""

    embedding: str
    head: str


def pair(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> Pair | None:
    """The embedding and the head of a checkpoint if they are tied, else None.

    They are if the configuration does not untie them, and the file lacks the head or
    holds the same values for both.

    Args:
      tensors: the tensors by name.
      config: the content of `config.json`.
    """
    found = stored_pair(tensors)
    embedding = _outermost(_EMBEDDING, tensors)
    if embedding is None or states(config) is False:
        return None
    if found is not None:
        same = same_values(tensors[found.embedding], tensors[found.head])
        return found if same else None
    [architecture, *_] = config.get("architectures") or [""]
    with_head = _HAS_HEAD.fullmatch(architecture) or states(config) and not architecture
    return Pair(embedding, _head_of(embedding, config)) if with_head else None


def stored_pair(tensors: Mapping[str, Stored]) -> Pair | None:
    """The embedding and the head of equal shape that a file holds, tied or not."""
    embedding = _outermost(_EMBEDDING, tensors)
    head = _outermost(_HEAD, tensors)
    if embedding is None or head is None:
        return None
    same = tensors[embedding].shape == tensors[head].shape
    return Pair(embedding, head) if same else None


def rows(tensors: Mapping[str, Stored]) -> float:
    """The number of rows of the embedding; infinity if none is known."""
    embedding = _outermost(_EMBEDDING, tensors)
    return math.inf if embedding is None else tensors[embedding].shape[0]


def head(tensors: Mapping[str, Stored]) -> str | None:
    """The name of the head that a file holds; None if there is none."""
    return _outermost(_HEAD, tensors)


def states(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration ties head and embedding; None if it does not say."""
    text = config.get("text_config")
    inner = text.get(KEY) if isinstance(text, Mapping) else None
    return config.get(KEY, inner)


def _outermost(pattern, names):
    """The name that fits and stands the furthest out; None if none fits."""

    def depth(name):
        return "shared" not in name, name.count("."), name

    return min(filter(pattern.fullmatch, names), key=depth, default=None)


def _head_of(embedding, config):
    kind = str(config.get("model_type"))
    if embedding.startswith("language_model.model."):
        return "language_model.lm_head.weight"
    if kind == "whisper":
        return "proj_out.weight"
    if kind == "distilbert":
        return "vocab_projector.weight"
    if embedding.endswith("embeddings.word_embeddings.weight"):
        inner = re.search("roberta|camembert|xlm", kind)
        return f"{'lm_head' if inner else 'cls.predictions'}.decoder.weight"
    return "lm_head.weight"


def apply(change: Adapter, names: Pair, ensured: bool) -> tuple[Adapter, bool]:
    """What an adapter does to a tied pair, for both of its names.

    Args:
      change: the adapter, by the names of the base and of the pair.
      names: the pair.
      ensured: whether PEFT's `ensure_weight_tying` gave both names the same factors,
        which then count once.

    Returns:
      The change, and whether it unties the two.
    """
    deltas = [change.deltas[name] for name in names if name in change.deltas]
    whole = [change.replaced[name] for name in names if name in change.replaced]
    own = [n for n in names if n in change.replaced and n not in change.deltas]
    if own:
        return change, len(own) < 2 or not same_values(*whole)
    moved = dict(change.deltas)
    if deltas:
        delta = deltas[0] if ensured or len(deltas) == 1 else _sum(*deltas)
        moved |= dict.fromkeys(names, delta)
    # Beside factors, PEFT saves the matrix that they move.
    both = dict.fromkeys(names, whole[0]) if whole else {}
    return Adapter(moved, change.replaced | both), False


def spread(
    change: Adapter, names: Pair, base: Mapping[str, Stored], label: str
) -> Adapter:
    """What an adapter does to a tied pair, for the same matrix under further names.

    A file of an encoder-decoder may hold it once more for each of the two stacks.

    Args:
      change: the adapter, after `apply`, which did not untie the pair.
      names: the pair.
      base: the tensors of the base.
      label: what errors call the adapter.

    Raises:
      ValueError: the adapter moves the embedding of one stack only.
    """
    copies = [
        name
        for name in base
        if _OF_STACK.fullmatch(name)
        and name not in names
        and same_values(base[name], base[names.embedding])
    ]
    if own := [x for x in copies if x in change.deltas or x in change.replaced]:
        raise ValueError(
            f"{label} moves {own[0]}, which is tied to {names.embedding}: its factors "
            "are those of one stack, and the matrix is that of both and of the head. "
            f"Train the adapter with factors of {names.embedding}, or on a base that "
            "is not tied."
        )
    deltas, replaced = (
        found | {name: found[names.embedding] for name in copies}
        if names.embedding in found
        else found
        for found in (change.deltas, change.replaced)
    )
    return change._replace(deltas=deltas, replaced=replaced)


def _sum(a, b):
    return Stored.made(np.float32, a.shape, lambda: a.read() + b.read())


def with_head(tensors: Mapping[str, Stored], names: Pair) -> dict[str, Stored]:
    """The tensors of a model that is tied, with the head under its own name."""
    if names.embedding not in tensors:  # an adapter alone
        return dict(tensors)
    return {**tensors, names.head: tensors.get(names.head, tensors[names.embedding])}


def differ(
    config: Mapping[str, Any], found: Mapping[str, Mapping[str, Stored]]
) -> list[str]:
    """Who holds a head other than its embedding, though a configuration ties the two.

    Args:
      config: the content of the base's `config.json`.
      found: by label, tensors by the base's names.
    """
    if not states(config):
        return []
    return [
        label
        for label, tensors in found.items()
        if (names := stored_pair(tensors)) is not None
        and not same_values(tensors[names.embedding], tensors[names.head])
    ]


def check_untied(config: Mapping[str, Any], label: str) -> None:
    """Raises a ValueError if a model computes otherwise once it is untied."""
    if config.get("is_encoder_decoder") or "t5" in str(config.get("model_type")):
        raise ValueError(
            f"{label} gives the head or the embedding new values of its own. In an "
            "encoder-decoder more than the two are tied, and an untied T5 scales its "
            "outputs otherwise. Train the adapter with factors (target_modules) in "
            "place of modules_to_save, or on a base that is not tied."
        )
