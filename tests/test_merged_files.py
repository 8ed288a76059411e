"""`jaxarith merge` of single files, PyTorch's files, and folders of the Hub's cache."""

import json
import shutil
from pathlib import Path

import merge_command
import numpy as np
import pytest
from merge_command import CONFIG, failure, load, run

from jaxarith import hub
from jaxarith.hub import pickles

models = merge_command.models  # a fixture
DOUBLE = ("--method", "task_arithmetic", "--coef", "0.5", "--quiet")


@pytest.fixture
def merged(models, tmp_path):
    """The tensors of the merge of the folders."""
    assert run(models, tmp_path / "of_folders", *DOUBLE) == 0
    return load(tmp_path / "of_folders")


def assert_same(folder, merged):
    found = load(folder)
    assert found.keys() == merged.keys()
    for name, leaf in merged.items():
        np.testing.assert_array_equal(found[name], leaf)


def test_single_files_merge_to_weights_without_a_configuration(
    models, merged, tmp_path, capsys
):
    files = []
    for model in models:
        files.append(f"{model}.safetensors")
        shutil.copy(f"{model}/model.safetensors", files[-1])
    out = tmp_path / "out"
    assert run(files, out, *DOUBLE[:-1]) == 0
    assert "is a single file, so the merge has weights and no config.json" in (
        capsys.readouterr().err
    )
    assert_same(out, merged)
    names = {"README.md", "jaxarith_merge.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    record = json.loads((out / "jaxarith_merge.json").read_text())
    [base, *_] = record["inputs"]
    assert base["sha256"].keys() == {Path(files[0]).name}


def test_a_file_on_a_folder_keeps_the_folders_configuration(models, merged, tmp_path):
    base, one, two = models
    shutil.copy(f"{one}/model.safetensors", tmp_path / "one.safetensors")
    out = tmp_path / "out"
    assert run([base, str(tmp_path / "one.safetensors"), two], out, *DOUBLE) == 0
    assert_same(out, merged)
    assert json.loads((out / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("name", ["notes.txt", "model.gguf", "broken.safetensors"])
def test_files_of_other_kinds_are_refused(models, tmp_path, capsys, name):
    (tmp_path / name).write_text("nothing")
    base, *_ = models
    error = failure(capsys, [base, str(tmp_path / name)], tmp_path / "out", *DOUBLE)
    assert error.count("\n") == 1 and name in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_base(models, tmp_path, capsys):
    _, one, two = models
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    error = failure(
        capsys, [str(tmp_path / "lora"), one, two], tmp_path / "out", *DOUBLE
    )
    assert "lora is an adapter, but the base must be a whole model" in error


def in_pytorch(torch, folder, shards, zipped=True):
    """Replaces the weights of a folder by PyTorch's files."""
    file = Path(folder) / "model.safetensors"
    tensors = {n: torch.from_numpy(x) for n, x in load(folder).items()}
    options = {"_use_new_zipfile_serialization": zipped}
    file.unlink()
    if shards == 1:
        torch.save(tensors, file.with_name("pytorch_model.bin"), **options)
        return
    shard_of = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        shard_of[name] = f"pytorch_model-{i % 2}.bin"
        torch.save({name: tensor}, file.with_name(f"part{i}.bin"), **options)
    for shard in sorted({*shard_of.values()}):
        held = {n: x for n, x in tensors.items() if shard_of[n] == shard}
        torch.save(held, file.with_name(shard), **options)
    for part in file.parent.glob("part*.bin"):
        part.unlink()
    index = file.with_name("pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_files_of_pytorch_merge_as_safetensors_do(
    models, merged, tmp_path, shards, zipped
):
    torch = pytest.importorskip("torch")
    for folder in models[:2]:
        in_pytorch(torch, folder, shards, zipped)
    out = tmp_path / "out"
    assert run(models, out, *DOUBLE) == 0
    assert_same(out, merged)
    record = json.loads((out / "jaxarith_merge.json").read_text())
    assert len(record["inputs"][0]["sha256"]) == shards
    assert not list(out.glob("*.bin*"))


@pytest.mark.torch
def test_bfloat16_of_pytorch_keeps_its_bits(tmp_path):
    torch = pytest.importorskip("torch")
    tensor = torch.linspace(-3, 7, 11).to(torch.bfloat16)
    torch.save({"w": tensor}, tmp_path / "x.pt")
    leaf = hub.open_checkpoint(tmp_path / "x.pt").tensors["w"]
    assert str(leaf.dtype) == "bfloat16"
    np.testing.assert_array_equal(leaf.read().astype("f4"), tensor.float().numpy())


def test_without_pytorch_its_files_are_refused_with_what_to_do(
    models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pickles, "readable", lambda: False)
    file = Path(models[1]) / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    error = failure(capsys, models, tmp_path / "out", *DOUBLE)
    assert "pip install" in error and "weights_only" in error


def in_cache(root, folder, commits, main=None):
    """A folder as a model of the Hub's cache."""
    for commit in commits:
        shutil.copytree(folder, root / "snapshots" / commit)
    if main is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root


@pytest.mark.parametrize(
    ("commits", "main"), [(("abc",), None), (("abc", "def"), "abc")]
)
def test_a_model_of_the_cache_is_its_current_snapshot(models, tmp_path, commits, main):
    root = in_cache(tmp_path / "models--a--b", models[0], commits, main)
    assert hub.find(root) == root / "snapshots" / "abc"


def test_a_model_of_the_cache_without_a_main_branch_names_its_snapshots(
    models, tmp_path
):
    root = in_cache(tmp_path / "models--a--b", models[0], ("abc", "def"))
    with pytest.raises(ValueError, match="without a main branch.*: abc, def"):
        hub.find(root)
