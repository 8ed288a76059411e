"""Where outputs are written: nothing of another program is replaced or left behind."""

import os
import re

import checkpoints
import merge_command
import numpy as np
import pytest

from jaxarith import hub, merge, stream
from jaxarith.hub import places

models = merge_command.models  # a fixture


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return checkpoints.family(tmp_path_factory.mktemp("in"), models=2)


def run(method, family, out, **options):
    opened = stream.open_models(family[0], family[1])
    return stream.merge(method, opened, out, quiet=True, **options)


def meanwhile(act):
    """A merge during which another program does something."""

    def method(params_0, taus):
        act()
        return merge.average(params_0, taus)

    return method


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_another_program_makes_during_a_merge_stays(
    family, tmp_path, overwrite
):
    out = tmp_path / "out"

    def act():
        out.mkdir()
        (out / "thesis.txt").write_text("only copy")

    with pytest.raises(FileExistsError, match=r"made or changed .*out in .*Name a new"):
        run(meanwhile(act), family, out, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "only copy"
    assert os.listdir(tmp_path) == ["out"]


def test_of_two_merges_into_one_folder_the_first_to_end_wins(family, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="made or changed"):
        run(meanwhile(lambda: run(merge.average, family, out)), family, out)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]


def test_a_folder_that_gets_a_file_during_a_merge_is_not_replaced(family, tmp_path):
    out = tmp_path / "out"
    run(merge.average, family, out)
    act = (out / "notes.txt").touch
    with pytest.raises(FileExistsError, match="made or changed"):
        run(meanwhile(act), family, out, overwrite=True)
    assert (out / "notes.txt").exists()


def test_a_file_that_comes_at_the_last_moment_is_not_overwritten(tmp_path, monkeypatch):
    new, out = tmp_path / "new", tmp_path / "out"
    new.mkdir()
    replace = os.replace

    def late(source, target):
        (out / "late.txt").touch()
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(FileExistsError, match="made or changed"):
        hub.publish(new, out, None, tmp_path / "old")
    assert (out / "late.txt").exists()


def test_the_folder_above_the_current_one_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "work" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deeper")
    for out in ("..", ".", tmp_path, tmp_path / "work"):
        with pytest.raises(FileExistsError, match="current folder or a folder above"):
            hub.check_out(out, overwrite=True)


def test_inputs_are_not_replaced_links_followed(tmp_path):
    out, model = tmp_path / "out", tmp_path / "model"
    for folder in (out, model):
        folder.mkdir()
    (out / "model.safetensors").touch()
    (model / "model.safetensors").symlink_to(out / "model.safetensors")
    (out / "recipe.yaml").touch()
    for path in (model, out / "recipe.yaml"):
        with pytest.raises(ValueError, match=r"out holds .*, which is an input"):
            hub.check_out(out, True, [path])


@pytest.mark.parametrize("name", [".git/HEAD", "code.c", "train.py", "data.csv"])
def test_a_folder_with_something_that_no_model_has_is_not_replaced(tmp_path, name):
    for ours in (
        "config.json",
        "model.safetensors",
        "LICENSE",
        "1_Pooling/config.json",
    ):
        (tmp_path / ours).parent.mkdir(exist_ok=True)
        (tmp_path / ours).write_text("{}")
    hub.check_out(tmp_path, True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds {re.escape(name.split('/')[0])}"):
        hub.check_out(tmp_path, True)


def test_code_that_a_configuration_names_belongs_to_a_model(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "net.Net"}}')
    (tmp_path / "net.py").touch()
    hub.check_out(tmp_path, True)


def test_what_a_merge_copied_may_be_replaced_by_another_merge(models, tmp_path):
    for name in (
        "bpe.codes",
        "tokenizer.model.v3",
        "prophetnet.tokenizer",
        "table.csv",
    ):
        (tmp_path / "base" / name).write_text(name)
    out = tmp_path / "out"
    options = ("--method", "average", "--quiet", "--overwrite")
    assert merge_command.run(models, out, *options) == 0
    assert (out / "table.csv").exists()
    assert merge_command.run(models, out, *options) == 0
    (out / "mine.csv").touch()
    assert merge_command.run(models, out, *options) == 1


@pytest.mark.parametrize(
    "name", ["notes.txt", "todo.md", "samples.bin", "run.jsonl", "deep/notes.txt"]
)
def test_notes_beside_a_model_are_not_replaced(tmp_path, name):
    hub.save(tmp_path, {"a": np.ones(2)}, {}, overwrite=True)
    for known in ("vocab.txt", "README.md", "pytorch_model.bin", "onnx/model.bin"):
        (tmp_path / known).parent.mkdir(exist_ok=True)
        (tmp_path / known).touch()
    hub.check_out(tmp_path, True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds {name}, which no model's folder has"):
        hub.check_out(tmp_path, True)
    hub.save(tmp_path, {"a": np.ones(2)}, {}, overwrite=True)  # keeps it
    assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    "name", ["notes.txt", "vocab.txt", "results.json", "plot.png", "more/config.yaml"]
)
def test_what_a_merge_did_not_write_is_not_replaced(models, tmp_path, capsys, name):
    out = tmp_path / "out"
    options = ("--method", "average", "--overwrite", "--shard-size", "40B")
    for _ in range(2):
        assert merge_command.run(models, out, *options) == 0
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).touch()
    error = merge_command.failure(capsys, models, out, *options)
    assert f"holds {name}, which jaxarith did not write there" in error
    assert (out / name).exists()


def test_neither_a_merge_nor_save_replaces_what_is_no_models(family, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "thesis.c").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.c, which no model's folder"):
        run(merge.average, family, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"holds thesis\.c, which no model's folder"):
        hub.save(tmp_path, {"a": np.ones(2)}, {}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "thesis.c"]


def test_what_save_copied_may_be_replaced_by_save(models, tmp_path):
    source = tmp_path / "base"
    for name in ("table.csv", "additional_chat_templates/tool.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    for _ in range(2):
        params = {"a": np.ones(2)}
        hub.save(tmp_path / "out", params, {}, copy_from=source, overwrite=True)
    assert (tmp_path / "out" / "table.csv").exists()


def test_folders_made_for_a_merge_that_fails_go(family, tmp_path):
    def failing(params_0, taus):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(failing, family, tmp_path / "x" / "y" / "out")
    assert not os.listdir(tmp_path)


def test_what_a_killed_run_left_is_named(tmp_path):
    left = tmp_path / ".jaxarith-killed"
    left.mkdir()
    os.utime(left, (0, 0))
    with pytest.warns(UserWarning, match=r"killed left .*\.jaxarith-killed.*remove it"):
        with hub.staging(tmp_path) as own:
            os.utime(own, (0, 0))
            # Another run does not take it for one that was left.
            assert places._left_overs(tmp_path) == [left]


def test_what_replaces_something_is_on_the_disk_first(family, tmp_path, monkeypatch):
    out, synced = tmp_path / "out", []
    fsync, replace = os.fsync, os.replace
    run(merge.average, family, out)

    def noted(file):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    def replaced(source, target):
        synced.append(f"{os.path.basename(source)} -> {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", replaced)
    run(merge.average, family, out, overwrite=True)
    assert synced == [
        *("model.safetensors", "new", "out -> old", "new -> out", tmp_path.name)
    ]
    synced.clear()
    run(merge.average, family, tmp_path / "other")  # replaces nothing
    assert synced == ["new -> other"]
