"""A head that is trained beside the encoder, as `models.heads` describes it."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_bert import tiny, tiny_params

from jaxarith import losses, tangent, task_vectors, train, tree
from jaxarith.models import bert, heads

INPUTS = ("input_ids", "attention_mask")
BLOCKS = r"bert/encoder/.*"
encode = bert.mean_encoder(tiny("bert"))


def apply_fn(params, *inputs):
    return encode(params, *inputs), params["head"]


def loss_fn(outputs, batch, constants):
    features, moved = outputs
    head = constants["head"] + constants["trains"] * moved
    scores = heads.logits(head, features, constants["valid"])
    return losses.cross_entropy(scores, batch["label"])


def texts(seed, classes):
    """Texts whose first word tells the class."""
    rng = np.random.default_rng(seed)
    return [
        {
            "input_ids": np.array([5 + i % classes, *rng.integers(9, 30, 5)], "i4"),
            "attention_mask": np.ones(6, np.int32),
            "label": np.int32(i % classes),
        }
        for i in range(24)
    ]


@pytest.fixture(scope="module")
def frozen():
    rng = np.random.default_rng(3)
    return heads.pad([rng.normal(size=(c, 24)).astype("f4") for c in (2, 3)])


@pytest.fixture(scope="module")
def params_0(frozen):
    return tiny_params("bert") | {"head": jnp.zeros_like(frozen["head"][0])}


def fine_tune(params_0, frozen, trains, linearized=False):
    config = train.TrainConfig(
        steps=12,
        warmup_steps=0,
        batch_size=8,
        learning_rate=1e-2,
        weight_decay=0,
        linearized=linearized,
        trained=f"{BLOCKS}|head",
    )
    sources = [texts(0, 2), texts(1, 3)]
    return sources, train.fine_tune(
        apply_fn,
        params_0,
        loss_fn,
        train.task_batches(sources, config, seeds=[0, 1], inputs=INPUTS),
        config,
        names=["two", "three"],
        constants=frozen | {"trains": jnp.asarray(trains, jnp.float32)},
        inputs=INPUTS,
    )


@pytest.mark.parametrize("linearized", [False, True])
def test_every_task_trains_its_own_head_and_the_loss_falls(
    params_0, frozen, linearized
):
    sources, taus = fine_tune(params_0, frozen, [1, 1], linearized)
    model = tangent.linearize(apply_fn, params_0) if linearized else apply_fn
    trained = [
        head + tau["head"] for head, tau in zip(frozen["head"], taus, strict=True)
    ]
    assert np.abs(taus[0]["head"] - taus[1]["head"]).max() > 1e-2
    assert not taus[0]["head"][2].any()  # a row that only pads
    for task, (source, tau) in enumerate(zip(sources, taus, strict=True)):
        batch = {k: np.stack([row[k] for row in source]) for k in source[0]}
        inputs = [batch[name] for name in INPUTS]
        valid = frozen["valid"][task]

        def loss(head, features, batch=batch, valid=valid):
            scores = heads.logits(head, features, valid)
            return losses.cross_entropy(scores, batch["label"])

        before = loss(frozen["head"][task], encode(params_0, *inputs))
        features, moved = model(task_vectors.apply(params_0, tau), *inputs)
        np.testing.assert_allclose(moved, tau["head"], rtol=1e-6)
        assert loss(trained[task], features) < 0.9 * before


def test_a_head_stays_frozen_beside_one_that_is_trained(params_0, frozen):
    _, (one, other) = fine_tune(params_0, frozen, [1, 0])
    assert np.abs(one["head"]).max() > 1e-2
    assert not np.asarray(other["head"]).any()
    encoders = [tree.select(tau, "(?!head).*") for tau in (one, other)]
    for tau in encoders:
        assert all(leaf.any() for leaf in tree.flatten(tau).values())
        assert "head" not in tau
    merged = task_vectors.apply(tiny_params("bert"), task_vectors.add(encoders), 0.5)
    assert tree.flatten(merged).keys() == tree.flatten(tiny_params("bert")).keys()
