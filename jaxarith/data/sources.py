"""Raw labelled images from folders, TFDS and the Hugging Face hub.

A reader is one split as it lies there: `len(reader)`; `reader.names`, its classes;
`reader[i]`, the image and its number among those classes; `reader.labels`, all these
numbers, and `reader.labels_at(indices)`, some of them, for which no image is decoded.
`Samples` puts readers together and numbers their labels as a task does. Everything here
can be pickled.
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
)  # of the files that count as images


class Samples:
    """A source of `{"image": PIL image or u8 array, "label": int}`.

    Args:
      readers: taken one after the other.
      maps: for each reader, the labels of its classes, `i32[its classes]`.
      indices: `i[N]`, which samples, in which order; all by default.
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
        """`i32[N]`, without decoding an image."""
        return self.labels_at(np.arange(len(self)))

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """The labels of some samples, `i32[n]`."""
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

    A class is every folder with no folder in it, or with images in it, by its path:
    `cat`, or `a/apartment_building/outdoor`. The order is that of the sorted paths.

    Links to folders and images elsewhere are followed, those to a folder above are not.

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
                "must hold a folder for each class, with images in it: "
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
        """The labels of some images."""
        return self.labels[indices]

    def checksum(self) -> int:
        """Of the names and sizes of the files, wherever the folder is."""
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
    """As `os.walk`, sorted, of images and without what is hidden.

    Links to folders are followed unless they lead to one above, and so in circles.

    Args:
      folder: where to begin.
      links: a set that gets the paths of links.
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
    """Raises a ValueError if several images of a folder are one file, behind links."""
    known = {}
    for path, file in zip(folder.files, _resolved(folder), strict=True):
        if (first := known.setdefault(file, path)) != path:
            raise ValueError(
                f"{path} is the same file as {first}, behind a link, and would be two "
                "images. Remove the link."
            )


def _resolved(folder):
    """The real path of every file; only links are looked up, and folders once."""
    real = functools.cache(os.path.realpath)
    for path in folder.files:
        if path in folder.links:
            yield real(path)
        else:
            parent, name = os.path.split(path)
            yield os.path.join(real(parent), name)


class NoColumn(ValueError):
    """A dataset was found, and is not what it was taken for."""


class Records:
    """Records of a TFDS data source or a Hugging Face dataset.

    Args:
      records: `{image: encoded image, label: int, …}` each.
      label_records: the same ones, perhaps without their images. TFDS has no records
        without images, so it matters how many are read.
      names: the classes; without names they are called by their numbers.
      image, label: the fields.
      place: for messages.
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
            except (OSError, TypeError) as error:  # no file, or neither of both
                raise ValueError(f"cannot read the image {place}: {error}") from error
        if image is None:
            raise ValueError(f"cannot read the image {place}: there is none.")
        if isinstance(image, bytes):
            image = images.decode(image, place)
        return image, label

    @functools.cached_property
    def labels(self) -> np.ndarray:
        records = self._label_records
        return self._numbers(iter(records), range(len(records)))

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """The labels of some records; of less than half, no other record is read."""
        # To read a record by its index takes longer than to read it in order.
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
                f"{self._place}, index {indices[first]} has the label {labels[first]}; "
                f"its {len(self.names)} classes are numbered from 0. Is this split "
                "without labels?"
            )


def folder_splits(folder: str | os.PathLike) -> dict[str, Callable]:
    """What opens every split of an image folder, by its name; `val` is `validation`.

    Raises:
      ValueError: both `val` and `validation` are there.
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
        raise ValueError(f"{folder} has both val and validation; keep one of them.")
    return {{"val": "validation"}.get(name, name): s for name, s in splits.items()}


def tfds_splits(
    name: str, data_dir: str | os.PathLike | None = None
) -> dict[str, Callable]:
    """What opens every split of a prepared TFDS set; none where it is not prepared.

    Raises:
      ImportError: tensorflow-datasets is not installed.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    # `is_prepared` alone logs a warning where there is nothing.
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
            "which cannot be read in any order. Prepare it as array_record."
        ) from error
    names, place = features["label"].names, f"{builder.data_path}, {split}"
    return Records(records, records, names, "image", "label", place)


def open_hub(
    identity: str, config: str | None, split: str, image: str, label: str
) -> Records:
    """A split of a dataset on the Hugging Face hub, by `datasets`.

    Args:
      identity: id of the dataset, such as "ylecun/mnist".
      config: name of its configuration, if it has several.
      split: "train" and so on.
      image, label: the columns.

    Raises:
      ImportError: `datasets` is not installed.
      NoColumn: there is no such column, or the labels are no numbers.
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
        raise NoColumn(f"{identity}, {split}: the column {label} holds texts.")
    label_records = dataset.select_columns([label])
    names = getattr(feature, "names", None)
    if names is None:
        names = map(str, range(1 + max(int(r[label]) for r in label_records)))
    dataset = dataset.select_columns([image, label])
    dataset = dataset.cast_column(image, datasets.Image(decode=False))
    place = f"{identity}, {split}"
    return Records(dataset, label_records, names, image, label, place)


def shared_files(a: Folder, b: Folder) -> list[tuple[str, str]]:
    """Files of two splits that are one file, behind links; their content is not read.

    Returns:
      Pairs of paths.
    """
    paths = dict(zip(_resolved(a), a.files, strict=True))
    pairs = zip(_resolved(b), b.files, strict=True)
    return [(paths[file], path) for file, path in pairs if file in paths]


def identical_files(a: Folder, b: Folder) -> list[tuple[str, str]]:
    """Files of two splits with the same size and CRC-32; only equal sizes are read.

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
