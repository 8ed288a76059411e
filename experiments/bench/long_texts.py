"""What a linearised step costs on long texts, with blocks of queries and without.

Random weights and inputs of a language model's true sizes, but of fewer blocks. A step
is the gradient of a loss in the task vector, without an optimizer. The steps of one
length run in turn, A B A B. "Processor seconds" add up the cores and do not count the
time that other processes take.

    python -m experiments.bench.long_texts --out runs/long_texts
    python -m experiments.bench.long_texts --model t5-small-encoder \\
        --lengths 512 1024 2048 --out runs/long_texts_t5

See `jaxarith.models.blocked_attention`.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import encoders, measure
from experiments.common import script
from jaxarith import tangent, tree
from jaxarith.models import blocked_attention, gpt2, t5

# Lengths from which on texts are taken by blocks.
FORMS = {"whole": sys.maxsize, "blocks": 1}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure linearised steps on long texts."""

    out: Path
    """Folder for report.json and report.md."""
    model: Literal["gpt2", "t5-small-encoder"] = "gpt2"
    lengths: tuple[int, ...] = (512, 1024)
    """Tokens of a text."""
    batch: int = 1
    """Texts of a step."""
    layers: int = 2
    """Transformer blocks."""
    repetitions: int = 3
    """Runs of each step that count, after one that does not."""


def prepare(config: Config, length: int) -> tuple[Callable, tuple]:
    """`step(params, tau, ids, mask) -> gradient` and its arguments."""
    if config.model == "gpt2":
        sizes = gpt2.GPT2Config(n_layer=config.layers, n_positions=length)
        apply_fn, layout = gpt2.encoder(sizes), gpt2.layout(sizes)
    else:
        sizes = t5.T5Config(num_layers=config.layers)
        apply_fn = t5.encoder(sizes)
        layout = tree.select(t5.layout(sizes), t5.ENCODER)
    params = encoders.random_params(layout, 0, "float32")
    rng = np.random.default_rng(0)
    texts = encoders.random_texts(sizes.vocab_size, (length,), rng, config.batch)

    def step(params, tau, *inputs):
        def loss(tau):
            features = functools.partial(encoders.mean_features, apply_fn)
            start, moved = tangent.jvp(features, params, tau, *inputs)
            return jnp.sum((start + moved) ** 2)

        return jax.grad(loss)(tau)

    return step, (params, encoders.random_tau(params, 1), *texts)


def of_length(config: Config, length: int) -> list[dict]:
    """A row for each form of attention."""
    compiled, processor = {}, {form: [] for form in FORMS}
    for form, threshold in FORMS.items():
        step, args = prepare(config, length)
        with mock.patch.object(blocked_attention, "LENGTH", threshold):
            compiled[form] = jax.jit(step).lower(*args).compile()

    def run(form):
        start = time.process_time()
        jax.block_until_ready(compiled[form](*args))
        processor[form].append(time.process_time() - start)

    functions = {form: functools.partial(run, form) for form in FORMS}
    seconds = measure.alternated(functions, config.repetitions)
    rows = [
        {
            "tokens": length,
            "attention": form,
            "s": float(np.median(seconds[form])),
            "processor s": float(np.median(processor[form][1:])),
            "temporary MB": compiled[form].memory_analysis().temp_size_in_bytes / 1e6,
        }
        for form in FORMS
    ]
    for row in rows:
        for name in ("s", "processor s", "temporary MB"):
            row[f"{name}, over whole"] = row[name] / rows[0][name]
    return rows


@script.full_precision
def main(config: Config) -> dict:
    """Measures, prints and writes; returns what `report.json` holds."""
    rows = [row for length in config.lengths for row in of_length(config, length)]
    options = {"model": config.model, "batch": config.batch, "layers": config.layers}
    where = measure.machine() | options
    return measure.write(
        config.out,
        "Linearised steps on long texts",
        [measure.named(where), measure.table(rows)],
        {"machine": where, "rows": rows},
    )


if __name__ == "__main__":
    script.run(Config, main)
