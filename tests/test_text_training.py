"""Linearised training with the τJp penalty, and merging, of every family of texts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import tiny_t5, tiny_t5_config

from jaxarith import (
    hub,
    losses,
    merge,
    task_vectors,
    tau_jp,
    train,
    tree,
)
from jaxarith.models import bert, gpt2, t5

TEXTS = ("input_ids", "attention_mask")
V, S = 30, 6
BERT = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 2, "intermediate_size": 24}
BERT |= {"max_position_embeddings": 16, "num_labels": 3}
GPT2 = {"vocab_size": V, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
CONFIG = train.TrainConfig(
    steps=3,
    warmup_steps=0,
    batch_size=24,  # all of a task's texts, so that losses compare
    learning_rate=0.01,
    linearized=True,
    penalty="cyclic",
    penalty_batch_size=4,
)


def causal(logits, batch, _):
    return losses.next_token_cross_entropy(logits, batch["labels"])


def by_token(logits, batch, _):
    return losses.token_cross_entropy(logits, batch["labels"])


def of_text(logits, batch, _):
    return losses.cross_entropy(logits, batch["label"])


def bert_config(kind):
    return bert.BertConfig(**BERT, model_type=kind, pad_token_id=1)


def family(name):
    """The model, its parameters, inputs, mask of the penalty, and loss."""
    key = jax.random.key(1)
    if name == "t5":
        config = tiny_t5(num_layers=1)
        inputs = (*TEXTS, "decoder_input_ids")
        params, mask = t5.init(key, config), "decoder_attention_mask"
        return t5.language_model(config), params, inputs, mask, by_token
    kind, head = name.split("/")
    if kind == "gpt2":
        config = gpt2.GPT2Config(**GPT2)
        params = gpt2.init(key, config)
        return gpt2.language_model(config), params, TEXTS, "attention_mask", causal
    config = bert_config(kind)
    params = bert.init(key, config, head)
    if head == "classifier":
        return bert.classifier(config), params, TEXTS, None, of_text
    return bert.masked_lm(config), params, TEXTS, "attention_mask", by_token


# Derivatives of the other heads are tested with the models.
FAMILIES = ["t5", "gpt2/language_model", "bert/classifier", "roberta/masked_lm"]


def source(seed, size=24):
    """Texts of unlike lengths, padded, with every kind of label.

    The words of a text follow from its class, so that there is something to learn.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(size):
        label, length = rng.integers(3), rng.integers(3, S + 1)
        real = np.arange(S) < length
        words = 3 + 9 * label + rng.integers(4, size=S)
        ids = np.where(real, words, 1).astype(np.int32)
        labels = np.where(real, ids, -100).astype(np.int32)
        samples.append(
            {
                "input_ids": ids,
                "attention_mask": real.astype(np.int32),
                "label": np.int32(label),
                "labels": labels,
                "decoder_input_ids": np.concatenate([[2], ids[:-1]]).astype(np.int32),
                "decoder_attention_mask": real.astype(np.int32),
            }
        )
    return samples


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    apply_fn, params, inputs, mask, loss = family(request.param)
    fields = inputs if mask is None else tuple(dict.fromkeys((*inputs, mask)))
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    taus = train.fine_tune(
        apply_fn,
        params,
        loss,
        train.task_batches([source(1), source(2)], CONFIG, seeds=[0, 1], inputs=fields),
        CONFIG,
        names=["one", "two"],
        inputs=inputs,
        penalty_mask=mask,
        log=log,
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return request.param, params, taus, lines


def test_linearised_steps_with_the_penalty_reduce_the_loss(trained):
    *_, lines = trained
    for task in ("one", "two"):
        first, *_, last = (line["loss"][task] for line in lines)
        assert last < 0.99 * first
        first, *others = (line["penalty"][task] for line in lines)
        assert first == 0 < min(others)


def test_the_task_vectors_merge_with_tied_embeddings_held_once(trained):
    name, params, taus, _ = trained
    merged = merge.task_arithmetic(params, taus, coef=0.7)
    leaves = tree.flatten(merged)
    assert leaves.keys() == tree.flatten(params).keys()
    wide = [
        path for path, leaf in leaves.items() if V in leaf.shape[:2] and leaf.ndim > 1
    ]
    assert len(wide) == 1  # no other matrix has a row for every word
    moved = np.abs(np.asarray(leaves[wide[0]] - tree.flatten(params)[wide[0]]))
    assert moved.max() > 1e-3
    expected = task_vectors.apply(params, task_vectors.add(taus), 0.7)
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(leaves[path], leaf, rtol=1e-5, atol=1e-6)


RAW = {
    "t5": (t5.load, tiny_t5_config(num_layers=1)),
    "gpt2/language_model": (gpt2.load, {"model_type": "gpt2", **GPT2}),
}


@pytest.mark.parametrize("trained", RAW, indirect=True)
def test_merged_language_models_are_saved_and_loaded(trained, tmp_path):
    name, params, taus, _ = trained
    load, raw = RAW[name]
    merged = merge.task_arithmetic(params, taus, coef=0.7)
    hub.save(tmp_path / "merged", merged, raw)
    loaded = load(tmp_path / "merged")
    leaves = tree.flatten(loaded.params)
    assert leaves.keys() == tree.flatten(merged).keys()
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_array_equal(leaves[path], leaf)
    apply_fn, _, inputs, *_ = family(name)
    apply_fn = jax.jit(apply_fn)
    batch = [np.stack([row[k] for row in source(3)]) for k in inputs]
    outputs = apply_fn(loaded.params, *batch)
    np.testing.assert_allclose(outputs, apply_fn(merged, *batch), rtol=1e-6)
    assert np.abs(np.asarray(outputs - apply_fn(params, *batch))).max() > 1e-3


def test_the_penalty_of_padded_texts_is_that_of_the_texts_alone():
    """The mean over all tokens of the norms, text by text without its padding."""
    apply_fn, params, inputs, mask, loss = family("gpt2/language_model")
    rng = np.random.default_rng(0)
    tau = jax.tree.map(
        lambda leaf: jnp.asarray(0.05 * rng.normal(size=leaf.shape), leaf.dtype), params
    )
    samples = source(5, size=6)
    batch = {k: np.stack([row[k] for row in samples]) for k in samples[0]}
    batch["penalty"] = {k: batch[k] for k in TEXTS}

    def parts(mask):
        objective = train.objective(apply_fn, loss, CONFIG, inputs, mask)
        return jax.jit(objective)(tau, params, batch, None)[1]

    @jax.jit
    def penalty(ids):
        text = ids, np.ones(ids.shape, int)
        moved = jax.jvp(lambda p: apply_fn(p, *text), (params,), (tau,))[1]
        return tau_jp.penalty(moved)

    lengths = [row["attention_mask"].sum() for row in samples]
    assert min(lengths) < max(lengths) == S
    means = [
        penalty(row["input_ids"][None, :length])
        for row, length in zip(samples, lengths, strict=True)
    ]
    masked, unmasked = parts(mask), parts(None)
    expected = np.average(means, weights=lengths)
    np.testing.assert_allclose(masked["penalty"], expected, rtol=1e-5)
    assert abs(unmasked["penalty"] / expected - 1) > 1e-3
    np.testing.assert_array_equal(masked["loss"], unmasked["loss"])


def test_a_mask_that_the_penalty_samples_lack_is_an_error():
    apply_fn, params, inputs, mask, loss = family("t5")
    sources = [source(1), source(2)]
    batches = train.task_batches(sources, CONFIG, seeds=[0, 1], inputs=inputs)
    with pytest.raises(
        ValueError, match="'decoder_attention_mask'; .* have .*input_ids"
    ):
        train.fine_tune(
            apply_fn, params, loss, batches, CONFIG,
            names=["one", "two"], inputs=inputs, penalty_mask=mask,
        )  # fmt: skip
