"""AdaMerging from cached outputs and tangents, without passes of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from adamerging_case import HEADS

from jaxarith import evaluate, merge

pytestmark = pytest.mark.usefixtures("x64")


def linear(params, x):
    return x @ params["w"] + params["b"][None]


def linear_apply(head):
    return lambda params, batch: linear(params, batch["image"]) @ jnp.asarray(head).T


LINEAR_FNS = [linear_apply(head) for head in HEADS]
OF_OUTPUTS = [lambda f, head=head: f @ jnp.asarray(head).T for head in HEADS]


def linear_case():
    params_0, *taus = (
        {"w": oracles.normal((s, 0), 5, 4), "b": oracles.normal((s, 1), 4)}
        for s in range(3)
    )
    batches = [
        {"image": oracles.normal((7, t), 12, 5), "mask": np.ones(12, bool)}
        for t in range(2)
    ]
    return params_0, taus, batches


@pytest.mark.parametrize("clamp", [None, (0.0, 0.4)])
def test_a_linear_models_network_and_its_tangents_learn_the_same(clamp):
    params_0, taus, batches = linear_case()
    options = dict(steps=30, learning_rate=0.02, clamp=clamp)
    network = merge.adamerging(
        *(params_0, taus, LINEAR_FNS, [[batch] for batch in batches]),
        **dict(scope="task", **options),
    )
    cached = [evaluate.tangent(linear, params_0, taus, [b]) for b in batches]
    coefs, entropies = merge.adamerging_tangent(
        [at.f0 for at in cached],
        [at.moves for at in cached],
        OF_OUTPUTS,
        **options,
    )
    assert np.abs(coefs - 0.3).min() > 1e-3
    np.testing.assert_allclose(coefs, network.coefs, rtol=1e-10)
    np.testing.assert_allclose(entropies, network.losses, rtol=1e-10)


def test_tangent_batches_are_draws_of_the_key():
    params_0, taus, batches = linear_case()
    cached = [evaluate.tangent(linear, params_0, taus, [b]) for b in batches]
    data = [at.f0 for at in cached], [at.moves for at in cached]

    def learned(batch_size, seed=0, steps=30, coef=0.3):
        return merge.adamerging_tangent(
            *(*data, OF_OUTPUTS),
            **dict(batch_size=batch_size, key=jax.random.key(seed), steps=steps),
            **dict(learning_rate=0.02, coef=coef),
        )

    coefs, entropies = learned(4)
    assert entropies.shape == (30, 2)
    np.testing.assert_array_equal(coefs, learned(4)[0])
    assert np.any(coefs != learned(4, seed=1)[0])
    np.testing.assert_array_equal(learned(12)[0], learned(None)[0])
    before, after = (learned(None, coef=c)[1][0].sum() for c in (0.3, coefs))
    assert after < before
    with pytest.raises(ValueError, match="batch_size needs a key"):
        merge.adamerging_tangent(*data, OF_OUTPUTS, batch_size=4)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        learned(0)
    with pytest.raises(ValueError, match="dataset 1 has NaN .*: tangents"):
        moves = [data[1][0], np.full_like(data[1][1], np.nan)]
        merge.adamerging_tangent(data[0], moves, OF_OUTPUTS)
    with pytest.raises(ValueError, match=r"dataset 1 .* tangents \[2, 12, 4\]"):
        f0 = [data[0][0], data[0][1][:5]]
        merge.adamerging_tangent(f0, data[1], OF_OUTPUTS)
    with pytest.raises(ValueError, match="1 logits functions"):
        merge.adamerging_tangent(*data, OF_OUTPUTS[:1])
