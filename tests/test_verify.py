"""`jaxarith verify`: is a model its base plus an adapter?"""

import json

import adapter_folders
import ml_dtypes
import numpy as np
import pytest
from adapter_folders import SHAPES, normal, write
from merge_command import checkpoint
from safetensors.numpy import load_file

from jaxarith import cli

UP = "model.layers.0.mlp.up_proj.weight"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tensors():
    found = {f"{m}.weight": normal(70 + i, *SHAPES[m]) for i, m in enumerate(SHAPES)}
    return found | {
        "model.norm.weight": normal(80, 6),
        "model.embed_tokens.weight": normal(81, 11, 6),
        "model.zeros.weight": np.zeros(4, np.float32),
        "model.scale": np.array(3, np.float32),
        "steps": np.arange(3),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, an adapter, and models that `jaxarith merge` made of both."""
    place = tmp_path_factory.mktemp("verify")
    base = checkpoint(place / "base", tensors())
    write(place / "adapter", 1)
    for dtype in ("float32", "bfloat16", "float16"):
        arguments = ["merge", "--method", "task_arithmetic", "--base", base, "--quiet"]
        arguments += ["--coef", "1", "--model", str(place / "adapter")]
        arguments += ["--dtype", dtype, "--out", str(place / dtype)]
        assert cli.main(arguments) == 0
    return place


def run(place, merged, *options, adapter="adapter"):
    names = [place / "base", place / adapter, merged]
    return cli.main(["verify", *map(str, names), *options])


def changed(place, folder, change, dtype="bfloat16"):
    """A copy of a merged model whose tensors went through `change`."""
    found = load_file(place / dtype / "model.safetensors")
    change(found)
    return checkpoint(folder, found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_merge_made_agrees(place, capsys, dtype):
    assert run(place, place / dtype) == 0
    told = capsys.readouterr().out
    assert "9 of 9 tensors agree" in told
    assert f"{dtype} is {place}/base + {place}/adapter" in told
    assert run(place, place / dtype, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def a_unit_of_the_last_place(found):
    """One number of bfloat16, moved to the next."""
    bits = found[UP].view(np.uint16)
    bits[3, 2] += 1


def test_one_number_that_is_one_unit_off_is_found(place, tmp_path, capsys):
    merged = changed(place, tmp_path / "merged", a_unit_of_the_last_place)
    assert run(place, merged) == 1
    told = capsys.readouterr().out
    assert f"| {UP} |" in told and "8 of 9 tensors agree" in told
    assert "is NOT" in told
    assert run(place, merged, "--roundings", "3") == 0


def test_what_moved_away_from_zero_is_told_without_warnings(place, tmp_path, capsys):
    def moved(found):
        found["model.zeros.weight"][1] = 3

    assert run(place, changed(place, tmp_path / "merged", moved, "float32")) == 1
    told = capsys.readouterr()
    assert "| model.zeros.weight |                 3 |" in told.out
    assert "overflow" not in told.err


def rounded(place, folder, times):
    """The sum as programs make it that round products, scales and sums."""
    sums = {k: x.astype(BFLOAT16) for k, x in tensors().items() if k != "steps"}
    pairs, config = adapter_folders.read(place / "adapter")
    scale = config["lora_alpha"] / config["r"]
    for module, (a, b) in pairs.items():
        product = (b @ a).astype(BFLOAT16 if times == 3 else "f4")
        delta = (product.astype("f4") * np.float32(scale)).astype(BFLOAT16)
        name = f"{module}.weight"
        base = tensors()[name]
        sums[name] = (base + delta.astype("f4")).astype(BFLOAT16)
    return checkpoint(folder, sums | {"steps": np.arange(3)})


@pytest.mark.parametrize("times", [2, 3])
def test_programs_that_round_more_often(place, tmp_path, times):
    merged = rounded(place, tmp_path / "merged", times)
    assert run(place, merged, "--quiet") == 1
    assert run(place, merged, "--roundings", str(times)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update({UP: tensors()[UP].astype(BFLOAT16)}), "nothing was added"),
        (lambda x: x.pop(UP), f"missing (1): {UP}"),
        (
            lambda x: x.update({"extra.weight": normal(0, 2, 2)}),
            "unexpected (1): extra",
        ),
        (
            lambda x: x.update({UP: normal(0, 10, 5)}),
            "f32[10, 5] in place of f32[10, 6]",
        ),
        (lambda x: x.update({UP: np.full((10, 6), np.nan, "f4")}), "inf"),
        (
            lambda x: x.update({"steps": np.arange(3) + 1}),
            "not weights, and different from the base",
        ),
        (lambda x: x.update({"model.norm.weight": normal(5, 6)}), "model.norm.weight"),
        (lambda x: x.update({"model.scale": np.array(2, "f4")}), "model.scale"),
        (lambda x: x["model.zeros.weight"].__setitem__(1, 1e-6), "model.zeros.weight"),
    ],
)
def test_what_differs_is_said(place, tmp_path, capsys, change, message):
    merged = changed(place, tmp_path / "merged", change)
    assert run(place, merged, "--quiet") == 1
    told = capsys.readouterr()
    assert message in told.out and told.err == ""


def test_an_adapter_of_weight_2_is_not_the_adapter(place, tmp_path, capsys):
    write(tmp_path / "twice", 1, lora_alpha=10)
    assert run(place, place / "bfloat16", adapter=tmp_path / "twice") == 1
    assert "5 of 9 tensors agree" in capsys.readouterr().out


def test_names_with_another_prefix_and_tied_heads(place, tmp_path, capsys):
    def rename(found):
        for name in [*found]:
            if name.startswith("model."):
                found[name.removeprefix("model.")] = found.pop(name)

    merged = changed(place, tmp_path / "merged", rename)
    assert run(place, merged) == 0
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "base").mkdir()
    base = checkpoint(tmp_path / "base" / "base", tensors())
    with open(f"{base}/config.json", "w") as file:
        json.dump(config, file)
    head = "lm_head.weight"
    copied = changed(
        place,
        tmp_path / "copied",
        lambda x: x.update({head: x["model.embed_tokens.weight"]}),
    )
    names = [base, str(place / "adapter")]
    assert cli.main(["verify", *names, copied]) == 0
    other = changed(
        place, tmp_path / "other", lambda x: x.update({head: normal(3, 11, 6)})
    )
    capsys.readouterr()
    assert cli.main(["verify", *names, other]) == 1
    assert f"unexpected (1): {head}" in capsys.readouterr().out


def test_refusals(place, tmp_path, capsys):
    assert run(place, tmp_path) == 1
    assert f"jaxarith verify: no checkpoint in {tmp_path}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(place, place / "float32", "--roundings", "0")
    assert "'0' is not a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stated", "noted"), [("org/Base@main", False), ("org/other", True), (None, False)]
)
def test_an_adapter_of_another_base_is_noted(place, tmp_path, capsys, stated, noted):
    adapter = tmp_path / "adapter"
    write(adapter, 1, base_model_name_or_path=stated)
    run(place, place / "float32", adapter=adapter)
    told = f"trained on org/other (its adapter_config.json), but added to {place}/base"
    assert (told in capsys.readouterr().err) == noted
