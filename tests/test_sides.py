"""Everything in a model's folder is copied, but for weights and known left-overs."""

import json
import re

import merge_command
import numpy as np
import pytest
from merge_command import checkpoint, run, write
from safetensors.numpy import save_file

from jaxarith import cli
from jaxarith.commands.merge import sides
from jaxarith.hub import folders

models = merge_command.models  # a fixture

KEPT = (
    "source.spm target.spm qwen.tiktoken bpe.codes tokenizer.model.v3 LICENSE "
    "NOTICE.md prophetnet.tokenizer vocab.json generation_config.json modeling_x.py "
    "teaser.png"
).split()
LEFT = (
    "optimizer.pt pytorch_model.bin tf_model.h5 model.onnx flax_model.msgpack "
    "README.md training_args.bin trainer_state.json eval_results.json rust_model.ot "
    "model.gguf events.out.tfevents.1 consolidated.00.pth jaxarith_merge.json"
).split()


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names_of(folder):
    return {str(path.relative_to(folder)) for path in folders.side_files(folder)}


def test_all_files_are_of_the_model_but_weights_and_left_overs(tmp_path):
    fill(tmp_path, [*KEPT, *LEFT, ".hidden", "config.json", "model.safetensors"])
    assert names_of(tmp_path) == set(KEPT)
    left = {"README.md", "flax_model.msgpack", "jaxarith_merge.json"}  # known to all
    assert set(folders.left_behind(tmp_path)) == set(LEFT) - left


def test_folders_of_templates_and_named_layers_are_of_the_model(tmp_path):
    inner = ["additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"]
    inner += ["2_Dense/config.json", "2_Dense/model.safetensors"]
    fill(tmp_path, [*inner, "3_Other/config.json", "2_Dense/.hidden", "onnx/x.onnx"])
    paths = ["", "1_Pooling", "2_Dense", "absent", "..", "../..", str(tmp_path)]
    modules = json.dumps([{"path": path} for path in paths])
    (tmp_path / "modules.json").write_text(modules)
    assert names_of(tmp_path) == {*inner, "modules.json"}
    assert folders.left_behind(tmp_path) == ["3_Other/", "onnx/"]
    (tmp_path / "4_Link").symlink_to(tmp_path.parent)
    (tmp_path / "modules.json").write_text('[{"path": "4_Link"}, 3]')
    assert not any("4_Link" in name for name in names_of(tmp_path))


def test_a_merge_copies_them_and_lists_the_rest(models, tmp_path, capsys):
    base, one, _ = (tmp_path / name for name in ("base", "m1", "m2"))
    modules = '[{"path": "2_Dense"}]'
    for folder in (base, one):
        fill(folder, ["2_Dense/config.json", "additional_chat_templates/a.jinja"])
        (folder / "modules.json").write_text(modules)
        save_file(
            {"w": np.full(2, len(folder.name), "f4")},
            folder / "2_Dense/model.safetensors",
        )
    fill(base, ["bpe.codes", "optimizer.pt", "runs/x"])
    fill(one, ["chat_template.jinja"])
    out = tmp_path / "out"
    assert run(models, out, "--method", "average") == 0
    for name in (
        "bpe.codes",
        "2_Dense/config.json",
        "additional_chat_templates/a.jinja",
    ):
        assert (out / name).read_text() == name
    assert (out / "2_Dense/model.safetensors").is_file()
    notes = capsys.readouterr().err
    assert "not copied: optimizer.pt, runs/" in notes
    assert re.search(r"of .*m1 2_Dense/model.safetensors differ and stay behind", notes)
    assert re.search(r"of .*m1 chat_template.jinja are not copied \(tokenizer_s", notes)


def adapter(folder, **files):
    prefix = "base_model.model.a.lora_"
    ones = {"A.weight": np.ones((2, 3), "f4"), "B.weight": np.ones((4, 2), "f4")}
    folder.mkdir()
    save_file({prefix + k: v for k, v in ones.items()}, folder / folders.ADAPTER)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def merge_adapters(base, *adapters, out):
    parts = [x for a in adapters for x in ("--model", f"{base}+{a}")]
    return cli.main(
        [
            "merge",
            "--method",
            "average",
            *parts,
            "--out",
            str(out),
            "--missing",
            "error",
        ]
    )


def test_an_adapters_tokenizer_replaces_the_bases(models, tmp_path, capsys):
    base = models[0]
    write(tmp_path / "base" / "chat_template.jinja", "BASE")
    new = {"chat_template__jinja": "NEW", "added_tokens__json": '{"<new>": 1}'}
    first = adapter(tmp_path / "x", **new)
    out = tmp_path / "out"
    assert merge_adapters(base, first, out=out) == 0
    assert (out / "chat_template.jinja").read_text() == "NEW"
    assert (out / "added_tokens.json").exists() and (out / "tokenizer.json").exists()
    assert "come from the adapter" in capsys.readouterr().err
    # That of two which agree, and the base's if they do not.
    same = adapter(tmp_path / "y", **new)
    assert merge_adapters(base, first, same, out=tmp_path / "same") == 0
    assert (tmp_path / "same" / "chat_template.jinja").read_text() == "NEW"
    other = adapter(tmp_path / "z", chat_template__jinja="OTHER")
    capsys.readouterr()
    assert merge_adapters(base, first, other, out=tmp_path / "other") == 0
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == "BASE"
    assert "have different tokenizers" in capsys.readouterr().err


def test_the_base_is_chosen_as_the_source_of_the_tokenizer(models, tmp_path):
    write(tmp_path / "base" / "chat_template.jinja", "BASE")
    first = adapter(tmp_path / "x", chat_template__jinja="NEW")
    config = f"""
merge_method: task_arithmetic
base_model: {models[0]}
models: [{{model: {models[0]}+{first}, parameters: {{weight: 1}}}}]
tokenizer_source: base
"""
    path = write(tmp_path / "config.yaml", config)
    assert cli.main(["merge", path, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "BASE"
    without = write(
        tmp_path / "config.yaml", config.replace("tokenizer_source: base", "")
    )
    assert cli.main(["merge", without, str(tmp_path / "out2")]) == 0
    assert (tmp_path / "out2" / "chat_template.jinja").read_text() == "NEW"


def test_a_template_in_the_adapters_settings_is_not_hidden(models, tmp_path):
    write(tmp_path / "base" / "chat_template.jinja", "BASE")
    settings = '{"chat_template": "NEW"}'
    one = adapter(tmp_path / "x", tokenizer_config__json=settings)
    assert merge_adapters(models[0], one, out=tmp_path / "out") == 0
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_the_source_of_the_tokenizer_brings_its_code(tmp_path):
    base, source = tmp_path / "base", tmp_path / "source"
    fill(base, ["modeling.py", "tokenizer.json", "merges.txt"])
    fill(source, ["modeling.py", "tokenizer.json", "other.py"])
    auto_map = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    write(source / "tokenizer_config.json", json.dumps(auto_map))
    write(source / "tokenization_x.py", "from .parts import Part\n")
    write(source / "parts.py", "")
    found, _ = sides.choose([base], source)
    assert found == {
        "modeling.py": base / "modeling.py",
        **{
            name: source / name
            for name in ("tokenizer.json", "tokenizer_config.json")
            + ("tokenization_x.py", "parts.py")
        },
    }
    write(base / "parts.py", "other")
    with pytest.raises(ValueError, match="parts.py differs from"):
        sides.choose([base], source)


TOKENS = {
    "config.json": (
        {"text_config": {"eos_token_id": [1, 6]}},
        "text_config.eos_token_id",
    ),
    "generation_config.json": ({"pad_token_id": 6}, "pad_token_id is 6"),
    "added_tokens.json": ({"<x>": 6}, "<x> is 6"),
    "tokenizer_config.json": (
        {"added_tokens_decoder": {"6": {"content": "<x>"}}},
        "<x>",
    ),
    "tokenizer.json": ({"added_tokens": [{"id": 6, "content": "<x>"}]}, "<x> is 6"),
}


def test_tokens_without_rows_are_noted(tmp_path, capsys):
    weight = {"model.embed_tokens.weight": np.ones((4, 3), "f4")}
    places = [checkpoint(tmp_path / name, weight) for name in ("base", "m1")]
    write(tmp_path / "base" / "added_tokens.json", '{"<x>": 4, "<y>": 3}')
    assert run(places, tmp_path / "out", "--method", "average") == 0
    assert "no rows for 1 token: <x> is 4 in added" in capsys.readouterr().err


@pytest.mark.parametrize("file", TOKENS)
def test_truncation_refuses_while_tokens_lie_beyond(file, tmp_path, capsys):
    content, message = TOKENS[file]
    places = []
    for name, rows in (("base", 8), ("m1", 6), ("m2", 7)):
        weight = np.ones((rows, 3), "f4")
        places.append(
            checkpoint(tmp_path / name, {"model.embed_tokens.weight": weight})
        )
    config = {"vocab_size": 8} | (content if file == "config.json" else {})
    for name, what in ((file, content), ("config.json", config)):
        write(tmp_path / "base" / name, json.dumps(what))
    options = ("--method", "average", "--vocabulary", "truncate")
    assert run(places, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert (
        "keep 6 rows, and 1 special or added token lies" in error and message in error
    )
    assert not (tmp_path / "out").exists()
    write(tmp_path / "base" / file, json.dumps(content).replace("6", "5"))
    assert run(places, tmp_path / "out", *options) == 0


@pytest.mark.parametrize("at_the_top", [True, False])
def test_of_a_large_tokenizer_only_the_added_tokens_are_parsed(at_the_top, tmp_path):
    tokens = {"added_tokens": [{"id": 9, "content": "<x>"}, {"id": 3, "content": "é"}]}
    vocab = {
        "model": {"vocab": {"added_tokens": 12} | {f"é{i}": i for i in range(9000)}}
    }
    content = tokens | vocab if at_the_top else vocab | tokens
    text = json.dumps(content, ensure_ascii=False, indent=2)
    # A file that is cut behind them is read as far as them.
    write(tmp_path / "tokenizer.json", text[:-20] if at_the_top else text)
    found = {"tokenizer.json": tmp_path / "tokenizer.json"}
    assert sides.beyond({}, found, 4) == ["<x> is 9 in tokenizer.json"]
    assert sides.beyond({}, found, 10) == []
