"""Reads raw labelled images from folders, TFDS and the Hugging Face hub.

A reader holds one split of a source. It has `len(reader)`, `reader.names` (its
classes), `reader[i]` (an image and its class number), `reader.labels` (all class
numbers), and `reader.labels_at(indices)` (some of them, without decoding images).
`Samples` joins readers and numbers their labels as the task does. Everything here can
be pickled.
"""

import functools
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxarith import files, report
from jaxarith.data import images
from jaxarith.typing import Source

SUFFIXES = frozenset(
    ".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
)  # suffixes of the files that count as images


class Samples:
    """A source of `{"image": PIL image or u8 array, "label": int}`.

    Args:
      readers: the readers, in order.
      maps: the labels of each reader's classes, `i32[classes of the reader]`.
      indices: `i[N]`, the samples to take, in order; all by default.
    """

    def __init__(
        self,
        readers: Sequence[Any],
        maps: Sequence[np.ndarray],
        indices: np.ndarray | None = None,
    ):
        self._readers, self._maps = tuple(readers), tuple(maps)
        lengths = [len(reader) for reader in self._readers]
        self._starts = np.cumsum([0, *lengths[:-1]])
        self._indices = np.arange(sum(lengths)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict:
        index = int(self._indices[i])
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        image, number = self._readers[part][index - int(self._starts[part])]
        return {"image": image, "label": int(self._maps[part][number])}

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels of all samples, `i32[N]`; no image is decoded."""
        return self.labels_at(np.arange(len(self)))

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of the samples at `indices`, `i32[n]`."""
        found = self._indices[indices]
        parts = np.searchsorted(self._starts, found, side="right") - 1
        labels = np.empty(len(found), np.int32)
        for part, (reader, numbers) in enumerate(
            zip(self._readers, self._maps, strict=True)
        ):
            own = parts == part
            labels[own] = numbers[reader.labels_at(found[own] - self._starts[part])]
        return labels


class Folder:
    """Image files in one folder for each class.

    Every folder that contains images, or contains no folder, is a class. Its name is
    its path: `cat`, or `a/apartment_building/outdoor`. Classes are sorted by path.

    Links to folders and images elsewhere are followed; links to a folder above are not.

    Raises:
      ValueError: there is no class, a class has no image, or links repeat an image.
    """

    def __init__(self, folder: str | os.PathLike):
        names, lists, self.links = [], [], set[str]()
        for path, folders, found in _walk(str(folder), self.links):
            name = Path(path).relative_to(folder).as_posix()
            if name != "." and (found or not folders):
                names.append(name)
                lists.append(found)
        empty = [name for name, found in zip(names, lists, strict=True) if not found]
        if empty or not names:
            raise ValueError(
                f"{folder} has no image of {report.listed(empty) or 'any class'}. It "
                "must contain a folder for each class, with images in it: "
                f"{', '.join(sorted(SUFFIXES))}."
            )
        self.names = tuple(names)
        self.files = list(itertools.chain.from_iterable(lists))
        if self.links:
            _check_once(self)
        counts = [len(found) for found in lists]
        self.labels = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        self._folder = folder

    def __len__(self) -> int:
        return len(self.files)

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of the images at `indices`."""
        return self.labels[indices]

    def checksum(self) -> int:
        """A checksum of the files' names and sizes, whatever the folder's path."""
        listed = [
            (Path(path).relative_to(self._folder).as_posix(), os.path.getsize(path))
            for path in self.files
        ]
        return zlib.crc32(repr(listed).encode())

    def __getitem__(self, i: int):
        path = self.files[i]
        try:
            content = files.read(path)
        except OSError as error:
            raise ValueError(f"cannot read the image {path}: {error}") from error
        return images.decode(content, path), int(self.labels[i])


def _walk(folder, links, above=()):
    """Like `os.walk`, but sorted, only with images, and without hidden entries.

    Links to folders are followed, except links to a folder above, which would never
    end.

    Args:
      folder: the folder to begin in.
      links: a set to which the paths of links are added.
      above: real paths of the folders that led here.
    """
    real = os.path.realpath(folder)
    if any(f"{path}/".startswith(real.rstrip("/") + "/") for path in above):
        return
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    links.update(entry.path for entry in shown if entry.is_symlink())
    folders = sorted(entry.path for entry in shown if _is_folder(entry))
    yield (
        folder,
        folders,
        sorted(
            {
                entry.path
                for entry in shown
                if os.path.splitext(entry.name)[1].lower() in SUFFIXES
            }.difference(folders)
        ),
    )
    for inner in folders:
        yield from _walk(inner, links, (*above, real))


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _check_once(folder):
    """Raises a ValueError if several images of a folder are links to one file."""
    known = {}
    for path, file in zip(folder.files, _resolved(folder), strict=True):
        if (first := known.setdefault(file, path)) != path:
            raise ValueError(
                f"{path} is the same file as {first}, through a link, and would count "
                "as two images. Remove the link."
            )


def _resolved(folder):
    """Returns the real path of every file; looks up only links, and folders once."""
    real = functools.cache(os.path.realpath)
    for path in folder.files:
        if path in folder.links:
            yield real(path)
        else:
            parent, name = os.path.split(path)
            yield os.path.join(real(parent), name)


class NoColumn(ValueError):
    """A dataset was found, but does not have the expected columns."""


class Records:
    """Records of a TFDS data source or a Hugging Face dataset.

    Args:
      records: the records, each `{image: encoded image, label: int, …}`.
      label_records: the same records, without images if the source allows it. TFDS
        always reads the images too, so reading fewer records saves time.
      names: the names of the classes; without names, their numbers are used.
      image, label: the names of the two fields.
      place: the name of the split in messages.
    """

    def __init__(
        self,
        records: Source,
        label_records: Source,
        names: Iterable[str],
        image: str,
        label: str,
        place: str,
    ):
        self._records, self._label_records = records, label_records
        self.names = tuple(names)
        self._image, self._label, self._place = image, label, place

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int):
        place = f"{self._place}, index {i}"
        record = self._records[int(i)]
        image, label = record[self._image], int(record[self._label])
        self._check(np.array([label]), [i])
        if isinstance(image, Mapping):  # datasets.Image(decode=False)
            try:
                image = image["bytes"] or files.read(image["path"])
            except (OSError, TypeError) as error:  # no file, or neither bytes nor path
                raise ValueError(f"cannot read the image {place}: {error}") from error
        if image is None:
            raise ValueError(f"cannot read the image {place}: the record has no image.")
        if isinstance(image, bytes):
            image = images.decode(image, place)
        return image, label

    @functools.cached_property
    def labels(self) -> np.ndarray:
        records = self._label_records
        return self._numbers(iter(records), range(len(records)))

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of some records; for less than half, reads only those."""
        # Reading a record by its index takes longer than reading records in order.
        if "labels" in self.__dict__ or 2 * len(indices) > len(self):
            return self.labels[indices]
        records = self._label_records
        return self._numbers((records[int(i)] for i in indices), indices)

    def _numbers(self, records, indices):
        labels = (int(record[self._label]) for record in records)
        found = np.fromiter(labels, np.int32, len(indices))
        self._check(found, indices)
        return found

    def _check(self, labels, indices):
        wrong = (labels < 0) | (labels >= len(self.names))
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(
                f"{self._place}, index {indices[first]} has the label {labels[first]}, "
                f"but its {len(self.names)} classes are numbered from 0. The split may "
                "have no labels: use another."
            )


def folder_splits(folder: str | os.PathLike) -> dict[str, Callable]:
    """Returns functions that open the splits of an image folder, by the split's name.

    A folder `val` counts as `validation`.

    Raises:
      ValueError: both `val` and `validation` exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return {}
    splits = {
        path.name: functools.cache(functools.partial(Folder, path))
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    if {"val", "validation"} <= splits.keys():
        raise ValueError(f"{folder} has both val and validation. Keep one of them.")
    return {{"val": "validation"}.get(name, name): s for name, s in splits.items()}


def tfds_splits(
    name: str, data_dir: str | os.PathLike | None = None
) -> dict[str, Callable]:
    """Returns functions that open the splits of a TFDS set; none if it is not prepared.

    Args:
      name: the set's name in TFDS.
      data_dir: the folder of prepared sets; None means TFDS's own.

    Raises:
      ImportError: tensorflow-datasets is not installed.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    # `is_prepared` alone logs a warning if the path does not exist.
    if not (builder.data_path.exists() and builder.is_prepared()):
        return {}
    return {
        split: functools.cache(functools.partial(_open_tfds, builder, split))
        for split in builder.info.splits
    }


def _open_tfds(builder, split: str) -> Records:
    import tensorflow_datasets as tfds

    features, skip = builder.info.features, tfds.decode.SkipDecoding()
    decoders = {
        name: skip
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        records = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_path} is prepared as {builder.info.file_format.value}, "
            "which can only be read in order. Prepare it as array_record."
        ) from error
    names, place = features["label"].names, f"{builder.data_path}, {split}"
    return Records(records, records, names, "image", "label", place)


def open_hub(
    identity: str, config: str | None, split: str, image: str, label: str
) -> Records:
    """Opens a split of a dataset on the Hugging Face hub with `datasets`.

    Args:
      identity: id of the dataset, for example "ylecun/mnist".
      config: name of its configuration, if it has several.
      split: the name of the split, for example "train".
      image, label: the names of the two columns.

    Raises:
      ImportError: `datasets` is not installed.
      NoColumn: a column is missing, or the labels are not numbers.
    """
    import datasets

    dataset: Any = datasets.load_dataset(identity, config, split=split)
    if missing := [c for c in (image, label) if c not in dataset.column_names]:
        raise NoColumn(
            f"{identity}, {split} has no column {report.listed(missing)}; "
            f"it has {', '.join(dataset.column_names)}."
        )
    feature = dataset.features[label]
    if getattr(feature, "dtype", None) == "string":
        raise NoColumn(
            f"{identity}, {split}: the column {label} holds texts; expected class "
            "numbers."
        )
    label_records = dataset.select_columns([label])
    names = getattr(feature, "names", None)
    if names is None:
        names = map(str, range(1 + max(int(r[label]) for r in label_records)))
    dataset = dataset.select_columns([image, label])
    dataset = dataset.cast_column(image, datasets.Image(decode=False))
    place = f"{identity}, {split}"
    return Records(dataset, label_records, names, image, label, place)


def shared_files(a: Folder, b: Folder) -> list[tuple[str, str]]:
    """Finds files that two splits share through links, without reading them.

    Returns:
      Pairs of paths.
    """
    paths = dict(zip(_resolved(a), a.files, strict=True))
    pairs = zip(_resolved(b), b.files, strict=True)
    return [(paths[file], path) for file, path in pairs if file in paths]


def identical_files(a: Folder, b: Folder) -> list[tuple[str, str]]:
    """Finds files of two splits with the same size and CRC-32; reads only equal sizes.

    Returns:
      Pairs of paths.
    """
    sizes = [{os.path.getsize(path) for path in folder.files} for folder in (a, b)]
    common = sizes[0] & sizes[1]

    def prints(folder):
        sized = ((os.path.getsize(path), path) for path in folder.files)
        for size, path in sized:
            if size in common:
                yield (size, zlib.crc32(files.read(path))), path

    known = dict(prints(a))
    return [(known[key], path) for key, path in prints(b) if key in known]
