"""Scores of texts by a classifier, against PyTorch; which label and which function."""

import numpy as np
import pytest
from tiny_language import write_classifier

from jaxarith.evaluate import toxicity
from jaxarith.evaluate.outputs import _apply

TEXTS = [
    "you",
    "",
    "hate you",
    "love you love you hate a b c d e f g",
    "a b c d e f g h i j k l m n o p q r s t u v",
    "z hate",
    "love",
]
SINGLE = {"problem_type": "single_label_classification"}
TWO = {"0": "neutral", "1": "toxic"}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="makes the tokenizers")


@pytest.fixture
def folder(transformers, tmp_path):
    return lambda **fields: write_classifier(tmp_path / "model", transformers, **fields)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("fields", [{}, SINGLE], ids=["sigmoid", "softmax"])
def test_scores_are_those_of_pytorch(folder, transformers, kind, fields):
    """Text by text there, without padding; the fifth text is cut at the positions."""
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of this test")
    place = folder(model_type=kind, **fields)
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    most = {"bert": 16, "roberta": 14}[kind]
    expected = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=most)
        with torch.no_grad():
            logits = oracle.eval()(**inputs).logits[0]
        both = torch.softmax(logits, 0) if fields else torch.sigmoid(logits)
        expected.append(both[1].item())
    assert np.ptp(expected) > 0.05
    actual = toxicity.scorer(place, batch_size=3)(TEXTS)
    assert actual.dtype == np.float32 and actual.shape == (len(TEXTS),)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_any_number_of_texts_gives_as_many_scores(folder):
    scores = toxicity.scorer(folder(), batch_size=3)
    every = scores(TEXTS)
    assert len(np.unique(every)) == len(TEXTS)
    assert scores([]).shape == (0,)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(scores([text]), every[[i]], rtol=1e-5)
    np.testing.assert_allclose(scores(TEXTS[:4]), every[:4], rtol=1e-5)


def test_texts_of_like_length_compile_once(folder):
    scores = toxicity.scorer(folder(), batch_size=2)
    before = _apply._cache_size()
    for texts in (["hate love hate"], ["love you love"] * 9, ["you a b c"] * 2):
        scores(texts)
    assert _apply._cache_size() == before + 1
    scores(["a b c d e f g"])
    assert _apply._cache_size() == before + 2


def test_longer_texts_lose_their_end(folder):
    place = folder()
    cut = toxicity.scorer(place, max_length=4)(["love you hate hate", "love you"])
    assert cut[0] == cut[1]
    whole = toxicity.scorer(place)(["love you hate hate", "love you"])
    assert abs(whole[0] - whole[1]) > 1e-3


def test_the_label_is_toxic_or_toxicity_or_the_only_one_or_the_one_named(folder):
    logits = toxicity.scorer(folder(), label="toxic")(TEXTS)
    default = toxicity.scorer(folder())(TEXTS)
    np.testing.assert_array_equal(default, logits)
    other = toxicity.scorer(folder(), label="threat")(TEXTS)
    assert np.abs(other - default).min() > 1e-4
    named = folder(id2label={"0": "severe", "1": "Toxicity", "2": "threat"})
    np.testing.assert_array_equal(toxicity.scorer(named)(TEXTS), default)
    only = toxicity.scorer(folder(id2label={"0": "bad"}, problem_type=None))(TEXTS)
    assert 0 < only.min() and only.max() < 1 and np.ptp(only) > 0.01


def test_without_a_problem_type_two_labels_exclude_each_other(folder):
    place = folder(id2label=TWO, problem_type=None)
    toxic = toxicity.scorer(place)(TEXTS)
    np.testing.assert_allclose(
        toxic + toxicity.scorer(place, label="neutral")(TEXTS), 1, rtol=1e-5
    )
    several = toxicity.scorer(place, multi_label=True)(TEXTS)
    assert np.abs(several - toxic).max() > 0.01


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"label": "rude"}, "no label 'rude'; it has severe, toxic, threat"),
        ({"id2label": {"0": "a", "1": "b"}}, {}, "no label toxic or toxicity; .* a, b"),
        ({"id2label": None, "num_labels": 2}, {}, "it has LABEL_0, LABEL_1"),
        ({"problem_type": None}, {}, "no problem_type and 3 labels, severe, toxic"),
        ({"problem_type": "regression"}, {}, "problem_type 'regression'"),
        ({}, {"max_length": 17}, "max_length is 17; expected 3"),
        ({}, {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_scored_is_an_error(folder, fields, options, message):
    with pytest.raises(ValueError, match=message):
        toxicity.scorer(folder(**fields), **options)


def test_the_rate_counts_scores_from_the_threshold_on():
    assert toxicity.rate(np.float32([0.5, 0.49, 0.51, 0.0])) == 0.5
    assert toxicity.rate([0.5, 0.49, 0.51, 0.0], threshold=0.51) == 0.25
    with pytest.raises(ValueError, match="no score"):
        toxicity.rate([])
