"""Random slices of small models without a class, beside NumPy."""

import json

import numpy as np
import pytest
from checks import assert_close
from merge_command import write
from safetensors.numpy import save_file

from jaxarith import cli, hub

COUNTS = {"a": 3, "b": 5, "c": 4}
PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "norm.weight")
BEFORE, AFTER = ["model.embed_tokens.weight"], ["model.norm.weight", "lm_head.weight"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of several numbers of layers, by name: the folder and its tensors."""
    root = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    found = {}
    for name, count in COUNTS.items():
        layers = [f"model.layers.{i}.{part}" for i in range(count) for part in PARTS]
        names = [*BEFORE, *layers, *AFTER]
        shapes = {n: (4,) if "norm" in n else (4, 4) for n in names}
        tensors = {n: rng.normal(size=shapes[n]).astype("f4") for n in names}
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        config = {"model_type": "x", "num_hidden_layers": count}
        config["kinds"] = [f"{name}{i}" for i in range(count)]
        (root / name / "config.json").write_text(json.dumps(config))
        found[name] = (str(root / name), tensors)
    return found


def drawn(rng):
    """Slices: each a list of models with the first of their layers, and a length."""
    slices = []
    for _ in range(rng.integers(1, 5)):
        names = [*rng.choice(list(COUNTS), size=rng.integers(1, 4))]
        length = rng.integers(0, 1 + min(COUNTS[name] for name in names))
        starts = [rng.integers(0, 1 + COUNTS[name] - length) for name in names]
        slices.append(
            (list(zip(map(str, names), map(int, starts), strict=True)), length)
        )
    return slices


def expected_of(models, slices, weight):
    """What a merge of slices gives, by `weight(rows, depth)`."""
    new, at = {}, 0
    for number, (sources, length) in enumerate(slices):
        for i in range(length):
            depth = 1.0 if length == 1 else i / (length - 1)
            for part in PARTS:
                rows = [
                    models[name][1][f"model.layers.{start + i}.{part}"]
                    for name, start in sources
                ]
                new[f"model.layers.{at + i}.{part}"] = weight(rows, depth)
        at += length
        edges = [*(BEFORE if number == 0 else [])]
        edges += AFTER if number == len(slices) - 1 else []
        for name in edges:
            new[name] = weight([models[source][1][name] for source, _ in sources], 0.0)
    return new


def falling(rows, depth):
    """The first has the weight 1 - depth / 2, all others 1."""
    weights = [1 - depth / 2, *[1.0] * (len(rows) - 1)]
    return sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)


@pytest.mark.parametrize("seed", range(12))
def test_random_slices_are_what_numpy_makes(seed, models, tmp_path):
    rng = np.random.default_rng(seed)
    slices = drawn(rng)
    while not any(length for _, length in slices):
        slices = drawn(rng)
    lines = ["merge_method: linear", "slices:"]
    for sources, length in slices:
        lines.append("- sources:")
        for i, (name, start) in enumerate(sources):
            weight = "1" if i else "[1, 0.5]"
            lines.append(
                f"  - {{model: {models[name][0]}, layer_range: [{start}, "
                f"{start + length}], parameters: {{weight: {weight}}}}}"
            )
    path = write(tmp_path / "c.yaml", "\n".join(lines))
    assert cli.main(["merge", path, str(tmp_path / "out"), "--quiet"]) == 0
    found = hub.read(tmp_path / "out")
    assert_close(found, expected_of(models, slices, falling), 1e-6)
    config = hub.read_json(tmp_path / "out")
    firsts = [(sources[0], length) for sources, length in slices]
    assert config["kinds"] == [
        f"{name}{start + i}" for (name, start), length in firsts for i in range(length)
    ]
    assert config["num_hidden_layers"] == len(config["kinds"])


def test_mistakes_in_random_ranges_are_one_line(models, tmp_path, capsys):
    rng, folder = np.random.default_rng(0), models["a"][0]
    for number in range(40):
        start, stop = (int(x) for x in rng.integers(-2, 9, size=2))
        text = (
            "merge_method: passthrough\nslices:\n"
            f"- sources: [{{model: {folder}, layer_range: [{start}, {stop}]}}]\n"
        )
        path = write(tmp_path / "c.yaml", text)
        status = cli.main(["merge", path, str(tmp_path / f"{number}"), "--quiet"])
        said = capsys.readouterr().err
        assert status == (not 0 <= start < stop <= 3)
        if status:
            assert len(said.splitlines()) == 1 and "c.yaml, line" in said
            assert not (tmp_path / f"{number}").exists()
