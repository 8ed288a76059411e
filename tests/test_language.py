"""Blocks, padded texts and inputs with targets for language models."""

import tracemalloc

import numpy as np
import pytest

from jaxarith.data import language, pipeline


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="makes the tokenizers")


@pytest.fixture(scope="module")
def gpt2(transformers):
    vocab = {w: i for i, w in enumerate(["<|endoftext|>", "Ġ", "a", "b", "c"])}
    return transformers.GPT2Tokenizer(vocab=vocab, merges=[])


@pytest.fixture(scope="module")
def t5(transformers):
    words = ["▁yes", "▁no", "▁not", "▁maybe", "▁a", "▁b"]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    return transformers.T5Tokenizer(
        vocab=[*specials, *((word, -1.0) for word in words)], extra_ids=0
    )


def test_a_stream_is_cut_into_blocks_without_gap_or_overlap():
    tokens = np.random.default_rng(0).integers(0, 50, 23)
    source = language.blocks(tokens, 5)
    assert len(source) == 4
    joined = np.concatenate([block["input_ids"] for block in source])
    np.testing.assert_array_equal(joined, tokens[:20])
    for block in source:
        np.testing.assert_array_equal(block["labels"], block["input_ids"])
        assert block["attention_mask"].tolist() == [1] * 5


def test_pairs_of_blocks_follow_each_other_and_share_none():
    tokens = np.random.default_rng(0).integers(0, 50, 21)
    source = language.consecutive_blocks(tokens, 5)
    assert len(source) == 2
    joined = [np.concatenate([pair["input_ids"], pair["labels"]]) for pair in source]
    np.testing.assert_array_equal(np.concatenate(joined), tokens[:20])


@pytest.mark.parametrize("cut", [language.blocks, language.consecutive_blocks])
def test_a_stream_shorter_than_a_block_is_an_error(cut):
    with pytest.raises(ValueError, match="cannot cut 4 tokens into blocks"):
        cut(np.arange(4), 5)
    with pytest.raises(ValueError, match="blocks of 0"):
        cut(np.arange(4), 0)


def test_texts_in_a_stream_end_with_the_end_of_text(gpt2, t5):
    end = gpt2.eos_token_id
    assert language.stream(gpt2, ["ab", "c"]).tolist() == [2, 3, end, 4, end]
    end = t5.eos_token_id
    stream = language.stream(t5, ["yes no", "maybe"])
    assert stream.tolist() == [4, 5, end, 7, end]
    assert stream.dtype == np.int32
    assert language.stream(gpt2, ["ab", "c"], end=False).tolist() == [2, 3, 4]


def test_many_texts_are_tokens_in_parts_and_the_same(t5):
    """The peak is that of a part, and not that of all texts."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["yes", "no", "maybe"], 40)) for _ in range(3000)]
    numbers = {"yes": 4, "no": 5, "maybe": 7}
    each = [[numbers[word] for word in text.split()] for text in texts]
    expected = np.array([[*ids, t5.eos_token_id] for ids in each])
    language.stream(t5, texts[:10])  # what is imported does not count
    tracemalloc.start()
    found = language.stream(t5, texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, expected.ravel())
    assert peak < 30 * len(found)  # bytes; 4 are the result's
    records = [{"text": text, "target": "no"} for text in texts]
    rows = language.text_to_text(t5, records, 50, 2)
    ids = np.stack([row["input_ids"] for row in rows])
    np.testing.assert_array_equal(ids[:, :41], expected)
    assert {tuple(row["labels"]) for row in rows} == {(5, t5.eos_token_id)}


def test_a_stream_cannot_end_texts_without_a_token_for_it(transformers):
    bert = transformers.BertTokenizer(vocab={"[UNK]": 0, "a": 1})
    bert.eos_token = None
    assert language.stream(bert, ["a", "a"], end=False).tolist() == [1, 1]
    with pytest.raises(ValueError, match="no end-of-text token"):
        language.stream(bert, ["a", "a"])


def test_padding_is_no_label_and_the_end_of_text_that_pads_is_masked(gpt2):
    source = language.encode(gpt2, ["ab", "abcabc"], 4)
    end = gpt2.eos_token_id
    assert source[0]["input_ids"].tolist() == [2, 3, end, end]
    assert source[0]["attention_mask"].tolist() == [1, 1, 0, 0]
    assert source[0]["labels"].tolist() == [2, 3, -100, -100]
    assert source[1]["labels"].tolist() == [2, 3, 4, 2]


def test_an_end_of_text_inside_a_text_stays_a_label(gpt2):
    (row,) = language.encode(gpt2, ["a<|endoftext|>"], 4)
    end = gpt2.eos_token_id
    assert row["labels"].tolist() == [2, end, -100, -100]


def test_prompts_are_padded_on_the_left(gpt2):
    (row,) = language.encode(gpt2, ["ab"], 4, side="left")
    end = gpt2.eos_token_id
    assert row["input_ids"].tolist() == [end, end, 2, 3]
    assert row["attention_mask"].tolist() == [0, 0, 1, 1]


def test_targets_are_padded_with_labels_that_do_not_count(t5):
    records = [
        {"text": "a b", "target": "yes", "label": 0},
        {"text": "a b a b a b", "target": "not yes", "label": 1},
    ]
    batch = pipeline.collate(language.text_to_text(t5, records, 4, 3))
    assert batch["input_ids"].tolist() == [[8, 9, 1, 0], [8, 9, 8, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[4, 1, -100], [6, 4, 1]]
    assert batch["label"].tolist() == [0, 1]
    assert {value.dtype.name for value in batch.values()} == {"int32"}


def test_labels_may_be_scores_or_missing(t5):
    scored = [{"text": "a", "target": "yes", "label": 2.5}]
    batch = pipeline.collate(language.text_to_text(t5, scored, 4, 3))
    assert batch["label"].dtype == np.float32
    plain = language.text_to_text(t5, [{"text": "a", "target": "yes"}], 4, 3)
    assert set(plain[0]) == {"input_ids", "attention_mask", "labels"}


def test_candidates_are_as_long_as_the_longest(t5):
    rows = language.candidates(t5, ["yes", "not yes"])
    assert rows.tolist() == [[4, 1, -100], [6, 4, 1]]
    with pytest.raises(ValueError, match="the same tokens"):
        language.candidates(t5, ["here", "there"])
