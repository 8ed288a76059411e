"""`jaxarith data check`: what it prints, and its exit status."""

import dataclasses
import sys

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from jaxarith import cli
from jaxarith.data import vision


def digits(folder, train=30, test=20, first=0):
    """An image folder of MNIST's classes, `train` and `test` images of each."""
    value = first
    for split, count in (("train", train), ("test", test)):
        for name in "0123456789":
            path = folder / split / name
            path.mkdir(parents=True)
            for i in range(count):
                value += 1
                pixels = np.frombuffer(np.int64(value).tobytes(), np.uint8)
                Image.fromarray(pixels.reshape(2, 4)).save(path / f"{i}.png")
    return folder


def check(capsys, *arguments):
    status = cli.main(["data", "check", *map(str, arguments)])
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.fixture
def small_mnist(monkeypatch):
    """The papers' MNIST, had it 300 and 200 images."""
    small = dataclasses.replace(
        vision.TASKS["mnist"], train=300, validation=30, test=200
    )
    monkeypatch.setitem(vision.TASKS, "mnist", small)


def rows(output):
    lines = [line for line in output.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_a_complete_task_passes_with_its_sizes_and_counts(
    tmp_path, capsys, small_mnist
):
    folder = digits(tmp_path / "mnist")
    status, output, _ = check(capsys, "mnist", "--data-dir", tmp_path, "--images")
    assert status == 0
    assert f"mnist (MNIST): folder, {folder}" in output
    assert rows(output)["test"] == ["200", "200", "10 of 10", "20", "20", "20"]
    samples = vision.load("mnist", tmp_path).train
    counts = np.bincount(samples.labels)
    assert counts.min() < counts.max()
    train = rows(output)["train"]
    assert train[:3] == ["270", "270", "10 of 10"]
    assert [float(cell) for cell in train[3:]] == [
        counts.min(),
        np.median(counts),
        counts.max(),
    ]
    assert "The 10 class names match." in output
    assert "WARNING" not in output


def test_other_sizes_are_a_loud_warning_with_both_numbers(tmp_path, capsys):
    digits(tmp_path / "mnist", 3, 2)
    status, output, _ = check(capsys, "mnist", "--data-dir", tmp_path)
    assert status == 1
    assert "WARNING: train has 27 samples; the papers' has 55000." in output
    assert "WARNING: test has 20 samples; the papers' has 10000." in output


def test_another_order_of_the_classes_is_told(tmp_path, capsys):
    names = [labels[0] for labels in vision.TASKS["gtsrb"].labels]
    for split in ("train", "test"):
        for name in names:
            path = tmp_path / "gtsrb" / split / name.lstrip("0").rjust(1, "0")
            path.mkdir(parents=True)
            Image.new("L", (2, 2)).save(path / "0.png")
    _, output, _ = check(capsys, "gtsrb", "--data-dir", tmp_path)
    assert "The 43 class names match, in another order" in output


def test_copies_in_two_splits_are_found_by_their_content(tmp_path, capsys, small_mnist):
    folder = digits(tmp_path / "mnist")
    content = (folder / "train" / "4" / "7.png").read_bytes()
    (folder / "test" / "5" / "11.png").write_bytes(content)
    status, output, _ = check(capsys, "mnist", "--data-dir", tmp_path)
    assert status == 1
    copies = [line for line in output.splitlines() if "a copy of" in line]
    assert len(copies) == 1
    assert copies[0].startswith("WARNING: 1 file of test is in train as well")
    assert copies[0].endswith(
        f"{folder}/test/5/11.png, a copy of {folder}/train/4/7.png."
    )


def test_unreadable_images_are_found_on_demand(tmp_path, capsys, small_mnist):
    folder = digits(tmp_path / "mnist")
    path = folder / "test" / "5" / "11.png"
    path.write_bytes(path.read_bytes()[:30])
    assert check(capsys, "mnist", "--data-dir", tmp_path)[0] == 0
    status, output, _ = check(capsys, "mnist", "--data-dir", tmp_path, "--images")
    assert status == 1
    assert f"WARNING: test: cannot read the image {path}" in output


def test_wrong_classes_are_listed(tmp_path, capsys):
    folder = digits(tmp_path / "mnist", 3, 2)
    (folder / "train" / "9").rename(folder / "train" / "nine")
    status, output, _ = check(capsys, "mnist", "--data-dir", tmp_path)
    assert status == 1
    assert "only there (1): nine" in output and "only in mnist (1): 9" in output


def test_a_folder_of_ones_own_is_checked(tmp_path, capsys):
    folder = digits(tmp_path / "mine", 3, 2)
    status, output, _ = check(capsys, folder)
    assert status == 0
    assert rows(output)["test"] == ["20", "", "10 of 10", "2", "2", "2"]


def test_missing_data_is_told_with_commands_and_nothing_is_downloaded(
    tmp_path, capsys, monkeypatch
):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    offline = []

    def load(*_, **__):
        offline.append(constants.HF_HUB_OFFLINE)
        raise ConnectionError("not in the cache")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    status, output, _ = check(capsys, "mnist", "--data-dir", tmp_path)
    assert status == 1
    assert offline == [True] and constants.HF_HUB_OFFLINE is False
    assert "no data of mnist was found" in output
    assert "tfds build mnist" in output and "load_dataset('ylecun/mnist')" in output


def test_all_tasks_are_checked_and_the_incomplete_ones_named(
    tmp_path, capsys, monkeypatch, small_mnist
):
    for module in ("datasets", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    digits(tmp_path / "mnist")
    status, output, _ = check(capsys, "all", "--data-dir", tmp_path)
    assert status == 1
    assert "1 of 20 tasks are complete." in output
    last = output.strip().splitlines()[-1]
    assert last.startswith("Not complete: stanford_cars, dtd, ")
    assert " mnist," not in last


def test_an_unknown_task_is_one_line(capsys):
    status, output, error = check(capsys, "cars")
    assert status == 1 and output == ""
    assert error.startswith("jaxarith data: there is no task 'cars'; the tasks are")
    status, output, error = check(capsys, "./cars")
    assert status == 1 and output == ""
    assert error.startswith("jaxarith data: ./cars is not a folder; expected")
    with pytest.raises(SystemExit):
        check(capsys, "mnist", "--source", "disk")


def test_one_broken_task_does_not_hide_the_next(tmp_path, capsys):
    link = tmp_path / "mnist" / "train" / "0" / "gone.png"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "mnist" / "test" / "0").mkdir(parents=True)
    arguments = ("all", "--data-dir", tmp_path, "--source", "folder")
    status = cli.main(["data", "check", *map(str, arguments)])
    printed = capsys.readouterr().out
    assert status == 1
    assert f"0 of {len(vision.TASKS)} tasks are complete" in printed
    assert "svhn" in printed.split("Not complete")[1]
