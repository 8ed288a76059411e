"""The scripts on RoBERTa: their smoke runs, the task list, masks, heads and files."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

from experiments.awd import beyond, table3_glue
from experiments.bases import figure7_seventy_tasks as figure7
from experiments.bases import table8_twelve_tasks as table8
from experiments.bases import table16_prompt_robustness as table16
from experiments.common import bank
from experiments.common.language import (
    prompted,
    prompted_model,
    prompted_texts,
    roberta_glue,
    tiny_text,
)
from jaxarith import hub, merge, tree
from jaxarith.data import prompt_sources, prompts, text
from jaxarith.data.glue import score as glue_score
from jaxarith.models import bert, heads

SOURCES = prompt_sources.sources()


@pytest.fixture(autouse=True, scope="module")
def _transformers():
    pytest.importorskip("transformers", reason="makes the tokenizers")
    pytest.importorskip("sklearn", reason="clusters, and measures F1")


# Smoke runs.


def test_twelve_tasks_have_the_papers_rows_and_what_they_store(bank_folder, tmp_path):
    found = smoke.run("bases.table8_twelve_tasks", tmp_path, bank=bank_folder)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["Pre-trained", "Individual", *table8.PUBLISHED]
    text = (tmp_path / "report.md").read_text()
    known = [*table8.TASKS.values(), "Avg."]
    for method, values in table8.PUBLISHED.items():
        assert len(values) == len(known)
        assert np.mean(values[:-1]) == pytest.approx(values[-1], abs=0.11)
        [line] = [x for x in text.splitlines() if f"| {method} " in x][:1]
        for name in ("SST-2", "CR", "QNLI"):
            assert f" {values[known.index(name)]} |" in line
    tau, _ = hub.load_tree(bank_folder / "tiny_roberta" / "prompted" / "CR.safetensors")
    assert all("/encoder/layer/" in path for path in tree.flatten(tau))
    size = 4e-9 * sum(leaf.size for leaf in tree.flatten(tau).values())
    for method, [count, *_] in table8.PUBLISHED_STORAGE.items():
        row = rows[method]
        assert row["masks"] == (2 if count == 4 else 4)
        stored = row["masks"] * row["density, %"] / 100 * size
        assert row["GB"] == pytest.approx(stored)
    assert 0 < rows["Stitch Twice"]["density, %"]
    density = rows["Localize-and-Stitch"]["density, %"]
    assert rows["Stitch Twice"]["density, %"] < density < 100
    assert sorted(sum(found["clusters"], [])) == sorted(prompted.SMOKE)


def test_seventy_tasks_are_clustered_and_merged_by_it(bank_folder, tmp_path):
    found = smoke.run("bases.figure7_seventy_tasks", tmp_path, bank=bank_folder)
    assert [row["k"] for row in found["rows"]] == [1, 2]
    assert [len(row["random partitions"]) for row in found["rows"]] == [1, 2]
    assert [row["task"] for row in found["tasks"]] == list(prompted.SMOKE)
    assert all(row["majority vote"] == 50 for row in found["tasks"])
    for clusters in found["clusters"].values():
        assert sorted(sum(clusters, [])) == sorted(prompted.SMOKE)
    cosines = np.array(found["cosines"])
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
    for name in ("figure7", "figure8"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    text = (tmp_path / "report.md").read_text()
    assert " 42.15 |" in text and " 40.47 |" in text and "published: 3" in text


def test_the_adversarial_prompt_has_a_vector_of_its_own(bank_folder, tmp_path):
    found = smoke.run("bases.table16_prompt_robustness", tmp_path, bank=bank_folder)
    assert found["tasks"] == ["QNLI", "CR", "SST2", "SST2Adv"]
    pairs = [(row["first"], row["second"]) for row in found["rows"]]
    published = [tuple(x.replace("MNLI", "QNLI") for x in k) for k in table16.PUBLISHED]
    assert pairs[:3] == published  # the smoke run has QNLI in the place of MNLI
    assert "0.0627" in (tmp_path / "report.md").read_text()
    folder = bank_folder / "tiny_roberta" / "prompted"
    taus = [hub.load_tree(folder / f"{n}.safetensors")[0] for n in ("SST2", "SST2Adv")]
    own, other = (tree.flatten(tau) for tau in taus)
    assert any(np.abs(own[path] - other[path]).max() > 1e-4 for path in own)


def test_glue_tasks_have_the_papers_rows(bank_folder, tmp_path, monkeypatch):
    # As one of the papers' models, so that their figures stand beside.
    monkeypatch.setitem(roberta_glue.MODELS, roberta_glue.TINY, table3_glue.BASE)
    found = smoke.run("awd.table3_glue", tmp_path, bank=bank_folder)
    methods = [method for model, method in table3_glue.PUBLISHED if "Base" in model]
    assert [row["method"] for row in found["rows"]] == methods
    text = (tmp_path / "report.md").read_text()
    for (model, method), values in table3_glue.PUBLISHED.items():
        if (model, method) != (table3_glue.BASE, "Pre-trained"):  # a slip of the paper
            assert np.mean(values[:-1]) == pytest.approx(values[-1], abs=0.06)
        if model == table3_glue.BASE:
            named = re.compile(rf"\| {re.escape(method)} *\|")
            lines = [x for x in text.splitlines() if named.search(x)]
            at = [table3_glue.COLUMNS.index(x) for x in ("MRPC", "STS-B", "MNLI")]
            assert (
                f" {values[at[0]]} |" in lines[0] and f" {values[at[1]]} " in lines[0]
            )
            assert f" {values[at[2]]} |" in lines[1]
    single = found["rows"][1]
    assert single["MRPC"] == single["MNLI"] == 100
    more = {row["method"]: row for row in found["beyond"]}
    assert list(more) == [*beyond.MERGES, beyond.PLAIN, beyond.SEARCHED]
    plain = more[beyond.PLAIN]
    assert plain["effective λ"] == pytest.approx(plain["coefficient"], rel=1e-5)
    assert 0 < found["rows"][-1]["cosine with sum"] < 1.0001
    assert [row["variant"] for row in found["figure 2"]] == list(table3_glue.VARIANTS)
    full = found["figure 2"][0]
    assert full["MNLI"] == single["MNLI, score"]
    assert (tmp_path / "figure2_RoBERTa-Base.png").stat().st_size > 5000


# The list of tasks.


def test_the_list_says_of_all_72_tasks_and_qqp_how_they_are_read():
    listed = prompts.bases_tasks()
    assert len(SOURCES) == 73 and figure7.LIST == tuple(SOURCES)[:-1]
    assert set(table8.TASKS) <= SOURCES.keys()
    counts = {name: 0 for name in listed}
    for name, source in SOURCES.items():
        assert set(source.prompt.fields) <= source.fields.keys(), name
        assert set(source.classes.values()) <= set(source.prompt.words), name
        assert source.files or "/" in source.dataset
        for entry, known in listed.items():
            if name.startswith(entry) and known.dataset == source.dataset:
                counts[entry] += 1
                assert source.prompt.template == known.prompt.template
    assert all(counts[name] >= known.tasks for name, known in listed.items())
    assert sum(name.startswith("bAbI ") for name in SOURCES) == 20
    # Where the classes are not those of the paper, a note says so.
    for name, source in SOURCES.items():
        if set(source.classes.values()) != set(source.prompt.words):
            assert source.note, name


def test_all_that_is_missing_is_one_error_and_nothing_is_written(tmp_path):
    for script in (figure7, table8):
        config = script.Config(
            tasks=("MR", "cats", f"SUBJ={tmp_path / 'none.txt'}", "CR"),
            data_dir=tmp_path,
            out=tmp_path / "out",
            bank=tmp_path / "bank",
        )
        missing = r"(?s)MR: .*datasets.tar.*cats: not a task.*none.txt.*CR: .*original"
        with pytest.raises(ValueError, match=missing):
            script.main(config)
    config = table3_glue.Config(data_dir=tmp_path, out=tmp_path / "out")
    missing = r"(?s)cola: .*no such file.*rte: .*no such file"
    with pytest.raises(ValueError, match=missing):
        table3_glue.main(config)
    assert not list(tmp_path.iterdir())


# Samples, heads, merges.


def test_few_samples_are_balanced_repeated_and_apart_from_validation():
    labels = ["a"] * 50 + ["b"] * 9 + [None] * 3
    drawn, held_out = prompted_texts.draw(labels, ["a", "b"], 16, seed=1)
    of = np.array(labels, object)
    assert [(of[drawn] == name).sum() for name in "ab"] == [16, 16]
    assert [(of[held_out] == name).sum() for name in "ab"] == [16, 2]
    assert not set(drawn) & set(held_out)
    assert len({i for i in drawn if labels[i] == "a"}) == 16
    assert len({i for i in drawn if labels[i] == "b"}) == 7  # of nine, two held out
    with pytest.raises(ValueError, match="the class b has 1 rows"):
        prompted_texts.draw(["a", "a", "b"], ["a", "b"], 1, seed=0)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    words = ["great", "terrible"]
    folder = tmp_path_factory.mktemp("model") / "roberta"
    return tiny_text.write_roberta(folder, words)


def test_a_label_word_of_several_tokens_has_the_mean_of_their_rows(roberta):
    model = bert.load(roberta, head="masked_lm")
    tokenizer = text.load_tokenizer(roberta)
    pieces = prompts.word_pieces(tokenizer, ["great", "greatness"])
    assert len(pieces[0]) == 1 and len(pieces[1]) > 1
    words, bias = map(np.asarray, bert.output_words(model.config, model.params))
    head = prompted_model.label_head(words, bias, pieces)
    ids = tokenizer("a film " + tokenizer.mask_token)["input_ids"]
    tokens, mask = np.array([ids], np.int32), np.ones((1, len(ids)), np.int32)
    inputs = jnp.asarray(tokens), jnp.asarray(mask)
    logits = bert.masked_lm(model.config)(model.params, *inputs)[
        0, ids.index(tokenizer.mask_token_id)
    ]
    expected = [np.mean(logits[np.array(of_word)]) for of_word in pieces]
    encode = bert.mask_encoder(model.config, tokenizer.mask_token_id)
    found = heads.affine_logits(head, encode(model.params, *inputs))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="two classes share a label word"):
        prompts.word_pieces(tokenizer, ["great", "great"])


def test_class_means_are_those_of_normalised_mean_features(roberta):
    model = prompted_model.load(str(roberta), "class-mean")
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 20, (6, 7)).astype(np.int32)
    mask = (np.arange(7) < rng.integers(3, 8, (6, 1))).astype(np.int32)
    labels = [0, 1, 0, 1, 1, 0]
    rows = zip(ids, mask, labels, strict=True)
    head = model.head(
        [{"input_ids": i, "attention_mask": m, "label": y} for i, m, y in rows],
        ["great", "terrible"],
    )
    hidden = np.asarray(bert.encoder(model.config)(model.params, ids, mask))
    features = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([features[np.equal(labels, c)].mean(0) for c in range(2)])
    means *= 20 / np.linalg.norm(means, axis=1, keepdims=True)
    found = heads.affine_logits(head, model.apply_fn(model.params, ids, mask))
    np.testing.assert_allclose(found, features @ means.T, rtol=1e-5, atol=1e-5)


def test_an_encoder_without_a_masked_lm_head_is_clustered_too(bank_folder, tmp_path):
    options = {"bank": bank_folder, "head": "class-mean"}
    found = smoke.run("bases.figure7_seventy_tasks", tmp_path, **options)
    assert [row["task"] for row in found["tasks"]] == list(prompted.SMOKE)
    files = {path.parent.name for path in bank_folder.rglob("SST2.safetensors")}
    assert "prompted_class_mean" in files


def test_mean_of_means_is_the_average_of_the_basis_vectors():
    rng = np.random.default_rng(0)
    params_0 = {"w": rng.normal(size=(4, 3)).astype(np.float32)}
    taus = [{"w": rng.normal(size=(4, 3)).astype(np.float32)} for _ in range(5)]
    clusters = [[0, 3, 4], [1], [2]]
    found = figure7.mean_of_means(params_0, taus, clusters)["w"]
    bases = merge.basis_vectors(params_0, taus, clusters=clusters).vectors
    expected = merge.average(params_0, bases)["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    means = [np.mean([taus[i]["w"] for i in c], axis=0) for c in clusters]
    by_hand = params_0["w"] + np.mean(means, axis=0)
    np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-6)


def test_a_random_partition_has_all_tasks_and_no_empty_group():
    rng = np.random.default_rng(0)
    seen = set()
    for k in (1, 2, 5, 7):
        for _ in range(20):
            groups = figure7.random_partition(rng, 7, k)
            assert len(groups) == k and all(groups)
            assert sorted(sum(groups, [])) == list(range(7))
            seen.add(tuple(map(tuple, groups)))
    assert len(seen) > 20


def test_the_loss_of_glue_is_cross_entropy_over_the_classes_or_squared_error():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(5, 3)).astype(np.float32)

    def loss(outputs, classes, labels):
        batch = {"label": jnp.asarray(labels, jnp.float32)}
        return roberta_glue.loss(outputs, batch, {"classes": jnp.int32(classes)})

    for classes in (2, 3):
        labels = rng.integers(classes, size=5)
        logits = outputs[:, :classes].astype(float)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = -np.mean(log_p[np.arange(5), labels])
        found = loss(outputs, classes, labels)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    labels = rng.uniform(0, 5, size=5)
    expected = np.mean((outputs[:, 0] - labels) ** 2)
    np.testing.assert_allclose(loss(outputs, 1, labels), expected, rtol=1e-5)
    slopes = jax.grad(loss)(jnp.asarray(outputs), 1, labels)
    by_hand = np.zeros((5, 3))
    by_hand[:, 0] = 2 * (outputs[:, 0] - labels) / 5
    np.testing.assert_allclose(slopes, by_hand, rtol=1e-5, atol=1e-6)


def test_a_score_of_glue_looks_at_the_outputs_of_the_task_alone():
    labels = np.array([0, 1, 1, 0], np.float32)
    batches = [{"label": labels, "mask": np.ones(4, bool)}]
    outputs = np.array([[1, 0, 9], [0, 1, 9], [1, 0, 9], [1, 0, 9]], np.float32)
    expected = glue_score(roberta_glue.glue.TASKS["mrpc"], [0, 1, 0, 0], [0, 1, 1, 0])
    assert roberta_glue.score("mrpc", outputs, batches) == pytest.approx(expected)
    scores = np.array([[1, 5], [2, 0], [3, 9], [0, 1]], np.float32)
    expected = glue_score(roberta_glue.glue.TASKS["stsb"], scores[:, 0], labels)
    assert roberta_glue.score("stsb", scores, batches) == pytest.approx(expected)


# Files of texts, and the bank.


def write_files(folder, count=24):
    """Two tasks of a text and one of choices."""
    rng = np.random.default_rng(0)
    for name in ("films", "MR"):
        labels = ["negative", "positive"] if name == "MR" else ["0", "1"]
        words = [("bad", "good")[i % 2] for i in range(count)]
        things = rng.choice(["cat", "dog"], count)
        lines = [
            f"{labels[i % 2]} the {word} {thing}"
            for i, (word, thing) in enumerate(zip(words, things, strict=True))
        ]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    rows = [
        f'{{"text": "it is", "choice1": "good", "choice2": "bad", "label": {i % 2}}}'
        for i in range(count)
    ]
    (folder / "PiQA.jsonl").write_text("\n".join(rows))


def test_tasks_are_files_too_and_their_vectors_are_kept(roberta, tmp_path, monkeypatch):
    write_files(tmp_path)
    options = dict(
        model=str(roberta),
        tasks=(
            f"MR={tmp_path / 'MR.txt'}",
            f"PiQA={tmp_path / 'PiQA.jsonl'}",
            f"films={tmp_path / 'films.txt'},{tmp_path / 'films.txt'}",
        ),
        prompt=("films={text} It was {mask}.|0:terrible,1:great",),
        **dict(shots=4, steps=2, batch_size=8, max_length=32, evaluation_batch=16),
        **dict(save_every=0, mesh="data=1", bank=tmp_path / "bank"),
    )
    config = table16.Config(out=tmp_path / "first", **options)
    first = table16.main(config)
    assert first["tasks"] == ["MR", "PiQA", "films", "filmsAdv"]
    with monkeypatch.context() as patch:
        patch.setattr(
            prompted.training.train, "fine_tune", lambda *_, **__: pytest.fail()
        )
        again = figure7.Config(
            out=tmp_path / "again", keep_all=True, ks=(1,), shown_ks=(2,), **options
        )
        found = figure7.main(again)
        np.testing.assert_allclose(
            found["cosines"], np.array(first["cosines"])[:3, :3], atol=1e-6
        )
        other = figure7.Config(out=tmp_path / "other", **{**options, "shots": 5})
        with pytest.raises(ValueError, match="another configuration"):
            figure7.main(other)
    record = bank.record(tmp_path / "bank" / "roberta" / "prompted" / "MR.safetensors")
    assert record["configuration"]["recipe"]["trained"] == bert.BLOCKS


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("figure7_seventy_tasks", {"tasks": ("MR", "CR")}, "at least three"),
        ("table8_twelve_tasks", {"clusters": 13}, "--clusters 13: expected 1 to 12"),
        ("table16_prompt_robustness", {"tasks": ("MR", "CR")}, "expected three tasks"),
        ("table8_twelve_tasks", {"tasks": ("MR", "MR", "CR", "MR")}, "each only once"),
        (
            "table16_prompt_robustness",
            {"tasks": ("MR", "CR", "SUBJ"), "prompt": ("x={text} {mask}|a:b,c:d",)},
            "--prompt is given for x",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(script, options, message, tmp_path):
    script = importlib.import_module(f"experiments.bases.{script}")
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(out=tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())
