"""Readers of TFDS and of Hugging Face `datasets`, on data in their true formats."""

import functools
import io
import pickle
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from experiments.common.vision.sources import limited
from jaxarith.data import pipeline, sources, vision

DIGITS = "9876543210"  # an order that is not ours
IN_TFDS = [name for name, info in vision.TASKS.items() if info.tfds]
ON_HUB = [name for name, info in vision.TASKS.items() if info.hub]


def png(value: int, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (28, 28), (value,) * len(mode)).save(file, "PNG")
    return file.getvalue()


def value(sample) -> int:
    return int(np.asarray(sample["image"]).flat[0])


def check_digits(task, train, validation, test):
    """Every image holds its index, and its label is the last digit of that."""
    parts = task.train, task.validation, task.test
    assert tuple(map(len, parts)) == (train, validation, test)
    for part in parts:
        samples = [part[i] for i in range(len(part))]
        assert [sample["label"] for sample in samples] == part.labels.tolist()
        assert [value(sample) % 10 for sample in samples] == part.labels.tolist()
        assert len(set(part.labels.tolist())) > 3
    assert part.labels.dtype == np.int32


@pytest.fixture
def tfds():
    return pytest.importorskip(
        "tensorflow_datasets", reason="tensorflow-datasets is not installed"
    )


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="datasets is not installed")


def prepare(tfds, folder, images, file_format="array_record"):
    """Writes a small set under the name of MNIST, as `tfds build` would."""

    with tfds.core.registered.skip_registration():

        class Mnist(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.0.1")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(names=list(DIGITS)),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, manager):
                return {n: self._generate_examples(n) for n in ("train", "test")}

            def _generate_examples(self, split):
                for i, content in enumerate(images[split]):
                    yield i, {"image": io.BytesIO(content), "label": str(i % 10)}

        builder = Mnist(data_dir=folder, file_format=file_format)
        builder.download_and_prepare()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    tfds = pytest.importorskip(
        "tensorflow_datasets", reason="tensorflow-datasets is not installed"
    )
    folder = tmp_path_factory.mktemp("tfds")
    contents = {"train": map(png, range(200)), "test": map(png, range(50))}
    prepare(tfds, folder, contents)
    return folder


def test_a_prepared_array_record_set_is_read_and_renumbered_by_name(prepared):
    task = vision.load("mnist", prepared)
    check_digits(task, 180, 20, 50)
    assert isinstance(task.train[0]["image"], Image.Image)


def test_samples_of_every_source_pickle_and_reach_worker_processes(prepared):
    task = vision.load("mnist", prepared, source="tfds")
    copy = pickle.loads(pickle.dumps(task.train))
    assert value(copy[3]) == value(task.train[3])
    batches = pipeline.lazy(functools.partial(numbers, task.test), 2)
    assert [*pipeline.prefetch(batches, workers=1)] == [
        numbers(task.test, i) for i in (0, 1)
    ]


def numbers(source, i):
    return {"label": source[i]["label"], "value": value(source[i])}


def test_a_damaged_record_is_named_by_its_index(tfds, tmp_path):
    contents = {"train": [*map(png, range(29)), png(29)[:50]], "test": [png(0)] * 10}
    prepare(tfds, tmp_path, contents)
    train = sources.tfds_splits("mnist", tmp_path)["train"]()
    assert len(train.labels) == 30
    bad = []
    for i in range(30):
        try:
            train[i]
        except ValueError as error:
            bad.append((i, str(error)))
    ((i, message),) = bad
    assert f"train, index {i}: " in message and "cannot read the image" in message


@pytest.mark.parametrize("name", IN_TFDS)
def test_the_classes_of_tfds_are_the_tasks(tfds, tmp_path, name):
    """On mocked data: the names and features are those of the real builders."""
    info, asked = vision.TASKS[name], []

    def records(builder, split, decoders=None, **_):
        features = builder.info.features
        assert "image" in decoders
        # No image is decoded by TFDS, a segmentation mask neither.
        assert all(
            type(f).__name__ != "Image"
            for n, f in features.items()
            if n not in decoders
        )
        asked.append(split)
        classes = features["label"].num_classes
        return [
            {"image": png(i % classes % 256), "label": i % classes} for i in range(2000)
        ]

    layout = info.layouts["tfds"][0]
    there = dict.fromkeys(split for part in layout for split in part)
    builder = tfds.core.DatasetBuilder
    with (
        tfds.testing.mock_data(as_data_source_fn=records),
        mock.patch.object(tfds.core.DatasetInfo, "splits", there),
        mock.patch.object(builder, "data_path", tmp_path),
        mock.patch.object(builder, "is_prepared", lambda _: True),
    ):
        task = vision.load(name, source="tfds")
    assert sorted(asked) == sorted(there)
    samples = [task.test[i] for i in range(100)]
    moved = {s["label"] for s in samples if s["label"] % 256 != value(s)}
    # Where our order is another one, the labels are.
    assert moved == ({16, 17} if name == "food101" else set())


def hub_split(datasets, names, count, columns=("image", "label")):
    image, label = columns
    pictures = [{"bytes": png(i % 256, "RGB"), "path": None} for i in range(count)]
    features = datasets.Features(
        {
            image: datasets.Image(),
            label: datasets.ClassLabel(names=names)
            if names
            else datasets.Value("bool"),
            "other": datasets.Value("int64"),
        }
    )
    labels = [i % (len(names) or 2) for i in range(count)]
    columns = {image: pictures, label: labels, "other": labels}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_datasets_of_local_files_are_read(datasets, tmp_path, monkeypatch, form):
    for split, count in (("train", 200), ("test", 50)):
        made = hub_split(datasets, list(DIGITS), count)
        if form == "disk":
            made.save_to_disk(tmp_path / split)
        else:
            made.to_parquet(tmp_path / f"{split}.parquet")
    real, asked = datasets.load_dataset, []

    def load(identity, config=None, *, split):
        asked.append((identity, config, split))
        if form == "disk":
            return datasets.load_from_disk(tmp_path / split)
        files = {split: str(tmp_path / f"{split}.parquet")}
        return real("parquet", data_files=files, split=split, cache_dir=tmp_path / "c")

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = vision.load("svhn", source="hub")
    svhn = "ufldl-stanford/svhn", "cropped_digits"
    assert asked == [(*svhn, "train"), (*svhn, "test")]
    # Their label is 9 - i % 10 by name.
    for part in (task.train, task.test):
        labels = [9 - value(part[i]) % 10 for i in range(len(part))]
        assert (
            labels
            == part.labels.tolist()
            == [s["label"] for s in map(part.__getitem__, range(len(part)))]
        )
    copy = pickle.loads(pickle.dumps(task.train))
    assert value(copy[3]) == value(task.train[3])


@pytest.mark.parametrize("name", ON_HUB)
def test_every_hub_dataset_is_asked_for_by_its_id_and_columns(
    datasets, monkeypatch, name
):
    info, asked = vision.TASKS[name], []

    def load(identity, config=None, *, split):
        asked.append((identity, config, split))
        names = (
            []
            if name == "pcam"
            else [
                o[0] if o else c for o, c in zip(info.labels, info.classes, strict=True)
            ]
        )
        return hub_split(
            datasets,
            names,
            max(20, len(info.classes)),
            (info.hub.image, info.hub.label),
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = vision.load(name, source="hub")
    test = "validation" if name in ("imagenet", "food101") else "test"
    hub = info.hub.id, info.hub.config
    assert asked == [(*hub, "train"), (*hub, test)]
    assert task.classes == info.classes
    assert task.test[1]["label"] == 1 == task.test.labels[1]


def test_missing_columns_and_labels_are_refused(datasets, monkeypatch):
    made = hub_split(datasets, list(DIGITS), 20, ("picture", "label"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    with pytest.raises(
        ValueError, match="no column image; it has picture, label, other"
    ):
        sources.open_hub("some/set", None, "train", "image", "label")
    records = [{"image": png(0), "label": -1}]
    reader = sources.Records(records, records, DIGITS, "image", "label", "here")
    for read in (lambda: reader[0], lambda: reader.labels):
        with pytest.raises(
            ValueError, match="here, index 0 has the label -1, but its 10"
        ):
            read()


class Counted(list):
    """Records that count how often one is read."""

    read = 0

    def __getitem__(self, i):
        self.read += 1
        return super().__getitem__(i)

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def counted(count):
    records = Counted({"image": png(0), "label": i % 10} for i in range(count))
    return records, sources.Records(records, records, DIGITS, "image", "label", "here")


def test_labels_of_a_few_samples_read_those_records_alone():
    (one, first), (two, second) = counted(60), counted(40)
    maps = [np.arange(10), np.arange(10)[::-1]]
    every = np.array([*(np.arange(60) % 10), *(9 - np.arange(40) % 10)])
    chosen = np.array([99, 3, 61, 5, 64, 3])
    samples = sources.Samples([first, second], maps, chosen)
    assert samples.labels.tolist() == every[chosen].tolist()
    assert (one.read, two.read) == (3, 3) and samples.labels.dtype == np.int32
    assert samples.labels_at(np.array([1, 2])).tolist() == every[chosen[1:3]].tolist()
    assert (one.read, two.read) == (4, 4)
    whole = sources.Samples([first, second], maps)
    assert whole.labels.tolist() == every.tolist()
    assert (one.read, two.read) == (64, 44)
    # All are known now.
    assert samples.labels_at(np.array([0, 1])).tolist() == every[chosen[:2]].tolist()
    assert (one.read, two.read) == (64, 44)


def test_a_part_of_a_split_reads_the_labels_of_that_part():
    records, reader = counted(200)
    part = limited(sources.Samples([reader], [np.arange(10)]), 20)
    assert part.labels.tolist() == (part.indices % 10).tolist()
    assert records.read == 20
    records[int(part.indices[4])]["label"] = 10
    with pytest.raises(ValueError, match=f"index {part.indices[4]} has the label 10"):
        _ = part.labels


def test_what_is_missing_is_said_with_the_commands_that_prepare_it(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError) as caught:
        vision.load("svhn", tmp_path)
    message = str(caught.value)
    for part in (
        "no data of svhn was found",
        f"{tmp_path}/svhn/train is not a folder",
        f"put its images into {tmp_path}/svhn/train/<class>/",
        f"{tmp_path}/svhn_cropped is not prepared",
        f"tfds build svhn_cropped --data_dir={tmp_path} --file_format=array_record",
        "load_dataset('ufldl-stanford/svhn', 'cropped_digits')",
        "pip install 'jaxarith[data]' is needed",
    ):
        assert part in message
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        FileNotFoundError, match=r"tfds: pip install 'jaxarith\[data\]'"
    ):
        vision.load("svhn", tmp_path, source="tfds")
    with pytest.raises(FileNotFoundError, match="TFDS has no gtsrb with the papers'"):
        vision.load("gtsrb", source="tfds")


def test_the_hubs_own_errors_are_passed_on(datasets, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        FileNotFoundError, match="ylecun/mnist, train: ConnectionError: no"
    ):
        vision.load("mnist", source="hub")


def test_a_set_that_cannot_be_read_in_any_order_is_refused(tfds):
    class Builder:
        data_path = "somewhere"
        info = mock.Mock()
        info.features = {"image": tfds.features.Image()}
        info.file_format.value = "tfrecord"

        def as_data_source(self, *_, **__):
            raise NotImplementedError

    with pytest.raises(ValueError, match="somewhere is prepared as tfrecord"):
        sources._open_tfds(Builder(), "train")


def test_importing_the_tasks_imports_neither_library():
    code = (
        "import sys; import jaxarith; from jaxarith.data import vision; "
        "print({'datasets', 'tensorflow_datasets'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
