"""Images as CLIP wants them, and image-classification tasks."""

import dataclasses
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxarith import files
from jaxarith.hub import open_clip

# Pillow's names of the formats that are read.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PIXELS = 2**26  # of one image


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """A classification task: class names, prompt templates, and three sources.

    Every source yields `{"image": f32[H, W, 3], "label": int}`, with images already
    preprocessed for the model, or raw ones: a PIL image, `u8[H, W]` or `u8[H, W, 3]`.
    `origin` is the kind of source, such as "tfds", where there are several, and of an
    image folder of one's own a checksum of its training files.
    """

    name: str
    classes: Sequence[str]
    templates: Sequence[str]
    train: Any
    validation: Any
    test: Any
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """CLIP's evaluation preprocessing: resize, centre crop, scale, normalise.

    Attributes:
      size: pixels of the shorter edge after resizing, and of the crop.
      mean, std: per channel, of pixels in [0, 1].
    """

    size: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Preprocessing":
        """Reads a Hugging Face `preprocessor_config.json`, or else OpenCLIP's.

        Raises:
          ValueError: the file is missing or has no size, mean or std.
        """
        path = Path(folder) / "preprocessor_config.json"
        try:
            of_open_clip = (
                not path.exists() and (path.parent / open_clip.CONFIG).exists()
            )
            raw = (
                open_clip.preprocessing(path.parent)
                if of_open_clip
                else files.read_json(path)
            )
            size = raw["size"]
            size = size if isinstance(size, int) else min(size.values())
            return cls(size, tuple(raw["image_mean"]), tuple(raw["image_std"]))
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"cannot read {path.name} in {folder}: {error!r}. It must state size, "
                "image_mean and image_std, as CLIP checkpoints do."
            ) from error

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """`f32[size, size, 3]` of a PIL image or an array `u8[H, W]`, `u8[H, W, 3]`.

        Raises:
          ValueError: the image is not of 8 bits by channel.
        """
        image = rgb(image)
        # Hugging Face and torchvision truncate the longer edge.
        width, height = (self.size * side // min(image.size) for side in image.size)
        if (width, height) != image.size:
            # PIL's bicubic filters when it shrinks; jax.image.resize differs.
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        # To the nearest pixel, as torchvision and the papers; Hugging Face truncates.
        left, top = (round((side - self.size) / 2) for side in (width, height))
        image = image.crop((left, top, left + self.size, top + self.size))
        return _normalized(image, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """CLIP's training preprocessing: a random crop, resized, scaled and normalised.

    The crop is that of torchvision's `RandomResizedCrop`: nine tenths of the image or
    more, at an aspect ratio from 3/4 to 4/3. There is no flip.

    Attributes:
      size: pixels of both edges.
      mean, std: per channel, of pixels in [0, 1].
    """

    size: int = Preprocessing.size
    mean: tuple[float, ...] = Preprocessing.mean
    std: tuple[float, ...] = Preprocessing.std

    def __call__(
        self, image: Image.Image | np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """`f32[size, size, 3]` of a PIL image or an array, as `Preprocessing` takes."""
        image = rgb(image)
        # Not `resize(box=...)`, whose filter reads pixels outside the crop.
        image = image.crop(random_crop(*image.size, rng))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return _normalized(image, self.mean, self.std)


def random_crop(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """The box that torchvision's `RandomResizedCrop` draws.

    Ten times, an area is drawn uniformly and an aspect ratio log-uniformly; the first
    box that fits is placed uniformly. If none fits, the box is the largest one in the
    middle whose ratio is allowed.

    Args:
      width, height: size of the image.
      scale: range of the area, as a share of the image's.
      ratio: range of width to height.

    Returns:
      `(left, upper, right, lower)`.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            upper = int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def decode(content: bytes, name: str) -> Image.Image:
    """An encoded image, read whole.

    Args:
      content: a file's bytes, in one of `FORMATS`.
      name: name of the file, for the message.

    Raises:
      ValueError: it is no image in one of these formats, only a part of one, or too
        large.
    """
    try:
        # Without a list, Pillow tries decoders that start other programs.
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > _PIXELS:
            raise ValueError(
                f"it has {width} x {height} pixels; expected at most {_PIXELS:,}"
            )
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, ...
        raise ValueError(f"cannot read the image {name}: {error}") from error
    return image


def rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """An image of 8 bits by channel as RGB; transparency is dropped.

    Raises:
      ValueError: it has more bits; Pillow would cut off the upper ones.
    """
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8:
            raise ValueError(
                f"an image of {image.dtype}; expected uint8, from 0 to 255. What is "
                "preprocessed already must not be so again."
            )
        image = Image.fromarray(image)
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"an image of mode {image.mode}, with more than 8 bits by channel; convert "
            "it to 8 bits."
        )
    return image.convert("RGB")


def _normalized(image, mean, std):
    pixels = np.asarray(image, np.float32) / 255
    # By rows: over the three channels alone, NumPy is four times slower.
    rows = pixels.reshape(len(pixels), -1)
    rows -= np.tile(np.float32(mean), image.width)
    rows /= np.tile(np.float32(std), image.width)
    return pixels
