"""`jaxarith inspect`: figures against NumPy's, of whole checkpoints in memory."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxarith import cli, fingerprint
from jaxarith.models import clip

SHAPES = {
    "embed.weight": (7, 4),
    "layers.0.fc.weight": (4, 5),
    "layers.0.fc.bias": (5,),
    "layers.2.fc.weight": (4, 5),
    "layers.10.fc.weight": (4, 5),
}


def random_tensors(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.normal(size=shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def checkpoint(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def sharded(folder, tensors):
    folder.mkdir()
    index = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"part-{i}.safetensors")
        index[name] = f"part-{i}.safetensors"
    text = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def inspect(out, *arguments):
    """The report as data; fails unless the command succeeds."""
    assert cli.main(["inspect", *map(str, arguments), "--out", str(out)]) == 0
    return json.loads((out / "report.json").read_text())


def norm(*arrays):
    return np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in arrays))


def test_figures_of_a_checkpoint_are_numpys(tmp_path, capsys):
    tensors = random_tensors(0)
    tensors["layers.2.fc.weight"] = tensors["layers.2.fc.weight"].astype(
        ml_dtypes.bfloat16
    )
    tensors["ids"] = np.arange(3)
    folder = checkpoint(tmp_path / "m", tensors)
    [model] = inspect(tmp_path / "out", folder, "--tensors")["models"]
    floats = {k: v for k, v in tensors.items() if k != "ids"}
    assert model["parameters"] == sum(x.size for x in tensors.values())
    assert model["bytes"] == sum(x.nbytes for x in tensors.values())
    assert model["dtypes"] == {"f32": 28 + 20 + 5 + 20, "bf16": 20, "i64": 3}
    assert model["files"] == ["model.safetensors"]
    np.testing.assert_allclose(model["norm"], norm(*floats.values()), rtol=1e-6)
    rows = {row["name"]: row for row in model["tensors"]}
    assert rows.keys() == tensors.keys()
    assert rows["ids"]["norm"] is None
    for name, tensor in floats.items():
        np.testing.assert_allclose(rows[name]["norm"], norm(tensor), rtol=1e-6)
        assert tuple(rows[name]["shape"]) == tensor.shape
    assert model["largest"][0]["name"] == "embed.weight"
    assert model["copies"] == []
    layers = {entry["layer"]: entry for entry in model["layers"]}
    assert list(layers) == ["embed", "layers.0", "layers.2", "layers.10"]
    first = [tensors["layers.0.fc.weight"], tensors["layers.0.fc.bias"]]
    np.testing.assert_allclose(layers["layers.0"]["norm"], norm(*first), rtol=1e-6)
    assert (layers["layers.0"]["tensors"], layers["layers.0"]["parameters"]) == (2, 25)
    text = (tmp_path / "out" / "report.md").read_text()
    assert text == capsys.readouterr().out
    assert "96 parameters (73 f32, 3 i64, 20 bf16)" in text
    assert "| layers.10.fc.weight | f32   | [4, 5] |" in text
    assert not (tmp_path / "out" / "cosines.png").exists()


def test_large_tensors_are_measured_in_pieces(tmp_path):
    tensor = np.random.default_rng(0).normal(size=(700, 1000)).astype(np.float16)
    tensor[699, 999] = 300
    folder = checkpoint(tmp_path / "m", {"w.weight": tensor})
    [model] = inspect(tmp_path / "out", folder)["models"]
    np.testing.assert_allclose(model["norm"], norm(tensor), rtol=1e-9)


def test_fingerprint_is_that_of_the_tree_in_any_files(tmp_path):
    tensors = random_tensors(0)
    whole = checkpoint(tmp_path / "whole", tensors)
    parts = sharded(tmp_path / "parts", tensors)
    tensors["embed.weight"][6, 3] += 1e-6
    other = checkpoint(tmp_path / "other", tensors)
    found = inspect(tmp_path / "out", whole, parts, other)["models"]
    prints = [model["fingerprint"] for model in found]
    assert prints[0] == prints[1] != prints[2]
    assert int(prints[2], 16) == fingerprint.combined(tensors)
    assert len(found[1]["files"]) == len(SHAPES)


def test_copies_are_matrices_with_equal_bytes(tmp_path):
    tensors = random_tensors(0)
    tensors |= {"head.weight": tensors["embed.weight"].copy()}
    tensors |= {f"norm.{i}.bias": np.ones(4, np.float32) for i in range(2)}
    tensors |= {f"zero.{i}.weight": np.zeros((2, 2), np.float32) for i in range(2)}
    [model] = inspect(tmp_path / "out", checkpoint(tmp_path / "m", tensors))["models"]
    assert model["copies"] == [["embed.weight", "head.weight"]]


def test_values_that_are_not_finite_are_counted(tmp_path, capsys):
    tensors = random_tensors(0)
    good = norm(tensors["layers.0.fc.bias"][2:])
    tensors["layers.0.fc.bias"][:2] = np.nan, np.inf
    [model] = inspect(tmp_path / "out", checkpoint(tmp_path / "m", tensors))["models"]
    bad = [row for row in model["tensors"] if row["not_finite"]]
    assert [(row["name"], row["not_finite"]) for row in bad] == [
        ("layers.0.fc.bias", 2)
    ]
    np.testing.assert_allclose(bad[0]["norm"], good, rtol=1e-6)
    assert "infinite values: layers.0.fc.bias (2)" in capsys.readouterr().out


def test_differences_between_checkpoints_are_listed(tmp_path, capsys):
    first, other = random_tensors(0), random_tensors(0)
    del other["layers.0.fc.bias"]
    other["extra.bias"] = np.ones(2, np.float32)
    other["layers.2.fc.weight"] = other["layers.2.fc.weight"].T.copy()
    other["layers.10.fc.weight"] = other["layers.10.fc.weight"].astype(np.float16)
    found = inspect(
        tmp_path / "out",
        checkpoint(tmp_path / "a", first),
        checkpoint(tmp_path / "b", other),
    )
    [entry] = found["differences"]
    assert entry["missing"] == ["layers.0.fc.bias"]
    assert entry["added"] == ["extra.bias"]
    assert entry["shapes"] == [["layers.2.fc.weight", [4, 5], [5, 4]]]
    assert entry["dtypes"] == [["layers.10.fc.weight", "f32", "f16"]]
    assert entry["equal"] == 2
    printed = capsys.readouterr().out
    assert "- 1 tensor is of another dtype: layers.10.fc.weight (f32 → f16)" in printed


@pytest.fixture
def fine_tuned(tmp_path):
    """Tensors of a base and three models, and their folders; one has shards."""
    base = random_tensors(0)
    moves = [random_tensors(seed, 0.1) for seed in (1, 2, 3)]
    for name in base:  # not orthogonal, and the same in one layer
        moves[1][name] += 0.5 * moves[0][name]
    moves[1]["embed.weight"] = moves[0]["embed.weight"].copy()
    moves[2]["embed.weight"][:] = 0
    models = [{k: base[k] + move[k] for k in base} for move in moves]
    taus = [{k: model[k] - base[k] for k in base} for model in models]
    folders = [
        checkpoint(tmp_path / "base", base),
        checkpoint(tmp_path / "one", models[0]),
        sharded(tmp_path / "two", models[1]),
        checkpoint(tmp_path / "three", models[2]),
    ]
    return base, taus, folders


def flat(tau, names=SHAPES):
    return np.concatenate([tau[name].astype(np.float64).ravel() for name in names])


def cosine(a, b):
    return a @ b / np.sqrt(a @ a * (b @ b))


def test_norms_and_cosines_of_task_vectors_are_numpys(fine_tuned, tmp_path, capsys):
    base, taus, (base_folder, *models) = fine_tuned
    out = tmp_path / "out"
    found = inspect(out, *models, "--base", base_folder, "--tensors")
    np.testing.assert_allclose(found["base_norm"], norm(*base.values()), rtol=1e-6)
    for entry, tau in zip(found["models"], taus, strict=True):
        np.testing.assert_allclose(entry["norm"], norm(*tau.values()), rtol=1e-5)
        relative = norm(*tau.values()) / norm(*base.values())
        np.testing.assert_allclose(entry["relative"], relative, rtol=1e-5)
    assert [entry["name"] for entry in found["models"]] == ["one", "two", "three"]
    expected = [[cosine(flat(a), flat(b)) for b in taus] for a in taus]
    assert 0.3 < expected[0][1] < 0.9
    np.testing.assert_allclose(found["cosines"], expected, atol=1e-5)
    layers = {entry["layer"]: entry for entry in found["layers"]}
    assert list(layers) == ["embed", "layers.0", "layers.2", "layers.10"]
    names = ["layers.0.fc.weight", "layers.0.fc.bias"]
    expected = [[cosine(flat(a, names), flat(b, names)) for b in taus] for a in taus]
    np.testing.assert_allclose(layers["layers.0"]["cosines"], expected, atol=1e-5)
    norms = [norm(*(tau[name] for name in names)) for tau in taus]
    np.testing.assert_allclose(layers["layers.0"]["norms"], norms, rtol=1e-5)
    assert layers["embed"]["norms"][2] == 0
    for entry in found["tensors"]:
        norms = [norm(tau[entry["name"]]) for tau in taus]
        np.testing.assert_allclose(entry["norms"], norms, rtol=1e-5)
    text = capsys.readouterr().out
    assert text == (out / "report.md").read_text()
    # The third model did not move there, so that one pair is left.
    [row] = [line for line in text.splitlines() if line.startswith("| embed  ")]
    assert row.endswith("|             0 |      1.0000 |")
    assert (out / "cosines.png").read_bytes().startswith(b"\x89PNG")


def test_cosines_of_a_model_with_itself_and_its_opposite(fine_tuned, tmp_path):
    base, taus, (base_folder, one, *_) = fine_tuned
    opposite = {k: base[k] - taus[0][k] for k in base}
    folder = checkpoint(tmp_path / "opposite", opposite)
    found = inspect(tmp_path / "out", one, one, folder, "--base", base_folder)
    expected = [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    # The base rounds the differences.
    np.testing.assert_allclose(found["cosines"], expected, atol=1e-5)
    assert len({entry["name"] for entry in found["models"]}) == 2


def test_one_model_on_a_base_has_norms_only(fine_tuned, tmp_path, capsys):
    _, taus, (base, one, *_) = fine_tuned
    found = inspect(tmp_path / "out", one, "--base", base)
    [entry] = found["models"]
    np.testing.assert_allclose(entry["norm"], norm(*taus[0].values()), rtol=1e-5)
    assert not (tmp_path / "out" / "cosines.png").exists()
    assert "osine" not in capsys.readouterr().out


def test_adapters_count_as_task_vectors(fine_tuned, tmp_path):
    _, _, (base, one, *_) = fine_tuned
    rng = np.random.default_rng(5)
    a = rng.normal(size=(2, 5)).astype(np.float32)
    b = rng.normal(size=(4, 2)).astype(np.float32)
    folder = tmp_path / "adapter"
    folder.mkdir()
    key = "base_model.model.layers.2.fc.lora_"
    tensors = {f"{key}A.weight": a, f"{key}B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = inspect(tmp_path / "out", one, folder, "--base", base)
    expected = norm(1.5 * b.astype(np.float64) @ a)
    np.testing.assert_allclose(found["models"][1]["norm"], expected, rtol=1e-5)
    assert cli.main(["inspect", str(folder)]) == 1


@pytest.mark.parametrize("on_base", [False, True])
def test_folders_without_a_checkpoint_are_an_error(tmp_path, capsys, on_base):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    options = ["--base", str(clip.TINY_CLIP)] if on_base else []
    assert cli.main(["inspect", str(empty), *options, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("jaxarith inspect: no checkpoint in")
    assert not out.exists()


def test_task_vectors_with_nan_are_an_error_that_names_them(fine_tuned, capsys):
    _, taus, (base, one, *_) = fine_tuned
    broken = {k: np.full_like(tau, np.nan) for k, tau in taus[0].items()}
    save_file(broken, one / "model.safetensors")
    assert cli.main(["inspect", str(one), "--base", str(base)]) == 1
    assert "NaN or infinite values" in capsys.readouterr().err


def test_models_with_other_vocabularies_are_inspected_if_a_policy_is_chosen(
    tmp_path, capsys
):
    base, tuned = random_tensors(0), random_tensors(1)
    tuned["embed.weight"] = tuned["embed.weight"][:5]
    folders = [checkpoint(tmp_path / "b", base), checkpoint(tmp_path / "m", tuned)]
    command = ["inspect", str(folders[1]), "--base", str(folders[0])]
    assert cli.main(command) == 1
    assert "(--vocabulary, in" in capsys.readouterr().err
    found = inspect(
        tmp_path / "out",
        *(folders[1], "--base", folders[0]),
        "--vocabulary",
        "truncate",
    )
    base["embed.weight"] = base["embed.weight"][:5]
    expected = norm(*(tuned[name] - base[name] for name in base))
    np.testing.assert_allclose(found["models"][0]["norm"], expected, rtol=1e-6)


def test_types_without_arithmetic_are_an_error(tmp_path, capsys):
    header = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    folder = tmp_path / "m"
    folder.mkdir()
    content = len(header).to_bytes(8, "little") + header + b"\0\0"
    (folder / "model.safetensors").write_bytes(content)
    for command in (["inspect"], ["convert"]):
        rest = [str(tmp_path / "out")] * (command == ["convert"])
        assert cli.main([*command, str(folder), *rest]) == 1
        assert "w has the dtype f8_e4m3" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "out"
    file.write_text("mine")
    assert cli.main(["inspect", str(clip.TINY_CLIP), "--out", str(file)]) == 1
    assert "is a file; expected a folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_msgpack_checkpoints_are_inspected_too(tmp_path):
    folder = tmp_path / "flax"
    assert cli.main(["convert", str(clip.TINY_CLIP), str(folder)]) == 0
    found = inspect(tmp_path / "out", clip.TINY_CLIP, folder)["models"]
    assert [model["parameters"] for model in found] == [359041, 359041]
    np.testing.assert_allclose(found[0]["norm"], found[1]["norm"], rtol=1e-9)
    assert jnp.isfinite(found[0]["norm"])
