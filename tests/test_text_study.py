"""The study on texts, of tiny random models and files made here, and its errors."""

import json
import string

import numpy as np
import pytest

from experiments import text_study
from experiments.common.studies import evaluation
from jaxarith import hub, task_vectors, tree
from jaxarith.data import labelled
from jaxarith.models import bert

WORDS = ["good", "bad", "fine", "poor", "film", "book", "cat", "dog", "a", "the", "is"]
RAW = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="makes the tokenizers")


@pytest.fixture(scope="module")
def bert_folder(transformers, tmp_path_factory):
    """A BERT with a masked-LM head, as most are published."""
    folder = tmp_path_factory.mktemp("model") / "bert"
    raw = {"model_type": "bert", "architectures": ["BertForMaskedLM"], **RAW}
    save(folder, raw, "masked_lm")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocab = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocab).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def roberta_folder(transformers, tmp_path_factory):
    """A RoBERTa with a masked-LM head; " good" and " bad" are single tokens."""
    folder = tmp_path_factory.mktemp("model") / "roberta"
    raw = {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        **RAW,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    }
    save(folder, raw, "masked_lm")
    letters = sorted({*string.ascii_letters, *"Ġ?.,:!"})
    merges = [("Ġ", "g"), ("Ġg", "o"), ("Ġgo", "o"), ("Ġgoo", "d")]
    merges += [("Ġ", "b"), ("Ġb", "a"), ("Ġba", "d")]
    vocab = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    vocab += ["".join(pair) for pair in merges] + ["<mask>"]
    transformers.RobertaTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=merges
    ).save_pretrained(folder)
    return folder


def save(folder, raw, head):
    config = bert.BertConfig.from_json(raw)
    rng = np.random.default_rng(0)

    def leaf(path, expected):
        noise = 0.3 * rng.normal(size=expected.shape)
        return np.asarray(noise + path.endswith("/scale"), np.float32)

    hub.save(folder, tree.map_with_path(leaf, bert.layout(config, head)), raw)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three tasks, one per format; the label is told by a word of the text."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)

    def records(told, count):
        for i in range(count):
            fill = rng.choice(WORDS, size=rng.integers(3, 9))
            yield i % len(told), " ".join([told[i % len(told)], *fill])

    lines = [f"{label} {text}" for label, text in records(["good", "bad"], 120)]
    (folder / "mood.txt").write_text("\n".join(lines))
    rows = [f"{text}\t{label}" for label, text in records(["cat", "dog"], 90)]
    (folder / "animal.tsv").write_text("\n".join(["text\tlabel", *rows]))
    for name, count in (("train", 90), ("test", 30)):
        content = [
            json.dumps({"text": text, "label": ["film", "book", "none"][label]})
            for label, text in records(["film", "book", "the"], count)
        ]
        (folder / f"thing_{name}.jsonl").write_text("\n".join(content))
    return folder


def options(files, model, **others):
    tasks = {
        "mood": f"mood={files / 'mood.txt'}",
        "thing": f"thing={files / 'thing_train.jsonl'},{files / 'thing_test.jsonl'}",
        "animal": f"animal={files / 'animal.tsv'}",
    }
    names = others.pop("names", tasks)
    task = tuple(tasks[name] for name in names)
    return {
        **{"model": str(model), "task": task, "max_length": 12, "mesh": "data=1"},
        **others,
    }


def test_the_study_writes_everything_it_promises(bert_folder, files, tmp_path):
    out = tmp_path / "out"
    merges = ("ties", "regmean", "adamerging")
    config = text_study.Config(
        out=out, smoke=True, merges=merges, **options(files, bert_folder)
    )
    result = text_study.main(config)
    content = json.loads((out / "report.json").read_text())
    assert content == result
    names = ["mood", "thing", "animal"]
    assert content["tasks"] == names
    methods = {"nonlinear", "linear", "curvature", "tau_jp_cyclic"}
    assert content["tau_jp"].keys() == methods - {"nonlinear"}
    assert content["cosine"].keys() == methods
    np.testing.assert_allclose(np.diag(content["cosine"]["linear"]), 1, rtol=1e-5)
    rows = {(r["method"], r["merge"], r["searched"]): r for r in content["rows"]}
    both = (False, True)
    expected = {(m, "task_arithmetic", searched) for m in methods for searched in both}
    expected |= {("nonlinear", "ties", searched) for searched in both}
    expected |= {("nonlinear", merge, False) for merge in ("regmean", "adamerging")}
    expected.add(("linear", "adamerging", False))
    alone = ["zero_shot", *(f"individual_{method}" for method in methods)]
    expected |= {(method, "none", False) for method in alone}
    assert rows.keys() == expected
    for row in rows.values():
        assert row["per_task"].keys() == set(names)
    for figure in ("xi", "tau_jp", "cosine", "coefficients", "tasks"):
        assert (out / f"{figure}.png").stat().st_size > 5000
    # Only the blocks moved, and what was saved is what was evaluated.
    folder = out / "task_vectors" / "nonlinear"
    taus = [hub.load_tree(folder / f"{name}.safetensors")[0] for name in names]
    assert all(path.startswith("bert/encoder/") for path in tree.flatten(taus[0]))
    chosen = rows["nonlinear", "task_arithmetic", True]["coef"]
    merged, base = bert.load(out / "merged"), bert.load(bert_folder, head=None)
    edited = task_vectors.apply(base.params, task_vectors.add(taus), chosen)
    leaves = tree.flatten(merged.params)
    for path, leaf in tree.flatten(edited).items():
        np.testing.assert_allclose(leaves[path], leaf, rtol=1e-6, atol=1e-7)
    assert (out / "merged" / "tokenizer.json").is_file()
    found, classes = hub.load_tree(out / "heads.safetensors")
    assert {name: len(head) for name, head in found.items()} == dict(
        mood=2, thing=3, animal=2
    )
    assert json.loads(classes["thing"]) == ["book", "film", "none"]


def test_prompts_and_label_words_run_the_same_study_of_any_accuracy(
    roberta_folder, files, tmp_path, monkeypatch
):
    """An accuracy of zero costs the normalised accuracy and no report."""
    for single in ("ordinary_single", "linearized_single"):
        monkeypatch.setattr(
            evaluation,
            single,
            lambda study, _: dict.fromkeys(("validation", "test"), [0.0, 0.5]),
        )
    template = "{text} It is {mask}."
    prompt = (f"mood={template}|0:good,1:bad", f"animal={template}|0:bad,1:good")
    config = text_study.Config(
        **options(files, roberta_folder, names=("mood", "animal")),
        **dict(out=tmp_path, smoke=True, head="label-word", prompt=prompt),
        **dict(merges=(), modes=(), curvature=False),
    )
    rows = text_study.main(config)["rows"]
    assert {row["method"] for row in rows} >= {"zero_shot", "nonlinear", "linear"}
    assert {row["normalized"] for row in rows} == {None}
    assert all(row["absolute"] > 0 for row in rows if row["merge"] != "none")
    assert (tmp_path / "report.md").is_file()
    tau, _ = hub.load_tree(tmp_path / "task_vectors" / "linear" / "mood.safetensors")
    assert task_vectors.norm(tau) > 0
    assert all(path.startswith("roberta/encoder/") for path in tree.flatten(tau))


def test_label_words_start_from_what_the_model_says(roberta_folder, files, tmp_path):
    config = text_study.Config(
        **options(files, roberta_folder, names=("mood", "animal")),
        **dict(out=tmp_path, smoke=True, head="label-word"),
        prompt=tuple(
            f"{name}={{text}} It is {{mask}}.|0:good,1:bad"
            for name in ("mood", "animal")
        ),
    )
    study = text_study.prepare(config)
    model = bert.load(roberta_folder)
    batch = study.test[0].batches[0]
    every = bert.masked_lm(model.config)(
        model.params, batch["input_ids"], batch["attention_mask"]
    )
    tokenizer = text_study.text.load_tokenizer(roberta_folder)
    at = (batch["input_ids"] == tokenizer.mask_token_id).argmax(1)
    words = [tokenizer.convert_tokens_to_ids(w) for w in ("Ġgood", "Ġbad")]
    expected = np.asarray(every)[np.arange(len(at)), at][:, words]
    features = study.apply_fn(study.params_0, *(batch[name] for name in study.inputs))
    logits = study.logits(study.test[0].head, features)
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused_and_nothing_is_written(
    bert_folder, roberta_folder, files, tmp_path
):
    def refused(message, model=bert_folder, **others):
        out = tmp_path / "out"
        given = options(files, model) | others
        with pytest.raises(ValueError, match=message):
            text_study.main(text_study.Config(out=out, **given))
        assert not out.exists()

    mood, animal = options(files, bert_folder, names=("mood", "animal"))["task"]
    refused("at least two tasks", task=(mood,))
    refused("at least two tasks", task=(mood, mood))
    refused("expected NAME=FILE", task=(mood, "animal"))
    refused("no such file", task=(mood, "x=nowhere.tsv"))
    refused("at most 20, the positions of the model", max_length=21)
    refused("expected 5 at least", max_length=4)
    refused("expected 3 or more", samples=2)
    refused("only with --head label-word", prompt=("mood={text} {mask}|0:good,1:bad",))
    refused("cannot be the name of a file", task=(mood, "a/../b=x.txt"))
    base = tmp_path / "base"
    hub.save(base, {"a": np.zeros(1, np.float32)}, {"model_type": "bert", **RAW})
    refused("has no masked_lm head", model=base, head="label-word")
    words = dict(model=roberta_folder, head="label-word", task=(mood, animal))
    refused("no prompt for mood, animal", **words)
    good = tuple(
        f"{n}={{text}} It is {{mask}}.|0:good,1:bad" for n in ("mood", "animal")
    )
    refused("no label word for 1", **words, prompt=(good[0][: -len(",1:bad")], good[1]))
    refused("expected one token", **words, prompt=(good[0] + "ly", good[1]))
    refused("expected NAME=TEMPLATE", **words, prompt=("mood={text} {mask}",))
    refused("--task does not name", **words, prompt=(*good, "x={text} {mask}|a:b,c:d"))
    refused("words for 2", **words, prompt=(good[0] + ",2:fine", good[1]))
    refused("3 --prompt for 2 tasks", **words, prompt=(*good, good[0]))

    (tmp_path / "empty.txt").write_text("")
    refused("holds no record", task=(mood, f"x={tmp_path / 'empty.txt'}"))
    (tmp_path / "unseen.txt").write_text("2 a cat\n1 a dog")
    unseen = f"x={files / 'mood.txt'},{tmp_path / 'unseen.txt'}"
    refused("labels that train lacks: 2", task=(mood, unseen))


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    transformers, bert_folder, files, tmp_path
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder)
    model = bert.load(bert_folder)
    folder = tmp_path / "model"
    hub.save(folder, model.params, hub.read_json(bert_folder))
    tokenizer.add_tokens([f"new{i}" for i in range(100)])
    tokenizer.save_pretrained(folder)
    config = text_study.Config(out=tmp_path / "out", **options(files, folder))
    with pytest.raises(ValueError, match="embedding has 100 rows"):
        text_study.main(config)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_architecture_is_refused(tmp_path, files):
    folder = tmp_path / "model"
    hub.save(folder, {"a": np.zeros(3, np.float32)}, {"model_type": "vit"})
    config = text_study.Config(out=tmp_path / "out", **options(files, folder))
    with pytest.raises(ValueError, match="describes a 'vit'; expected a BERT"):
        text_study.main(config)


def test_help_names_every_column_of_texts():
    names = {name for columns in labelled.COLUMNS for name in columns}
    assert names and all(f"`{name}`" in text_study.__doc__ for name in names)
