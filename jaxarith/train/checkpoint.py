"""Checkpoints of a training run: asynchronous, atomic, and checked on reading.

A run has one folder. In it, `step_00000120` holds `state`, which Orbax writes, and a
manifest. The manifest has the configuration of the run, and the shape, dtype and
fingerprint of each leaf. A folder without a manifest was left by a killed process.

In a run of several processes, all of them make the same calls on a shared file system.
Only process 0 writes manifests and removes files.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxarith import fingerprint, tree
from jaxarith.sharding import processes
from jaxarith.train import manifest
from jaxarith.typing import Tree


class Restored(NamedTuple):
    """A state that was read from a checkpoint.

    Attributes:
      step: number of optimizer steps done.
      state: the state.
      ended: whether the run ended at this step, before its last step.
    """

    step: int
    state: Tree
    ended: bool


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: folder of the checkpoints; it is created.
      config: everything that the run depends on, as plain JSON data. A function that
        returns it is called only if there is a checkpoint to compare or save.
      keep: number of checkpoints to keep. One more is on disk while it is written.

    Raises:
      OSError: the folder can't be written to.
      ValueError: the folder has checkpoints of another configuration; the message names
        the fields.

    Example:
      >>> state = {"w": jnp.arange(3.0)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder, {"steps": 2}) as checkpoints:
      ...         checkpoints.save(1, state)
      ...         checkpoints.restore(state)
      Restored(step=1, state={'w': Array([0., 1., 2.], dtype=float32)}, ended=False)
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        config: Mapping | Callable[[], Mapping],
        *,
        keep: int = 2,
    ):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint is kept.")
        self.folder, self.keep = Path(folder).absolute(), keep
        self._given = config
        processes.on_first(self._prepare)
        self._steps, self._damaged = list(filter(self._complete, self._on_disk())), []
        self._check_config()
        processes.on_first(self._clean)
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None

    @functools.cached_property
    def _config(self):
        config = self._given() if callable(self._given) else self._given
        return json.loads(json.dumps(config, allow_nan=False))

    def _prepare(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(b"written")
        except OSError as error:
            raise OSError(
                f"checkpoints can't be written to {self.folder}: {error}. Name another "
                "folder."
            ) from error

    def _clean(self):
        """Removes what a killed process left, and no files of other programs."""
        for step in self._on_disk():
            path = self._path(step)
            if not (path.is_symlink() or self._complete(step)):
                _remove(path)

    def _check_config(self):
        for step in reversed(self._steps):
            content = _content(self._path(step))
            if content and content["config"] != self._config:
                lines = manifest.differences(content["config"], self._config)
                raise ValueError(
                    f"{self._path(step)} is from a run with another configuration:\n  "
                    + "\n  ".join(lines)
                    + "\nName another folder, or remove this one to start anew."
                )

    def _path(self, step):
        return self.folder / f"step_{step:08d}"

    def _on_disk(self):
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(x[5:]) for x in names if re.fullmatch(r"step_\d{8,}", x))

    def _complete(self, step):
        return (self._path(step) / manifest.NAME).exists()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if error is None:
                self.wait()
            elif self._pending and (failure := self._pending[1].exception()):
                # Not `wait`: other processes may never answer.
                error.add_note(str(failure))
        finally:
            self._background.shutdown()

    def reserve(self, like: Tree) -> None:
        """Raises an OSError unless the disk has room for the checkpoints of a run."""
        leaves = jax.tree.leaves(like)
        size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        more = max(self.keep + 1 - len(self._steps) - len(self._damaged), 1)
        free = shutil.disk_usage(self.folder).free
        if free < more * size:
            raise OSError(
                f"{self.folder} has {free / 1e9:.3g} GB free; {more} more checkpoints "
                f"of {size / 1e9:.3g} GB need {more * size / 1e9:.3g} GB "
                f"({self.keep} are kept, and one is being written). Free some space, "
                "keep fewer, or name a folder on another disk."
            )

    def save(self, step: int, state: Tree, *, ended: bool = False) -> None:
        """Starts to save; returns when the buffers of `state` may be reused.

        When the new checkpoint is complete, the method removes older ones beyond
        `keep`, and those that `restore` found damaged. It saves no step twice.

        Args:
          step: number of optimizer steps done.
          state: tree of arrays; PRNG keys are allowed.
          ended: whether the run ends at this step, before its last step.

        Raises:
          OSError: the previous save failed, or this one failed at once.
          ValueError: a checkpoint of a later step exists.
        """
        self.wait()
        newest = max(self._steps, default=-1)
        if step == newest:
            return
        if step < newest:
            raise ValueError(
                f"step {step} can't be saved: {self.folder} has step {newest}. Restore "
                "it first, or name another folder."
            )
        state = jax.tree.map(jnp.asarray, state)
        content = {
            "step": step,
            "ended": ended,
            "config": self._config,
            "leaves": _layout(state),
            "fingerprints": fingerprint.of(state),
        }
        steps = [*self._steps, step]
        old = steps[: -self.keep] + [x for x in self._damaged if x != step]
        with self._failure_named(step):
            processes.on_first(lambda: self._begin(step))
            saving = ocp.save_async(
                str(self._path(step) / "state"), _without_empty(state)
            )
        future = self._background.submit(self._finish, saving, content, old)
        self._pending = step, future

    def _begin(self, step):
        path = self._path(step)
        _remove(path)  # of a damaged checkpoint
        if os.path.lexists(path):
            raise FileExistsError(
                f"{path} is not a checkpoint of this program, so it was not touched; "
                "move it, or name another folder"
            )
        path.mkdir()

    def _finish(self, saving, content, old):
        folder = self._path(content["step"])
        with self._failure_named(content["step"]):
            saving.result()  # returns when all processes have written their part
            if jax.process_index() == 0:
                manifest.write(folder, content)
        if jax.process_index() == 0:
            for step in old:
                _remove(self._path(step))

    @contextlib.contextmanager
    def _failure_named(self, step):
        try:
            yield
        except Exception as error:
            # On a full disk, writers raise OSError, ValueError, RuntimeError, …
            if jax.process_index() == 0:
                _remove(self._path(step))
            last = self._path(self._steps[-1]) if self._steps else "none"
            raise OSError(
                f"the checkpoint of step {step} was not saved: {_brief(error)}. The "
                f"last good one: {last}."
            ) from error

    def wait(self) -> None:
        """Returns when all checkpoints are on disk.

        Raises:
          OSError: the last save failed; the message names it and the last good one.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        failure = future.exception()
        if processes.anywhere(failure is not None):
            raise failure or OSError(
                f"the checkpoint of step {step} was not saved: another process failed, "
                "and its message says why."
            )
        self._steps, self._damaged = [*self._steps, step][-self.keep :], []

    def restore(self, like: Tree) -> Restored | None:
        """Returns the newest undamaged checkpoint, or None if there is none.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct` with the leaves of the state.
            The result has its shardings, whichever devices held the saved state.

        Warns:
          UserWarning: newer checkpoints are damaged; the message says how, and which
            one is used.

        Raises:
          ValueError: the leaves of `like` differ from those of the checkpoint.
        """
        self.wait()
        like, flaws = jax.tree.map(_abstract, like), []
        while self._steps:
            folder = self._path(self._steps[-1])
            # Checked before Orbax reads: on damaged files it logs pages of tracebacks.
            first = jax.process_index() == 0
            state, flaw = None, _agreed(_flaw(folder) if first else None)
            if flaw is None:
                state, flaw = _load(folder, like)
                flaw = _agreed(flaw)
            if flaw is None:
                if flaws:
                    flaws.append(f"{folder.name} is used instead.")
                    warnings.warn("\n".join(flaws), stacklevel=2)
                content = _content(folder) or {}
                ended = bool(content.get("ended"))  # older manifests do not say
                return Restored(self._steps[-1], state, ended)
            flaws.append(f"{folder} is damaged: {flaw}.")
            self._damaged.append(self._steps.pop())
        if flaws:
            flaws.append("No undamaged checkpoint is left: the run starts anew.")
            warnings.warn("\n".join(flaws), stacklevel=2)
        return None


def _remove(path):
    """Removes a checkpoint; if it is killed half-way, the rest does not count as one.

    It removes nothing else: no target of a link, no folder of this name that another
    program made, and no file that was added to a checkpoint.
    """
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        ours = [entry for entry in path.iterdir() if _is_ours(entry)]
        if len(ours) == len(os.listdir(path)) or manifest.read(path) is not None:
            (path / manifest.NAME).unlink(missing_ok=True)
            for entry in ours:
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _is_ours(entry):
    """Returns whether `save` writes an entry of this name into a checkpoint."""
    if entry.is_symlink():
        return False
    if entry.is_dir():
        return bool(re.fullmatch(r"state(\.orbax-checkpoint-tmp.*)?", entry.name))
    return entry.name in (manifest.NAME, f".{manifest.NAME}.partial")


def _content(folder):
    """Returns the manifest of a checkpoint, or None if `save` did not write it."""
    content, parts = manifest.read(folder), ("config", "leaves", "fingerprints")
    if content and all(isinstance(content.get(part), dict) for part in parts):
        return content
    return None


def _flaw(folder):
    if _content(folder) is None:
        return f"{manifest.NAME} is not what was written"
    return manifest.flaw(folder)


def _load(folder, like):
    """Returns the state in a folder and None, or None and what is wrong with it."""
    content = _content(folder)
    if content is None:
        return None, f"{manifest.NAME} is not what was written"
    if lines := manifest.differences(content["leaves"], _layout(like)):
        shown = lines[:10] + [f"… and {len(lines) - 10} more"] * (len(lines) > 10)
        leaves = tree.counted(len(lines), "leaf", "leaves")
        raise ValueError(
            f"{folder} does not fit the tree to restore in {leaves}:\n  "
            + "\n  ".join(shown)
            + "\nBuild the state as the run that saved it did, or name another folder."
        )
    try:
        abstract = jax.tree.map(_on_a_device, _without_empty(like))
        state = ocp.load(folder / "state", abstract)
    except Exception as error:
        # JSON, TensorStore, zstd and others raise errors of many types.
        return None, _brief(error)
    state = jax.tree.map(_placed, like, state)
    found, saved = fingerprint.of(state), content["fingerprints"]
    if bad := [path for path in found if found[path] != saved.get(path)]:
        some = ", ".join(bad[:3]) + " …" * (len(bad) > 3)
        are = tree.counted(len(bad), "leaf is", "leaves are")
        return None, f"{are} not as saved ({some})"
    return state, None


def _layout(state):
    leaves = tree.flatten(state).items()
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _without_empty(state):
    """Returns the tree without leaves of size 0, which Orbax refuses."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, state)


def _abstract(leaf):
    """Returns shape and dtype, and the sharding of a leaf bound to its devices."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    leaf = jnp.asarray(leaf)
    sharding = leaf.sharding if leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _on_a_device(leaf):
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return leaf.update(sharding=leaf.sharding or first)


def _placed(like, leaf):
    """Returns the leaf that Orbax read, bound to a device only if `like` is."""
    if leaf is None:
        return jnp.zeros(like.shape, like.dtype, device=like.sharding)
    if like.sharding is not None:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(leaf)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(leaf))


def _brief(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _agreed(flaw: str | None) -> str | None:
    """Returns what a process finds wrong, or that another one found something."""
    wrong = processes.anywhere(flaw is not None)
    return (flaw or "another process says why") if wrong else None
