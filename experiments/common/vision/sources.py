"""Sources of raw images, and what becomes of a sample on its way to the model."""

import dataclasses
from typing import Any

import numpy as np

from experiments.common.vision import stand_ins
from jaxarith.data import images, sources
from jaxarith.typing import Source


@dataclasses.dataclass(frozen=True)
class Part:
    """Some samples of a source."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index) -> dict:
        return self.source[int(self.indices[index])]

    @property
    def labels(self) -> np.ndarray:
        if isinstance(self.source, sources.Samples):  # reads no others
            return self.source.labels_at(self.indices)
        return labels(self.source)[self.indices]


def labels(source: Any) -> np.ndarray:
    """The labels of all samples, `i32[N]`; of a list too."""
    found = [r["label"] for r in source] if isinstance(source, list) else source.labels
    return np.asarray(found, np.int32)


def stands_for(source: Any) -> int:
    """The number of samples, of a stand-in those of what it stands for."""
    return getattr(source, "stands_for", len(source))


def limited(source: Source, samples: int) -> Source:
    """So many samples of a source, drawn and ordered at random."""
    if isinstance(source, stand_ins.Few):
        return dataclasses.replace(source, stands_for=min(samples, source.stands_for))
    return Part(source, np.random.default_rng(0).permutation(len(source))[:samples])


@dataclasses.dataclass(frozen=True)
class Preprocessed:
    """A sample as the model is evaluated on; a class, so that it pickles by name."""

    preprocess: images.Preprocessing

    def __call__(self, sample: dict) -> dict:
        return sample | {"image": self.preprocess(sample["image"])}


@dataclasses.dataclass(frozen=True)
class Augmented:
    """A sample as the model is trained on."""

    augmentation: images.Augmentation

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict:
        image = self.augmentation(sample["image"], rng)
        return {"image": image, "label": np.int32(sample["label"])}
