"""The presets of the papers and of their code, and what PyTorch does with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxarith import train, tree
from jaxarith.data import vision
from jaxarith.models import clip

SHORT = {"steps": 50, "warmup_steps": 7, "learning_rate": 3e-3}


@pytest.mark.torch
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(train.paper(), **SHORT),
        dataclasses.replace(train.code(1280, 5), **SHORT),
        dataclasses.replace(train.paper(), **SHORT, decay="linear"),
        dataclasses.replace(train.paper(), **SHORT, decay="constant"),
        dataclasses.replace(train.paper(), **SHORT, clip_norm=None, weight_decay=0.0),
    ],
    ids=["paper", "code", "linear", "constant", "neither clipped nor decayed"],
)
def test_fifty_steps_are_those_of_pytorchs_adamw(config, torch, x64):
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    target = rng.normal(size=3)
    # Gradients of norms on both sides of 1, and noise, which a schedule must not miss.
    noise = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(50)]

    def gradient(params, step):
        scale = 0.05 if step % 3 else 2.0
        return {
            k: scale * (np.asarray(params[k]) - target + noise[step][k]) for k in params
        }

    params = jax.tree.map(jnp.asarray, start)
    transform = train.optimizer(config)
    state = transform.init(params)
    for step in range(config.steps):
        updates, state = transform.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)

    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in start.items()}
    adamw = torch.optim.AdamW(
        leaves.values(), lr=config.learning_rate, weight_decay=config.weight_decay
    )

    def factor(step):  # the papers' code, of a step that starts from 0
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.decay == "constant":
            return 1.0
        progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        if config.decay == "linear":
            return 1 - progress
        return 0.5 * (1 + np.cos(np.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, factor)
    clipped = 0
    for step in range(config.steps):
        grads = gradient({k: v.detach().numpy() for k, v in leaves.items()}, step)
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(grads[name])
        if config.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(leaves.values(), config.clip_norm)
            clipped += bool(norm > config.clip_norm)
        adamw.step()
        schedule.step()
    assert config.clip_norm is None or 0 < clipped < config.steps
    for name, leaf in leaves.items():
        moved = leaf.detach().numpy() - start[name]
        assert np.abs(moved).max() > 0.01
        # Clipping by optax and by PyTorch differ by the 1e-6 that it adds to the norm.
        atol = 1e-6 * np.abs(moved).max()
        actual = params[name] - start[name]
        np.testing.assert_allclose(actual, moved, rtol=1e-6, atol=atol)


def test_the_code_trains_for_about_2000_steps_and_warms_up_500():
    steps = {
        name: train.code(info.train - info.validation, info.epochs).steps
        for name, info in vision.TASKS.items()
        if name in vision.EIGHT and name != "eurosat"
    }
    assert steps == {
        "stanford_cars": 2030,
        "dtd": 2052,
        "gtsrb": 2068,
        "mnist": 2150,
        "resisc45": 1995,
        "sun397": 1960,
        "svhn": 2136,
    }
    eurosat = train.code(vision.TASKS["eurosat"].train, vision.TASKS["eurosat"].epochs)
    assert (eurosat.steps, eurosat.warmup_steps) == (2028, 500)


def test_tak_is_linearised_and_leaves_embeddings_of_patches_and_positions():
    config = train.tak(7330, 35, tokens=257, tasks=8)
    assert (config.steps, config.warmup_steps) == (2030, 500)
    assert config.linearized and config.form == "kronecker"
    assert config.clip_norm is None and config.learning_rate == 3e-4
    assert config.penalty_coef == pytest.approx(2.72, abs=0.01)
    encoder = tree.select(clip.layout(tiny.tiny_clip()), clip.IMAGE_ENCODER)
    trained = tree.flatten(tree.select(encoder, config.trained))
    assert sorted(set(tree.flatten(encoder)) - set(trained)) == [
        f"vision_model/embeddings/{name}"
        for name in ("patch_embedding/kernel", "position_embedding/embedding")
    ]


def test_the_released_weights_of_tak_are_those_of_its_code():
    config = train.tak_released(7330, 35)
    weights = {
        path: config.penalty_coef * train.tak_released_weight(path, tokens=197, tasks=8)
        for path in (
            "vision_model/encoder/layers/0/mlp/fc1/kernel",
            "vision_model/encoder/layers/0/layer_norm1/scale",
            "vision_model/embeddings/class_embedding",
            "visual_projection/kernel",
        )
    }
    assert list(weights.values()) == pytest.approx([700 / 197, 1000, 1000, 7])
    encoder = tree.select(clip.layout(tiny.tiny_clip()), clip.IMAGE_ENCODER)
    assert weights.keys() <= tree.flatten(encoder).keys()


def test_an_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="linear or constant"):
        train.TrainConfig(decay="steps")
