"""Opens checkpoints of one model as a base and task vectors with leaves in files."""

import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from jaxarith import lazy, tree
from jaxarith.hub import Stored, lora
from jaxarith.stream import configs, inputs, leaves, policies, tying
from jaxarith.stream.inputs import open_checkpoint, read_config
from jaxarith.stream.rerowed import Rerowing, rerowed


class Progress:
    """Counts the bytes that are read, and shows a progress bar for each pass."""

    def __init__(self):
        self.bytes_read, self._bytes_in = 0, 0
        self._bar, self._lock = None, threading.Lock()

    @contextlib.contextmanager
    def shown(self, bytes_in: int, quiet: bool) -> Iterator[None]:
        """Shows passes of this many bytes inside a `with` block, unless `quiet`."""
        self.bytes_read, self._bytes_in = 0, max(bytes_in, 1)
        self._bar = None if quiet else self._next(1)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
            self._bar = None

    def add(self, count: int) -> None:
        """Counts bytes that a thread has read."""
        with self._lock:
            self.bytes_read += count
            if self._bar is None:
                return
            if self._bar.n >= self._bytes_in:
                self._bar.close()
                self._bar = self._next(math.ceil(self.bytes_read / self._bytes_in))
            self._bar.update(count)

    def _next(self, number):
        return tqdm(
            total=self._bytes_in, desc=f"pass {number}", unit="B", unit_scale=True
        )


@dataclasses.dataclass(frozen=True)
class Opened:
    """Checkpoints of one model that are not read yet.

    Attributes:
      base: the tensors of the base by name, with the rows that are merged. Without a
        base these are the first model's, for their shapes, dtypes and buffers.
      taus: the task vectors, trees of `lazy.Leaf`s; the models if there is no base.
      has_base: whether there is a base.
      folders: the folder of `base`, then those of the models and adapters, and the
        files of task vectors.
      notes: how the checkpoints differed, and what was done.
      narrowed: names of float64 tensors that are merged in float32, since JAX's float64
        is off (`jax_enable_x64`).
      resized: `{rows of the base: rows of the merge}` where the two differ.
      untied: whether head and embedding differ although the base's configuration ties
        them.
      metadata: metadata of the base's weights.
      progress: counts the bytes that are read.
      config: the content of the new `config.json`, before dtypes and rows are changed;
        None means the `config.json` of the first folder.
      slices: the depth of each tensor, for each slice; empty for whole models.
    """

    base: dict[str, Stored]
    taus: list[dict[str, lazy.Leaf]]
    has_base: bool
    folders: list[Path]
    notes: tuple[str, ...]
    narrowed: tuple[str, ...]
    resized: dict[int, int]
    untied: bool
    metadata: dict[str, str]
    progress: Progress
    _source: Callable[[Stored, str], lazy.Source]
    config: dict[str, Any] | None = None
    slices: tuple[dict[str, float], ...] = ()

    @property
    def params_0(self) -> dict[str, lazy.Leaf]:
        """Returns the base, a tree of leaves; zero if there is none."""
        return self.start(None, None)

    def start(
        self, dtype: DTypeLike | None, place: Callable[[str, jax.Array], None] | None
    ) -> dict[str, lazy.Leaf]:
        """Returns the leaves of the base, from which a merge starts.

        Args:
          dtype: dtype of the merged leaves; None keeps that of each leaf. Narrower
            leaves are widened, so that the result is rounded only once.
          place: `place(name, merged)` writes a merged leaf.
        """
        return {
            name: self._start_leaf(name, tensor, dtype, place)
            for name, tensor in self.base.items()
        }

    def _start_leaf(self, name, tensor, dtype, place):
        dtypes = [tensor.dtype]
        if dtype is not None and tensor.is_floating:
            dtypes.append(jnp.dtype(dtype))
        wide = leaves.common_dtype(*dtypes)
        go = None if place is None else functools.partial(place, name)
        if self.has_base:
            sources = (self._source(tensor, f"{name} of the base"),)
            as_wide = functools.partial(leaves.widened, wide)
            return lazy.Leaf(tensor.shape, wide, sources, as_wide, go)
        zeros = functools.partial(jnp.zeros, tensor.shape, wide)
        return lazy.Leaf(tensor.shape, wide, (), zeros, go)


def open_models(
    base: str | os.PathLike | None,
    models: Sequence[str | os.PathLike],
    *,
    vocabulary: policies.Vocabulary = "error",
    missing: policies.Missing = "error",
    rerowing: Rerowing | None = None,
    dequantize: DTypeLike | None = None,
) -> Opened:
    """Opens checkpoints as a base and its task vectors, without reading them.

    A checkpoint may be given as a folder or as the id of a model on the Hub, with its
    weights in one file or several; as a single file of weights; as the folder of a PEFT
    adapter, which is added to the base; or as `model+adapter`. A model may also be a
    file with a task vector of the base, see `hub.open_vector`.

    Args:
      base: the pre-trained checkpoint. None makes the base zero, for methods that merge
        models rather than task vectors.
      models: the fine-tuned checkpoints.
      vocabulary: what to do if numbers of tokens differ, as for `policies.rows`.
      missing: what to do if tensors are missing, as for `policies.fit`.
      rerowing: the sources of rows of embeddings and heads, under the names that `base`
        and `models` have here; None leaves all rows in place.
      dequantize: dtype in which packed (quantised) weights are read, for example
        `"bfloat16"`; None refuses them.

    Raises:
      FileNotFoundError: a checkpoint or a part of one does not exist.
      ValueError: a file is corrupt, or the checkpoints do not belong to one model.

    Example:
      >>> opened = open_models("base", ["math", "code"])  # doctest: +SKIP
      >>> tree.cosine(tree.gram(opened.taus))  # doctest: +SKIP
    """
    policies.check(vocabulary, missing, base is not None)
    if not models:
        raise ValueError("there are no models to merge. Give at least one.")
    places = [inputs.find(str(model)) for model in models]
    start = places[0].folder if base is None else inputs.find_base(base)
    for model, place in zip(models, places, strict=True):
        if place.vector is not None and base is None:
            raise ValueError(
                f"{model} is a task vector, which moves a base. Give a base, and a "
                "method that merges task vectors."
            )
    if start is None:
        raise ValueError(
            f"{models[0]} is an adapter, which needs a model. Give a base, or "
            "model+adapter."
        )
    first = open_checkpoint(start, dequantize)
    labels = [f"model {i} ({model})" for i, model in enumerate(models)]
    config = read_config(start)
    notes = [*first.notes]
    fitted: dict[str, dict[str, Stored]] = {}
    were_packed: dict[str, bool] = {}
    for name, label, place in zip(map(str, models), labels, places, strict=True):
        fitted[label] = {}
        if place.folder is not None:
            notes += configs.compare(config, read_config(place.folder), label)
            found = open_checkpoint(place.folder, dequantize)
            ours, more = policies.fit(first.tensors, found.tensors, label, missing)
            fitted[label] = ours
            were_packed[label] = bool(found.notes)
            notes += [*found.notes, *more]
        if place.adapter is not None:
            [on, *own] = inputs.adapted(name)
            if not own:
                on = inputs.adapted(str(models[0]))[0] if base is None else str(base)
            notes += inputs.trained_elsewhere(place.adapter, on, label)
    if base is not None:
        notes += inputs.rounding_notes(bool(first.notes), were_packed)
    tensors = first.tensors
    changes, parted, more = inputs.changes_of(tensors, fitted, places, config, missing)
    notes += more
    untied = parted is not None
    if parted is not None:
        tensors = tying.with_head(tensors, parted)
        fitted = {x: tying.with_head(found, parted) for x, found in fitted.items()}
    elif apart := tying.differ(config, {"the base": tensors, **fitted}):
        untied = True
        notes += [
            f"{x}: {tying.KEY} is true, but its head and its embedding differ"
            for x in apart
        ]
    rows = {}
    if rerowing is not None:
        key = str(models[0] if base is None else base)
        called = dict(zip(labels, map(str, models), strict=True))
        rows = {rerowing.rows[key]: rerowing.count}
        tensors, fitted, changes = rerowed(
            rerowing, key, tensors, fitted, changes, called
        )
    kept, skipped, more = policies.rows(tensors, fitted, vocabulary)
    rows |= {tensors[name].shape[0]: count for name, count in kept.items()}
    of_base = {
        name: tensor.rows(kept[name]) if name in kept else tensor
        for name, tensor in tensors.items()
    }
    deltas = [change.deltas for change in changes.values()]
    double, of_double = narrowed([tensors, *fitted.values(), *deltas])
    more += of_double
    progress = Progress()
    source = sources(progress)
    taus = task_vectors(of_base, fitted, changes, source, base is not None)
    for tau in taus:
        for name in skipped & tau.keys():
            del tau[name]
    return Opened(
        base=of_base,
        taus=taus,
        has_base=base is not None,
        folders=[start, *(x for place in places for x in place if x is not None)],
        notes=tuple(dict.fromkeys((*notes, *more))),
        narrowed=tuple(double),
        resized={old: new for old, new in rows.items() if old != new},
        untied=untied,
        metadata=first.metadata,
        progress=progress,
        _source=source,
    )


def task_vectors(
    of_base: Mapping[str, Stored],
    fitted: Mapping[str, Mapping[str, Stored]],
    changes: Mapping[str, lora.Adapter],
    source: Callable[[Stored, str], lazy.Source],
    has_base: bool,
) -> list[dict[str, lazy.Leaf]]:
    """Returns the leaves of all task vectors, or of the models if there is no base.

    Args:
      of_base: the tensors of the base by name, with the rows that are merged.
      fitted: the tensors of each model by the base's names; the models by label.
      changes: what an adapter or a task vector adds, by label.
      source: `source(tensor, label)` returns the one source of a tensor.
      has_base: whether there is a base.
    """
    taus = []
    for label, found in fitted.items():
        change = changes[label]
        changed = {**found, **change.replaced}
        tau = {}
        for name, tensor in of_base.items():
            if not (name in changed or name in change.deltas):
                continue
            of_name = source(tensor, f"{name} of the base") if has_base else None
            tau[name] = leaves.moved(
                source,
                f"{name} of {label}",
                layout=tensor,
                base=of_name,
                model=changed.get(name),
                delta=change.deltas.get(name),
            )
        taus.append(tau)
    return taus


def sources(progress: Progress) -> Callable[[Stored, str], lazy.Source]:
    """Returns a function that returns the one source of a tensor."""

    @functools.cache
    def source(tensor: Stored, label: str) -> lazy.Source:
        load = functools.partial(_loaded, progress, tensor, label)
        return lazy.Source(label, tensor.nbytes, load)

    return source


def _loaded(progress: Progress, tensor: Stored, label: str) -> jax.Array | np.ndarray:
    """Reads the values; small tensors stay in NumPy until a program takes them."""
    numbers = tensor.read()
    if numbers.dtype == np.float64 and not _has_float64():
        numbers = _in_float32(numbers, label)
    progress.add(tensor.nbytes)
    if tensor.nbytes < lazy.SMALL:
        return numbers
    return jax.device_put(numbers, may_alias=True)


def narrowed(
    found: Iterable[Mapping[str, Stored]],
) -> tuple[list[str], list[str]]:
    """Returns names of float64 tensors that are merged in float32, and a note."""
    names = sorted(
        {n for tensors in found for n, x in tensors.items() if x.dtype == np.float64}
    )
    if _has_float64() or not names:
        return [], []
    few = ", ".join(tree.first_few(names, most=3))
    are = tree.counted(len(names), f"tensor ({few}) is", f"tensors ({few}) are")
    note = (
        f"{are} float64 and merged in float32; enable jax_enable_x64 "
        "(JAX_ENABLE_X64=1) to merge in float64"
    )
    return names, [note]


def _has_float64():
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def _in_float32(numbers, label):
    with np.errstate(over="ignore"):
        array = numbers.astype(np.float32)
    if np.isfinite(numbers).all() and not np.isfinite(array).all():
        raise ValueError(
            f"{label} has float64 numbers that are too large for float32. Enable "
            "jax_enable_x64 (JAX_ENABLE_X64=1)."
        )
    return array
