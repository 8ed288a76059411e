"""Files of several documents: merges that refer to each other by name."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import adapter_folders
import merge_command
import numpy as np
import pytest
from merge_command import checkpoint, fails, load, write

from jaxarith import cli, stream
from jaxarith.commands.merge import located

models = merge_command.models  # a fixture

# The last one first: the order of the file does not matter.
CHAIN = """
merge_method: task_arithmetic
base_model: {base}
models:
  - model: tuned
    parameters: {{weight: 0.5}}
  - model: mean
    parameters: {{weight: 0.25}}
---
name: tuned
merge_method: task_arithmetic
base_model: mean
models: [{{model: {m2}, parameters: {{weight: 2.0}}}}]
---
name: mean
merge_method: linear
dtype: float32
models:
  - {{model: {m1}, parameters: {{weight: 1}}}}
  - {{model: {m2}, parameters: {{weight: 1}}}}
"""


@pytest.fixture
def chain(models, tmp_path):
    base, m1, m2 = models
    return write(tmp_path / "chain.yaml", CHAIN.format(base=base, m1=m1, m2=m2))


def ran(*arguments):
    assert cli.main(["merge", *map(str, arguments), "--quiet"]) == 0


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def one_by_one(path, folder):
    """The merges of the file, each from a file of its own and a folder of the last."""
    last, tuned, mean = Path(path).read_text().split("---\n")
    names = {}
    for name, text in (("mean", mean), ("tuned", tuned), ("last", last)):
        text = re.sub(r"(model: )(mean|tuned)\b", lambda x: x[1] + names[x[2]], text)
        out = folder / f"alone-{name}"
        ran(write(folder / f"{name}.yaml", text), out)
        names[name] = str(out)
    return names


def test_documents_are_the_merges_of_their_folders(chain, tmp_path):
    out = tmp_path / "new" / "out"
    ran(chain, out)
    alone = one_by_one(chain, tmp_path)
    assert weights(out) == weights(alone["last"])
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    work = tmp_path / "work"
    ran(chain, tmp_path / "again", "--intermediate-dir", work)
    assert weights(tmp_path / "again") == weights(out)
    for name in ("mean", "tuned"):
        assert weights(work / name) == weights(alone[name])
    parts = Path(chain).read_text().split("---")
    ran(write(tmp_path / "turned.yaml", "---".join(parts[::-1])), tmp_path / "turned")
    assert weights(tmp_path / "turned") == weights(out)


def test_the_card_has_all_recipes_and_names_of_documents(chain, models, tmp_path):
    ran(chain, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "jaxarith_merge.json").read_text())
    base, m1, m2 = models
    assert [x["model"] for x in record["inputs"]] == [base, "tuned", "mean"]
    assert [x["name"] for x in record["documents"]] == ["mean", "tuned"]
    found = [[x["model"] for x in one["inputs"]] for one in record["documents"]]
    assert found == [[m1, m2], ["mean", m2]]
    inputs = [x for one in (record, *record["documents"]) for x in one["inputs"]]
    assert all(x["sha256"] for x in inputs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ".jaxarith-" not in card + json.dumps(record)
    recipe = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1]
    ran(write(tmp_path / "again.yaml", recipe), tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    ran(chain, tmp_path / "third" / "out")
    other = (tmp_path / "third" / "out" / "README.md").read_text()
    assert other == card.replace(f"{tmp_path}/out", f"{tmp_path}/third/out")


LINEAR = "merge_method: linear\nmodels: [{{model: {}, parameters: {{weight: 1}}}}]\n"


def linear(model, name=None):
    return LINEAR.format(model) + (f"name: {name}\n" if name else "")


MISTAKES = {
    "a circle": (
        linear("b", "a") + "---\n" + linear("a", "b") + "---\n" + linear("a"),
        "line 1: documents refer to each other in a circle: (a <- b <- a|b <- a <- b)",
    ),
    "itself": (
        linear("m1") + "---\n" + linear("a", "a"),
        "line 4: documents refer to each other in a circle: a <- a",
    ),
    "a name twice": (
        linear("m1", "a") + "---\n" + linear("m2", "a") + "---\n" + linear("a"),
        "line 7: the name 'a' is given twice, first in line 3",
    ),
    "two without a name": (
        linear("m1") + "---\n" + linear("m2"),
        "line 4: this document and that of line 1 have no names",
    ),
    "no folder's name": (
        linear("m1", "a/b") + "---\n" + linear("a/b"),
        "line 3: name is 'a/b'; it must be the name of a folder",
    ),
    "a word that means another thing": (
        linear("m1", "union") + "---\n" + linear("union"),
        "line 3: name is 'union'",
    ),
    "two that nobody refers to": (
        linear("m1", "a") + "---\n" + linear("m2", "b"),
        "line 5: no document refers to those of the lines 1, 5",
    ),
    "an unknown name": (
        linear("m1", "first") + "---\n" + linear("first") + "base_model: ./secnd\n",
        r"line 7: .*'./secnd' .* The documents are first\.\n$",
    ),
    "a method of one": (
        linear("m1", "a").replace("linear", "magic") + "---\n" + linear("a"),
        "line 1: there is no method 'magic'",
    ),
    "what only headers tell": (
        linear("m1", "a")
        + "---\n"
        + linear("a").replace("]", ", {model: narrow, parameters: {weight: 1}}]"),
        "line 5: (.|\n)*narrow",
    ),
    "no YAML": (linear("m1", "a") + "---\n{", "line 5: this is not YAML"),
}


@pytest.mark.parametrize("text, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_with_their_lines(
    models, tmp_path, capsys, monkeypatch, text, message
):
    checkpoint(tmp_path / "narrow", {"a.weight": np.zeros((2, 3), "f4")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream, "merge", None)  # nothing is merged in vain
    error = fails(capsys, write(tmp_path / "c.yaml", text), "out")
    assert re.search(rf"c\.yaml, {message}", error), error
    assert not (tmp_path / "out").exists()
    assert not [*tmp_path.glob(".jaxarith-*")]


@pytest.fixture
def told(chain, tmp_path, capsys):
    """A function that runs a file, and returns the results that stayed, and the notes.

    Results that stayed have the inodes from before.
    """
    work = tmp_path / "work"

    def inodes():
        return {path.name: path.stat().st_ino for path in work.glob("*")}

    def run(*flags, path=chain):
        before = inodes()
        out = tmp_path / "out"
        flags = ("--intermediate-dir", str(work), "--overwrite", *flags)
        assert cli.main(["merge", path, str(out), *flags]) == 0
        said = dict(re.findall(r"note: (\w+): (.*)\n", capsys.readouterr().err))
        return sorted(name for name, _ in before.items() & inodes().items()), said

    return run


def test_results_are_used_again_under_the_same_recipe_and_flags(chain, tmp_path, told):
    out, mean = tmp_path / "out", tmp_path / "work" / "mean"
    told()
    first = weights(out)
    kept, said = told()
    assert kept == ["mean", "tuned"] and weights(out) == first
    assert said["mean"] == f"{mean} is used as it is"
    # Another recipe of one document: it and those that merge its result are made anew.
    text = Path(chain).read_text().replace("weight: 2.0", "weight: 1.5")
    kept, said = told(path=write(tmp_path / "other.yaml", text))
    assert kept == ["mean"] and "its recipe has changed" in said["tuned"]
    assert weights(out) != first
    kept, said = told()
    assert kept == ["mean"] and weights(out) == first
    assert "the flags have changed" in told("--shard-size", "1GB")[1]["mean"]
    assert "the seed has changed" in told("--seed", "3")[1]["mean"]
    # That dtype is the last merge's.
    assert told("--seed", "3", "--dtype", "bfloat16")[0] == ["mean", "tuned"]
    assert "--no-hashes" in told("--seed", "3", "--no-hashes")[1]["mean"]
    assert "--no-hashes" in told("--seed", "3")[1]["mean"]


def test_results_are_used_again_only_of_the_same_files(chain, models, tmp_path, told):
    base, m1, _ = models
    mean = tmp_path / "work" / "mean"
    told()
    write(tmp_path / "m1" / "generation_config.json", '{"top_k": 1}')
    kept, said = told()
    assert "configurations or tokenizers of its models have changed" in said["mean"]
    content = bytearray(weights(mean))
    content[-1] ^= 1
    (mean / "model.safetensors").write_bytes(content)
    kept, said = told()
    assert "its weights are not those that were written" in said["mean"]
    assert kept == ["tuned"]  # the same weights came back
    (mean / "model.safetensors").write_bytes(content[:-1])
    assert "its weights are not" in told()[1]["mean"]
    shutil.rmtree(m1)
    shutil.copytree(base, m1)
    kept, said = told()
    assert said["mean"] == f"made again, because the weights of {m1} have changed"
    assert said["tuned"] == "made again, because the weights of mean have changed"
    assert not kept
    ran(chain, tmp_path / "fresh")
    assert weights(tmp_path / "fresh") == weights(tmp_path / "out")


def test_folders_of_others_are_not_replaced(chain, models, tmp_path, capsys):
    flags = ("--intermediate-dir", tmp_path)
    shutil.copytree(models[0], tmp_path / "mean")
    error = fails(capsys, chain, tmp_path / "out", *flags)
    assert "mean exists, but `jaxarith merge` did not keep it there" in error
    for record in ("[]", "{", '{"inputs": [1]}', '{"inputs": 1, "files_beside": ""}'):
        write(tmp_path / "mean" / "jaxarith_merge.json", record)
        error = fails(capsys, chain, tmp_path / "out", *flags)
        assert "mean exists, but `jaxarith merge` did not keep" in error
    shutil.rmtree(tmp_path / "mean")
    error = fails(capsys, chain, tmp_path / "mean", *flags)
    assert "overlap" in error
    error = fails(capsys, chain, tmp_path / "out", "--intermediate-dir", chain)
    assert f"{chain} is a file. Name another --intermediate-dir." in error
    single = write(tmp_path / "single.yaml", linear(models[1]))
    error = fails(capsys, single, tmp_path / "out", *flags)
    assert "--intermediate-dir is for a YAML file with several documents" in error
    error = fails(capsys, chain, tmp_path / "out", "--to-adapter", *flags)
    assert "--intermediate-dir is for a YAML file with several documents" in error
    error = fails(capsys, chain, tmp_path / "out", "--to-adapter")
    assert re.search(r"chain.yaml, line \d+: this is a second document", error)


@pytest.mark.parametrize("kept", [True, False])
def test_a_merge_that_fails_leaves_whole_results_and_no_output(
    chain, models, tmp_path, capsys, kept
):
    checkpoint(
        tmp_path / "nan",
        load(models[0]) | {"a.weight": np.full((4, 3), np.nan, np.float32)},
    )
    last, *rest = Path(chain).read_text().split("---")
    broken = last.replace("model: mean", f"model: {tmp_path / 'nan'}")
    path = write(tmp_path / "broken.yaml", "---".join([broken, *rest]))
    flags = ("--intermediate-dir", tmp_path / "work") if kept else ()
    error = fails(capsys, path, tmp_path / "out", "--quiet", *flags)
    assert error.startswith(f"jaxarith merge: {path}, line 2: a.weight of model 1")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not [*tmp_path.rglob(".jaxarith-*")]
    names = {"base", "m1", "m2", "nan", "chain.yaml", "broken.yaml"}
    assert {path.name for path in tmp_path.iterdir()} - {"work"} == names
    if kept:
        ran(chain, tmp_path / "out", *flags)
        ran(chain, tmp_path / "again")
        assert weights(tmp_path / "out") == weights(tmp_path / "again")


def test_a_stop_between_two_merges_leaves_no_output(chain, tmp_path, monkeypatch):
    merge, calls = stream.merge, []

    def stopped(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return merge(*args, **options)

    monkeypatch.setattr(stream, "merge", stopped)
    assert cli.main(["merge", chain, str(tmp_path / "out"), "--quiet"]) == 130
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".jaxarith-*")]


def test_a_dry_run_tells_of_results_that_are_not_there(
    chain, tmp_path, capsys, monkeypatch
):
    work, out = tmp_path / "work", tmp_path / "out"
    flags = ("--intermediate-dir", str(work))

    def plan():
        assert cli.main(["merge", chain, str(out), "--dry-run", *flags]) == 0
        return capsys.readouterr().out

    first = plan()
    assert not work.exists() and not out.exists()
    assert first.count("method ") == 3
    assert f"document mean ({chain}, line 15)\ngoes to  {work}/mean, where it" in first
    # A mean in float32 widens what is made of it: 4 * (12 + 3) bytes and the numbers.
    assert re.search(r"goes to .*tuned(.|\n)*model +\S*m2\n(.|\n)*writes +\d+ B", first)
    ran(chain, out, *flags)
    shutil.rmtree(out)
    monkeypatch.setattr(stream, "merge", None)
    second = plan()
    assert second.count("used if the hashes of its models are the same") == 2
    lines = [line for line in first.split("\n") if not line.startswith("goes to")]
    assert lines == [x for x in second.split("\n") if not x.startswith("goes to")]
    text = Path(chain).read_text().replace("weight: 2.0", "weight: 1.5")
    write(tmp_path / "chain.yaml", text)
    assert f"{work}/tuned, made again: its recipe has changed" in plan()


def test_adapters_and_tokenizers_of_results(models, tmp_path):
    base, m1, m2 = models
    write(tmp_path / "m1" / "tokenizer.json", '{"of": "m1"}')
    for name, one in (("step", "step"), (m1, None)):
        text = f"{linear(m2)}tokenizer_source: {name}\n"
        if one:
            text += f"---\nname: step\n{linear(m1)}---\n"
        ran(write(tmp_path / "c.yaml", text), tmp_path / f"out-{one}")
    found = [
        (tmp_path / f"out-{x}" / "tokenizer.json").read_text() for x in ("step", None)
    ]
    assert found == ['{"of": "m1"}'] * 2
    lora = adapter_folders.write(tmp_path / "lora", shapes={"a": (4, 3)})
    ran(write(tmp_path / "c.yaml", linear(f"{m1}+{lora}")), tmp_path / "alone")
    text = f"{linear(f'step+{lora}')}---\n{linear(m1, 'step')}"
    ran(write(tmp_path / "c.yaml", text), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "alone")
    record = json.loads((tmp_path / "out" / "jaxarith_merge.json").read_text())
    assert record["inputs"][0]["model"] == f"step+{lora}"


def test_names_stand_for_whole_folders():
    names = located.Located({"a": "/w/a", "b": "/w/a-b", "org/c@v1": "/h/0"})
    for name, folder in names.folders.items():
        assert names.folder(name) == folder
        assert names.named(f"of {folder} and ({folder}/x.json).") == (
            f"of {name} and ({name}/x.json)."
        )
    assert names.folder("a+org/c@v1") == "/w/a+/h/0"
    assert names.named("/w/a+/h/0") == "a+org/c@v1"
    assert names.folder("d") == "d" and names.named("/w/a.b /w/ab") == "/w/a.b /w/ab"


def test_a_chain_of_llamas_loads_and_generates(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
    text = "merge_method: slerp\nbase_model: tall-a\nparameters: {t: 0.5}\n"
    text += "models: [{model: tall-a}, {model: tall-b}]\n"
    for name in "ab":
        slices = [
            f"- sources: [{{model: {tmp_path / name}, layer_range: {layers}}}]\n"
            for layers in ([0, 2], [1, 2])
        ]
        text += f"---\nname: tall-{name}\nmerge_method: passthrough\nslices:\n"
        text += "".join(slices)
    ran(write(tmp_path / "c.yaml", text), tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert model.config.num_hidden_layers == 3
    texts = torch.arange(3, 8).reshape(1, 5)
    assert model.generate(texts, max_new_tokens=2, pad_token_id=0).shape == (1, 7)


def test_after_kills_outputs_are_absent_or_complete(chain, tmp_path):
    ran(chain, tmp_path / "true", "--intermediate-dir", tmp_path / "true-work")
    work, out = tmp_path / "work", tmp_path / "out"
    code = "import sys; from jaxarith import cli; sys.exit(cli.main(sys.argv[1:]))"
    arguments = ["merge", chain, out, "--intermediate-dir", work, "--quiet"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    begin = time.perf_counter()
    assert subprocess.run(command).returncode == 0
    seconds = time.perf_counter() - begin
    for part in (0.6, 0.75, 0.85, 0.95):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        process = subprocess.Popen(command)
        time.sleep(part * seconds)
        process.kill()
        process.communicate()
        for path in (out, work / "mean", work / "tuned"):
            if path.exists():
                true = tmp_path / ("true" if path == out else f"true-work/{path.name}")
                assert weights(path) == weights(true)
                assert {x.name for x in path.iterdir()} == {
                    x.name for x in true.iterdir()
                }
        if not out.exists():
            ran(chain, out, "--intermediate-dir", work)
            assert weights(out) == weights(tmp_path / "true")


def test_aliases_of_aliases_are_looked_into_once(tmp_path, capsys, models):
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(60)]
    text = f"{linear(models[1])}parameters: {{{', '.join(lines)}}}\n"
    error = fails(capsys, write(tmp_path / "c.yaml", text), tmp_path / "out")
    assert "line 3: the key 'a0' of parameters of linear is not supported" in error
