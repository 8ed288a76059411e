"""GLUE as text: from records to the score of a fine-tuned T5, through every step."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_t5 import random_params, tiny_t5_config

from jaxarith import losses, tangent, task_vectors, train
from jaxarith.data import glue, language, pipeline
from jaxarith.evaluate import rank
from jaxarith.models import generate, t5

INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")
TASK = glue.TASKS["sst2"]


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers", reason="makes the tokenizer")
    words = ["sst2", "sentence:", "good", "bad", "film", "positive", "negative"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    vocab += [(f"▁{word}", -1.0) for word in words]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def test_a_linearised_t5_learns_a_glue_task_that_rank_classification_scores(tokenizer):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 48)
    fill = [rng.choice(["film", "sentence:"], 3) for _ in labels]
    texts = [
        " ".join([*words[:2], ["bad", "good"][label], *words[2:]])
        for label, words in zip(labels, fill, strict=True)
    ]
    records = [
        {"text": text, "label": int(label)}
        for text, label in zip(texts, labels, strict=True)
    ]
    source = language.text_to_text(tokenizer, glue.text_to_text(TASK, records), 10, 3)
    config = t5.T5Config.from_json(tiny_t5_config(num_layers=1))
    params_0 = random_params(0, config)
    for sample in source:
        sample["decoder_input_ids"] = np.asarray(
            t5.shift_right(sample["labels"][None], config)[0]
        )
    recipe = train.TrainConfig(
        **dict(steps=60, warmup_steps=5, batch_size=16, learning_rate=1e-2),
        **dict(linearized=True, weight_decay=0.0),
    )
    apply_fn = t5.language_model(config)
    [tau] = train.fine_tune(
        apply_fn,
        params_0,
        lambda logits, batch, _: losses.token_cross_entropy(logits, batch["labels"]),
        train.task_batches([source], recipe, seeds=[0], inputs=INPUTS),
        recipe,
        names=["sst2"],
        inputs=INPUTS,
    )
    batches = pipeline.evaluation_batches(source, 20)
    candidates = language.candidates(tokenizer, TASK.classes)

    apply_lin = tangent.linearize(apply_fn, params_0)

    def score(coef):
        found = rank.label_losses(
            *(apply_lin, task_vectors.apply(params_0, tau, coef), batches, candidates),
            start_token_id=config.decoder_start_token_id,
        )
        return glue.score(TASK, found.argmin(axis=1), labels)

    assert score(0.0) < 0.7
    assert score(1.0) > 0.9


def test_what_a_t5_generates_is_read_back_as_a_label(tokenizer):
    ids = language.candidates(tokenizer, TASK.classes)

    def start(params, input_ids, room):
        return jnp.zeros(len(input_ids), jnp.int32), one_hot(input_ids[:, 0], 0)

    def step(params, cache, tokens):
        return cache + 1, one_hot(ids_of(tokens), 1)

    def one_hot(label, position):
        table = jnp.where(jnp.asarray(ids) < 0, 0, jnp.asarray(ids))
        return jnp.eye(20)[table[label, position]]

    def ids_of(tokens):
        return (tokens[:, None] == jnp.asarray(ids)[None, :, 0]).argmax(1)

    labels = jnp.array([[1], [0]])
    tokens = generate.generate(
        *(generate.Decoder(start, step), {}, labels),
        **dict(max_new_tokens=4, eos_token_id=tokenizer.eos_token_id),
    )
    texts = tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
    assert [glue.answer(TASK, text) for text in texts] == [1, 0]
