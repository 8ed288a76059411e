"""Rank classification and scores of tokens against their formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import flops, normal
from tiny_t5 import START, plain_t5, random_params, tiny_t5, tiny_t5_config

from jaxarith import hub, sharding, tangent
from jaxarith.evaluate import rank
from jaxarith.models import t5

close = {"rtol": 1e-5, "atol": 1e-5}
END = 1
LABELS = np.array(
    [
        [7, END, -100, -100],
        [7, 8, 9, END],
        [12, END, -100, -100],
        [5, 29, END, -100],
    ]
)


def tiny():
    config = tiny_t5("gated-gelu", num_layers=1, scale_decoder_outputs=False)
    return config, random_params(0, config)


def batches_of_texts():
    """Five texts in batches of three, the last row of which is padding."""
    rng = np.random.default_rng(1)
    input_ids = rng.integers(2, 30, size=(6, 10))
    attention_mask = (np.arange(10)[None] < [[10], [4], [7], [9], [2], [1]]).astype(int)
    batches = []
    for rows in (slice(0, 3), slice(3, 6)):
        mask = np.arange(6)[rows] < 5
        batches.append(
            {
                "input_ids": input_ids[rows],
                "attention_mask": attention_mask[rows],
                "mask": mask,
            }
        )
    return batches, (input_ids[:5], attention_mask[:5])


def plain_losses(config, params, texts):
    """Every label after every text, one at a time, without padding."""
    plain = jax.jit(functools.partial(plain_t5, config))
    losses = np.zeros((len(texts[0]), len(LABELS)))
    for n in range(len(losses)):
        for c, label in enumerate(LABELS):
            label = label[label != -100]
            inputs = np.array([[START, *label[:-1]]])
            text = (array[n : n + 1] for array in texts)
            logits = np.asarray(plain(params, *text, inputs))[0]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses[n, c] = -np.mean([log_p[t, token] for t, token in enumerate(label)])
    return losses


def test_losses_of_labels_are_those_of_the_formula(x64):
    config, params = tiny()
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    batches, texts = batches_of_texts()
    expected = plain_losses(config, params, texts)
    assert (expected.std(axis=0) > 0.01).all() and (expected.std(axis=1) > 0.1).all()
    actual = rank.label_losses(
        t5.language_model(config), params, batches, LABELS, start_token_id=START
    )
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", ["data=2,fsdp=2", "task=4"])
def test_devices_share_the_texts_and_find_the_same(sizes):
    config, params = tiny()
    batches, _ = batches_of_texts()  # of three, which no mesh here divides
    found = [
        rank.label_losses(
            t5.language_model(config),
            params,
            batches,
            LABELS,
            start_token_id=START,
            mesh=sharding.make_mesh(mesh, jax.devices()[:count]),
        )
        for mesh, count in (("data=1", 1), (sizes, 4))
    ]
    assert found[0].shape == found[1].shape == (5, len(LABELS))
    np.testing.assert_allclose(found[1], found[0], **close)


@pytest.mark.torch
def test_losses_of_single_examples_equal_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import T5ForConditionalGeneration

    config, params = tiny()
    raw = tiny_t5_config("gated-gelu", num_layers=1, scale_decoder_outputs=False)
    hub.save(tmp_path, params, raw, overwrite=True)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batches, texts = batches_of_texts()
    expected = np.zeros((5, len(LABELS)))
    with torch.no_grad():
        for n, (ids, mask) in enumerate(
            zip(*map(torch.from_numpy, texts), strict=True)
        ):
            for c, label in enumerate(torch.from_numpy(LABELS)):
                output = model(
                    input_ids=ids[None], attention_mask=mask[None], labels=label[None]
                )
                expected[n, c] = output.loss
    apply_fn = t5.language_model(config)
    actual = rank.label_losses(apply_fn, params, batches, LABELS, start_token_id=START)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, **close)
    longer = np.pad(LABELS, [(0, 0), (0, 3)], constant_values=-100)
    again = rank.label_losses(apply_fn, params, batches, longer, start_token_id=START)
    np.testing.assert_allclose(again, expected, **close)
    elsewhere = rank.label_losses(apply_fn, params, batches, LABELS)
    assert np.abs(elsewhere - expected).max() > 0.1


def test_linearized_model_is_ranked_by_its_own_logits():
    config, params_0 = tiny()
    params = jax.tree.map(lambda leaf: 1.05 * leaf, params_0)
    apply_fn = t5.language_model(config)
    f_lin = tangent.linearize(apply_fn, params_0)
    batches, texts = batches_of_texts()
    label = LABELS[1:2]
    inputs = np.tile([[START, 7, 8, 9]], (5, 1))
    logits = jax.jit(f_lin)(params, *texts, inputs)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(log_p, label[..., None], axis=-1).mean(axis=(1, 2))
    actual = rank.label_losses(f_lin, params, batches, label, start_token_id=START)
    np.testing.assert_allclose(actual[:, 0], expected, **close)
    start = rank.label_losses(apply_fn, params_0, batches, label, start_token_id=START)
    assert np.abs(actual - start).max() > 0.01


def test_a_text_is_encoded_once_for_all_labels():
    config, params = tiny()
    apply_fn = t5.language_model(config)
    texts = jnp.ones((1, 400), int), jnp.ones((1, 400), int)

    def cost(labels):
        return flops(apply_fn, params, *texts, jnp.ones((1, labels, 2), int))

    assert cost(8) < 1.5 * cost(1)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([3, 1], r"labels of shape \[2\]; expected \[C, T\]"),
        ([[3, 1], [-100, -100]], r"label 1 is \[-100, -100\]; expected one token"),
        ([[-100, 3], [3, 1]], r"label 0 is \[-100, 3\]; .* only after the last"),
        ([[3, 1], [4, 1], [3, 1]], r"label 2, \[3, 1\], is there twice"),
    ],
)
def test_labels_that_cannot_be_ranked_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        rank.label_losses(lambda *_: None, {}, [], np.array(labels))


def test_losses_that_are_no_numbers_and_no_inputs_are_refused():
    config, params = tiny()
    apply_fn = t5.language_model(config)
    batches, _ = batches_of_texts()
    with pytest.raises(ValueError, match=r"label 1 is NaN (?s:.*)vocabulary"):
        rank.label_losses(apply_fn, params, batches, np.array([[29, END], [30, END]]))
    with pytest.raises(ValueError, match="no batch"):
        rank.label_losses(apply_fn, params, [], LABELS)


# Scores of tokens.


def tokens():
    """Logits and labels of which six in seven are the likeliest, or count at all."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 5, size=(40, 6))
    logits = normal(5, 40, 6, 5) + 2 * np.eye(5)[labels]
    labels[rng.random((40, 6)) < 1 / 7] = -100
    return logits, labels


def test_predicted_tokens_are_the_likeliest_where_a_label_counts():
    logits, labels = tokens()
    expected = [
        (int(np.argmax(logits[i, t])), int(labels[i, t]))
        for i in range(40)
        for t in range(6)
        if labels[i, t] != -100
    ]
    assert 100 < len(expected) < 240
    predicted, true = rank.predicted_tokens(logits, labels)
    assert list(zip(predicted, true, strict=True)) == expected
    for array in (jnp.asarray(logits), jnp.asarray(logits, jnp.bfloat16)):
        assert len(rank.predicted_tokens(array, jnp.asarray(labels))[0]) == len(true)
    hits = np.mean([a == b for a, b in expected])
    assert 0.5 < hits < 0.95
    np.testing.assert_allclose(rank.token_accuracy(logits, labels), hits, rtol=1e-12)


def test_matthews_of_tokens_is_gorodkins_correlation():
    """The covariance of the one-hot indicators over the root of their variances."""
    logits, labels = tokens()
    predicted, true = (np.eye(5)[a] for a in rank.predicted_tokens(logits, labels))
    predicted, true = predicted - predicted.mean(axis=0), true - true.mean(axis=0)
    expected = np.sum(predicted * true) / np.sqrt(
        np.sum(predicted**2) * np.sum(true**2)
    )
    assert 0.3 < expected < 0.95
    actual = rank.token_matthews(logits, labels)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    right = np.eye(5)[np.maximum(labels, 0)]
    np.testing.assert_allclose(rank.token_matthews(right, labels), 1, rtol=1e-12)


def test_scores_of_nothing_and_of_unlike_shapes_are_refused():
    for score in (rank.token_accuracy, rank.token_matthews):
        with pytest.raises(ValueError, match="every label is -100"):
            score(np.zeros((1, 2, 3)), np.full((1, 2), -100))
        with pytest.raises(ValueError, match=r"\[1, 2, 3\] for labels of shape \[1, 1"):
            score(np.zeros((1, 2, 3)), np.zeros((1, 1), int))
