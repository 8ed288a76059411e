"""Reads the keys of mergekit's files for tokenizers and chat templates."""

from collections.abc import Mapping
from typing import Any

from jaxarith.commands.merge import template_syntax
from jaxarith.commands.merge.chat_templates import NAMED
from jaxarith.commands.merge.request import TokenRow
from jaxarith.commands.merge.yaml_lines import Node

_SHORTEST = 20  # the fewest characters of a template; shorter texts are names


def tokenizer(keys: Mapping[str, Node]) -> dict[str, Any]:
    """Returns the fields of a request for the keys of a file about tokenizers.

    Args:
      keys: the keys of the file.

    Raises:
      ValueError: two keys name the tokenizer, a value is invalid, or a base is missing.
    """
    if "tokenizer_source" in keys and "tokenizer" in keys:
        raise keys["tokenizer"].error(
            "there is a tokenizer_source as well. Remove one of the two."
        )
    if "tokenizer_source" in keys:
        return {"tokenizer_source": _source(keys["tokenizer_source"], keys)}
    if "tokenizer" not in keys:
        return {}
    known = ("source", "tokens", "pad_to_multiple_of")
    fields = keys["tokenizer"].fields(known, "tokenizer")
    source, tokens = fields.get("source"), fields.get("tokens")
    named = {} if tokens is None else tokens.mapping("tokens")
    return {
        "tokenizer_source": "union" if source is None else _source(source, keys),
        "tokens": tuple(_row(token, node) for token, node in named.items()),
        "pad_to_multiple_of": _multiple(fields.get("pad_to_multiple_of")),
    }


def chat_template(node: Node | None) -> str | None:
    """Returns the chat template of a file: "auto", the name of one, or a template.

    Raises:
      ValueError: the text is none of these, or its syntax is wrong (checked if jinja2
        is installed).
    """
    if node is None:
        return None
    text = node.text("chat_template")
    if text == "auto" or text in NAMED:
        return text
    if len(text) < _SHORTEST or "{" not in text:
        raise node.error(
            f'chat_template is {text!r}; it must be "auto", for the one that most '
            f"models have, one of {', '.join(NAMED)}, or a template in Jinja."
        )
    fault = template_syntax.fault(text) if template_syntax.checkable() else None
    if fault is not None:
        raise node.error(
            f"chat_template is not valid Jinja: {fault.rstrip('.')}. Correct the "
            "template. Its own lines are counted from 1."
        )
    return text


def _source(node: Node, keys: Mapping[str, Node]) -> str:
    source = node.text("the source of the tokenizer")
    if source != "base":
        return source
    if "base_model" not in keys:
        raise node.error('the source of the tokenizer is "base"; there is none.')
    return keys["base_model"].text("base_model")


def _multiple(node: Node | None) -> int | None:
    if node is None or node.value is None:
        return None
    if type(node.value) is not int or node.value < 1:
        raise node.error(
            f"pad_to_multiple_of is {node.shown()}; it must be a whole number from 1."
        )
    return node.value


def _row(token: str, node: Node) -> TokenRow:
    fields = node.fields(("source", "force"), f"the token {token}")
    force = fields.get("force")
    if force is not None and type(force.value) is not bool:
        raise force.error(f"force is {force.shown()}; it must be true or false.")
    forced = bool(force is not None and force.value)
    source = fields.get("source")
    if source is None or source.value is None:
        return TokenRow(token, "default", force=forced, place=node.place)
    if isinstance(source.value, str):
        model = source.text("source")
        return TokenRow(token, "model", model, force=forced, place=source.place)
    inner = source.fields(("kind", "model", "token", "token_id"), "source")
    if "kind" not in inner:
        raise source.error("the source of a token has a kind: model_token or zero.")
    kind = inner["kind"].word(("model_token", "zero"), "kind")
    if kind == "zero":
        return TokenRow(token, "zero", force=forced, place=source.place)
    if "model" not in inner or ("token" in inner) == ("token_id" in inner):
        raise source.error("a model_token has a model, and a token or a token_id.")
    model = inner["model"].text("model")
    if "token" in inner:
        of: str | int = inner["token"].text("token")
    else:
        of = inner["token_id"].value
        if type(of) is not int or of < 0:
            raise inner["token_id"].error(
                f"token_id is {inner['token_id'].shown()}; it must be a whole number."
            )
    return TokenRow(token, "row", model, of, forced, source.place)
