"""Damaged adapters are one error, and stopped commands leave nothing behind."""

import json
import random
import shutil

import numpy as np
import pytest
from adapter_folders import SHAPES, normal, write
from merge_command import checkpoint

from jaxarith import cli
from jaxarith.hub import adapter_writing

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("damage")
    tensors = {f"{m}.weight": normal(i, *SHAPES[m]) for i, m in enumerate(SHAPES)}
    base = checkpoint(place / "base", tensors)
    moved = {name: x + normal(9, *x.shape) for name, x in tensors.items()}
    checkpoint(place / "tuned", moved)
    for i in range(2):
        write(place / f"{i}", i, base_model_name_or_path=base, rank_pattern={"no": 2})
    return place


def commands(place, adapter, out):
    """Every command that reads an adapter."""
    to_adapter = ["--to-adapter", "--model", str(place / "1")]
    merge = ["merge", "--quiet", "--method", "task_arithmetic", "--model", str(adapter)]
    base, tuned = str(place / "base"), str(place / "tuned")
    yield [*merge, *to_adapter, "--out", str(out)]
    yield [*merge, "--base", base, "--out", str(out)]
    yield ["verify", "--quiet", base, str(adapter), tuned]
    yield ["extract", "--quiet", base, str(adapter), "--rank", "2", "--out", str(out)]


def bytes_changed(content, rng):
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(min(len(content), 900))] = rng.randrange(256)
    return bytes(content)


def cut(content, rng):
    return content[: rng.randrange(len(content))]


VALUES = (None, -1, 0, 2.5, "x", [], [1], {}, {"(": 1}, {"q_proj": "x"}, True, 10**30)


def value_changed(content, rng):
    config = json.loads(content)
    keys = [*config, "target_parameters", "use_dora", "lora_bias", "fan_in_fan_out"]
    config[rng.choice([*keys, "trainable_token_indices"])] = rng.choice(VALUES)
    return json.dumps(config).encode()


@pytest.mark.parametrize(
    ("file", "change"),
    [(WEIGHTS, bytes_changed), (WEIGHTS, cut), (CONFIG, cut), (CONFIG, value_changed)],
)
def test_whatever_is_damaged_is_one_error(place, tmp_path, capsys, file, change):
    rng = random.Random(0)
    content = (place / "0" / file).read_bytes()
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(place / "0", adapter)
    failed = 0
    for _ in range(30):
        (adapter / file).write_bytes(change(content, rng))
        for command in commands(place, adapter, out):
            status = cli.main(command)
            error = capsys.readouterr().err
            assert status in (0, 1) and "Traceback" not in error
            if status and command[0] != "verify":
                assert error.startswith(f"jaxarith {command[0]}: "), error
                assert not out.exists()
                failed += 1
            shutil.rmtree(out, ignore_errors=True)
    assert failed > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("number", [0, 3])
def test_a_stopped_command_leaves_everything_as_it_was(
    place, tmp_path, monkeypatch, number
):
    command = [*commands(place, place / "0", tmp_path / "out")][number]
    assert cli.main(command) == 0
    before = {x.name: x.read_bytes() for x in (tmp_path / "out").iterdir()}

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_writing, "write", stopped)
    assert cli.main([*command, "--overwrite"]) == 130
    assert {x.name: x.read_bytes() for x in (tmp_path / "out").iterdir()} == before
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [0, 3])
def test_the_bits_are_the_same_every_time(place, tmp_path, number):
    found = []
    for i in range(2):
        command = [*commands(place, place / "0", tmp_path / f"{i}")][number]
        assert cli.main(command) == 0
        found.append((tmp_path / f"{i}" / WEIGHTS).read_bytes())
    assert found[0] == found[1]


def test_numbers_that_are_not_finite_are_refused(place, tmp_path, capsys):
    adapter = write(
        tmp_path / "adapter", 0, base_model_name_or_path=str(place / "base")
    )
    content = bytearray((tmp_path / "adapter" / WEIGHTS).read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / "adapter" / WEIGHTS).write_bytes(bytes(content))
    for command in commands(place, adapter, tmp_path / "out"):
        if command[0] == "verify":
            continue
        assert cli.main(command) == 1
        assert "NaN or infinite" in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["adapter"]
