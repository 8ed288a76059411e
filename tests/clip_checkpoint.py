"""A small CLIP saved as a checkpoint, and changes to its files."""

import json
import re

import pytest
from safetensors.numpy import load_file, save_file
from tiny import random_params, tiny_clip, tiny_clip_config

from jaxarith import hub
from jaxarith.models import clip

LAYOUT = clip.layout(tiny_clip())
CONFIG = tiny_clip_config()


@pytest.fixture(scope="module")
def params():
    return random_params(0, LAYOUT)


@pytest.fixture
def checkpoint(tmp_path, params):
    """A good checkpoint, for tests to spoil."""
    hub.save(tmp_path / "clip", params, CONFIG)
    return tmp_path / "clip"


def rewrite(folder, change):
    """Rewrites the tensors of a checkpoint as `change(tensors)` leaves them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def write_shards(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20]}
    shards["model-00002-of-00002.safetensors"] = names[20:]
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, checkpoint / shard)
    index = {name: shard for shard, held in shards.items() for name in held}
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )


def shallow(folder):
    """The tiny CLIP with one layer of images, which compiles three times as fast."""
    config = hub.read_json(clip.TINY_CLIP)
    config["vision_config"]["num_hidden_layers"] = 1
    deeper = re.compile(r"vision_model\.encoder\.layers\.[1-9]")
    tensors = hub.read(clip.TINY_CLIP)
    kept = {name: x for name, x in tensors.items() if not deeper.match(name)}
    assert len(kept) < len(tensors)
    hub.write(folder, kept, config, copy_from=clip.TINY_CLIP)
