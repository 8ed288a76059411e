"""How many images a second are read, decoded and augmented for training.

Writes a folder of JPEG files, from 256x256 to 500x375, and makes batches of them with
threads of this process (0 workers) and with worker processes.

    python -m experiments.bench.input_rate --workers 0 2 4 --out runs/input_rate

A training step is fed where it takes longer than a batch does here.
"""

import dataclasses
import functools
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.bench import measure
from experiments.common import script
from experiments.common.vision import sources
from jaxarith.data import images, pipeline, vision

SHAPES = ((256, 256), (333, 250), (375, 500), (500, 375))  # width, height


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path | None = None
    """Folder for report.json and report.md; none by default."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Worker processes, one row for each; 0 is threads of this process."""
    size: int = 224
    batch_size: int = 128
    batches: int = 20
    """How many are timed, after two that are not."""
    images: int = 400
    """How many files are written, of which the batches are drawn."""


def write_images(folder: Path, count: int):
    """An image folder of two classes: smooth shapes with a little noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        split = "test" if i % 10 == 0 else "train"
        path = folder / split / f"class_{i // 10 % 2}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = SHAPES[i % len(SHAPES)]
        coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC)
        )
        noisy = smooth + rng.normal(0, 8, smooth.shape)
        pixels = np.clip(noisy, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)


def batch(samples, batch_size: int, step: int) -> dict:
    first = step * batch_size
    return pipeline.collate([samples[first + i] for i in range(batch_size)])


def rate(source, config: Config, workers: int) -> float:
    """Images a second, from the second batch on."""
    augment = sources.Augmented(images.Augmentation(config.size))
    samples = pipeline.shuffled(source, 0, augment)
    make = functools.partial(batch, samples, config.batch_size)
    # More than are taken, so that no worker idles while the last ones are timed.
    count = 2 + config.batches + 4 * (1 + workers)
    batches = pipeline.prefetch(pipeline.lazy(make, count), 0, workers=workers)
    for _ in range(2):
        next(batches)
    start = time.perf_counter()
    for _ in range(config.batches):
        next(batches)
    return config.batches * config.batch_size / (time.perf_counter() - start)


@script.full_precision
def main(config: Config) -> dict:
    """Measures, prints and writes; returns what `report.json` holds."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), config.images)
        source = vision.load_folder("synthetic", folder).train
        for workers in config.workers:
            found = rate(source, config, workers)
            row = {"workers": workers, "images/s": found}
            rows.append(row | {"steps/s": found / config.batch_size})
    said = f"Batches of {config.batch_size}, size {config.size}."
    results = {"machine": measure.machine(), "rows": rows}
    parts = [said, measure.table(rows)]
    return measure.write(config.out, "", parts, results)


if __name__ == "__main__":
    script.run(Config, main)
