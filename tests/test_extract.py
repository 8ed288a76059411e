"""`jaxarith extract`: adapters from the differences of models."""

import functools
import json
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapter_folders import normal, read
from merge_command import checkpoint
from safetensors.numpy import load_file

from jaxarith import cli, resources, stream
from jaxarith.commands.adapters import classes
from jaxarith.commands.adapters.low_rank import low_rank
from jaxarith.hub import Stored

SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}
QUERY, UP = (f"model.layers.0.{x}" for x in ("self_attn.q_proj", "mlp.up_proj"))


def tensors():
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}


def product(seed, rank, rows, columns):
    return (normal(seed, rows, rank) @ normal(seed + 1, rank, columns)) / 8


@pytest.fixture(autouse=True)
def one_thread():
    with resources.one_blas_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and a model whose layers moved by ranks 2 and 3."""
    place = tmp_path_factory.mktemp("models")
    moved = tensors()
    moved[f"{QUERY}.weight"] += product(50, 2, 8, 8)
    moved[f"{UP}.weight"] += product(60, 3, 12, 8)
    return checkpoint(place / "base", tensors()), checkpoint(place / "tuned", moved)


def run(base, model, out, *options):
    arguments = ["extract", base, model, "--out", out, "--quiet", *options]
    return cli.main([*map(str, arguments)])


@pytest.mark.parametrize("rank", [3, 8])
def test_a_change_of_low_rank_is_recovered(models, tmp_path, rank):
    assert run(*models, tmp_path / "out", "--rank", rank) == 0
    pairs, config = read(tmp_path / "out")
    assert {module: len(a) for module, (a, _) in pairs.items()} == {QUERY: 2, UP: 3}
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert config["rank_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 2}
    for module, change in ((QUERY, product(50, 2, 8, 8)), (UP, product(60, 3, 12, 8))):
        a, b = pairs[module]
        np.testing.assert_allclose(b @ a, change, atol=1e-5)
        lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)
        np.testing.assert_allclose(*lengths, rtol=1e-4)
    [tau] = stream.open_models(models[0], [tmp_path / "out"]).taus
    assert sorted(tau) == [f"{UP}.weight", f"{QUERY}.weight"]


@pytest.mark.parametrize("energy", [0.6, 0.9, 1.0])
def test_energy_gives_each_layer_the_rank_that_it_needs(models, tmp_path, energy):
    out = tmp_path / "out"
    assert run(*models, out, "--energy", energy) == 0
    record = json.loads((out / "jaxarith_merge.json").read_text())
    changes = {QUERY: product(50, 2, 8, 8), UP: product(60, 3, 12, 8)}
    for row in record["layers"]:
        s = np.linalg.svd(changes[row["module"]].astype(float), compute_uv=False)
        shares = np.cumsum(s**2) / np.sum(s**2)
        rank = 1 + int(np.searchsorted(shares, energy - 1e-9))
        assert row["rank"] == (rank if energy < 1 else len(shares[s > 1e-5]))
        share = shares[row["rank"] - 1]
        np.testing.assert_allclose(row["energy"], share, rtol=1e-5)


def test_the_rank_caps_the_energy(models, tmp_path):
    assert run(*models, tmp_path / "out", "--energy", 1, "--rank", 1) == 0
    pairs, _ = read(tmp_path / "out")
    assert {len(a) for a, _ in pairs.values()} == {1}


@functools.cache
def decaying(rows, columns):
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(rows, columns)))[0]
    v = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
    s = np.arange(1, columns + 1.0) ** -0.7
    return (u * s) @ v.T, s


@pytest.mark.parametrize("turned", [False, True])
def test_sketches_are_nearly_as_good_as_the_whole(turned):
    matrix, s = decaying(400, 300)
    matrix = matrix.T if turned else matrix
    found = low_rank(jnp.asarray(matrix, "f4"), rank=20, energy=None)
    best = np.sum(s[:20] ** 2) / np.sum(s**2)
    assert best - 1e-3 < found.energy <= best + 1e-6
    error = np.sum((matrix - found.left.astype(float) @ found.right) ** 2)
    np.testing.assert_allclose(error, (1 - found.energy) * np.sum(s**2), rtol=1e-3)


def test_sketches_grow_until_the_energy_is_reached():
    matrix, s = decaying(400, 300)
    found = low_rank(jnp.asarray(matrix, "f4"), rank=None, energy=0.9)
    shares = np.cumsum(s**2) / np.sum(s**2)
    best = 1 + int(np.searchsorted(shares, 0.9))
    assert 32 < best <= len(found.right) <= best + 2
    assert found.energy >= 0.9


def test_an_exact_product_is_found_by_a_sketch():
    matrix = product(0, 5, 500, 400)
    found = low_rank(jnp.asarray(matrix), rank=16, energy=None)
    assert len(found.right) == 5
    np.testing.assert_allclose(found.left @ found.right, matrix, atol=2e-6)


def test_nothing_that_is_wide_is_factored(monkeypatch):
    shapes = []
    before = jnp.linalg.svd
    monkeypatch.setattr(
        jnp.linalg, "svd", lambda x, **k: (shapes.append(x.shape), before(x, **k))[1]
    )
    matrix = product(0, 3, 611, 521)
    low_rank(jnp.asarray(matrix), rank=8, energy=None)
    assert shapes == [(24, 24)]


def test_what_is_no_linear_layer_is_said_or_kept(models, tmp_path, capsys):
    moved = load_file(f"{models[1]}/model.safetensors")
    names = ["model.embed_tokens.weight", f"{QUERY}.bias", "model.layers.0.norm.weight"]
    for name in names:
        moved[name] = moved[name] + 1
    model = checkpoint(tmp_path / "tuned", moved)
    arguments = ["extract", models[0], model, "--rank", "4", "--out"]
    assert cli.main([*arguments, str(tmp_path / "plain")]) == 0
    told = capsys.readouterr().out
    assert "| model.layers.0.mlp.up_proj" in told
    assert "not in the adapter (--keep-rest keeps them): 3 changed tensors" in told
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "Not in the adapter: 3 changed tensors: model.embed_tokens.weight" in card
    assert cli.main([*arguments, str(tmp_path / "whole"), "--keep-rest"]) == 0
    assert "kept whole: 3 changed tensors" in capsys.readouterr().out
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens", "model.layers.0.norm"]
    opened = stream.open_models(models[0], [tmp_path / "whole"])
    [tau] = opened.taus
    for name, tensor in moved.items():
        found = opened.base[name].read() + (
            jnp.asarray(tau[name]) if name in tau else 0
        )
        np.testing.assert_allclose(found, tensor, atol=1e-5, err_msg=name)


def test_a_tied_head_is_kept_with_its_embedding(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # names must do
    shapes = {**SHAPES}
    del shapes["lm_head.weight"]
    start = {name: x for name, x in tensors().items() if name in shapes}
    moved = {
        name: x + product(5, 1, *x.shape) for name, x in start.items() if x.ndim > 1
    }
    folders = [
        checkpoint(tmp_path / name, x)
        for name, x in (("base", start), ("tuned", {**start, **moved}))
    ]
    for folder in folders:
        content = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
        with open(f"{folder}/config.json", "w") as file:
            json.dump(content, file)
    assert run(*folders, tmp_path / "out", "--rank", 2, "--keep-rest") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    assert config["task_type"] == "CAUSAL_LM"
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        expected = moved["model.embed_tokens.weight"]
        np.testing.assert_array_equal(found[f"base_model.model.{name}"], expected)


@pytest.mark.parametrize(
    ("names", "is_linear"),
    [
        ("lm_head embed_out embeddings_project visual_projection project_in", True),
        ("h.0.attn.c_attn mlp.gate_proj mlp.shared_expert_gate mlp.up_proj", True),
        ("model.embed_tokens bert.embeddings.word_embeddings wte wpe shared", False),
        ("position_embedding decoder.embed_positions embed_in tok_embeddings", False),
        ("0.SelfAttention.relative_attention_bias 0.mlp.gate moe.router", False),
        ("0.mlp.experts.0.up_proj 0.block_sparse_moe.gate", False),
    ],
)
def test_linear_layers_by_their_names(names, is_linear):
    weights = [f"{name}.weight" for name in names.split()]
    base = {x: Stored.made("f4", (4, 6), lambda: np.zeros(24)) for x in weights}
    found = classes.by_names({}, base).linear
    assert list(found) == (weights if is_linear else [])


def test_excluded_layers_and_narrow_factors(models, tmp_path):
    options = ("--rank", 4, "--exclude", r".*q_proj", "--dtype", "bfloat16")
    assert run(*models, tmp_path / "out", *options) == 0
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(found) == 2
    assert {x.dtype for x in found.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_models_in_bfloat16(models, tmp_path):
    narrow = []
    for name, folder in zip(("base", "tuned"), models, strict=True):
        content = load_file(f"{folder}/model.safetensors")
        rounded = {k: x.astype(ml_dtypes.bfloat16) for k, x in content.items()}
        narrow.append(checkpoint(tmp_path / name, rounded))
    assert run(*narrow, tmp_path / "out", "--rank", 8) == 0
    pairs, _ = read(tmp_path / "out")
    one, other = (load_file(f"{x}/model.safetensors") for x in narrow)
    for module, (a, b) in pairs.items():
        name = f"{module}.weight"
        change = other[name].astype(float) - one[name].astype(float)
        np.testing.assert_allclose(b @ a, change, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the size of the adapter is missing"),
        (("--rank", "2", "--exclude", "("), "is not a regular expression"),
        (("--rank", "2", "--exclude", ".*"), "no linear layer of"),
    ],
)
def test_refusals(models, tmp_path, capsys, options, message):
    assert run(*models, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_an_adapter_is_refused(models, tmp_path, capsys):
    def error(model, *options):
        assert run(models[0], model, tmp_path / "out", "--rank", 2, *options) == 1
        return capsys.readouterr().err

    assert "no linear layer of" in error(models[0])
    content = load_file(f"{models[1]}/model.safetensors")
    wide = {**content, "lm_head.weight": normal(0, 13, 8)}
    assert "lm_head.weight" in error(checkpoint(tmp_path / "wide", wide))
    holes = {**content, f"{UP}.weight": np.full((12, 8), np.nan, "f4")}
    assert "NaN or infinite" in error(checkpoint(tmp_path / "holes", holes))
    (tmp_path / "out").mkdir()
    assert "exists. Name a new folder" in error(models[1])
    assert sorted(x.name for x in tmp_path.iterdir()) == ["holes", "out", "wide"]


@pytest.mark.parametrize("text", ["0", "1.5", "x"])
def test_shares_and_ranks_are_checked(models, tmp_path, capsys, text):
    for flag in ("--energy", "--rank"):
        with pytest.raises(SystemExit):
            run(*models, tmp_path / "out", flag, text)
        assert f"argument {flag}: '{text}' is no" in capsys.readouterr().err
