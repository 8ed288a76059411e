"""Preprocesses images for CLIP, and defines image-classification tasks."""

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

# Pillow's names of the supported formats.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PIXELS = 2**26  # the most pixels in one image


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """A classification task: class names, prompt templates, and three sources.

    Every source yields `{"image": f32[H, W, 3], "label": int}` with images that are
    preprocessed for the model, or raw images: a PIL image, `u8[H, W]` or `u8[H, W, 3]`.
    `origin` is the kind of source (for example "tfds") if a task has several. For an
    image folder of your own it is a checksum of the training files.
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
      mean, std: mean and standard deviation of each channel, for pixels in [0, 1].
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
                "image_mean and image_std, as in CLIP checkpoints."
            ) from error

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Preprocesses an image.

        Args:
          image: a PIL image, or an array `u8[H, W]` or `u8[H, W, 3]`.

        Returns:
          `f32[size, size, 3]`.

        Raises:
          ValueError: the image does not have 8 bits per channel.
        """
        image = rgb(image)
        # Hugging Face and torchvision truncate the longer edge.
        width, height = (self.size * side // min(image.size) for side in image.size)
        if (width, height) != image.size:
            # PIL's bicubic resizing also filters when it shrinks an image.
            # jax.image.resize differs.
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        # Round to the nearest pixel, as torchvision and the papers do; Hugging Face
        # truncates.
        left, top = (round((side - self.size) / 2) for side in (width, height))
        image = image.crop((left, top, left + self.size, top + self.size))
        return _normalized(image, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """CLIP's training preprocessing: a random crop, resized, scaled and normalised.

    The crop is that of torchvision's `RandomResizedCrop`: at least nine tenths of the
    image, with an aspect ratio from 3/4 to 4/3. Images are not flipped.

    Attributes:
      size: pixels of both edges.
      mean, std: mean and standard deviation of each channel, for pixels in [0, 1].
    """

    size: int = Preprocessing.size
    mean: tuple[float, ...] = Preprocessing.mean
    std: tuple[float, ...] = Preprocessing.std

    def __call__(
        self, image: Image.Image | np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Preprocesses an image, given as for `Preprocessing`, to `f32[size, size, 3]`.

        Args:
          image: a PIL image, or an array `u8[H, W]` or `u8[H, W, 3]`.
          rng: the source of the random crop.
        """
        image = rgb(image)
        # `resize(box=...)` is not used: its filter reads pixels outside the crop.
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
    """Draws a box as torchvision's `RandomResizedCrop` does.

    An area is drawn uniformly and an aspect ratio log-uniformly, up to ten times. The
    first box that fits is placed uniformly. If none fits, the box is the largest one in
    the middle with an allowed ratio.

    Args:
      width, height: size of the image, in pixels.
      rng: the source of random numbers.
      scale: range of the area, as a fraction of the image's area.
      ratio: range of width / height.

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
    """Decodes an image completely.

    Args:
      content: a file's bytes, in one of `FORMATS`.
      name: name of the file, for the message.

    Raises:
      ValueError: the bytes are not an image in one of these formats, or only a part of
        one, or the image is too large.
    """
    try:
        # Without this list, Pillow tries decoders that start other programs.
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
    """Returns an image with 8 bits per channel as RGB; transparency is dropped.

    Raises:
      ValueError: the image has more bits; Pillow would cut off the upper ones.
    """
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8:
            raise ValueError(
                f"an image has the dtype {image.dtype}; expected uint8, from 0 to 255. "
                "Do not preprocess an image twice."
            )
        image = Image.fromarray(image)
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"an image has the mode {image.mode}, with more than 8 bits per channel. "
            "Convert it to 8 bits."
        )
    return image.convert("RGB")


def _normalized(image, mean, std):
    pixels = np.asarray(image, np.float32) / 255
    # Whole rows are processed: NumPy is four times slower over three channels alone.
    rows = pixels.reshape(len(pixels), -1)
    rows -= np.tile(np.float32(mean), image.width)
    rows /= np.tile(np.float32(std), image.width)
    return pixels
