"""Images as CLIP wants them, and image-classification tasks."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """A classification task: class names, prompt templates, and three sources.

    Every source yields `{"image": f32[H, W, 3], "label": int}`, with images already
    preprocessed for the model.
    """

    name: str
    classes: Sequence[str]
    templates: Sequence[str]
    train: Any
    validation: Any
    test: Any


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
    def from_folder(cls, folder) -> "Preprocessing":
        """Reads a Hugging Face `preprocessor_config.json`.

        Raises:
          ValueError: the file is missing or has no size, mean or std.
        """
        path = Path(folder) / "preprocessor_config.json"
        try:
            raw = json.loads(path.read_text())
            size = raw["size"]
            size = size if isinstance(size, int) else min(size.values())
            return cls(size, tuple(raw["image_mean"]), tuple(raw["image_std"]))
        except (OSError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"cannot read {path.name} in {folder}: {error!r}. It must state size, "
                "image_mean and image_std, as CLIP checkpoints do."
            ) from error

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """`f32[size, size, 3]` of a PIL image or an array `u8[H, W]`, `u8[H, W, 3]`."""
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image, np.uint8))
        image = image.convert("RGB")
        # Hugging Face and torchvision truncate the longer edge.
        width, height = (self.size * side // min(image.size) for side in image.size)
        if (width, height) != image.size:
            # PIL's bicubic filters when it shrinks; jax.image.resize differs.
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = np.asarray(image, np.float32) / 255
        return (pixels - np.float32(self.mean)) / np.float32(self.std)
