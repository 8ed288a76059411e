"""Files of others: links, pipes, devices, and JSON beyond all measure."""

import hashlib
import json
import os

import checkpoints
import merge_command
import pytest
from merge_command import models  # noqa: F401

from jaxarith import cli, files, hub
from jaxarith.hub import folders
from jaxarith.stream import written


@pytest.fixture
def model(tmp_path):
    return checkpoints.write(tmp_path / "model", checkpoints.tensors(0))


@pytest.mark.parametrize("target", ["../secret", "/proc/self/environ"])
@pytest.mark.parametrize("name", ["tokenizer.json", "notes.txt", "model.safetensors"])
def test_a_link_out_of_a_models_folder_is_refused(tmp_path, model, target, name):
    (tmp_path / "secret").write_text("TOP SECRET")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    for read in (hub.open_checkpoint, hub.read_json):
        with pytest.raises(ValueError, match=f"{name} is a link to /.*, outside"):
            read(model)


def test_links_inside_a_folder_and_to_blobs_of_the_hub_are_followed(tmp_path, model):
    cached = tmp_path / "models--me--it"
    snapshot, blobs = cached / "snapshots" / "abc", cached / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        digest = hashlib.sha256((model / name).read_bytes()).hexdigest()
        (model / name).rename(blobs / digest)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    (snapshot / "copy.json").symlink_to("config.json")
    assert hub.open_checkpoint(snapshot).tensors.keys() == checkpoints.tensors(0).keys()
    assert written._of_file(snapshot / "model.safetensors") == digest
    assert hub.read_json(snapshot, "copy.json") == hub.read_json(snapshot)


def test_a_hash_is_never_the_name_of_a_file_outside_the_hubs_cache(model):
    weights = model / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (model / "blobs").mkdir()
    for place in (model, model / "blobs"):
        weights.rename(place / ("0" * 64))
        weights.symlink_to(place / ("0" * 64))
        assert written._of_file(weights) == digest
        (place / ("0" * 64)).replace(weights)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "other.txt"])
def test_pipes_and_devices_are_refused_without_being_opened(model, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (model / name).unlink(missing_ok=True)
        make(model / name)
        with pytest.raises(ValueError, match=f"{name} is a (named pipe|device)"):
            hub.open_checkpoint(model)
        with pytest.raises(ValueError, match=f"{name} is a (named pipe|device)"):
            files.read(model / name)


def test_hidden_files_are_not_copied(model):
    (model / ".secret.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    assert [p.name for p in folders.side_files(model)] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 64 levels"),
        ("[" * 100 + "]" * 100, "nested more than 64 levels"),
        ('{"a": 1' + "0" * 400 + "}", "whole number of 401 digits"),
        ('{"a": 1' + "0" * 9000 + "}", "digits"),
        ('{"a": "\xff"}', "decode"),
    ],
    ids=["deep", "just too deep", "large number", "very large number", "no UTF-8"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_beyond_the_limits_is_an_error_with_its_file(model, text, message, name):
    (model / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is not valid JSON: .*{message}"):
        hub.read_json(model, name)


def test_json_of_a_usual_configuration_is_read_as_before(tmp_path):
    content = {"a": [1, 2.5, None, True], "time": [0.0, float("inf")], "b": {"c": {}}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert hub.read_json(tmp_path) == content


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 2**40)  # it takes no space
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes; expected at most"):
        hub.read_json(tmp_path)


def test_a_merge_with_such_a_folder_says_it_in_one_line(models, tmp_path, capsys):  # noqa: F811
    (tmp_path / "m1" / "tokenizer.json").unlink()
    (tmp_path / "m1" / "tokenizer.json").symlink_to("/etc/passwd")
    assert merge_command.run(models, tmp_path / "out", "--method", "average") == 1
    error = capsys.readouterr().err
    assert "m1/tokenizer.json is a link to /etc/passwd" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_convert_refuses_them_too(tmp_path, model, capsys):
    (model / "notes.txt").symlink_to("/proc/self/environ")
    arguments = ["convert", str(model), str(tmp_path / "out"), "--names", "keep"]
    assert cli.main(arguments) == 1
    assert "notes.txt is a link" in capsys.readouterr().err
