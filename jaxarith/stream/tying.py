"""Handles heads that are tied to embeddings, and adapters that move one of the two.

A file may hold a tied matrix once, under the embedding's name. An adapter may then name
a head that the file lacks, or move only the embedding and untie the two. The result is
that of PEFT's `merge_and_unload`, saved: a matrix of `modules_to_save` is a new matrix
and unties the two; factors move the one matrix that both share.
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
    """Returns the embedding and the head of a checkpoint if they are tied, else None.

    They are tied if the configuration does not untie them, and the file lacks the head
    or holds the same values for both.

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
    """Returns a file's embedding and head of equal shape, tied or not; else None."""
    embedding = _outermost(_EMBEDDING, tensors)
    head = _outermost(_HEAD, tensors)
    if embedding is None or head is None:
        return None
    same = tensors[embedding].shape == tensors[head].shape
    return Pair(embedding, head) if same else None


def rows(tensors: Mapping[str, Stored]) -> float:
    """Returns the number of rows of the embedding; infinity if it is unknown."""
    embedding = _outermost(_EMBEDDING, tensors)
    return math.inf if embedding is None else tensors[embedding].shape[0]


def head(tensors: Mapping[str, Stored]) -> str | None:
    """Returns the name of the head that a file holds; None if there is none."""
    return _outermost(_HEAD, tensors)


def states(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration ties head and embedding; None if it does not say so."""
    text = config.get("text_config")
    inner = text.get(KEY) if isinstance(text, Mapping) else None
    return config.get(KEY, inner)


def _outermost(pattern, names):
    """Returns the matching name in the outermost module; None if none matches."""

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
    """Returns an adapter's change with the same effect for both names of a tied pair.

    Args:
      change: the adapter, by the names of the base and of the pair.
      names: the pair.
      ensured: whether PEFT's `ensure_weight_tying` gave both names the same factors.
        They are then counted once.

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
    # PEFT saves the matrix that factors move beside the factors.
    both = dict.fromkeys(names, whole[0]) if whole else {}
    return Adapter(moved, change.replaced | both), False


def spread(
    change: Adapter, names: Pair, base: Mapping[str, Stored], label: str
) -> Adapter:
    """Copies an adapter's change of a tied pair to further names of the matrix.

    A file of an encoder-decoder may hold the matrix again for each of the two stacks.

    Args:
      change: the adapter after `apply`, which did not untie the pair.
      names: the pair.
      base: the tensors of the base.
      label: the name of the adapter in errors.

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
            f"{label} moves {own[0]}, which is tied to {names.embedding}. Its factors "
            "belong to one stack, but both stacks and the head share the matrix. Train "
            f"the adapter with factors of {names.embedding}, or on a base that is not "
            "tied."
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
    """Returns the tensors of a tied model with the head under its own name."""
    if names.embedding not in tensors:  # only an adapter
        return dict(tensors)
    return {**tensors, names.head: tensors.get(names.head, tensors[names.embedding])}


def differ(
    config: Mapping[str, Any], found: Mapping[str, Mapping[str, Stored]]
) -> list[str]:
    """Returns the models whose head differs from an embedding that it is tied to.

    Args:
      config: the content of the base's `config.json`, which may tie the two.
      found: the tensors of each model by the base's names; the models by label.
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
    """Raises a ValueError if untying a model changes what it computes."""
    if config.get("is_encoder_decoder") or "t5" in str(config.get("model_type")):
        raise ValueError(
            f"{label} gives the head or the embedding separate new values. In an "
            "encoder-decoder more than these two are tied, and an untied T5 scales its "
            "outputs in another way. Train the adapter with factors (target_modules) "
            "in place of modules_to_save, or on a base that is not tied."
        )
