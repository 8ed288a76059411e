"""The checks of `experiments.check_model`."""

import importlib.util
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.common import script
from experiments.common.vision import objectives, options, raw_tasks, setups, sources
from jaxarith import evaluate, sharding, train, tree
from jaxarith.data import images
from jaxarith.hub import open_clip
from jaxarith.models import clip, heads

OK, FAILED, NOT_POSSIBLE = "OK", "failed", "not possible here"
_TOLERANCE = 1e-4  # largest error of features, relative to the largest feature
_POINTS = 2.0  # largest difference from a published zero-shot accuracy
_STEPS = 3
_FETCH = (
    "Run `hf download {model} --local-dir {name}` on a machine with a connection, copy "
    "the folder here, and name its path. It must hold config.json, the weights "
    "(model.safetensors), preprocessor_config.json and the tokenizer. Keep the name of "
    "the folder: tables recognise the papers' models by it."
)


class Check(NamedTuple):
    """One line of the report.

    Attributes:
      name: name of the check.
      state: OK, FAILED or NOT_POSSIBLE.
      ours: measured zero-shot accuracy in percent.
      published: published zero-shot accuracy in percent.
      details: what was found, or what to do.
    """

    name: str
    state: str
    ours: float | None = None
    published: float | None = None
    details: str = ""


def run(
    config: options.Options, model: str, published: Mapping[str, Mapping[str, float]]
) -> list[Check]:
    """Runs all checks of a model; a failed check does not stop the next.

    Args:
      config: options of the script.
      model: a folder, or an id of the Hugging Face Hub.
      published: zero-shot accuracies in percent, by title of the model and by task.
    """
    try:
        checkpoint = clip.load(model)
    except (OSError, ImportError) as error:
        fetch = _FETCH.format(model=model, name=Path(model).name)
        return [Check("layout", FAILED, details=f"{script.one_line(error)} {fetch}")]
    except ValueError as error:
        return [Check("layout", FAILED, details=script.one_line(error))]
    size = tree.size(checkpoint.params)
    found = [Check("layout", OK, details=f"{size:,} parameters, all and no others")]
    found.append(parity(checkpoint))
    titles = {Path(name).name: title for name, title in options.TITLES.items()}
    known = published.get(titles.get(Path(model).name, ""), {})
    if config.source == "small" or config.smoke:
        known = {}  # the small tasks have the same names but other data
    tasks = []
    for check, task in zero_shot(config, checkpoint, known):
        found.append(check)
        tasks += [task] if task else []
    own = found[2 : 2 + len(config.tasks)]  # without the control
    ours = [check.ours for check in own if check.ours is not None]
    theirs = [check.published for check in own if check.published is not None]
    if len(ours) == len(own) > 1:
        mean = float(np.mean(theirs)) if len(theirs) == len(own) else None
        name = f"zero-shot, mean of {len(own)}"
        found.append(Check(name, OK, float(np.mean(ours)), mean))
    found.append(step(config, checkpoint, tasks[0] if tasks else None))
    return found


def parity(checkpoint: clip.CLIP) -> Check:
    """Compares features of four random images and four texts with transformers."""
    missing = [x for x in ("torch", "transformers") if not importlib.util.find_spec(x)]
    if missing:
        how = f"pip install {' '.join(missing)}"
        return Check("parity", NOT_POSSIBLE, details=how)
    if open_clip.weights_of(checkpoint.folder) is not None:
        how = "this is an OpenCLIP checkpoint: check the result of `jaxarith convert`"
        return Check("parity", NOT_POSSIBLE, details=how)
    import torch
    import transformers

    theirs = transformers.CLIPModel.from_pretrained(checkpoint.folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    length = checkpoint.config.text.max_position_embeddings
    size = checkpoint.config.vision.image_size
    texts = [f"a photo of {what}." for what in ("a", "b", "the letter c", "two dogs")]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
    ids = np.asarray(encoded["input_ids"], np.int32)
    x = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        both = (
            theirs.get_image_features(pixel_values=pixels),
            theirs.get_text_features(input_ids=torch.from_numpy(ids).long()),
        )
    expected = [np.asarray(getattr(y, "pooler_output", y)) for y in both]
    image = clip.image_encoder(checkpoint.config)(checkpoint.params, x)
    text = clip.text_encoder(checkpoint.config)(checkpoint.params, ids)
    apart = [
        float(np.abs(np.asarray(own) - other).max() / np.abs(other).max())
        for own, other in zip((image, text), expected, strict=True)
    ]
    state = OK if max(apart) <= _TOLERANCE else FAILED
    details = f"images {apart[0]:.1e}, texts {apart[1]:.1e}, limit {_TOLERANCE:g}"
    return Check("parity", state, details=details)


def zero_shot(
    config: options.Options,
    checkpoint: clip.CLIP,
    published: Mapping[str, float],
) -> Iterator[tuple[Check, setups.Task | None]]:
    """Checks the data and the zero-shot accuracy of every task and of the control."""
    preprocess = images.Preprocessing.from_folder(checkpoint.folder)
    encode = clip.image_encoder(checkpoint.config)
    mesh = sharding.make_mesh(config.mesh)
    params = tree.select(checkpoint.params, clip.IMAGE_ENCODER)
    control = [] if config.control == options.NO_CONTROL else [config.control]
    for spec in (*config.tasks, *control):
        name = raw_tasks.name_of(spec)
        label, theirs = f"zero-shot, {name}", published.get(name)
        try:
            raw = raw_tasks.named(spec, config)
        except script.OF_DATASETS as error:
            details = " ".join(str(error).split())
            yield Check(label, NOT_POSSIBLE, None, theirs, details), None
            continue
        head = clip.zero_shot_head(checkpoint, raw.classes, raw.templates)
        task = setups.prepared(raw, head, preprocess, config)
        features = evaluate.outputs(encode, params, task.test.batches, mesh=mesh)
        ours = 100 * task.test.accuracy(features)
        apart = 0 if theirs is None or config.samples else abs(ours - theirs)
        state = FAILED if apart > _POINTS else OK
        details = f"{task.test.size} test and {len(task.train)} training images"
        yield Check(label, state, ours, theirs, details), task


def step(
    config: options.Options, checkpoint: clip.CLIP, task: setups.Task | None
) -> Check:
    """Takes three linearised steps on a task, or on noise without a task."""
    preprocess = images.Preprocessing.from_folder(checkpoint.folder)
    if task is None:
        x = np.random.default_rng(0).integers(256, size=(8, 64, 64, 3), dtype="u1")
        source = [{"image": image, "label": i % 2} for i, image in enumerate(x)]
        width = checkpoint.config.projection_dim
        head, on = jax.random.normal(jax.random.key(0), (2, width)), "noise"
    else:
        source, head, on = task.train, task.test.head, task.name
    recipe = train.TrainConfig(
        steps=_STEPS, batch_size=config.batch_size, linearized=True
    )
    mesh = sharding.make_mesh(config.mesh)
    kept = images.Augmentation(preprocess.size, preprocess.mean, preprocess.std)
    batches = train.task_batches(
        [source], recipe, names=[on], augment=sources.Augmented(kept), mesh=mesh
    )
    losses, times = [], []

    def observe(done, taus, metrics):
        losses.append(metrics["loss"][on])
        times.append(time.perf_counter())

    try:
        train.fine_tune(
            clip.image_encoder(checkpoint.config, remat=config.remat),
            tree.select(checkpoint.params, clip.IMAGE_ENCODER),
            objectives.loss,
            batches,
            recipe,
            names=[on],
            constants=heads.pad([head]),
            mesh=mesh,
            observe=observe,
            observe_every=1,
        )
    except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        return Check("linearised step", FAILED, details=script.one_line(error))
    state = OK if np.isfinite(losses).all() else FAILED
    shown = ", ".join(f"{loss:.4g}" for loss in losses)
    details = f"{config.batch_size} images of {on}: losses {shown}; "
    details += f"last step {times[-1] - times[-2]:.2f} s; {_memory()}"
    return Check("linearised step", state, details=details)


def _memory() -> str:
    """Returns the peak memory of the first device, if the device reports it."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    device = jax.local_devices()[0].device_kind
    return f"{used / 1e9:.1f} GB of {device}" if used else f"{device}, memory unknown"
