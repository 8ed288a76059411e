"""From sources of samples to batches: the only place that knows grain.

A source is anything with `__len__` and `__getitem__` that yields a dict: a TFDS data
source, a Hugging Face dataset, a list. A batch is a dict of stacked arrays.
"""

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np


def shuffled(source, seed: int):
    """An endless shuffled view: `view[i]` for any i, in a new order every epoch.

    Position i holds the same sample however it is reached, so a batch is a function of
    its step and a run resumes anywhere.

    Raises:
      ValueError: the source is empty.
    """
    if not len(source):
        raise ValueError("cannot draw training samples from an empty source.")
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def lazy(make: Callable[[int], dict], count: int) -> Sequence[dict]:
    """`[make(0), …, make(count - 1)]`, each made when it is asked for."""
    return grain.MapDataset.range(count).map(make)


def prefetch(batches: Sequence[dict], start: int = 0) -> Iterator[dict]:
    """`batches[start], batches[start + 1], …`, made ahead in background threads."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    rest = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    return iter(rest.to_iter_dataset(options))


def collate(records: Sequence[dict]) -> dict[str, np.ndarray]:
    """Samples as a batch: every field stacked on a new leading axis."""
    return {name: np.stack([r[name] for r in records]) for name in records[0]}


def evaluation_batches(source, batch_size: int) -> list[dict[str, np.ndarray]]:
    """All samples, in order, in batches of one size; none is dropped.

    The last batch is padded with copies of its last sample; `mask`, `bool[B]`, is False
    there.

    Raises:
      ValueError: the source is empty.
    """
    if not len(source):
        raise ValueError("cannot evaluate on an empty source.")
    batches = []
    for start in range(0, len(source), batch_size):
        records = [
            source[i] for i in range(start, min(start + batch_size, len(source)))
        ]
        padding = batch_size - len(records)
        batch = collate(records + records[-1:] * padding)
        batch["mask"] = np.arange(batch_size) < len(records)
        batches.append(batch)
    return batches
