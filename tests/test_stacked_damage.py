"""Damaged models in slices and vocabularies are one error, or a whole merge."""

import json
import random
import shutil

import numpy as np
import pytest
import stacked_models

from jaxarith import cli, hub

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("damage")
    stacked_models.write(place)
    return place


def bytes_changed(content, rng):
    content = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(min(len(content), header))] = rng.randrange(256)
    return bytes(content)


def cut(content, rng):
    return content[: rng.randrange(len(content))]


VALUES = (None, -1, 0, 2.5, "x", [], [1], {}, {"x": 1}, {"x": -1}, True, 10**30)


def value_changed(content, rng):
    """One value of the JSON, at the top or below."""
    found = json.loads(content)
    inner = found
    while True:
        key = rng.choice([*inner])
        if not isinstance(inner[key], dict) or not inner[key] or rng.random() < 0.3:
            break
        inner = inner[key]
    inner[key] = rng.choice(VALUES)
    return json.dumps(found).encode()


def header_changed(content, rng):
    """One entry of the header of safetensors, with its length put right."""
    length = int.from_bytes(content[:8], "little")
    header = value_changed(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@pytest.mark.parametrize("path", stacked_models.PATHS)
@pytest.mark.parametrize(
    ("file", "change"),
    [
        (WEIGHTS, bytes_changed),
        (WEIGHTS, header_changed),
        (WEIGHTS, cut),
        (CONFIG, value_changed),
        (TOKENIZER, value_changed),
        (TOKENIZER, cut),
        (SETTINGS, value_changed),
    ],
)
def test_whatever_is_damaged_is_one_error(place, tmp_path, capsys, path, file, change):
    rng = random.Random(0)
    folder, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(place, folder)
    config = tmp_path / "c.yaml"
    config.write_text(stacked_models.PATHS[path](folder, "linear", weight=0.5))
    failed = 0
    for number in range(24):
        damaged = folder / "abc"[number % 3] / file
        content = damaged.read_bytes()
        damaged.write_bytes(change(content, rng))
        # The check reads headers alone; what it refuses, the merge refuses too.
        checked = cli.main(["recipe", "check", str(config)])
        capsys.readouterr()
        status = cli.main(["merge", str(config), str(out), "--quiet"])
        error = capsys.readouterr().err
        assert status in (0, 1) and "Traceback" not in error
        assert checked <= status, (damaged, error)
        if status:
            assert error.startswith("jaxarith merge: "), error
            assert not out.exists()
            failed += 1
        else:
            assert all(np.isfinite(x).all() for x in hub.read(out).values())
            shutil.rmtree(out)
        damaged.write_bytes(content)
    # Some values, as of model_type, may be anything.
    assert failed >= (3 if change is value_changed else 15), failed
    assert sorted(x.name for x in tmp_path.iterdir()) == ["c.yaml", "models"]
