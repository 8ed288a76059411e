"""One clear error for every mistake on the command line, and nothing is written."""

import os
import re

import merge_command
import numpy as np
import pytest
from merge_command import fails, failure, run, write
from safetensors.numpy import load_file, save_file

from jaxarith import cli
from jaxarith.hub import safetensors

models = merge_command.models  # a fixture


def test_mistakes_are_told_and_nothing_is_written(models, tmp_path, capsys):
    out = tmp_path / "merged"
    before = sorted(tmp_path.rglob("*"))
    missing = [models[0], str(tmp_path / "nowhere")]
    assert "nowhere" in failure(capsys, missing, out, "--method", "ties")
    options = ("--method", "average", "--density", "0.5")
    assert "average has no option --density" in failure(capsys, models, out, *options)
    options = ("--method", "ties", "--density", "2")
    assert "must be in (0, 1]" in failure(capsys, models, out, *options)
    assert "at least two" in failure(capsys, models[:2], out, "--method", "awd")
    exists = tmp_path / "base"
    assert "exists" in failure(capsys, models, exists, "--method", "ties")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight": np.zeros((4, 4), np.float32)}, r"a\.weight: \[4, 4\]"),
        ({"c.weight": np.zeros(2, np.float32)}, r"\+ c\.weight"),
        ({"b.bias": None}, r"- b\.bias .*not in the model"),
        ({"b.bias": np.full(3, np.nan, np.float16)}, r"b\.bias .*NaN"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(
    models, tmp_path, capsys, change, message
):
    tensors = load_file(f"{models[1]}/model.safetensors") | change
    tensors = {name: array for name, array in tensors.items() if array is not None}
    save_file(tensors, f"{models[1]}/model.safetensors")
    error = failure(capsys, models, tmp_path / "merged", "--method", "average")
    assert re.search(message, error)
    assert not (tmp_path / "merged").exists()


def test_one_model_by_two_names_is_noted(models, tmp_path, capsys):
    same = [*models[:2], f"{models[0]}/../m1/"]
    assert run(same, tmp_path / "merged", "--method", "average", "--dry-run") == 0
    told = f"{same[1]} and {same[2]}: this model is given twice, and counts twice"
    assert told in capsys.readouterr().out


def test_a_plan_says_whose_dtype_is_written(models, tmp_path, capsys):
    named = ["--model", models[1], "--model", models[2]]
    out = ["--out", str(tmp_path / "merged"), "--dry-run"]
    for base in (["--base", models[0]], []):
        assert cli.main(["merge", "--method", "karcher", *named, *base, *out]) == 0
        whose = "base" if base else "first model"
        assert f"dtype    that of the {whose}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "hinted"), [("ties", True), ("dare_ties", False)])
def test_presets_are_told_of_methods_that_both_have(
    models, tmp_path, capsys, method, hinted
):
    options = ("--method", method, "--density", "0.5", "--weight", "1")
    assert run(models, tmp_path / "merged", *options) == 0
    hint = "--preset mergekit uses mergekit's" in capsys.readouterr().err
    assert hint == hinted


@pytest.mark.parametrize("number", ["1e400", "1e39", "inf"])
def test_numbers_beyond_float32_are_refused(models, tmp_path, capsys, number):
    options = ("--method", "task_arithmetic", "--coef", number)
    error = failure(capsys, models, tmp_path / "merged", *options)
    assert f"'{number}'; it must be a number that float32 holds" in error


def test_unknown_methods_are_refused(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(models, tmp_path / "merged", "--method", "magic")
    assert "invalid choice: 'magic'" in capsys.readouterr().err


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path, capsys):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "old_vocab.txt").write_text("old")
    nowhere = write(tmp_path / "config.yaml", "no: yaml")
    error = fails(capsys, nowhere, out)
    assert "exists" in error and "--overwrite" in error
    assert (out / "old_vocab.txt").read_text() == "old"


def test_overwrite_replaces_the_folder_once_the_new_one_is_complete(
    models, tmp_path, capsys
):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "old_vocab.txt").write_text("old")
    flags = ("--overwrite", "--method", "ties", "--density")
    error = failure(capsys, models, out, *flags, "0.5")
    assert "not a model and is not replaced" in error
    (out / "config.json").write_text("{}")
    failure(capsys, models, out, *flags, "2")
    assert (out / "old_vocab.txt").read_text() == "old"
    assert run(models, out, *flags, "0.5") == 0
    assert (out / "model.safetensors").exists() and not (out / "old_vocab.txt").exists()
    for place in (models[0], models[2]):
        error = failure(capsys, models, place, *flags, "0.5")
        assert "holds one of the models" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("base", "m1", "m2", "merged")
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "ties", "--coef", "x"), "--coef of ties is 'x'; .* a number"),
        (
            ("--method", "ties", "--density", "1", "1"),
            "--density of ties takes one value",
        ),
        (
            ("--method", "average", "--weight", "1", "2", "3"),
            "3 values, but --model is given 2 times",
        ),
        (("--method", "awd", "--steps", "1.5"), "--steps of awd is '1.5'; .* whole"),
        (("--method", "awd", "--scope", "leaf"), "--scope of awd .* global, layer"),
        (
            ("--method", "wise_ft"),
            "WiSE-FT takes exactly one task vector; found 2",
        ),
        (("--method", "iso_c", "--matrices", "x"), "no 2-D leaf matches"),
        (("--method", "slerp", "--density", "1"), "slerp has no option --density"),
        (("--density", "1"), "--method"),
    ],
)
def test_mistakes_in_options_are_told(models, tmp_path, capsys, flags, message):
    error = failure(capsys, models, tmp_path / "merged", *flags)
    assert re.search(message, error)
    assert not (tmp_path / "merged").exists()


def test_a_dry_run_finds_options_out_of_range(models, tmp_path, capsys):
    options = ("--method", "ties", "--density", "2", "--dry-run")
    error = failure(capsys, models, tmp_path / "merged", *options)
    assert "density is 2.0; it must be in (0, 1]" in error


def test_mistakes_around_files_are_told(models, tmp_path, capsys):
    config = write(tmp_path / "config.yaml", "merge_method: magic\nmodels: []\n")
    out = tmp_path / "merged"
    assert "config.yaml, line 1: there is no method" in fails(capsys, config, out)
    assert "nowhere.yaml" in fails(capsys, tmp_path / "nowhere.yaml", out)
    assert "is a folder; expected the YAML" in fails(capsys, tmp_path, out)
    assert "no new folder is named" in fails(capsys, config)
    assert "two new folders" in fails(capsys, config, out, "--out", out)
    assert "--base cannot be given with" in fails(capsys, config, out, "--base", "b")
    assert "--coef cannot be given with" in fails(capsys, config, out, "--coef", "1")
    assert "needs models" in fails(capsys, "--method", "ties", "--out", out)
    error = failure(capsys, models, out, "--method", "average", "--device", "tpu")
    assert "JAX finds no tpu here; it finds cpu" in error
    (tmp_path / "base" / "config.json").unlink()
    assert "config.json" in failure(capsys, models, out, "--method", "average")
    assert not out.exists()


def test_a_full_disk_and_ctrl_c_leave_nothing(models, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    for error, status, told in (
        (OSError(28, os.strerror(28)), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ImportError("no module named yaml"), 1, "no module named yaml"),
    ):

        def broken(*_, error=error):
            raise error

        monkeypatch.setattr(safetensors, "_write", broken)
        assert run(models, tmp_path / "merged", "--method", "average") == status
        assert told in capsys.readouterr().err.splitlines()[-1]
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [["merge"], ["recipe", "check"]])
def test_a_missing_recipe_is_told_with_what_was_expected(tmp_path, capsys, command):
    out = [str(tmp_path / "out")] * (command == ["merge"])
    for place, told in (
        (
            tmp_path / "c.yaml",
            "there is no file .*c.yaml; expected the YAML of a merge",
        ),
        (tmp_path, "is a folder; expected the YAML file of a merge. .* --model"),
    ):
        assert cli.main([*command, str(place), *out]) == 1
        error = capsys.readouterr().err
        assert re.search(told, error) and "Errno" not in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [["inspect"], ["convert"], ["verify"], ["extract"]], ids=" ".join
)
@pytest.mark.parametrize("name", ["none.safetensors", "./none", "none.bin"])
def test_a_missing_model_is_told_with_what_was_expected(
    tmp_path, capsys, monkeypatch, command, name
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rest = {
        "inspect": [],
        "convert": ["out"],
        "verify": [name, name],
        "extract": [name, "--rank", "1", "--out", "out"],
    }
    assert cli.main([*command, name, *rest[command[0]]]) == 1
    error = capsys.readouterr().err
    assert "Errno" not in error
    assert "expected weights" in error or "name a folder that holds" in error
