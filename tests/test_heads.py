"""Frozen heads made from features and from label words."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxarith.models import bert, heads


def test_class_means_are_the_directions_of_mean_directions():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6)) * rng.uniform(1, 9, size=(40, 1))
    labels = np.arange(40) % 3
    head = heads.class_means(jnp.asarray(features, jnp.float32), labels, 3, scale=7.0)
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    for c in range(3):
        mean = directions[labels == c].mean(0)
        np.testing.assert_allclose(head[c], 7 * mean / np.linalg.norm(mean), rtol=1e-5)


def test_a_class_without_samples_has_no_mean():
    with pytest.raises(ValueError, match=r"no features for the classes \[1\] of 3"):
        heads.class_means(jnp.ones((2, 4)), [0, 2], 3)


def test_label_words_give_the_logits_of_the_masked_language_model():
    config = bert.BertConfig(
        **dict(vocab_size=20, hidden_size=8, num_hidden_layers=1),
        **dict(num_attention_heads=2, intermediate_size=12),
    )
    rng = np.random.default_rng(0)
    params = bert.layout(config, "masked_lm")
    params = {
        key: _random(rng, value) for key, value in sorted(params.items())
    }  # with biases that are not zero
    ids = np.array([[3, 19, 4, 5], [6, 7, 19, 1]])
    mask = np.ones_like(ids)
    every = bert.masked_lm(config)(params, ids, mask)
    features = bert.mask_encoder(config, mask_token_id=19)(params, ids, mask)
    words = [11, 2, 7]
    head = heads.label_words(*bert.output_words(config, params), words)
    expected = np.stack([every[0, 1], every[1, 2]])[:, words]
    assert np.std(expected) > 0.1
    actual = heads.affine_logits(head, features)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    valid = jnp.array([True, False, True])
    hidden = heads.affine_logits(head, features, valid)
    np.testing.assert_array_equal(hidden[:, 1], [-np.inf, -np.inf])
    np.testing.assert_array_equal(hidden[:, ::2], actual[:, ::2])


def _random(rng, value):
    if isinstance(value, dict):
        return {k: _random(rng, v) for k, v in sorted(value.items())}
    return jnp.asarray(rng.normal(size=value.shape), jnp.float32)
