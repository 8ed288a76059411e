"""The papers' image tasks: facts, splits, class names, image folders, and mistakes."""

import hashlib
import json
import math
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxarith.data import splits, vision

CLASSES = {
    "stanford_cars": 196,
    "dtd": 47,
    "eurosat": 10,
    "gtsrb": 43,
    "mnist": 10,
    "resisc45": 45,
    "sun397": 397,
    "svhn": 10,
    "imagenet": 1000,
}
TEMPLATES = dict(zip(CLASSES, (8, 8, 3, 3, 1, 18, 2, 1, 80), strict=True))
# Of all class names and templates, as the papers' code lists them.
PROMPTS = "8e95d0a590cd029fe9535b9b30bb7765bed587e2e46b81323e450ad97fa976ee"
STEPS = (2030, 2052, 2028, 2068, 2150, 1995, 1960, 2136, 39884)


def test_the_table_has_the_papers_classes_templates_and_training_lengths():
    assert vision.EIGHT == tuple(CLASSES)[:8]
    for (name, classes), steps in zip(CLASSES.items(), STEPS, strict=True):
        info = vision.TASKS[name]
        assert len(info.classes) == len(info.labels) == classes
        assert len(info.templates) == TEMPLATES[name]
        # As many steps of 128 as the papers' code does.
        assert math.ceil(info.sizes[0] / 128) * info.epochs == steps


@pytest.mark.parametrize("name", vision.TASKS)
def test_every_task_is_complete_and_its_names_lead_to_one_class_each(name):
    info = vision.TASKS[name]
    twins = {"missile", "sunglasses"} if name == "imagenet" else set()
    assert len(set(info.classes)) == len(info.classes) - len(twins)
    assert {c for c in info.classes if info.classes.count(c) > 1} == twins
    assert all(t.count("{}") == 1 for t in info.templates)
    assert len(set(info.templates)) == len(info.templates)
    assert info.title and min(info.sizes) > 0
    if name != "eurosat":
        assert info.validation == min(info.train // 10, 5000)
    names = [labels[0] if labels else c for labels, c in name_pairs(info)]
    expected = list(range(len(names)))
    assert vision.label_map(info, names, "here").tolist() == expected


def name_pairs(info):
    return zip(info.labels, info.classes, strict=True)


class Reader:
    """A split whose images are their indices."""

    def __init__(self, names, labels):
        self.names, self.labels = tuple(names), np.asarray(labels, np.int32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return i, int(self.labels[i])

    def labels_at(self, indices):
        return self.labels[indices]


def found(**parts):
    opened = {split: lambda reader=reader: reader for split, reader in parts.items()}
    return vision.Found("hub", "there", opened)


def numbered(info, count):
    return Reader(info.classes, np.arange(count) % len(info.classes))


def test_mnists_first_training_sample_is_the_papers():
    info = vision.TASKS["mnist"]
    data = found(train=numbered(info, 60000), test=numbered(info, 10000))
    task = vision.assemble(info, data)
    assert task.train[0]["image"] == 36044
    parts = task.train, task.validation, task.test
    assert tuple(map(len, parts)) == info.sizes == (55000, 5000, 10000)
    train, validation = splits.train_validation(60000)
    assert task.validation[0]["image"] == validation[0]
    assert task.validation.labels.tolist() == (validation % 10).tolist()
    assert [task.test[i]["image"] for i in (0, -1)] == [0, 9999]
    assert len({*train.tolist(), *validation.tolist()}) == 60000


def test_dtd_trains_on_both_official_splits():
    info = vision.TASKS["dtd"]
    train, validation, test = (numbered(info, 1880) for _ in range(3))
    data = found(train=train, validation=validation, test=test)
    task = vision.assemble(info, data._replace(source="tfds"))
    assert tuple(map(len, (task.train, task.validation, task.test))) == info.sizes
    order = splits.torch_permutation(3760)
    # The second of the two splits starts again at 0.
    parts = task.train, task.validation
    samples = [part[i] for part in parts for i in range(len(part))]
    assert [s["image"] for s in samples] == (order % 1880).tolist()
    labels = [label for part in parts for label in part.labels.tolist()]
    assert [s["label"] for s in samples] == labels == (order % 1880 % 47).tolist()


def test_eurosats_own_split_of_a_single_one_takes_270_of_each_class():
    info = vision.TASKS["eurosat"]
    counts = [3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000]
    labels = np.repeat(np.arange(10), counts)
    data = found(train=Reader([n for n, *_ in info.labels], labels))
    task = vision.assemble(info, data._replace(source="tfds"))
    parts = task.train, task.validation, task.test
    assert tuple(map(len, parts)) == info.sizes == (21600, 2700, 2700)
    for part in parts[1:]:
        assert np.bincount(part.labels).tolist() == [270] * 10
    drawn = [part[i]["image"] for part in parts for i in range(len(part))]
    assert sorted(drawn) == list(range(27000))
    again = vision.one_split(labels, 10)
    assert again[1].tolist() == drawn[21600:24300]
    # Not the first 270: the order is drawn.
    assert task.validation[0]["image"] == splits.torch_permutation(27000)[0]


def test_eurosats_validation_split_is_used_and_a_missing_one_is_held_out():
    info = vision.TASKS["eurosat"]
    parts = {
        n: numbered(info, size)
        for n, size in zip(("train", "validation", "test"), info.sizes, strict=True)
    }
    task = vision.assemble(info, vision.Found("hub", "there", found(**parts).splits))
    assert len(task.train) == 21600 - 2160 and len(task.validation) == 2160


def test_labels_follow_names_and_not_their_order():
    info = vision.TASKS["eurosat"]
    names = ["Sea_Lake", "annual crop land", "Forest", "HerbaceousVegetation", "River"]
    names += [
        "Industrial",
        "highway or road",
        "Pasture",
        "Residential",
        "permanentcrop",
    ]
    labels = vision.label_map(info, names, "there")
    assert labels.tolist() == [9, 0, 1, 2, 8, 4, 3, 5, 7, 6]
    ids = sorted(map(str, range(43)))  # 0, 1, 10, 11, ...
    labels = vision.label_map(vision.TASKS["gtsrb"], ids, "there")
    assert labels.tolist() == list(map(int, ids))


def test_the_sources_names_of_sun397_imagenet_and_cars_are_known():
    sun = vision.TASKS["sun397"]
    nested = {8: "apartment building outdoor", 0: "abbey", 9: "apse indoor"}
    for form in ("/a/{}", "a/{}", "a_{}", "{}"):
        names = list(sun.classes)
        for i, name in nested.items():
            assert sun.classes[i] == name
            joint = "/" if form.startswith(("/", "a/")) else "_"
            names[i] = form.format(name.replace(" ", joint))
        assert vision.label_map(sun, names, "there")[:10].tolist() == list(range(10))
    net = vision.TASKS["imagenet"]
    assert [names[0] for names in net.labels] == sorted(n[0] for n in net.labels)
    written = [names[1] for names in net.labels]
    assert vision.label_map(net, written[::-1], "there")[0] == 999
    cars = vision.TASKS["stanford_cars"]
    names = [name.replace("C/V", "C-V").replace(" ", "_") for name in cars.classes]
    assert names != list(cars.classes)
    vision.label_map(cars, names, "there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: [*n[:-1], "ten"], r"only there \(1\): ten\n.*mnist \(1\): 9"),
        (lambda n: [*n, "ten"], r"only there \(1\): ten\n.*mnist \(0\)"),
        (
            lambda n: [*n[:-1], "0"],
            r"mnist \(1\): 9\n.*two of its names are the same class",
        ),
    ],
)
def test_other_class_names_are_refused(change, message):
    info = vision.TASKS["mnist"]
    names = change(list(info.classes))
    with pytest.raises(ValueError, match=message):
        vision.label_map(info, names, "there")


def test_only_known_names_count_as_names_of_one_class():
    with pytest.raises(ValueError, match="only there") as caught:
        vision.label_map(vision.TASKS["mnist"], ["x", "y", *"01234567"], "there")
    assert "x, y" in str(caught.value) and "8, 9" in str(caught.value)
    assert "one class" not in str(caught.value)


def test_a_class_that_a_source_lacks_is_refused():
    info = vision.TASKS["mnist"]
    nine = Reader(info.classes[:9], [0])
    with pytest.raises(ValueError, match="train lacks 1 of the 10 classes of mnist: 9"):
        vision.assemble(info, found(train=nine, test=numbered(info, 10)))


def write(path, value=0, shape=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value % 256, np.uint8)).save(path)


def folder(root, classes, per_class=10, parts=("train", "test")):
    for s, split in enumerate(parts):
        for c, name in enumerate(classes):
            for i in range(per_class):
                write(root / split / name / f"{i:03}.png", 100 * s + 10 * c + i)
    return root


def test_the_origin_of_a_folder_tells_its_files_and_not_its_place(tmp_path):
    first, moved = (folder(tmp_path / name, ["cat", "dog"]) for name in "ab")
    origin = vision.load_folder("pets", first).origin
    assert vision.load_folder("pets", moved).origin == origin != "folder"
    (moved / "train" / "cat" / "000.png").rename(moved / "train" / "cat" / "x.png")
    assert vision.load_folder("pets", moved).origin != origin


def test_a_folder_of_ones_own_is_a_task(tmp_path):
    task = vision.load_folder("pets", folder(tmp_path, ["big_cat", "dog"]))
    assert task.name == "pets"
    assert task.classes == ("big cat", "dog")
    assert task.templates == ("a photo of a {}.",)
    parts = task.train, task.validation, task.test
    assert tuple(map(len, parts)) == (18, 2, 20)
    train, _ = splits.train_validation(20)
    samples = [task.train[i] for i in range(18)]
    values = [int(np.asarray(s["image"])[0, 0]) for s in samples]
    assert values == train.tolist()
    assert [s["label"] for s in samples] == task.train.labels.tolist()
    assert task.train.labels.dtype == np.int32
    copy = pickle.loads(pickle.dumps(task.test))
    assert copy[-1]["label"] == 1 and copy[-1]["image"].size == (5, 6)


def test_a_validation_folder_is_used_and_may_lack_classes(tmp_path):
    folder(tmp_path, ["cat", "dog"])
    write(tmp_path / "val" / "dog" / "x.png")
    task = vision.load_folder("pets", tmp_path)
    assert (len(task.train), task.validation.labels.tolist()) == (20, [1])


@pytest.mark.parametrize("as_map", [False, True])
def test_a_task_file_names_and_orders_classes(tmp_path, as_map):
    folder(tmp_path, ["n1", "n2"])
    classes = {"n2": "dog", "n1": "cat"} if as_map else ["N2", "n1"]
    content = {"classes": classes, "templates": ["a {}"]}
    (tmp_path / "task.json").write_text(json.dumps(content))
    task = vision.load_folder("pets", tmp_path)
    assert task.classes == (("dog", "cat") if as_map else ("N2", "n1"))
    assert task.templates == ("a {}",)
    assert task.test.labels.tolist() == [1] * 10 + [0] * 10


def test_class_folders_that_differ_in_punctuation_alone_are_two_classes(tmp_path):
    task = vision.load_folder("signs", folder(tmp_path, ["+", "-", "A", "a"]))
    assert task.classes == ("+", "-", "A", "a")
    assert task.test.labels.tolist() == np.repeat(range(4), 10).tolist()


def test_nested_class_folders_go_by_their_path(tmp_path):
    names = ["a/apartment/outdoor", "b/bar"]
    task = vision.load_folder("scenes", folder(tmp_path, names))
    assert task.classes == tuple(names)


def test_the_tasks_folder_comes_before_other_sources(tmp_path):
    names = [labels[0] for labels in vision.TASKS["eurosat"].labels]
    folder(tmp_path / "eurosat", names, 10, ("train", "val", "test"))
    task = vision.load("eurosat", tmp_path)
    assert tuple(map(len, (task.train, task.validation, task.test))) == (100,) * 3
    assert task.classes[0] == "annual crop land"


def test_sun397s_and_dtds_folder_val_is_the_test_split(tmp_path):
    info = vision.TASKS["dtd"]
    folder(tmp_path / "dtd", info.classes, 2, ("train", "val"))
    task = vision.load("dtd", tmp_path, source="folder")
    assert tuple(map(len, (task.train, task.validation, task.test))) == (85, 9, 94)


def broken(kind, root):
    folder(root, ["cat", "dog"])
    if kind == "no train":
        (root / "train").rename(root / "training")
    elif kind == "no test":
        (root / "test").rename(root / "holdout")
    elif kind == "two vals":
        for name in ("val", "validation"):
            write(root / name / "cat" / "x.png")
    elif kind == "empty class":
        (root / "train" / "mouse").mkdir()
    elif kind == "empty split":
        (root / "validation").mkdir()
    elif kind == "unknown class":
        write(root / "test" / "mouse" / "0.png")
    elif kind == "overlap":
        os.symlink(root / "train/cat/003.png", root / "test/cat/zzz.png")
    elif kind == "same folder":
        os.symlink(root / "test", root / "val")
    elif kind == "task file":
        (root / "task.json").write_text('{"templates": ["no place"]}')
    elif kind == "task classes":
        (root / "task.json").write_text('{"classes": ["cat", "cow"]}')


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no train", "no split train; it has test, training"),
        ("no test", r"has the splits holdout, train, but .* needs .*train\+test"),
        ("two vals", "both val and validation"),
        ("empty class", "train has no image of mouse"),
        ("empty split", "validation has no image of any class"),
        ("unknown class", r"test does not have .*\n.*only there \(1\): mouse"),
        ("overlap", r"train and test overlap: 1 file is .*zzz.png, which is .*003.png"),
        ("same folder", "validation and test overlap: 20 files"),
        ("task file", "task.json must be .* one {} in every template"),
        ("task classes", r"only there \(1\): dog\n.*\(1\): cow"),
    ],
)
def test_a_wrong_folder_is_refused_before_anything_is_trained(tmp_path, kind, message):
    broken(kind, tmp_path)
    with pytest.raises(ValueError, match=message):
        vision.load_folder("pets", tmp_path)


def test_an_unreadable_image_is_named(tmp_path):
    task = vision.load_folder("pets", folder(tmp_path, ["cat", "dog"]))
    path = tmp_path / "test" / "dog" / "004.png"
    path.write_bytes(path.read_bytes()[:40])
    assert task.test[13]["label"] == 1
    with pytest.raises(ValueError, match=r"cannot read the image .*test.dog.004\.png"):
        task.test[14]
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot read the image .*004\.png"):
        task.test[14]


def test_unknown_tasks_sources_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no task 'cars'; the tasks are stanford_cars"):
        vision.load("cars")
    with pytest.raises(
        ValueError, match="source is 'disk'; expected one of folder, tfds"
    ):
        vision.load("mnist", source="disk")
    with pytest.raises(FileNotFoundError, match="no folder"):
        vision.load_folder("pets", tmp_path / "nowhere")


def test_class_names_and_templates_are_the_papers_to_the_letter():
    prompts = {
        name: {"class_names": list(info.classes), "templates": list(info.templates)}
        for name, info in vision.TASKS.items()
    }
    text = json.dumps(prompts, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == PROMPTS


@pytest.mark.parametrize("template", ["a {} {x}", "a {0} {}", "a {{}}", "a photo", "{"])
def test_a_template_without_one_place_for_the_class_is_refused(tmp_path, template):
    root = folder(tmp_path, ("cat", "dog"))
    (root / "task.json").write_text(json.dumps({"templates": [template]}))
    with pytest.raises(ValueError, match="one {} in every template"):
        vision.load_folder("own", root)
