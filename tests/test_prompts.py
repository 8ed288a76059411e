"""Prompts for masked language models: texts, label words, few samples, tokens."""

import collections
import re
import string

import numpy as np
import pytest

from jaxarith.data import pipeline, prompts

TASKS = prompts.TASKS
SENTIMENT = {"negative": "terrible", "positive": "great"}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="makes the tokenizers")


def make_roberta(transformers, lstrip=True):
    """Byte-level, with " great", " bad" and "bad" as tokens, else one per letter.

    As in RoBERTa's own tokenizer.json, the mask takes the blank before it.
    """
    letters = sorted({*string.ascii_letters, *"Ġ?.,:!"})
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    merges = [
        ("Ġ", "g"),
        ("Ġg", "r"),
        ("Ġgr", "e"),
        ("Ġgre", "a"),
        ("Ġgrea", "t"),
        ("b", "a"),
        ("ba", "d"),
        ("Ġ", "bad"),
    ]
    words = ["".join(pair) for pair in merges]
    vocab = [*specials, *letters, *words, "<mask>"]
    return transformers.RobertaTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=merges,
        mask_token=transformers.AddedToken("<mask>", lstrip=lstrip, special=True),
    )


@pytest.fixture(scope="module")
def roberta(transformers):
    return make_roberta(transformers)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("sst2", "cr", "mr", "mpqa"), "One It was <mask>."),
        (("trec",), "<mask>: One"),
        (("subj",), "One This is <mask>."),
        (("qnli", "snli", "mnli", "rte"), "One? <mask> , Two"),
        (("mrpc",), "One <mask> , Two"),
        (("qqp",), "One <mask>, Two"),
    ],
)
def test_the_twelve_tasks_in_their_prompts(names, text):
    record = {"text": "One", "text_pair": "Two", "label": 0}
    for name in names:
        assert prompts.fill(TASKS[name], record, "<mask>") == text


def test_there_are_twelve_tasks_with_a_word_for_every_class():
    assert len(TASKS) == 12
    found = {name: len(prompt.words) for name, prompt in TASKS.items()}
    three = dict.fromkeys(("snli", "mnli"), 3)
    assert found == {**dict.fromkeys(TASKS, 2), **three, "trec": 6}
    from jaxarith.data import glue

    for name in ("sst2", "qnli", "mnli", "rte", "mrpc", "qqp"):
        classes = glue.TASKS[name].classes
        assert len(TASKS[name].label_words(classes)) == len(classes)
    assert TASKS["mnli"].label_words(glue.TASKS["mnli"].classes) == (
        *("Yes", "Maybe", "No"),
    )
    assert TASKS["rte"].label_words(glue.TASKS["rte"].classes) == ("Yes", "No")
    assert TASKS["mrpc"].label_words(glue.TASKS["mrpc"].classes) == ("No", "Yes")


def test_the_bases_papers_list_is_whole():
    entries = prompts.bases_tasks()
    assert len(entries) == 50
    assert sum(entry.tasks for entry in entries.values()) == 72
    fields = {"text", "text_pair", "word", "phrase1", "phrase2", "context", "question"}
    fields |= {f"choice{i}" for i in range(1, 6)}
    for entry in entries.values():
        assert set(entry.prompt.fields) <= fields
        words = list(entry.prompt.words.values())
        assert len(words) > 1
        assert len(set(words)) == len(words)
        assert "/" in entry.dataset
    assert len(entries["20Newsgroups"].prompt.words) == 20
    assert len(entries["DBpedia14"].prompt.words) == 14
    for name in ("QNLI", "RTE", "MRPC", "SST2", "TREC", "SUBJ", "CR", "MR", "MPQA"):
        mine = TASKS[name.lower()]
        assert entries[name].prompt.template == mine.template
        assert sorted(entries[name].prompt.words.values()) == sorted(
            mine.words.values()
        )


def test_a_question_of_few_choices_fills_the_others_with_nothing():
    prompt = prompts.bases_tasks()["ARC"].prompt
    choices = {f"choice{i}": word for i, word in enumerate(["x", "y", "z", "u", ""], 1)}
    record = {"question": "Which?", **choices}
    expected = "Which? A: x B: y C: z D: u E:  Answer: <mask>"
    assert prompts.fill(prompt, record, "<mask>") == expected


def test_braces_in_a_text_are_text():
    filled = prompts.fill(TASKS["sst2"], {"text": "{mask} {0}"}, "<mask>")
    assert filled == "{mask} {0} It was <mask>."


@pytest.mark.parametrize(
    "template", ["{text} It was.", "{mask} {text} {mask}", "{mask}"]
)
def test_a_template_without_one_mask_and_a_field_is_an_error(template):
    with pytest.raises(ValueError, match="must contain {mask} once and a field"):
        prompts.Prompt(template, SENTIMENT)


def test_a_record_that_does_not_fit_its_prompt_is_an_error():
    with pytest.raises(
        ValueError, match="needs text_pair, but the record has text, label"
    ):
        prompts.fill(TASKS["rte"], {"text": "One", "label": 0}, "<mask>")
    with pytest.raises(ValueError, match="contains the mask token"):
        prompts.fill(TASKS["sst2"], {"text": "a <mask> b"}, "<mask>")


def test_a_class_without_a_label_word_is_an_error():
    assert TASKS["sst2"].label_words(("positive", "negative")) == ("great", "terrible")
    with pytest.raises(ValueError, match="no label word for 0, 1; it has words"):
        TASKS["sst2"].label_words(("0", "1"))


def test_label_words_are_tokens_as_they_stand_inside_a_text(roberta):
    ids = prompts.word_ids(roberta, ["great", "bad"])
    vocab = roberta.get_vocab()
    assert ids.tolist() == [vocab["Ġgreat"], vocab["Ġbad"]]
    assert vocab["Ġbad"] != vocab["bad"]
    inside = roberta("It was great.")["input_ids"]
    assert ids[0] in inside
    assert ids.dtype == np.int32


def test_a_label_word_of_many_tokens_is_an_error_until_it_is_added(transformers):
    tokenizer = make_roberta(transformers)
    with pytest.raises(
        ValueError, match="'windowsX' has .*'X'.*expected one token.*add_tokens"
    ):
        prompts.word_ids(tokenizer, ["great", "windowsX"])
    before = len(tokenizer)
    tokenizer.add_tokens(["windowsX"])
    ids = prompts.word_ids(tokenizer, ["great", "windowsX"])
    assert ids.tolist() == [tokenizer.get_vocab()["Ġgreat"], before]


def test_an_unknown_word_and_a_shared_one_are_errors(transformers, roberta):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] great bad".split()
    bert = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    assert prompts.word_ids(bert, ["great", "bad"]).tolist() == [5, 6]
    with pytest.raises(ValueError, match="'terrible' has .*UNK"):
        prompts.word_ids(bert, ["great", "terrible"])
    with pytest.raises(
        ValueError, match="two classes share a label word: great, great"
    ):
        prompts.word_ids(roberta, ["great", "great"])


def test_tokens_are_those_of_the_filled_text(roberta):
    records = [
        {"text": "Bad!", "text_pair": "bad bad", "label": 1},
        {"text": "Great", "text_pair": "A great one", "label": 0},
    ]
    prompt = TASKS["rte"]
    batch = pipeline.collate(prompts.encode(roberta, prompt, records, 30))
    texts = [prompts.fill(prompt, record, "<mask>") for record in records]
    expected = roberta(texts, padding="max_length", max_length=30, return_tensors="np")
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(batch[name], expected[name])
        assert batch[name].dtype == np.int32
    assert batch["label"].tolist() == [1, 0]
    masks = batch["input_ids"] == roberta.mask_token_id
    assert masks.sum(-1).tolist() == [1, 1]


def test_the_blank_before_the_mask_is_never_a_token(transformers, roberta):
    other = make_roberta(transformers, lstrip=False)
    records = [{"text": "Bad!", "text_pair": "great", "label": 1}]
    for name in ("sst2", "rte", "trec"):
        (ours,) = prompts.encode(roberta, TASKS[name], records, 30)
        (theirs,) = prompts.encode(other, TASKS[name], records, 30)
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    filled = prompts.fill(TASKS["sst2"], records[0], "<mask>")
    assert len(other(filled)["input_ids"]) == len(roberta(filled)["input_ids"]) + 1


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("sst2", r"<s>.+ĠItĠwas<mask>\.</s>"),
        ("trec", r"<s><mask>:Ġ.+</s>"),
        ("rte", r"<s>.+\?<mask>Ġ,.+</s>"),
    ],
)
@pytest.mark.parametrize("max_length", [20, 21, 27, 40])
def test_cutting_shortens_the_texts_and_never_the_template(
    roberta, name, template, max_length
):
    long = "abcde fghij " * 9
    records = [
        {"text": long, "text_pair": "Bad bad", "label": 0},
        {"text": long, "text_pair": long, "label": 0},
    ]
    for row in prompts.encode(roberta, TASKS[name], records, max_length):
        assert row["attention_mask"].tolist() == [1] * max_length
        tokens = "".join(roberta.convert_ids_to_tokens(row["input_ids"]))
        assert re.fullmatch(template, tokens)
        assert "abc" in tokens


def test_of_a_pair_the_longer_text_is_cut(roberta):
    record = {"text": "x" * 60, "text_pair": "bad", "label": 0}
    (row,) = prompts.encode(roberta, TASKS["rte"], [record], 20)
    text = roberta.decode(row["input_ids"], skip_special_tokens=True)
    assert text.endswith(", bad")
    kept = collections.Counter(text)["x"]
    assert len(roberta(f"{'x' * kept}? <mask> , bad")["input_ids"]) == 20
    record = {"text": "x" * 60, "text_pair": "y" * 40, "label": 0}
    (row,) = prompts.encode(roberta, TASKS["rte"], [record], 30)
    counts = collections.Counter(roberta.decode(row["input_ids"]))
    assert abs(counts["x"] - counts["y"]) <= 1


def test_a_text_that_stands_twice_loses_no_more_than_it_must(roberta):
    prompt = prompts.Prompt("{text} It was {mask}. {text}", {"bad": "bad"})
    record = {"text": "x" * 60, "label": 0}
    (row,) = prompts.encode(roberta, prompt, [record], 40)
    assert row["attention_mask"].sum() >= 39


def test_a_template_that_is_too_long_alone_is_an_error(roberta):
    record = {"text": "abc", "label": 0}
    with pytest.raises(ValueError, match="alone takes .* tokens, but max_length is 8"):
        prompts.encode(roberta, TASKS["sst2"], [record], 8)


def test_a_tokenizer_without_a_mask_token_is_an_error(transformers):
    vocab = {"<|endoftext|>": 0, "a": 1}
    tokenizer = transformers.GPT2Tokenizer(vocab=vocab, merges=[])
    with pytest.raises(ValueError, match="no mask token"):
        prompts.encode(tokenizer, TASKS["sst2"], [{"text": "a", "label": 0}], 8)


def test_as_many_records_of_every_class_are_drawn_by_the_seed():
    records = [{"text": f"text {i}", "label": i % 3} for i in range(90)]
    drawn = prompts.few_shot(records, 8, seed=0)
    labels = collections.Counter(record["label"] for record in drawn)
    assert labels == {0: 8, 1: 8, 2: 8}
    assert len({record["text"] for record in drawn}) == 24
    assert drawn == prompts.few_shot(records, 8, seed=0)
    assert drawn != prompts.few_shot(records, 8, seed=1)
    everything = prompts.few_shot(records, 30)
    assert sorted(r["text"] for r in everything) == sorted(r["text"] for r in records)


def test_a_class_with_too_few_records_is_an_error():
    records = [{"text": "a", "label": 0}, {"text": "b", "label": 0}]
    records += [{"text": "c", "label": 1}]
    with pytest.raises(ValueError, match=r"cannot draw 2 records per class.*\{1: 1\}"):
        prompts.few_shot(records, 2)
    with pytest.raises(ValueError, match="cannot draw 2 records"):
        prompts.few_shot([], 2)
