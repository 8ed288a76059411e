"""From sources of samples to batches: the only place that knows grain.

A source is anything with `__len__` and `__getitem__` that yields a dict: a TFDS data
source, a Hugging Face dataset, a list; or a dict of arrays `[N, ...]`, whose rows are
the samples. A batch is a dict of stacked arrays.
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

# From a sample and a random generator to what the model trains on.
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
    """A source as a sequence of samples: the rows, if it is a dict of arrays.

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
            "one length N, or a sequence with one dict for each sample."
        )
    return _Rows(columns)


def _column(name, column):
    try:
        return np.asarray(column)
    except ValueError as error:
        raise ValueError(
            f"the field {name!r} of a source is a {type(column).__name__} of rows of "
            "several shapes; expected an array [N, ...]. Pad the rows to one shape."
        ) from error


def shuffled(source: Source, seed: int, augment: Augment | None = None) -> Source:
    """An endless shuffled view: `view[i]` for any i, in a new order every epoch.

    Position i holds the same sample however it is reached, augmented with the same
    random numbers, so a batch is a function of its step and a run resumes anywhere.

    Raises:
      ValueError: the source is empty.
    """
    source = samples(source)
    if not len(source):
        raise ValueError("cannot draw training samples from an empty source.")
    view: Any = grain.MapDataset.source(cast(Any, source)).seed(seed).shuffle().repeat()
    return view if augment is None else view.random_map(augment)


def identity(source: Source) -> dict[str, int]:
    """What tells samples from others: their number, and a checksum of some of them.

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
    """A source of batches that knows the samples that they are made of.

    Attributes:
      made: the batches.
      identity: what tells the samples from others, as plain data. It does not depend on
        the mesh.
    """

    made: Source
    identity: Callable[[], Any]

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: Any, /) -> Any:
        return self.made[index]

    def __iter__(self) -> Iterator[Any]:
        # Not by rising indices, which grain takes modulo the length.
        return (self.made[index] for index in range(len(self.made)))


def lazy(make: Callable[[int], dict], count: int) -> Source:
    """`[make(0), …, make(count - 1)]`, each made when it is asked for."""
    made: Any = grain.MapDataset.range(count).map(make)
    return made


def prefetch(batches: Source, start: int = 0, workers: int = 0) -> Iterator[dict]:
    """`batches[start], batches[start + 1], …`, made ahead in the background.

    Args:
      batches: a sequence that makes them when it is asked; to pass it to workers,
        everything that it reads must pickle.
      start: the first.
      workers: how many processes make them; with 0, threads of this one, which is
        enough where no images have to be decoded. Every process imports the main
        module anew, so a script that starts them needs `if __name__ == "__main__":`.
        It takes seconds to start them.
    """
    rest: Any = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    if not workers:
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(rest.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():  # grain asks them how to start a worker
        flags.FLAGS.mark_as_parsed()
    # A worker makes one batch at a time: processes and not threads share the work. It
    # keeps one ahead, for a step of eight tasks is 0.7 GB of images.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    shared = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return iter(rest.to_iter_dataset(options).mp_prefetch(shared))


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches that every pass makes anew, ahead of their use: no pass holds them all.

    Attributes:
      batches: a sequence that makes them when it is asked, such as
        `evaluation_stream` has.
      workers: as for `prefetch`.
    """

    batches: Source
    workers: int = 0

    def __iter__(self) -> Iterator[dict]:
        return prefetch(self.batches, workers=self.workers)

    def __len__(self) -> int:
        return len(self.batches)


def collate(records: Sequence[dict]) -> dict[str, np.ndarray]:
    """Samples as a batch: every field stacked on a new leading axis.

    Raises:
      ValueError: a sample is no dict, lacks a field of the first, or has one of another
        shape.
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
    """All samples, in order, in batches of one size; none is dropped.

    The last batch is padded with copies of its last sample; `mask`, `bool[B]`, is False
    there.

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
    """The batches of `evaluation_batches`, for sources that memory cannot hold.

    Args:
      source: raw samples.
      batch_size: B.
      preprocess: from a raw sample to what is evaluated.
      workers: as for `prefetch`.

    Raises:
      ValueError: the source is empty.
    """
    raw: Any = grain.MapDataset.source(cast(Any, samples(source)))
    return Stream(_evaluation_batches(raw.map(preprocess), batch_size), workers)


def _evaluation_batches(source, batch_size):
    source = samples(source)
    if not len(source):
        raise ValueError("cannot evaluate on an empty source.")
    count = len(source)

    def make(number):
        start = number * batch_size
        records = [source[i] for i in range(start, min(start + batch_size, count))]
        batch = collate(records + records[-1:] * (batch_size - len(records)))
        batch["mask"] = np.arange(batch_size) < len(records)
        return batch

    return lazy(make, -(-count // batch_size))
