"""Sources of raw images, and the preprocessing of their samples."""

import dataclasses
from typing import Any

import numpy as np

from experiments.common.vision import stand_ins
from jaxarith.data import images, sources
from jaxarith.typing import Source


@dataclasses.dataclass(frozen=True)
class Part:
    """A source with some of the samples of another one."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index) -> dict:
        return self.source[int(self.indices[index])]

    @property
    def labels(self) -> np.ndarray:
        if isinstance(self.source, sources.Samples):  # reads only these labels
            return self.source.labels_at(self.indices)
        return labels(self.source)[self.indices]


def labels(source: Any) -> np.ndarray:
    """Returns the labels of all samples of a source or a list, `i32[N]`."""
    found = [r["label"] for r in source] if isinstance(source, list) else source.labels
    return np.asarray(found, np.int32)


def stands_for(source: Any) -> int:
    """Returns the number of samples; for a stand-in, that of the real split."""
    return getattr(source, "stands_for", len(source))


def limited(source: Source, samples: int) -> Source:
    """Returns at most `samples` samples of a source, drawn and ordered at random."""
    if isinstance(source, stand_ins.Few):
        return dataclasses.replace(source, stands_for=min(samples, source.stands_for))
    return Part(source, np.random.default_rng(0).permutation(len(source))[:samples])


@dataclasses.dataclass(frozen=True)
class Preprocessed:
    """Preprocesses a sample for evaluation; a class, so that workers can pickle it."""

    preprocess: images.Preprocessing

    def __call__(self, sample: dict) -> dict:
        return sample | {"image": self.preprocess(sample["image"])}


@dataclasses.dataclass(frozen=True)
class Augmented:
    """Augments a sample for training; a class, so that workers can pickle it."""

    augmentation: images.Augmentation

    def __call__(self, sample: dict, rng: np.random.Generator) -> dict:
        image = self.augmentation(sample["image"], rng)
        return {"image": image, "label": np.int32(sample["label"])}
