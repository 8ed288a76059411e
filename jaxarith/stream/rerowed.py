"""Changes the rows of embeddings and heads to another vocabulary.

Models with added tokens have rows in different orders, and rows that other models lack.
Before such models are merged, each one gets a row for every token of one vocabulary.
Rows are collected when a tensor is read, from one model after the other.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxarith.hub import Stored
from jaxarith.hub.lora import Adapter
from jaxarith.stream import policies, tying


@dataclasses.dataclass(frozen=True)
class Rerowing:
    """The sources of the new rows of every model.

    Attributes:
      count: the new number of rows, for tokens and for padding.
      words: the number of tokens. Rows beyond it are the mean of a model's own rows.
      rows: the number of rows that each model has, by model.
      own: for each model, the row of each token in that model; -1 if it lacks the
        token.
      fills: for the row of a token that models lack, the rows of other models. The
        missing row becomes their mean, or zero if there are none.
    """

    count: int
    words: int
    rows: Mapping[str, int]
    own: Mapping[str, np.ndarray]
    fills: Mapping[int, Sequence[tuple[str, int]]]

    def apply(
        self,
        found: Mapping[str, Mapping[str, Stored]],
        changes: Mapping[str, Adapter],
    ) -> tuple[dict[str, dict[str, Stored]], dict[str, Adapter]]:
        """Returns all models with the new rows.

        Args:
          found: the tensors of each model, by the base's names.
          changes: what an adapter or a task vector does to each model. Its changes to
            rows of tokens become part of the tensor, in float32.

        Raises:
          ValueError: a model needs rows from another model that lacks the tensor or has
            rows of another length; or a head has other rows than its embedding.
        """
        for model, tensors in found.items():
            _check_head(model, tensors, self.rows[model])
        moved = {
            model: _moved(tensors, changes.get(model), self.rows[model])
            for model, tensors in found.items()
        }
        new = {
            model: {
                name: self._rerowed(model, name, moved)
                if _has_rows(name, tensor, self.rows[model])
                else tensor
                for name, tensor in tensors.items()
            }
            for model, tensors in moved.items()
        }
        rest = {
            model: _without(changes[model], tensors, self.rows[model])
            for model, tensors in found.items()
            if model in changes
        }
        return new, rest

    def _rerowed(self, model, name, moved):
        tensor = moved[model][name]
        own = self.own[model]
        if np.array_equal(own, np.arange(self.count)) and len(own) == tensor.shape[0]:
            return tensor  # unchanged, as in its file
        lacking = np.flatnonzero(own < 0)
        donors = {}
        for row in lacking:
            for donor, theirs in self.fills.get(int(row), ()):
                donors.setdefault(donor, []).append((int(row), theirs))
        of_donor = {}
        for donor in donors:
            of_donor[donor] = moved[donor].get(name)
            if of_donor[donor] is None or of_donor[donor].shape[1:] != tensor.shape[1:]:
                raise ValueError(
                    f"{name} of {model} {list(tensor.shape)} needs rows of {donor}, "
                    f"which has {_shown(of_donor[donor])}. Their rows must have the "
                    "same length: merge models of one size."
                )
        make = functools.partial(self._made, tensor, own, donors, of_donor)
        return Stored.made(tensor.dtype, (self.count, *tensor.shape[1:]), make)

    def _made(self, tensor, own, donors, of_donor):
        out = np.zeros((self.count, *tensor.shape[1:]), tensor.dtype)
        have = np.flatnonzero(own >= 0)
        out[have] = tensor.read()[own[have]]
        wide = np.float64 if tensor.dtype == np.float64 else np.float32
        lacking = np.flatnonzero(own < 0)
        place = {int(row): i for i, row in enumerate(lacking)}
        sums = np.zeros((len(lacking), *tensor.shape[1:]), wide)
        counts = np.zeros(len(lacking), wide)
        for donor, pairs in donors.items():
            rows, theirs = np.array(pairs).T
            at = [place[int(row)] for row in rows]
            sums[at] += of_donor[donor].read()[theirs].astype(wide)
            counts[at] += 1
        shape = (-1, *[1] * (len(tensor.shape) - 1))
        out[lacking] = (sums / np.maximum(counts, 1).reshape(shape)).astype(out.dtype)
        if self.count > self.words:
            mean = np.mean(out[: self.words], axis=0, dtype=wide)
            out[self.words :] = mean.astype(out.dtype)
        return out


def rerowed(
    new: Rerowing,
    base: str,
    tensors: Mapping[str, Stored],
    fitted: Mapping[str, Mapping[str, Stored]],
    changes: Mapping[str, Adapter],
    names: Mapping[str, str],
) -> tuple[dict[str, Stored], dict[str, dict[str, Stored]], dict[str, Adapter]]:
    """Returns the base's tensors, the models' tensors and the changes with new rows.

    Args:
      new: the sources of the rows.
      base: the model whose tensors are the base's.
      tensors: the tensors of the base.
      fitted: the tensors of each model by the base's names; the models by label. An
        adapter or a task vector alone has none, because it moves the base.
      changes: what adapters and task vectors do, by label.
      names: the models by label.
    """
    whole = {base: tensors}
    whole |= {names[x]: found or tensors for x, found in fitted.items()}
    moving = {names[x]: change for x, change in changes.items()}
    found, rest = new.apply(whole, moving)
    of_models = {}
    for label, theirs in fitted.items():
        ours, change = found[names[label]], changes[label]
        moved = theirs or [*change.deltas, *change.replaced]
        stay = rest[names[label]].deltas.keys() | rest[names[label]].replaced.keys()
        of_models[label] = {
            n: ours[n] for n in moved if n in ours and (theirs or n not in stay)
        }
    return (
        {**tensors, **found[base]},
        of_models,
        {label: rest[names[label]] for label in fitted},
    )


def _check_head(model: str, tensors: Mapping[str, Stored], rows: int) -> None:
    head = tying.head(tensors)
    if head is None or not policies.may_be_tied(head):
        return
    if len(tensors[head].shape) == 2 and tensors[head].shape[0] != rows:
        raise ValueError(
            f"{head} of {model} has {tensors[head].shape[0]} rows, but its embedding "
            f"has {rows}, so its rows cannot be matched to tokens. Leave the tokenizer "
            "out."
        )


def _has_rows(name, tensor, rows):
    of_tokens = policies.may_be_tied(name) and tensor.is_floating
    return of_tokens and tensor.shape[:1] == (rows,)


def _moved(
    tensors: Mapping[str, Stored], change: Adapter | None, rows: int
) -> dict[str, Stored]:
    """Returns the tensors; those with rows for tokens contain the change."""
    if change is None:
        return dict(tensors)
    result = {**tensors}
    for name, tensor in tensors.items():
        if not _has_rows(name, tensor, rows):
            continue
        whole = change.replaced.get(name, tensor)
        if (delta := change.deltas.get(name)) is not None:
            add = functools.partial(_sum, whole, delta)
            whole = Stored.made(np.float32, whole.shape, add)
        result[name] = whole
    return result


def _sum(tensor, delta):
    return tensor.read().astype(np.float32) + delta.read()


def _without(change, tensors, rows):
    def rest(found):
        return {
            name: x
            for name, x in found.items()
            if name not in tensors or not _has_rows(name, tensors[name], rows)
        }

    return change._replace(deltas=rest(change.deltas), replaced=rest(change.replaced))


def _shown(tensor):
    return "no such tensor" if tensor is None else str(list(tensor.shape))
