"""Checkpoints of one model as trees of leaves in files: a base and task vectors."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from jaxarith import hub, lazy, tree
from jaxarith.hub import Stored, lora, packed
from jaxarith.stream import configs, leaves, policies, tying


class Progress:
    """Counts the bytes that are read, and shows them in a bar for each pass."""

    def __init__(self):
        self.bytes_read, self._bytes_in = 0, 0
        self._bar, self._lock = None, threading.Lock()

    @contextlib.contextmanager
    def shown(self, bytes_in: int, quiet: bool) -> Iterator[None]:
        """Shows passes of this size while the context lasts, unless `quiet`."""
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
    """Checkpoints of one model, none of them read yet.

    Attributes:
      base: by name, the tensors of the base, with the rows that are merged. Without a
        base, those of the first model; its shapes, dtypes and buffers are used.
      taus: the task vectors, trees of `lazy.Leaf`s; the models if there is no base.
      has_base: whether there is a base.
      folders: the folder of `base`, then those of the models and adapters; of a task
        vector its file.
      notes: where the checkpoints differed, and what was done.
      narrowed: names of float64 tensors that are merged in float32, since JAX's float64
        is off (`jax_enable_x64`).
      resized: numbers of rows of the base, with those of the merge where they differ.
      untied: whether head and embedding differ though the base's configuration ties
        them.
      metadata: metadata of the base's weights.
      progress: counts the bytes that are read.
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

    @property
    def params_0(self) -> dict[str, lazy.Leaf]:
        """The base, a tree of leaves; zero if there is none."""
        return self.start(None, None)

    def start(
        self, dtype: DTypeLike | None, place: Callable[[str, jax.Array], None] | None
    ) -> dict[str, lazy.Leaf]:
        """The leaves of the base, from which a merge starts.

        Args:
          dtype: dtype of the merged leaves; None is that of each leaf. Narrower leaves
            are widened, so that the result is rounded once.
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


def open_checkpoint(folder: str | os.PathLike) -> hub.Checkpoint:
    """Finds the tensors of a checkpoint in safetensors that can be merged.

    Raises:
      FileNotFoundError: the folder, its weights or one of the shards does not exist.
      ValueError: a file is corrupt, holds quantised tensors, or is not in safetensors.
    """
    found = hub.open_checkpoint(folder)
    if found.file.name == hub.MSGPACK:
        raise ValueError(
            f"{folder} holds no safetensors. Streams read nothing else: run "
            f"`jaxarith convert {folder} NEW_FOLDER` first."
        )
    packed.check(Path(folder), found.tensors, read_config(folder))
    return found


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`; empty if it has none."""
    exists = (Path(folder) / "config.json").is_file()
    return hub.read_json(folder) if exists else {}


def open_models(
    base: str | os.PathLike | None,
    models: Sequence[str | os.PathLike],
    *,
    vocabulary: policies.Vocabulary = "error",
    missing: policies.Missing = "error",
) -> Opened:
    """Opens checkpoints as a base and its task vectors, without reading them.

    Each is a folder or the id of a model on the Hub with safetensors, in one file or
    several; a folder of a PEFT adapter, on the base; or `model+adapter`. A model may
    also be a file of a task vector of the base, see `hub.open_vector`.

    Args:
      base: the pre-trained checkpoint. None makes the base zero, for methods that merge
        models rather than task vectors.
      models: the fine-tuned checkpoints.
      vocabulary: what to do where numbers of tokens differ, as for `policies.rows`.
      missing: what to do where tensors are missing, as for `policies.fit`.

    Raises:
      FileNotFoundError: a checkpoint or a part of one does not exist.
      ValueError: a file is corrupt, or the checkpoints are not of one model.

    Example:
      >>> opened = open_models("base", ["math", "code"])  # doctest: +SKIP
      >>> tree.cosine(tree.gram(opened.taus))  # doctest: +SKIP
    """
    policies.check(vocabulary, missing, base is not None)
    if not models:
        raise ValueError("there are no models to merge; give at least one.")
    places = [_find(str(model)) for model in models]
    start = places[0].folder if base is None else hub.find(base)
    for model, place in zip(models, places, strict=True):
        if place.vector is not None and base is None:
            raise ValueError(
                f"{model} is a task vector, which needs the base that it moves: give a "
                "base, and a method that merges task vectors."
            )
    if start is None:
        raise ValueError(
            f"{models[0]} is an adapter, which needs a model: give a base, or "
            "model+adapter."
        )
    first = open_checkpoint(start)
    labels = [f"model {i} ({model})" for i, model in enumerate(models)]
    config = read_config(start)
    notes: list[str] = []
    fitted: dict[str, dict[str, Stored]] = {}
    for label, place in zip(labels, places, strict=True):
        fitted[label] = {}
        if place.folder is not None:
            notes += configs.compare(config, read_config(place.folder), label)
            found = open_checkpoint(place.folder).tensors
            fitted[label], more = policies.fit(first.tensors, found, label, missing)
            notes += more
    tensors = first.tensors
    changes, parted, more = _changes(tensors, fitted, places, config, missing)
    notes += more
    untied = parted is not None
    if parted is not None:
        tensors = tying.with_head(tensors, parted)
        fitted = {x: tying.with_head(found, parted) for x, found in fitted.items()}
    elif apart := tying.differ(config, {"the base": tensors, **fitted}):
        untied = True
        notes += [
            f"{x}: {tying.KEY} is true, but its head and embedding differ"
            for x in apart
        ]
    kept, skipped, more = policies.rows(tensors, fitted, vocabulary)
    of_base = {
        name: tensor.rows(kept[name]) if name in kept else tensor
        for name, tensor in tensors.items()
    }
    deltas = [change.deltas for change in changes.values()]
    narrowed = [] if _has_float64() else _double([tensors, *fitted.values(), *deltas])
    if narrowed:
        few = ", ".join(tree.first_few(narrowed, most=3))
        more.append(
            f"{len(narrowed)} tensors ({few}) are float64 and merged in float32; "
            "jax_enable_x64 (JAX_ENABLE_X64=1) merges them in float64"
        )
    progress = Progress()
    source = _sources(progress)
    taus = []
    for label, found in fitted.items():
        change = changes[label]
        changed = {**found, **change.replaced}
        tau = {}
        for name, tensor in of_base.items():
            if name in skipped or not (name in changed or name in change.deltas):
                continue
            of_name = None if base is None else source(tensor, f"{name} of the base")
            tau[name] = leaves.moved(
                source,
                f"{name} of {label}",
                layout=tensor,
                base=of_name,
                model=changed.get(name),
                delta=change.deltas.get(name),
            )
        taus.append(tau)
    return Opened(
        base=of_base,
        taus=taus,
        has_base=base is not None,
        folders=[start, *(x for place in places for x in place if x is not None)],
        notes=(*notes, *more),
        narrowed=tuple(narrowed),
        resized={
            tensors[name].shape[0]: count
            for name, count in kept.items()
            if count != tensors[name].shape[0]
        },
        untied=untied,
        metadata=first.metadata,
        progress=progress,
        _source=source,
    )


def adapted(model: str) -> list[str]:
    """The parts of `model+adapter`, or the one part of another name.

    Raises:
      ValueError: a part is empty.
    """
    if "+" not in model or Path(model).expanduser().exists():
        return [model]
    parts = list(model.rpartition("+")[::2])
    if "" in parts:
        raise ValueError(f"{model!r} must be a model, or `model+adapter`.")
    return parts


class _Place(NamedTuple):
    """Where a model is: its folder, that of an adapter, and a task vector's file.

    A model has the first, the second or both, or the third.
    """

    folder: Path | None = None
    adapter: Path | None = None
    vector: Path | None = None


def _find(model: str) -> _Place:
    if len(parts := adapted(model)) == 2:
        folder, adapter = map(hub.find, parts)
        if not lora.is_adapter(adapter):
            raise ValueError(
                f"{adapter} is no PEFT adapter: it has no {lora.CONFIG}. What follows "
                "the + in `model+adapter` must be one."
            )
        return _Place(folder, adapter)
    if hub.is_vector(model):
        return _Place(vector=Path(model).expanduser())
    folder = hub.find(model)
    return _Place(adapter=folder) if lora.is_adapter(folder) else _Place(folder)


_QUANTISED = re.compile(r"bnb|gptq|awq|fp8|\dbit|int[48]", re.IGNORECASE)


def _changes(
    base: Mapping[str, Stored],
    models: Mapping[str, Mapping[str, Stored]],
    places: Sequence[_Place],
    config: Mapping[str, Any],
    missing: policies.Missing,
) -> tuple[dict[str, lora.Adapter], tying.Pair | None, list[str]]:
    """What adapters and task vectors add to each model or to the base.

    Returns:
      The changes by label, the pair that one of them unties, and notes.
    """
    changes = dict.fromkeys(models, lora.Adapter({}, {}))
    parted, notes = None, []
    tied = None
    if any(place.adapter for place in places):
        tied = tying.pair(base, config)
    for (label, found), place in zip(models.items(), places, strict=True):
        if place.vector is not None:
            changes[label], more = _vector(place.vector, base, label, missing)
            notes += more
        if place.adapter is None:
            continue
        under = base if place.folder is None else found
        changes[label], parts, more = _adapter(place.adapter, under, tied, label)
        notes += more
        if parts and tied is not None:
            tying.check_untied(config, label)
            notes.append(f"{label} moves {tied.embedding} and {tied.head} apart")
            parted = tied
    return changes, parted, notes


def _vector(
    file: Path, base: Mapping[str, Stored], label: str, missing: policies.Missing
) -> tuple[lora.Adapter, list[str]]:
    """What the task vector in a file adds to the base, and notes."""
    vector = hub.open_vector(file)
    method = "" if vector.method is None else f" by the method {vector.method}"
    deltas, notes = policies.fit_vector(base, vector.tensors, label, missing)
    return lora.Adapter(deltas, {}), [
        f"{label}: the task vector of {vector.task}{method}",
        *notes,
    ]


def _adapter(
    folder: Path, base: Mapping[str, Stored], tied: tying.Pair | None, label: str
) -> tuple[lora.Adapter, bool, list[str]]:
    """What an adapter does to a base, whether it unties the head, and notes."""
    config = hub.read_json(folder, lora.CONFIG)
    trained_on = str(config.get("base_model_name_or_path"))
    quantised = _QUANTISED.search(Path(trained_on).name) or (
        Path(trained_on).is_dir() and packed.stated_format(read_config(trained_on))
    )
    notes = [f"{label}: trained on {trained_on}, which is quantised"] * bool(quantised)
    if tied is None or tied.embedding not in base:
        change = lora.read_adapter(folder, base)
        return change, False, [*notes, *change.notes]
    change = lora.read_adapter(folder, {tied.head: base[tied.embedding], **base})
    notes += change.notes
    ensured = bool(config.get("ensure_weight_tying"))
    change, untied = tying.apply(change, tied, ensured)
    if not untied:
        change = tying.spread(change, tied, base, label)
    if not untied and (tied.embedding in change.deltas):
        notes.append(
            f"{label}: {tied.embedding} and {tied.head} are one tied matrix, which its "
            "factors move, as in PEFT's merge_and_unload"
        )
    return change, untied, notes


def _sources(progress: Progress) -> Callable[[Stored, str], lazy.Source]:
    """A function that returns the one source of a tensor."""

    @functools.cache
    def source(tensor: Stored, label: str) -> lazy.Source:
        load = functools.partial(_loaded, progress, tensor, label)
        return lazy.Source(label, tensor.nbytes, load)

    return source


def _loaded(progress: Progress, tensor: Stored, label: str) -> jax.Array | np.ndarray:
    """The values; those of small tensors stay in NumPy until a program takes them."""
    numbers = tensor.read()
    if numbers.dtype == np.float64 and not _has_float64():
        numbers = _narrowed(numbers, label)
    progress.add(tensor.nbytes)
    if tensor.nbytes < lazy.SMALL:
        return numbers
    return jax.device_put(numbers, may_alias=True)


def _double(found: Iterable[Mapping[str, Stored]]) -> list[str]:
    """The names of float64 tensors."""
    return sorted(
        {n for tensors in found for n, x in tensors.items() if x.dtype == np.float64}
    )


def _has_float64():
    return jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def _narrowed(numbers, label):
    with np.errstate(over="ignore"):
        array = numbers.astype(np.float32)
    if np.isfinite(numbers).all() and not np.isfinite(array).all():
        raise ValueError(
            f"{label} has float64 numbers that are beyond float32. Enable "
            "jax_enable_x64 (JAX_ENABLE_X64=1)."
        )
    return array
