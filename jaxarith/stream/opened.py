"""Checkpoints of one model as trees of leaves in files: a base and task vectors."""

import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxarith import hub, lazy
from jaxarith.hub import layouts, lora
from jaxarith.hub.safetensors import Tensor, open_file
from jaxarith.stream import policies

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


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

    def add(self, count: int):
        """Counts bytes that some thread has read."""
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
      base: by name, the tensors of the base as far as they are merged. Without a base,
        those of the first model, of which shapes, types and buffers are taken.
      taus: the task vectors, trees of `lazy.Leaf`s; the models if there is no base.
      has_base: whether there is one.
      folders: of `base`, and then of the models and adapters.
      notes: where the checkpoints differed, and what was done.
      metadata: of the base's weights.
      progress: counts what is read.
    """

    base: dict[str, Tensor]
    taus: list[dict[str, lazy.Leaf]]
    has_base: bool
    folders: list[Path]
    notes: list[str]
    metadata: dict[str, str]
    progress: Progress
    _source: Callable[[Tensor, str], lazy.Source]

    @property
    def params_0(self) -> dict[str, lazy.Leaf]:
        """The base, a tree of leaves; zero if there is none."""
        return self.start(None, None)

    def start(self, dtype, place: Callable | None) -> dict[str, lazy.Leaf]:
        """The leaves of the base, for results of a type that go to a place.

        Args:
          dtype: of the result; None is that of each leaf. Leaves that are narrower are
            widened, so that the result is rounded once.
          place: `place(name, merged)` of a merged leaf.
        """
        return {
            name: self._start_leaf(name, tensor, dtype, place)
            for name, tensor in self.base.items()
        }

    def _start_leaf(self, name, tensor, dtype, place):
        wide = tensor.dtype
        if dtype is not None and policies.is_floating(tensor):
            wide = jnp.promote_types(wide, dtype)
        wide = jax.dtypes.canonicalize_dtype(wide)  # JAX may have no float64
        go = None if place is None else functools.partial(place, name)
        if self.has_base:
            sources = (self._source(tensor, f"{name} of the base"),)
            as_wide = functools.partial(jnp.asarray, dtype=wide)
            return lazy.Leaf(tensor.shape, wide, sources, as_wide, go)
        zeros = functools.partial(jnp.zeros, tensor.shape, wide)
        return lazy.Leaf(tensor.shape, wide, (), zeros, go)


def open_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint in safetensors, by name, and the files' metadata.

    Raises:
      FileNotFoundError: the folder, the weights or a shard is not there.
      ValueError: a file is corrupt, or tensors that an index names are missing.
    """
    folder = Path(folder)
    if (file := folder / _WEIGHTS).is_file():
        return open_file(file)
    if not (index := folder / _INDEX).is_file():
        hub.names(folder)  # which says what is missing
        raise ValueError(
            f"{folder} holds no safetensors. Streams read nothing else: run "
            f"`jaxarith convert {folder} NEW_FOLDER` first."
        )
    file_of = hub.shards(index)
    files = {path: open_file(path) for path in sorted(set(file_of.values()))}
    absent = [name for name, path in file_of.items() if name not in files[path][0]]
    if absent:
        raise ValueError(
            f"{index} names {len(absent)} tensors that are not in their shards, such "
            f"as {absent[0]!r}. The shards are of another model: download them again."
        )
    tensors = {}
    for content, _ in files.values():
        tensors |= content
    tensors |= {name: files[path][0][name] for name, path in file_of.items()}
    return tensors, next(iter(files.values()))[1]


def open_models(
    base: str | os.PathLike | None,
    models: Sequence[str | os.PathLike],
    *,
    vocabulary: policies.Vocabulary = "error",
    missing: policies.Missing = "error",
) -> Opened:
    """Opens checkpoints as a base and its task vectors, without reading them.

    Each is a folder or the id of a model on the Hub with safetensors, in one file or
    several; a folder of a PEFT adapter, on the base; or `model+adapter`.

    Args:
      base: the pre-trained checkpoint. None gives zero as the base, for methods that
        merge models rather than task vectors.
      models: the fine-tuned checkpoints.
      vocabulary: what to do where numbers of tokens differ, as for `policies.rows`.
      missing: what to do where tensors are missing, as for `policies.fit`.

    Raises:
      FileNotFoundError: a checkpoint or a part of one is not there.
      ValueError: a file is corrupt, or the checkpoints are not of one model.

    Example:
      >>> opened = open_models("base", ["math", "code"])  # doctest: +SKIP
      >>> tree.cosine(tree.gram(opened.taus))  # doctest: +SKIP
    """
    policies.check(vocabulary, missing, base is not None)
    if not models:
        raise ValueError("there are no models to merge; give at least one.")
    places = [_find(str(model)) for model in models]
    start = places[0][0] if base is None else hub.find(base)
    if start is None:
        raise ValueError(
            f"{models[0]} is an adapter, which needs a model: give a base, or "
            "model+adapter."
        )
    tensors, metadata = open_checkpoint(start)
    labels = [f"model {i} ({model})" for i, model in enumerate(models)]
    notes, fitted = [], {}
    for label, (folder, _) in zip(labels, places, strict=True):
        found = {}
        if folder is not None:
            found = open_checkpoint(folder)[0]
            found, more = policies.fit(tensors, found, label, missing)
            notes += more
        fitted[label] = found
    kept, skipped, more = policies.rows(tensors, fitted, vocabulary)
    of_base = {
        name: tensor.rows(kept.get(name, tensor.shape[0])) if tensor.shape else tensor
        for name, tensor in tensors.items()
    }
    progress = Progress()
    source = _sources(progress)

    def base_of(name):
        if base is not None:
            return source(of_base[name], f"{name} of the base")

    taus = []
    for (label, found), (folder, adapter) in zip(fitted.items(), places, strict=True):
        read = lora.Adapter({}, {})
        if adapter is not None:
            under = tensors if folder is None else found
            known = {name: _stored(tensor) for name, tensor in under.items()}
            read = lora.read_adapter(adapter, known)
        changed = {**found, **read.replaced}
        names = [name for name in of_base if name in changed or name in read.deltas]
        taus.append(
            {
                name: _move(
                    *(source, f"{name} of {label}", of_base[name], base_of(name)),
                    *(changed.get(name), read.deltas.get(name)),
                )
                for name in names
                if name not in skipped
            }
        )
    folders = [start, *(x for place in places for x in place if x is not None)]
    return Opened(
        *(of_base, taus, base is not None, folders, notes + more, metadata),
        *(progress, source),
    )


def adapted(model: str) -> list[str]:
    """The parts of `model+adapter`, or the one part of another name.

    Raises:
      ValueError: a part is empty.
    """
    if "+" not in model or Path(model).expanduser().is_dir():
        return [model]
    parts = list(model.rpartition("+")[::2])
    if "" in parts:
        raise ValueError(f"{model!r} must be a model, or `model+adapter`.")
    return parts


def _find(model: str) -> tuple[Path | None, Path | None]:
    """The folders of a model and of an adapter, of which one may be missing."""
    if len(parts := adapted(model)) == 2:
        folder, adapter = map(hub.find, parts)
        if not lora.is_adapter(adapter):
            raise ValueError(
                f"{adapter} is no PEFT adapter: it has no {lora.CONFIG}. What follows "
                "the + in `model+adapter` must be one."
            )
        return folder, adapter
    folder = hub.find(model)
    return (None, folder) if lora.is_adapter(folder) else (folder, None)


def _stored(tensor: Tensor) -> layouts.Stored:
    return layouts.Stored(layouts.short(tensor.dtype), tensor.shape, tensor.read)


def _sources(progress):
    """A function that gives the one source of a tensor in a file."""

    @functools.cache
    def of_tensor(tensor, label):
        def load():
            array = jax.device_put(tensor.read(), may_alias=True)
            progress.add(tensor.nbytes)
            return array

        return lazy.Source(label, tensor.nbytes, load)

    def of_stored(stored, label):
        size = 4 * math.prod(stored.shape)
        return lazy.Source(label, size, lambda: jnp.asarray(stored.read()))

    def source(tensor, label):
        make = of_tensor if isinstance(tensor, Tensor) else of_stored
        return make(tensor, label)

    return source


def _move(source, label, layout, base, model, delta) -> lazy.Leaf:
    """A leaf of a task vector: `model + delta - base`, of what there is."""
    shape = layout.shape
    wide = jnp.float32
    found: dict[str, lazy.Source] = {}
    if model is not None:
        if isinstance(model, Tensor) and model.shape != shape:
            model = model.rows(min(model.shape[0], shape[0]))
        found["model"] = source(model, label)
        wide = jnp.promote_types(wide, _dtype(model))
    if base is not None:
        wide = jnp.promote_types(wide, layout.dtype)
        if model is not None:
            found["base"] = base
    if delta is not None:
        found["delta"] = source(delta, f"the adapter of {label}")
    elif base is None:
        wide = _dtype(model)
    combine = functools.partial(_combine, tuple(found), shape)
    wide = jax.dtypes.canonicalize_dtype(wide)
    return lazy.Leaf(shape, wide, found.values(), combine)


def _dtype(tensor):
    if isinstance(tensor, Tensor):
        return tensor.dtype
    types = {"bf16": jnp.bfloat16, "f16": "f2", "f32": "f4", "f64": "f8"}
    return np.dtype(types[tensor.dtype])


def _combine(names: Sequence[str], shape: tuple[int, ...], *arrays: jax.Array):
    found: Mapping[str, jax.Array] = dict(zip(names, arrays, strict=True))
    model, base, delta = (found.get(name) for name in ("model", "base", "delta"))
    if delta is not None:
        delta = jnp.asarray(delta, jnp.float32)[: shape[0]] if shape else delta
    if model is None:
        return delta
    if model.shape != shape:  # rows that the model lacks do not move
        model = jnp.concatenate([model, base[len(model) :]])
    moved = model if base is None else lazy.Difference(model, base)
    return moved if delta is None else jnp.asarray(moved, jnp.float32) + delta
