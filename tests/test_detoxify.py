"""Detoxification by negation, end to end on a tiny GPT-2; its parts on their own."""

import json
import math

import jax
import numpy as np
import pytest
from tiny import random_params
from tiny_language import write_classifier

from experiments import detoxify
from experiments.common.language import gpt2 as edited
from experiments.common.language import tiny_text
from jaxarith import hub, tangent, task_vectors, tree
from jaxarith.data import text
from jaxarith.evaluate import perplexity
from jaxarith.models import generate, gpt2

FILES = {
    "report.json",
    "report.md",
    "config.json",
    "coefficients.png",
    "samples.jsonl",
    "train.jsonl",
    "task_vectors",
    "edited",
}
CONTROL = "The sun rose over the hills and the river ran to the sea.\n" * 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="makes the tokenizers")
    folder = tmp_path_factory.mktemp("detoxify")
    tiny_text.write_gpt2(folder / "gpt2")
    write_classifier(folder / "classifier", transformers)
    (folder / "toxic.txt").write_text("you hate you hate\nhate hate you\n\n" * 10)
    (folder / "control.txt").write_text(CONTROL)
    return folder


def options(place, **fields):
    return detoxify.Config(
        **{
            "out": place / "absent",
            "model": str(place / "gpt2"),
            "toxic": place / "toxic.txt",
            "perplexity_text": place / "control.txt",
            "classifier": str(place / "classifier"),
            "max_length": 24,
            "smoke": True,
            "mesh": "data=1",
            **fields,
        }
    )


@pytest.fixture(
    scope="module",
    params=[False, True],
    ids=["ordinary", "linearised"],
)
def run(place, request):
    linear = {"linearized": True, "penalty_text": place / "control.txt"}
    config = options(
        place,
        out=place / f"linear_{request.param}",
        learning_rate=1e-3,
        allowance=1.0,
        coefs=(0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
        **(linear if request.param else {}),
    )
    return config, detoxify.main(config)


def test_every_promised_file_is_written(run):
    config, results = run
    assert {file.name for file in config.out.iterdir()} == FILES
    assert json.loads((config.out / "report.json").read_text()) == results
    assert (config.out / "coefficients.png").stat().st_size > 5000
    lines = (config.out / "report.md").read_text().splitlines()
    assert len(lines) == 2 + 2 + len(results["rows"])
    log = [json.loads(x) for x in (config.out / "train.jsonl").read_text().splitlines()]
    assert len(log) == 4  # an epoch of 16 texts
    assert all(("penalty" in line) == config.linearized for line in log)
    written = json.loads((config.out / "config.json").read_text())
    assert written["out"] == config.out.name and written["samples"] == 8


def test_the_coefficient_is_the_largest_within_the_perplexity_rule(run):
    config, results = run
    curve = {r["coef"]: r["perplexity"] for r in results["curve"]}
    assert list(curve) == [0.0, 0.1, 1.0]  # every fifth, and 0
    assert results["limit"] == curve[0.0] + config.allowance
    allowed = [c for c, p in curve.items() if p is not None and p <= results["limit"]]
    assert results["coef"] == max(allowed) == 0.1
    assert curve[0.1] != curve[0.0]


def test_the_rows_are_the_four_models_and_say_what_their_samples_score(run):
    config, results = run
    rows = {r["model"]: r for r in results["rows"]}
    assert list(rows) == ["pre-trained", "fine-tuned", "negated", "random, negated"]
    coef = results["coef"]
    assert [r["coef"] for r in rows.values()] == [0.0, 1.0, -coef, -coef]
    of_model = {name: [] for name in rows}
    for line in (config.out / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert sample["text"].startswith(edited.PROMPT)
        assert sample["coef"] == rows[sample["model"]]["coef"]
        of_model[sample["model"]].append(sample["score"])
    for name, scores in of_model.items():
        assert len(scores) == 8
        assert rows[name]["mean_score"] == pytest.approx(np.mean(scores), rel=1e-5)
        share = 100 * np.mean(np.array(scores) >= 0.5)
        assert rows[name]["toxic_percent"] == pytest.approx(share)
    assert rows["negated"]["perplexity"] <= results["limit"]
    # Fine-tuning on other text moved the model; a random vector moves it otherwise.
    found = [rows[name]["perplexity"] for name in rows]
    assert len(set(found)) == 4


def test_the_figures_are_those_of_the_saved_vector(run, place):
    config, results = run
    base = gpt2.load(place / "gpt2")
    tau, metadata = hub.load_tree(config.out / "task_vectors" / "toxic.safetensors")
    assert metadata == {"model": "gpt2", "task": "toxic"}
    apply_fn = gpt2.language_model(base.config)
    if config.linearized:
        apply_fn = tangent.linearize(apply_fn, base.params)
    tokenizer = text.load_tokenizer(place / "gpt2")
    tokens = np.array(tokenizer(CONTROL)["input_ids"])[:600]
    tuned = task_vectors.apply(base.params, tau)
    expected = perplexity.strided(apply_fn, tuned, tokens, window=64, stride=32)
    found = results["rows"][1]["perplexity"]
    assert found == pytest.approx(expected, rel=1e-4)
    before = results["rows"][0]["perplexity"]
    assert abs(math.log(found / before)) > 0.01


def test_the_edited_checkpoint_is_the_negated_model_and_has_its_tokenizer(run, place):
    config, results = run
    base, edited = gpt2.load(place / "gpt2"), gpt2.load(config.out / "edited")
    tau, _ = hub.load_tree(config.out / "task_vectors" / "toxic.safetensors")
    expected = task_vectors.apply(base.params, tau, -results["coef"])
    leaves = tree.flatten(edited.params)
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(leaves[path], leaf, rtol=1e-6, atol=1e-7)
    tokenizer = text.load_tokenizer(config.out / "edited")
    assert tokenizer.decode(tokenizer("it's.")["input_ids"]) == "it's."


def test_samples_depend_on_the_seed_alone_and_may_be_more_than_a_batch(place):
    def samples(**fields):
        config = options(place, samples=70, max_new_tokens=5, **fields)
        study = detoxify.load(config)
        return edited.write(study, study.checkpoint.params)

    first = samples()
    assert len(first) == 70 and len(set(first)) > 60
    assert samples() == first
    assert samples(seed=1) != first


def test_the_linearised_decoder_writes_what_the_linearised_model_predicts():
    """Greedily, against the whole text anew for every token, of two prompts."""
    config = gpt2.GPT2Config(
        vocab_size=31, n_positions=20, n_embd=16, n_layer=2, n_head=2
    )

    def varied(path, leaf):  # positions matter much, so that no token is repeated
        return leaf * (4 if "/wpe/" in path else 1)

    layout = gpt2.layout(config)
    params_0 = tree.map_with_path(varied, random_params(1, layout))
    tau = jax.tree.map(lambda leaf: 0.3 * leaf, random_params(2, layout))
    ids, mask = np.zeros((2, 11), int), np.zeros((2, 11), int)
    ids[:, :3], mask[:, :3] = [[0, 3, 7], [5, 9, 2]], [[0, 1, 1], [1, 1, 1]]
    prompt = ids[:, :3], mask[:, :3]
    decoder = generate.linearized(gpt2.decoder(config))
    new = generate.generate(decoder, (params_0, tau), *prompt, max_new_tokens=8)
    linear = jax.jit(tangent.linearize(gpt2.language_model(config), params_0))
    params = task_vectors.apply(params_0, tau)
    written, expected = ids.copy(), mask.copy()
    for i in range(3, 11):
        logits = np.asarray(linear(params, written, expected)[:, i - 1])
        second, first = np.sort(logits)[:, -2:].T
        assert (first - second).min() > 1e-3
        written[:, i], expected[:, i] = logits.argmax(-1), 1
    np.testing.assert_array_equal(new, written[:, 3:])
    assert np.unique(new).size > 5
    plain = generate.generate(gpt2.decoder(config), params_0, *prompt, max_new_tokens=8)
    edited = generate.generate(gpt2.decoder(config), params, *prompt, max_new_tokens=8)
    for other in (plain, edited):
        assert not np.array_equal(other, new)


ROWS = [("vile", 0.9), ("fine", 0.1), ("rude", 0.8), ("so, so", 0.81), (" ", 0.99)]


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        (
            "a.jsonl",
            "\n".join(json.dumps({"text": t, "toxicity": s}) for t, s in ROWS),
            {},
        ),
        (
            "a.csv",
            "text,toxicity\n" + "".join(f'"{t}",{s}\n' for t, s in ROWS),
            {},
        ),
        (
            "a.csv",
            'class,tweet\n1,vile\n2,fine\n,rude\n0,"so, so"\n',
            {"keep": "class=0,1", "text_column": "tweet"},
        ),
        ("a.txt", "vile\n\n so, so \n", {}),
    ],
    ids=["jsonl", "csv", "values", "lines"],
)
def test_toxic_texts_are_the_rows_that_are_kept(place, tmp_path, name, content, fields):
    (tmp_path / name).write_text(content)
    config = options(place, toxic=tmp_path / name, **fields)
    assert detoxify.toxic_texts(config) == ["vile", "so, so"]
    one = options(place, toxic=tmp_path / name, texts=1, **fields)
    assert detoxify.toxic_texts(one) == ["vile"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 65}, "window is 65, but the model has only 64 positions"),
        ({"max_length": 65}, "max_length is 65"),
        ({"stride": 65}, "stride is 65 and window 64"),
        ({"label": "rude"}, "no label 'rude'"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"prompt": "x" * 60}, "prompt and new tokens are"),
        ({"toxic": "table.csv"}, "no column class; the columns are text, toxicity"),
        ({"toxic": "table.csv", "keep": "toxicity>0.95"}, "no row matches --keep"),
        ({"toxic": "table.csv", "keep": "text>1"}, "could not convert string to float"),
        ({"toxic": "table.csv", "keep": "toxicity"}, "expected COLUMN>NUMBER"),
        ({"toxic": "missing.txt"}, "missing.txt: no such file"),
        ({"perplexity_text": "empty.txt"}, "a stream of 0 tokens"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(place, fields, message):
    (place / "table.csv").write_text("text,toxicity\nvile,0.9\nfine,0.1\n")
    (place / "empty.txt").write_text("")
    if fields == {"toxic": "table.csv"}:
        fields = {**fields, "keep": "class=1"}
    files = {"toxic", "perplexity_text"}
    fields = {k: place / v if k in files else v for k, v in fields.items()}
    config = options(place, **fields)
    with pytest.raises(ValueError, match=message):
        detoxify.main(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "all samples are the same text"),
        ({"penalty_text": "a.txt"}, "needs --linearized"),
        ({"samples": 0}, "--samples 0: expected more than 0"),
        ({"coefs": (-1.0,)}, "none below 0"),
    ],
)
def test_options_that_contradict_are_refused(place, fields, message):
    with pytest.raises(ValueError, match=message):
        options(place, **fields)
