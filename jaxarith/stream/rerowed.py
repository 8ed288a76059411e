"""Embeddings and heads whose rows are brought to another vocabulary.

Models that were given tokens of their own have rows in other orders, and rows that
others lack. Before such models are merged, each one gets a row for every token of one
vocabulary. Rows are gathered when a tensor is read, from one model after the other.
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
    """Where the rows of every model come from.

    Attributes:
      count: the number of rows, of tokens and of padding.
      words: the number of tokens; rows beyond are the mean of all of a model's own.
      rows: by model, the number of rows that it has.
      own: by model, for each token the row of it in the model; -1 where that lacks it.
      fills: by the row of a token that models lack, the rows of models whose mean
        they get; zero where there are none.
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
        """All models with the new rows.

        Args:
          found: by model, its tensors by the base's names.
          changes: by model, what an adapter or a task vector does to them. What it
            does to rows of tokens becomes part of the tensor, in float32.

        Raises:
          ValueError: a model lacks the tensor that has another one's rows, or their
            rows are of other lengths; a head has other rows than the embedding.
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
            return tensor  # as it is in its file
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
                    f"which has {_shown(of_donor[donor])}: rows of one length are "
                    "needed."
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
    """A base and models with new rows: the tensors, those of models, their changes.

    Args:
      new: where rows come from.
      base: the model whose tensors are the base's.
      tensors: the tensors of the base.
      fitted: by label, those of the models by the base's names. An adapter or a task
        vector alone has none; it moves the base.
      changes: by label, what adapters and task vectors do.
      names: by label, the model.
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
            f"{head} of {model} has {tensors[head].shape[0]} rows and its embedding "
            f"{rows}, so its rows cannot follow tokens. Leave the tokenizer out."
        )


def _has_rows(name, tensor, rows):
    of_tokens = policies.may_be_tied(name) and tensor.is_floating
    return of_tokens and tensor.shape[:1] == (rows,)


def _moved(
    tensors: Mapping[str, Stored], change: Adapter | None, rows: int
) -> dict[str, Stored]:
    """The tensors, of which those of tokens have the change in them."""
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
