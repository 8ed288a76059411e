"""`jaxarith recipe check`: what a merge would do, from headers alone.

The Hub's client is replaced: no test uses the network.
"""

import fnmatch
import json
import re
import shutil
import types

import adapter_folders
import checkpoints
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from merge_command import write

from jaxarith import cli, hub
from jaxarith.hub import headers

TEXT = """
merge_method: task_arithmetic
base_model: org/base
models:
  - model: org/one
    parameters: {weight: 0.5}
  - model: MORE
    parameters: {weight: 0.5}
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """The folder of a Hub, with three models by their ids, and what is downloaded."""
    root = tmp_path / "hub"
    for i, name in enumerate(("base", "one", "two")):
        folder = root / "org" / name
        checkpoints.write(
            folder, checkpoints.tensors(i, "f32"), shards=1 + 2 * (i == 2)
        )
        (folder / "tokenizer.json").write_text("{}")
        (folder / "README.md").write_text("of the run")
    shapes = {"model.layers.0.mlp.up_proj": (24, 8)}
    adapter_folders.write(root / "org" / "lora", shapes=shapes)
    seen = []

    def model_info(model, *, revision):
        seen.append((model, revision))
        if not (root / model).is_dir():
            raise OSError("no such repository")
        files = [x for x in (root / model).rglob("*") if x.is_file()]
        names = [
            types.SimpleNamespace(rfilename=name) for name in in_folder(files, model)
        ]
        return types.SimpleNamespace(siblings=names, sha="0123")

    def in_folder(files, model):
        return [str(file.relative_to(root / model)) for file in files]

    def snapshot_download(
        model,
        *,
        revision,
        allow_patterns=("*",),
        local_dir=None,
        local_files_only=False,
    ):
        if local_files_only:
            raise OSError("nothing in the cache")
        assert revision == "0123"
        for file in (root / model).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                seen.append((model, file.name))
                shutil.copy(file, local_dir)
        return str(local_dir)

    def parse_safetensors_file_metadata(model, filename, *, revision):
        assert revision == "0123"
        content = (root / model / filename).read_bytes()
        length = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + length])
        metadata = found.pop("__metadata__", {})
        tensors = {
            name: TensorInfo(**info | {"data_offsets": tuple(info["data_offsets"])})
            for name, info in found.items()
        }
        return SafetensorsFileMetadata(metadata=metadata, tensors=tensors)

    for function in (model_info, snapshot_download, parse_safetensors_file_metadata):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    return root, seen


def checked(path, *flags):
    return cli.main(["recipe", "check", path, *flags])


def with_folders(text, root):
    return re.sub(r"org/(base|one|two|lora)\b", lambda name: str(root / name[0]), text)


SEVERAL = """
name: mean
merge_method: linear
models:
  - {model: org/one, parameters: {weight: 1}}
  - {model: org/two, parameters: {weight: 1}}
---
merge_method: passthrough
slices:
  - sources: [{model: mean, layer_range: [0, 2]}]
  - sources: [{model: org/base, layer_range: [1, 2]}]
tokenizer_source: org/one
"""


@pytest.mark.parametrize(
    "text, flags",
    [
        (TEXT.replace("MORE", "org/two"), ()),
        (TEXT.replace("MORE", "org/two"), ("--dtype", "bfloat16")),
        (TEXT.replace("MORE", "org/lora"), ()),
        (TEXT.replace("MORE", "org/two+org/lora"), ("--shard-size", "1kB")),
        (SEVERAL, ("--shard-size", "1kB")),
        (SEVERAL.replace("tokenizer_source: org/one", ""), ()),
    ],
)
def test_a_check_prints_what_a_dry_run_of_the_folders_prints(
    pretended, tmp_path, capsys, text, flags
):
    root, seen = pretended
    path = write(tmp_path / "config.yaml", text)
    if "name: mean" in text:  # layers are counted by the configuration
        for name in ("base", "one", "two"):
            config = json.dumps({"model_type": "toy", "num_hidden_layers": 2})
            write(root / "org" / name / "config.json", config)
    assert checked(path, *flags) == 0
    printed = capsys.readouterr().out
    files = {name for _, name in seen if name}
    assert not [x for x in files if x.endswith((".safetensors", ".md"))]
    assert ("org/base", "config.json") in seen
    local = write(tmp_path / "config.yaml", with_folders(text, root))
    arguments = ("merge", local, "the new folder", "--dry-run", *flags)
    assert cli.main([*arguments]) == 0
    expected = capsys.readouterr().out.replace(f"{root}/", "")
    # That counters differ is what their values tell.
    values = re.compile(r"note +.*buffers or integers that differ, .*\n")
    print(printed, "=====", expected)
    assert printed == values.sub("", expected)
    assert str(tmp_path) not in printed.replace(path, "")


def test_headers_of_weights_have_their_length_and_take_no_space(pretended, tmp_path):
    root, _ = pretended
    folder = headers.fetch("org/two", tmp_path / "two")
    for file in sorted((root / "org" / "two").glob("*.safetensors")):
        sketch = (folder / file.name).stat()
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        numbers = sketch.st_size - int.from_bytes(
            (folder / file.name).read_bytes()[:8], "little"
        )
        assert numbers == len(content) - length
    found, true = hub.open_checkpoint(folder), hub.open_checkpoint(root / "org" / "two")
    assert found.tensors.keys() == true.tensors.keys()
    assert found.metadata == true.metadata
    for name, tensor in found.tensors.items():
        assert (tensor.shape, tensor.dtype) == (
            true.tensors[name].shape,
            true.tensors[name].dtype,
        )


def test_a_model_larger_than_any_disk_is_checked(
    pretended, tmp_path, monkeypatch, capsys
):
    side = 2**19  # 1 TB in float32
    info = TensorInfo("F32", [side, side], (0, 4 * side**2))
    monkeypatch.setattr(
        huggingface_hub,
        "parse_safetensors_file_metadata",
        lambda *args, **options: SafetensorsFileMetadata({}, {"a.weight": info}),
    )
    text = TEXT.replace("MORE", "org/one2").replace("org/one2", "org/base@v2")
    assert checked(write(tmp_path / "c.yaml", text)) == 0
    assert re.search(r"reads +3\.30 TB in each", capsys.readouterr().out)


MISTAKES = {
    "no such model": (
        "org/three",
        r"line 7: 'org/three' is not a folder .*not be downloaded",
    ),
    "no headers": ("org/pickle", r"line 7: no checkpoint in org/pickle(.|\n)*headers"),
    "shapes": ("org/narrow", r"norm\.weight: \[7\] in model 1 \(org/narrow\)"),
    "form": ("org/two\n    lora: x", r"line 8: the key 'lora' of the entry of a model"),
}


@pytest.mark.parametrize("model, message", MISTAKES.values(), ids=MISTAKES)
def test_what_headers_tell_against_a_merge_is_an_error(
    pretended, tmp_path, capsys, model, message
):
    root, _ = pretended
    shutil.copytree(root / "org" / "base", root / "org" / "pickle")
    (root / "org" / "pickle" / "model.safetensors").rename(
        root / "org" / "pickle" / "pytorch_model.bin"
    )
    tensors = checkpoints.tensors(1, "f32")
    tensors["model.layers.0.norm.weight"] = np.zeros(7, np.float32)
    checkpoints.write(root / "org" / "narrow", tensors)
    path = write(tmp_path / "config.yaml", TEXT.replace("MORE", model))
    assert checked(path) == 1
    error = capsys.readouterr().err
    assert error.startswith("jaxarith recipe: ")
    assert re.search(message, error), error
    assert str(tmp_path / "hub") not in error


def test_a_failure_on_the_way_is_one_error(pretended, tmp_path, monkeypatch, capsys):
    def failing(*args, **options):
        raise RuntimeError("the line is down")

    monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", failing)
    assert checked(write(tmp_path / "c.yaml", TEXT.replace("MORE", "org/two"))) == 1
    error = capsys.readouterr().err
    assert re.search("line 3: the Hub has org/base, .*: the line is down\n", error)


def test_without_the_hub_an_earlier_copy_is_checked(
    pretended, tmp_path, monkeypatch, capsys
):
    root, _ = pretended

    def offline(model, *, revision):
        raise OSError("no network")

    def cached(model, *, revision, local_files_only):
        assert local_files_only
        return str(root / model)

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    path = write(tmp_path / "config.yaml", TEXT.replace("MORE", "org/two"))
    assert checked(path) == 0
    assert "model    org/two" in capsys.readouterr().out


def test_local_models_are_checked_where_they_are(pretended, tmp_path, capsys):
    root, seen = pretended
    text = with_folders(TEXT.replace("MORE", "org/two"), root)
    path = write(tmp_path / "config.yaml", text)
    assert checked(path) == 0
    assert not seen
    printed = capsys.readouterr().out
    assert f"base     {root}/org/base\nmodel    {root}/org/one\n" in printed
