"""Requests: the merges that users ask for, with flags or in a YAML file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from jaxarith.commands.merge.gradients import Setting, plain
from jaxarith.commands.merge.wrappers import After

Preset: TypeAlias = Literal["paper", "mergekit"]
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class Model(NamedTuple):
    """A model to merge.

    Attributes:
      name: a folder or hub id, with or without `+` and an adapter.
      parameters: options of the method for this model only.
    """

    name: str
    parameters: Mapping[str, Setting]


class Source(NamedTuple):
    """Layers of a model in a slice.

    Attributes:
      model: the model, with options of the method for it in this slice only.
      start, stop: the first layer, and the layer after the last.
      place: the start of error messages about it, for example the line of a file.
    """

    model: Model
    start: int
    stop: int
    place: str = ""


class Slice(NamedTuple):
    """Layers of several models that are merged into new layers.

    Attributes:
      sources: the models.
      parameters: options of the method in this slice.
      base: the base model of this slice; None means that of the request.
      place: the start of error messages about it.
    """

    sources: tuple[Source, ...]
    parameters: Mapping[str, Setting]
    base: str | None = None
    place: str = ""


class TokenRow(NamedTuple):
    """The source of a token's row for models that lack the token.

    Attributes:
      token: the token; it is added if the tokenizer lacks it.
      source: "model": the row of this token in `model`; "row": the row of another token
        in `model`; "zero": a row of zeros; "default": as for tokens that are not
        listed.
      model: the model.
      of: the other token, or its id.
      force: whether models that have the token get that row too.
      place: the start of error messages about it.
    """

    token: str
    source: Literal["model", "row", "zero", "default"]
    model: str = ""
    of: str | int = ""
    force: bool = False
    place: str = ""


@dataclasses.dataclass(frozen=True)
class MergeRequest:
    """A merge that is asked for; its options have the right types.

    Attributes:
      method: name of the method.
      models: the models to merge; the base may be one of them.
      base: the model from which task vectors are measured.
      parameters: options of the method for all models, by name.
      preset: the table of methods to use if both have one of that name.
      dtype: dtype of the new weights (mergekit computes in it as well).
      out_dtype: dtype of the new weights, if it differs from `dtype`.
      tokenizer_source: the model whose tokenizer is used, or "union" for the base's
        with the tokens of all others. None means the base's and the tokenizer files of
        adapters, and rows of tokens stay in place.
      tokens: the sources of rows of single tokens.
      pad_to_multiple_of: the number of rows is a multiple of it; None allows any.
      chat_template: the new chat template, or the name of one; "auto" means the one
        that most models have.
      layers: the number of layers that the largest stack must have; None allows any.
      after: the wrappers of the merged vector, in order.
      slices: the slices whose layers follow each other, instead of `models`.
      place: the line that states the number of layers, for errors.
    """

    method: str
    models: tuple[Model, ...]
    base: str | None = None
    parameters: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    preset: Preset = "paper"
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokens: tuple[TokenRow, ...] = ()
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    layers: int | None = None
    after: tuple[After, ...] = ()
    slices: tuple[Slice, ...] = ()
    place: str = dataclasses.field(default="", compare=False)

    def as_file(self) -> dict[str, Any]:
        """Returns the content of a YAML file that asks for the same merge."""
        content = {
            "merge_method": self.method,
            "preset": self.preset,
            "base_model": self.base,
            "models": [
                _filled({"model": name, "parameters": _plain(own)})
                for name, own in self.models
            ],
            "slices": [_plain_slice(one) for one in self.slices],
            "parameters": _plain(self.parameters),
            "after": [one.plain for one in self.after],
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            **self._tokenizer(),
            "chat_template": self.chat_template,
        }
        return _filled(content)

    def _tokenizer(self) -> dict[str, Any]:
        if not self.tokens and self.pad_to_multiple_of is None:
            return {"tokenizer_source": self.tokenizer_source}
        tokens = {row.token: _plain_row(row) for row in self.tokens}
        multiple = {"pad_to_multiple_of": self.pad_to_multiple_of}
        block = {"source": self.tokenizer_source, "tokens": tokens, **multiple}
        return {"tokenizer": _filled(block)}


def _plain(parameters):
    return {name: plain(setting) for name, setting in parameters.items()}


def _plain_slice(one):
    sources = [
        _filled({"model": model.name, "parameters": _plain(model.parameters)})
        | {"layer_range": [start, stop]}
        for model, start, stop, _ in one.sources
    ]
    rest = {"base_model": one.base, "parameters": _plain(one.parameters)}
    return _filled({"sources": sources, **rest})


def _plain_row(row):
    of = "token_id" if isinstance(row.of, int) else "token"
    source = {
        "model": row.model,
        "row": {"kind": "model_token", "model": row.model, of: row.of},
        "zero": {"kind": "zero"},
        "default": None,
    }[row.source]
    return _filled({"source": source, "force": row.force})


def _filled(content):
    return {key: value for key, value in content.items() if value}
