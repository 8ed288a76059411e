"""The OCR task: images with a class name written on them, to be read.

Ilharco et al. Patching open-vocabulary models by interpolating weights. NeurIPS 2022:
on images of SUN397, the name of another class than the image's is written.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.common.vision import glyphs, sources
from jaxarith.data import images

TEMPLATES = (
    'an image of the text "{}".',
    'a photo with the word "{}" written on it.',
    "{}",
)


@dataclasses.dataclass(frozen=True)
class Written:
    """A source with names written on its images; the names are the labels.

    The text and its look depend only on the seed and the index of a sample.

    Attributes:
      source: raw images.
      classes: the names, two or more.
      seed: random seed; every split needs a different one.
    """

    source: Any
    classes: Sequence[str]
    seed: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index) -> dict:
        sample = self.source[int(index)]
        label = self.labels[int(index)]
        rng = np.random.default_rng((self.seed, int(index)))
        image = written(images.rgb(sample["image"]), self.classes[int(label)], rng)
        return {"image": image, "label": label}

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels, `i32[N]`, drawn from the classes that the image does not show."""
        shown = sources.labels(self.source)
        away = np.random.default_rng(self.seed).integers(
            1, len(self.classes), size=len(shown)
        )
        return ((shown + away) % len(self.classes)).astype(np.int32)


def written(image: Image.Image, text: str, rng: np.random.Generator) -> Image.Image:
    """Returns a copy of the image with text at a random place, font and colour.

    The text is 60 to 95 percent as wide as the image, and at most a third as high. The
    letters have an outline of the opposite brightness.
    """
    image = image.copy()
    fonts = glyphs.matplotlib_fonts()
    file = str(fonts[rng.integers(len(fonts))])
    width, height = image.size
    trial = ImageFont.truetype(file, 100).getbbox(text)
    wanted = rng.uniform(0.6, 0.95) * width / max(trial[2] - trial[0], 1)
    size = max(int(100 * min(wanted, height / 3 / max(trial[3] - trial[1], 1))), 4)
    font = ImageFont.truetype(file, size)
    left, top, right, bottom = font.getbbox(text)
    x = rng.uniform(0, max(width - (right - left), 0)) - left
    y = rng.uniform(0, max(height - (bottom - top), 0)) - top
    color = tuple(int(c) for c in rng.integers(0, 256, 3))
    edge = (0,) * 3 if sum(color) > 3 * 128 else (255,) * 3
    stroke = {"stroke_width": size // 15, "stroke_fill": edge}
    ImageDraw.Draw(image).text((x, y), text, font=font, fill=color, **stroke)
    return image


def reading(task: images.ImageTask) -> images.ImageTask:
    """Returns the OCR task with the images and the class names of another task."""
    splits = ("train", "validation", "test")
    parts = {
        split: Written(getattr(task, split), tuple(task.classes), seed)
        for seed, split in enumerate(splits)
    }
    return dataclasses.replace(
        task,
        name=f"{task.name}_ocr",
        templates=TEMPLATES,
        origin=f"written on {task.origin}",
        **parts,
    )
