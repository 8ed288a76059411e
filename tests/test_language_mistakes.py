"""Mistakes of a user of the language scripts: one line, status 2, nothing written."""

import importlib
import json
import re
import subprocess
import sys

import pytest

from experiments.common import script
from experiments.common.language import tiny_text

pytest.importorskip("transformers", reason="makes the tokenizers")
pytest.importorskip("sklearn", reason="measures F1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and files, whole ones and broken ones."""
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_text.write_gpt2(folder / "gpt2")
    tiny_text.write_roberta(folder / "roberta")
    tiny_text.write_classifier(folder / "classifier")
    tiny_text.write_comments(folder)
    lines = [f"{i % 2} a {('bad', 'good')[i % 2]} film" for i in range(60)]
    (folder / "mood.txt").write_text("\n".join(lines))
    (folder / "columns.tsv").write_text("words\tclass\na film\tgood\n")
    (folder / "latin.jsonl").write_bytes(b'{"text": "caf\xe9", "toxicity": 0.9}\n')
    (folder / "cut.jsonl").write_text('{"text": "a", "toxicity": 0.9}\n{"text": \n')
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "words.jsonl").write_text(json.dumps({"text": 5, "toxicity": "much"}))
    (folder / "empty.txt").write_text("")
    (folder / "GLUE" / "RTE").mkdir(parents=True)
    for name in ("train", "dev"):
        rows = "index\tsentence1\tsentence2\tlabel\n0\tx\ty\tmaybe\n"
        (folder / "GLUE" / "RTE" / f"{name}.tsv").write_text(rows)
    return folder


DETOXIFY = "detoxify --model gpt2 --classifier classifier --max-length 24 "
DETOXIFY += "--perplexity-text perplexity_text.txt --toxic"
STUDY = "text_study --model roberta --max-length 12 --task a=mood.txt"
WORDS = f"{STUDY} b=mood.txt --head label-word --prompt b={{text}}{{mask}}|0:bad,1:good"

MISTAKES = {
    f"{DETOXIFY} nowhere.jsonl": "nowhere.jsonl: no such file",
    f"{DETOXIFY} latin.jsonl": "latin.jsonl is not text in UTF-8",
    f"{DETOXIFY} cut.jsonl": "cut.jsonl, line 2 is not JSON",
    f"{DETOXIFY} list.jsonl": r"line 1 is \[1, 2\]; expected a JSON object",
    f"{DETOXIFY} words.jsonl": "could not convert string to float: 'much'",
    f"{DETOXIFY} comments.jsonl --keep toxicity~1": "expected COLUMN>NUMBER",
    f"{DETOXIFY} comments.jsonl --label rude": "no label 'rude'; it has toxic, threat",
    f"{DETOXIFY} comments.jsonl --samples many": "--samples: invalid literal",
    f"{DETOXIFY} comments.jsonl --batch-size 0": "--batch-size 0: expected more than 0",
    f"{DETOXIFY} comments.jsonl --coefs": "--coefs is empty",
    f"{DETOXIFY} comments.jsonl --mesh data=30": "asks for 30 devices",
    f"{DETOXIFY} comments.jsonl --model nowhere": "'nowhere' is not a folder",
    f"{DETOXIFY} comments.jsonl --model roberta": "describes a 'roberta'",
    f"{STUDY} b=nowhere.txt": "nowhere.txt: no such file",
    f"{STUDY} b=columns.tsv": "columns.tsv has the columns words, class",
    f"{STUDY} b=empty.txt": "empty.txt holds no record",
    f"{STUDY} b": "task 'b': expected NAME=FILE",
    f"{STUDY} b=mood.txt --merges nope": "invalid choice 'nope'",
    f"{STUDY} b=mood.txt --model gpt2": "expected a BERT or RoBERTa",
    f"{STUDY} b=mood.txt --out mood.txt": "mood.txt is a file; name a folder",
    f"{WORDS} a={{text}}{{mask}}|0:bad,7:good": "words for 7; the classes of the task",
    f"{WORDS} a={{text}}|0:bad,1:good": "must contain {mask} once",
    "awd.table3_glue --models roberta --data-dir GLUE --tasks rte cola": (
        "rte: .*'maybe' is not a label of rte.* cola: .*no such file"
    ),
    "awd.table3_glue --tasks rte nope": "not tasks of GLUE: nope",
    "tau_jp.table3_glue --coefficient two": "invalid choice 'two'",
    "tau_jp.table4_detoxification --penalty-text empty.txt --model gpt2 --classifier "
    "classifier --comments comments.jsonl --perplexity-text perplexity_text.txt "
    "--window 64 --max-length 24": "cannot cut 0 tokens into blocks of 24",
    "bases.figure7_seventy_tasks --tasks MR=mood.txt x=mood.txt CR=columns.tsv": (
        "MR=.*no label word for 0, 1.* x=.*not a task of the list.* CR=.*the columns"
    ),
    "editing.table4_analogies --yelp mood.txt,no.txt --amazon a,b": "no.txt: no such",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    command, place, monkeypatch, capsys
):
    name, *arguments = command.split()
    module = importlib.import_module(f"experiments.{name}")
    monkeypatch.chdir(place)
    before = set(place.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "out"]
    monkeypatch.setattr(sys, "argv", [name, *arguments, *out])
    with pytest.raises(SystemExit) as stop:
        script.run(module.Config, module.main)
    assert stop.value.code == 2
    said = capsys.readouterr().err.rstrip("\n")
    # Progress bars take themselves back by carriage returns.
    assert "\n" not in said and "Traceback" not in said
    assert re.search(MISTAKES[command], said), said
    assert set(place.rglob("*")) == before


def test_the_same_from_the_command_line(place):
    command = [
        sys.executable,
        "-m",
        "experiments.text_study",
        "--out",
        str(place / "o"),
    ]
    command += ["--model", str(place / "roberta"), "--task", f"a={place}/mood.txt", "b"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    [line] = run.stderr.splitlines()
    assert line.startswith("experiments.text_study: task 'b': expected NAME=FILE")
    shown = subprocess.run(
        [*command, "--traceback"], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 1 and "Traceback" in shown.stderr
    assert not (place / "o").exists()


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("detoxify", "transformers", "demo"),
        ("text_study", "transformers", "demo"),
        ("awd.table3_glue", "datasets", "text"),
        ("tau_jp.table3_glue", "datasets", "text"),
        ("bases.figure7_seventy_tasks", "sklearn", "text"),
        ("editing.table3_external_vectors", "datasets", "text"),
    ],
)
def test_missing_packages_are_named_with_their_extra_before_anything_is_done(
    name, package, extra, place, monkeypatch
):
    module = importlib.import_module(f"experiments.{name}")
    needed = {
        "detoxify": {"model": "m", "toxic": place, "perplexity_text": place},
        "text_study": {"model": "m", "task": ("a=a.txt", "b=b.txt")},
    }
    config = module.Config(out=place / "missing", **needed.get(name, {}))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is missing: .*\[{extra}\]'"):
        module.main(config)
    assert not config.out.exists()
