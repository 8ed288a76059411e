"""The language scripts of the task-arithmetic paper: smoke runs and their parts."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import smoke

from experiments.common.language import (
    detoxification,
    gpt2,
    text_files,
    text_to_text,
    tiny_text,
)
from experiments.editing import (
    figure13_real_toxicity_prompts,
    figure18_nlp_pairs,
    table2_detoxification,
    table3_external_vectors,
    table4_analogies,
)
from jaxarith import hub, sharding, task_vectors
from jaxarith.models import t5

pytest.importorskip("transformers", reason="makes the tokenizers")


@pytest.fixture(scope="module")
def negated(tmp_path_factory, bank_folder):
    out = tmp_path_factory.mktemp("table2")
    return smoke.run("editing.table2_detoxification", out, bank=bank_folder)


def test_table_2_has_the_rows_of_the_paper_in_order(negated):
    names = [row["method"] for row in negated["rows"]]
    printed = [m for size, m in table2_detoxification.PUBLISHED if "Large" in size]
    assert names == printed
    by_name = {row["method"]: row for row in negated["rows"]}
    curve = negated["searches"]["tiny_gpt2"]
    at = dict(zip(curve["coefs"], curve["perplexities"], strict=True))
    chosen = max(coef for coef, found in at.items() if found <= curve["limit"])
    assert by_name["Negative task vector"]["coef"] == -chosen
    assert by_name["Random vector"]["coef"] == -chosen
    assert by_name["Negative task vector"]["perplexity"] == pytest.approx(at[chosen])
    assert curve["limit"] == pytest.approx(by_name["Pre-trained"]["perplexity"] + 0.5)


def test_ascent_unlearns_what_descent_learns(negated, bank_folder):
    """Of one first step of Adam the two are opposite; later they still point apart."""
    folder = bank_folder / "tiny_gpt2" / "editing"
    toxic, ascent = (
        hub.load_tree(folder / f"{kind}.safetensors")[0]
        for kind in ("toxic", "toxic_ascent")
    )
    assert task_vectors.cosine_matrix([toxic, ascent])[0, 1] < -0.3
    loss = {row["method"]: row["perplexity"] for row in negated["rows"]}
    assert loss["Fine-tuned"] != pytest.approx(loss["Gradient ascent"], rel=1e-3)


def test_comments_of_both_kinds_are_told_apart_by_their_toxicity(tmp_path):
    files = tiny_text.write_comments(tmp_path)
    toxic = text_files.kept_texts(files["comments"], detoxification.TOXIC)
    others = text_files.kept_texts(files["comments"], detoxification.NON_TOXIC)
    assert all("hate" in line for line in toxic)
    assert others and not any("hate" in line for line in others)
    assert text_files.condition("toxicity<0.2")[1]("0.2") is False


def test_figure_13_takes_the_vector_of_table_2(negated, tmp_path, bank_folder):
    found = smoke.run(
        "editing.figure13_real_toxicity_prompts", tmp_path, bank=bank_folder
    )
    assert not list(tmp_path.glob("train_*"))
    assert [row["coef"] for row in found["rows"]] == [0.0, 1.0]
    first = negated["rows"][0]["perplexity"]
    assert found["rows"][0]["perplexity"] == pytest.approx(first)
    assert found["prompts"] == {"challenging": 2, "random": 2}
    assert "Perspective API" in (tmp_path / "report.md").read_text()
    assert "Perspective API" in figure13_real_toxicity_prompts.Config.__doc__


def test_expected_maximum_toxicity_is_the_mean_of_the_largest_scores():
    scores = np.random.default_rng(0).uniform(size=(7, 25)).astype(np.float32)
    found = figure13_real_toxicity_prompts.expected_maximum(scores.ravel(), 25)
    expected = sum(max(row.tolist()) for row in scores) / 7
    assert found == pytest.approx(expected, rel=1e-5)


def test_prompts_that_are_broken_are_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a"}))
    config = figure13_real_toxicity_prompts.Config(out=tmp_path / "out", prompts=file)
    with pytest.raises(ValueError, match="Expected an object on every line"):
        figure13_real_toxicity_prompts.main(config)
    assert not config.out.exists()


def test_table_3_adds_a_vector_only_where_it_helps_on_held_out_data(
    tmp_path, bank_folder
):
    pytest.importorskip("sklearn", reason="measures the Matthews correlation")
    found = smoke.run("editing.table3_external_vectors", tmp_path, bank=bank_folder)
    printed = table3_external_vectors.PUBLISHED
    assert [row["method"] for row in found["rows"]] == list(printed)
    for search in found["searches"]:
        assert (search["external"] is None) == (search["coef"] == 0.0)
        if search["external"] is None:
            assert search["Fine-tuned + task vectors"] == search["Fine-tuned"]
    by_task = {s["task"]: s for s in found["searches"]}
    row = found["rows"][1]
    for task in table3_external_vectors.TASKS:
        assert row[task] == pytest.approx(100 * by_task[task]["Fine-tuned"])
    assert "published" in (tmp_path / "report.md").read_text()


def test_every_external_model_is_read_once_for_all_tasks(tmp_path, monkeypatch):
    module, read = table3_external_vectors, []
    names = [str(i) for i in range(5)]
    vectors = {n: {"w": np.array([1.0, float(n)], np.float32)} for n in names}
    taus = [{"w": np.array(w, np.float32)} for w in ([0.0, 1.0], [1.0, 0.0])]

    def external_vector(base, name):
        read.append(name)
        return vectors[name]

    def accuracy_of(base, task, params, part):
        return -float(np.sum((params["w"] - task) ** 2))

    monkeypatch.setattr(module.text_to_text, "external_vector", external_vector)
    monkeypatch.setattr(module, "accuracy_of", accuracy_of)
    config = module.Config(out=tmp_path, external=tuple(names), coefs=(0.5, 1.0))
    checkpoint = types.SimpleNamespace(params={"w": np.zeros(2, np.float32)})
    base = types.SimpleNamespace(checkpoint=checkpoint, fingerprint=0)
    tasks = [np.array([1.0, 4.0]), np.array([2.0, 0.5])]
    scores, cosines = module.survey(config, base, tasks, taus, names)
    assert read == names and scores.shape == (2, 5, 2)
    for t, i in np.ndindex(2, 5):
        w, own = vectors[names[i]]["w"], taus[t]["w"]
        expected = [-np.sum((own + coef * w - tasks[t]) ** 2) for coef in (0.5, 1.0)]
        np.testing.assert_allclose(scores[t, i], expected, rtol=1e-6)
        cosine = w @ own / np.linalg.norm(w) / np.linalg.norm(own)
        np.testing.assert_allclose(cosines[t, i], cosine, rtol=1e-6)
    read.clear()
    few = dataclasses.replace(config, preselect=2, out=tmp_path / "few")
    some, _ = module.survey(few, base, tasks, taus, names)
    # The cosines are read off all; then those of either task, which are 3, 4 and 0, 1.
    assert read == [*names, "0", "1", "3", "4"]
    scored = ~np.isnan(some).any(axis=2)
    assert scored.tolist() == [[False] * 3 + [True] * 2, [True] * 2 + [False] * 3]
    np.testing.assert_array_equal(some[scored], scores[scored])
    monkeypatch.setattr(module, "accuracy_of", None)  # a second start has all scores
    again, _ = module.survey(config, base, tasks, taus, names)
    np.testing.assert_array_equal(again, scores)


def test_the_report_says_how_often_a_preselection_holds_the_winner():
    ranks = [{"rank by cosine": rank} for rank in (1, 4, None, 2)]
    found = [
        (r["N"], *list(r.values())[1:]) for r in table3_external_vectors.kept(ranks, 6)
    ]
    assert found == [(1, 1, 3), (2, 2, 3), (5, 3, 3)]


def test_a_model_that_does_not_fit_the_base_has_no_vector(tmp_path):
    folder = tiny_text.write_t5(tmp_path / "tiny_t5")
    config = text_to_text.Options(out=tmp_path, smoke=True)
    base = text_to_text.load(config, sharding.make_mesh("data=1"), "tiny_t5")
    same = text_to_text.external_vector(base, str(folder))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(same))
    raw = hub.read_json(folder)
    for change in ({"d_ff": 40}, {"num_layers": 2}):
        (folder / "config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(ValueError, match="(?s)so it has no task vector.*wi"):
            text_to_text.external_vector(base, str(folder))
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "bart"}))
    with pytest.raises(ValueError, match="'bart'; expected a T5"):
        text_to_text.external_vector(base, str(folder))


def test_table_4_has_the_analogy_between_the_two_domains(tmp_path, bank_folder):
    found = smoke.run("editing.table4_analogies", tmp_path, bank=bank_folder)
    rows = [(row["target"], row["method"]) for row in found["rows"]]
    methods = table4_analogies.METHODS
    assert rows == [(target, m) for target in ("yelp", "amazon") for m in methods]
    for curve in found["searches"].values():
        grid = np.array(curve["validation"])
        i, j = np.unravel_index(grid.argmax(), grid.shape)
        assert curve["coef"] == [curve["coefs"][i], curve["coefs"][j]]


def test_labels_of_the_files_of_a_domain_are_numbered_in_order(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("2 fine\n1 dull\n")
    option = f"{tmp_path}/train.txt,{tmp_path}/test.txt"
    train, test = table4_analogies.from_files("yelp", option)
    assert [row["label"] for row in train] == [1, 0] == [row["label"] for row in test]
    with pytest.raises(ValueError, match="expected TRAIN,TEST"):
        table4_analogies.from_files("yelp", option + ",x.txt")


def test_figure_18_normalises_by_the_tasks_own_models(tmp_path, bank_folder):
    pytest.importorskip("rouge_score", reason="measures ROUGE-2")
    found = smoke.run("editing.figure18_nlp_pairs", tmp_path, bank=bank_folder)
    assert len(found["rows"]) == 3
    # The targets of generated texts are what the own model wrote.
    assert found["single"]["test"]["race"] == 1.0
    for row in found["rows"]:
        for place in ("first", "second"):
            alone = found["single"]["test"][row[place]]
            expected = row[f"{place} score"] / alone
            assert row[f"{place} normalized"] == pytest.approx(expected)
    mean = np.mean([row["normalized"] for row in found["rows"]])
    assert found["mean"] == pytest.approx(mean)


def test_missing_data_of_a_pair_is_named_before_anything_is_loaded(tmp_path):
    config = figure18_nlp_pairs.Config(out=tmp_path / "out", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"imdb_validation\.jsonl: no such file"):
        figure18_nlp_pairs.main(config)
    assert not config.out.exists()


def test_summaries_are_not_cut_where_a_sentence_would_end():
    tokens = figure18_nlp_pairs.NEW_TOKENS
    generated = [k for k, v in figure18_nlp_pairs.METRICS.items() if v != "accuracy"]
    assert list(tokens) == generated
    assert tokens["multi_news"] > 1.3 * 264 > tokens["squad"]


def test_every_published_row_has_as_many_values_as_the_table():
    for row in table2_detoxification.PUBLISHED.values():
        assert len(row) == len(gpt2.VALUES)
    for name, row in table3_external_vectors.PUBLISHED.items():
        assert np.mean(row[:4]) == pytest.approx(row[4], abs=0.06), name
    assert len(table4_analogies.PUBLISHED) == 18
    assert set(detoxification.SIZES.values()) == {
        size for size, _ in table2_detoxification.PUBLISHED
    }


def test_generated_texts_are_those_of_the_largest_logits(tmp_path):
    """Against one forward pass per token, without a cache."""
    config = text_to_text.Options(out=tmp_path, smoke=True, max_length=8)
    base = text_to_text.load(config, sharding.make_mesh("data=1"), "tiny_t5")
    [batch] = text_to_text.batches(base, [{"text": "a good film"}])
    params = base.checkpoint.params
    [found] = text_to_text.generated(base, params, [batch], 3)
    apply_fn, tokens = jax.jit(t5.language_model(base.checkpoint.config)), [0]
    inputs = [batch[name][:1] for name in ("input_ids", "attention_mask")]
    for _ in range(3):
        padded = np.array([tokens + [0] * (3 - len(tokens))])  # no token sees them
        logits = apply_fn(params, *inputs, padded)
        tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
        if tokens[-1] == base.tokenizer.eos_token_id:
            break
    expected = base.tokenizer.decode(tokens[1:], skip_special_tokens=True)
    assert found == expected
