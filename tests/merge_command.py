"""Three small models, and `jaxarith merge` on them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxarith import cli

CONFIG = {"model_type": "anything"}


def checkpoint(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)

    def tensors():
        return {
            "a.weight": rng.normal(size=(4, 3)).astype(np.float32),
            "b.bias": rng.normal(size=3).astype(np.float16),
            "position_ids": np.arange(5, dtype=np.int64),
        }

    return [checkpoint(tmp_path / name, tensors()) for name in ("base", "m1", "m2")]


def run(models, out, *options):
    base, *rest = models
    named = [part for model in rest for part in ("--model", model)]
    return cli.main(["merge", "--base", base, *named, "--out", str(out), *options])


def failure(capsys, *args):
    assert run(*args) == 1
    return capsys.readouterr().err


def fails(capsys, *arguments):
    assert cli.main(["merge", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def write(path, text):
    path.write_text(text)
    return str(path)


def load(folder):
    return load_file(f"{folder}/model.safetensors")
