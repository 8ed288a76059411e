"""Makes batches from sources of samples; the only module that uses grain.

A source is anything with `__len__` and `__getitem__` that yields a dict: a TFDS data
source, a Hugging Face dataset, a list. Or it is a dict of arrays `[N, ...]`, whose rows
are the samples. A batch is a dict of stacked arrays.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import grain
import jax
import numpy as np
from absl import flags

from jaxarith.batches import check_dict, fields_of
from jaxarith.typing import Source

# Maps a sample and a random generator to the sample that the model trains on.
Augment = Callable[[dict, np.random.Generator], dict]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A dict of arrays as a sequence of samples, without a copy."""

    columns: dict[str, np.ndarray]

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def samples(source: Source) -> Source:
    """Returns a source as a sequence of samples: the rows, if it is a dict of arrays.

    Args:
      source: a sequence, which is returned as it is, or a dict of arrays `[N, ...]`.

    Raises:
      ValueError: the values of a dict are not arrays of one length.

    Example:
      >>> samples({"image": np.zeros((3, 2)), "label": np.arange(3)})[1]
      {'image': array([0., 0.]), 'label': np.int64(1)}
    """
    if not isinstance(source, Mapping):
        return source
    columns = {
        name: column if isinstance(column, np.ndarray) else _column(name, column)
        for name, column in source.items()
    }
    lengths = {name: column.shape[:1] for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        found = ", ".join(f"{k} {list(v.shape)}" for k, v in columns.items())
        raise ValueError(
            f"a source is a dict of {found or 'nothing'}; expected arrays [N, ...] of "
            "one N, or a sequence with one dict for each sample."
        )
    return _Rows(columns)


def _column(name, column):
    try:
        return np.asarray(column)
    except ValueError as error:
        raise ValueError(
            f"the field {name!r} of a source is a {type(column).__name__} with rows of "
            "several shapes; expected an array [N, ...]. Pad the rows to one shape."
        ) from error


def shuffled(source: Source, seed: int, augment: Augment | None = None) -> Source:
    """Returns an endless shuffled view: `view[i]` for any i, reordered every epoch.

    Position i always holds the same sample, augmented with the same random numbers. So
    a batch depends only on its step, and a run can resume anywhere.

    Args:
      source: the samples.
      seed: seed of the order and of the augmentation.
      augment: maps a sample and a random generator to the sample to train on.

    Raises:
      ValueError: the source is empty.
    """
    source = samples(source)
    if not len(source):
        raise ValueError("the training source is empty. Give at least one sample.")
    view: Any = grain.MapDataset.source(cast(Any, source)).seed(seed).shuffle().repeat()
    return view if augment is None else view.random_map(augment)


def identity(source: Source) -> dict[str, int]:
    """Returns the number of samples and a checksum of some, to tell sources apart.

    Args:
      source: the samples.

    Example:
      >>> identity({"x": np.zeros((3, 2))})
      {'samples': 3, 'checksum': 288657186}
    """
    source = samples(source)
    count, checksum = len(source), 0
    for index in sorted({0, count // 2, count - 1} if count else ()):
        for path, leaf in jax.tree.leaves_with_path(source[index]):
            array = np.asarray(leaf)
            content = repr(leaf).encode() if array.dtype.hasobject else array.tobytes()
            place = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
            checksum = zlib.crc32(content, zlib.crc32(place.encode(), checksum))
    return {"samples": count, "checksum": checksum}


@dataclasses.dataclass(frozen=True)
class Batches:
    """A source of batches that records which samples they are made of.

    Attributes:
      made: the batches.
      identity: plain data that tells the samples from others. It does not depend on the
        mesh.
    """

    made: Source
    identity: Callable[[], Any]

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: Any, /) -> Any:
        return self.made[index]

    def __iter__(self) -> Iterator[Any]:
        # Without this method Python would count up, and grain takes indices modulo the
        # length, so that it would never end.
        return (self.made[index] for index in range(len(self.made)))


def lazy(make: Callable[[int], dict], count: int) -> Source:
    """Returns the sequence `[make(0), …, make(count - 1)]`, each made on access.

    Args:
      make: makes the entry of an index.
      count: the length.
    """
    made: Any = grain.MapDataset.range(count).map(make)
    return made


def prefetch(batches: Source, start: int = 0, workers: int = 0) -> Iterator[dict]:
    """Yields `batches[start], batches[start + 1], …`, made ahead in the background.

    Args:
      batches: a sequence that makes batches on access. With workers, everything that it
        reads must be picklable.
      start: index of the first batch.
      workers: number of processes that make batches. With 0, threads of this process
        make them, which is enough if no images must be decoded. Every worker imports
        the main module again, so a script needs `if __name__ == "__main__":`. Workers
        take seconds to start.
    """
    rest: Any = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    if not workers:
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(rest.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():  # grain reads flags to start a worker
        flags.FLAGS.mark_as_parsed()
    # A worker makes one batch at a time, because processes share the work, not threads.
    # It keeps only one batch ahead, because a step of eight tasks is 0.7 GB of images.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    shared = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return iter(rest.to_iter_dataset(options).mp_prefetch(shared))


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches that every pass makes again, ahead of their use, without keeping them.

    Attributes:
      batches: a sequence that makes batches on access, as that of `evaluation_stream`.
      workers: as for `prefetch`.
    """

    batches: Source
    workers: int = 0

    def __iter__(self) -> Iterator[dict]:
        return prefetch(self.batches, workers=self.workers)

    def __len__(self) -> int:
        return len(self.batches)


def collate(records: Sequence[dict]) -> dict[str, np.ndarray]:
    """Stacks samples to a batch: every field gets a new leading axis.

    Args:
      records: the samples, dicts with the same fields and shapes.

    Raises:
      ValueError: a sample is not a dict, lacks a field of the first sample, or has a
        field with another shape.
    """
    check_dict(records[0], "sample")
    names = list(records[0])
    rows = [fields_of(record, names, "sample") for record in records]
    return {
        name: _stacked(name, column)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def _stacked(name, column):
    try:
        return np.stack(column)
    except ValueError as error:
        shapes = sorted({str(list(np.shape(value))) for value in column})
        raise ValueError(
            f"the field {name!r} has shapes {' and '.join(shapes)} in the samples of a "
            "batch; expected one shape. Resize, crop or pad the samples first."
        ) from error


def evaluation_batches(source: Source, batch_size: int) -> list[dict[str, np.ndarray]]:
    """Returns all samples, in order, in batches of one size; none is dropped.

    The last batch is padded with copies of its last sample; `mask`, `bool[B]`, is False
    there.

    Args:
      source: the samples.
      batch_size: B.

    Raises:
      ValueError: the source is empty.
    """
    batches: Any = _evaluation_batches(source, batch_size)
    return list(batches)


def evaluation_stream(
    source: Source,
    batch_size: int,
    *,
    preprocess: Callable[[dict], dict],
    workers: int = 0,
) -> Stream:
    """Returns the batches of `evaluation_batches` for sources too large for memory.

    Args:
      source: raw samples.
      batch_size: B.
      preprocess: maps a raw sample to the sample that is evaluated.
      workers: as for `prefetch`.

    Raises:
      ValueError: the source is empty.
    """
    raw: Any = grain.MapDataset.source(cast(Any, samples(source)))
    return Stream(_evaluation_batches(raw.map(preprocess), batch_size), workers)


def _evaluation_batches(source, batch_size):
    source = samples(source)
    if not len(source):
        raise ValueError("the evaluation source is empty. Give at least one sample.")
    count = len(source)

    def make(number):
        start = number * batch_size
        records = [source[i] for i in range(start, min(start + batch_size, count))]
        batch = collate(records + records[-1:] * (batch_size - len(records)))
        batch["mask"] = np.arange(batch_size) < len(records)
        return batch

    return lazy(make, -(-count // batch_size))
