"""Training: the recipe against PyTorch, the task axis, the batches, the errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close

from jaxarith import tangent, task_vectors, tau_jp, train, tree
from jaxarith.data import pipeline

CONFIG = train.TrainConfig(steps=8, warmup_steps=3, batch_size=4, learning_rate=0.05)


def apply_fn(params, x):
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return hidden @ params["out"]["kernel"]


def loss_fn(outputs, batch, constants):
    return jnp.mean((outputs - batch["label"]) ** 2) * constants


def params_0(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"in/kernel": (5, 7), "in/bias": (7,), "out/kernel": (7, 2)}
    leaves = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    return tree.unflatten({k: jnp.asarray(v, jnp.float32) for k, v in leaves.items()})


def source(seed, size=40):
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.normal(size=5).astype(np.float32),
            "label": rng.normal(size=2).astype(np.float32),
        }
        for _ in range(size)
    ]


def run(config, sources, scales, **options):
    names = [f"task{i}" for i in range(len(sources))]
    batches = train.task_batches(sources, config, seeds=range(len(sources)))
    constants = jnp.asarray(scales, jnp.float32)
    return train.fine_tune(
        apply_fn, params_0(), loss_fn, batches, config,
        names=names, constants=constants, **options,
    )  # fmt: skip


def test_schedule_is_the_papers_to_the_last_step():
    config = train.TrainConfig(steps=2000, warmup_steps=200, learning_rate=1e-5)
    rate = train.schedule(config)
    expected = [
        1e-5 * (s + 1) / 200
        if s < 200
        else 0.5e-5 * (1 + np.cos(np.pi * (s - 200) / 1800))
        for s in range(2000)
    ]
    # The cosine is evaluated in float32; near zero its error is absolute.
    actual = jax.vmap(rate)(jnp.arange(2000))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-12)
    assert rate(0) > 0


@pytest.mark.torch
def test_steps_equal_pytorchs_adamw_with_clipping_and_decay():
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of this test")
    sources, start = [source(1)], params_0()
    (tau,) = run(CONFIG, sources, [30.0])  # a loss large enough that clipping acts
    leaves = {
        path: torch.tensor(np.asarray(leaf), requires_grad=True)
        for path, leaf in tree.flatten(start).items()
    }
    adamw = torch.optim.AdamW(leaves.values(), lr=1.0, weight_decay=0.1)
    rate, clipped = train.schedule(CONFIG), 0
    for step, batch in enumerate(train.task_batches(sources, CONFIG, seeds=[0])):
        for group in adamw.param_groups:
            group["lr"] = float(rate(step))
        x, y = (torch.tensor(batch[name][0]) for name in ("image", "label"))
        hidden = torch.tanh(x @ leaves["in/kernel"] + leaves["in/bias"])
        loss = ((hidden @ leaves["out/kernel"] - y) ** 2).mean() * 30
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        clipped += bool(norm > 1)
        adamw.step()
    assert clipped > 0
    expected = tree.unflatten(
        {path: leaf.detach().numpy() for path, leaf in leaves.items()}
    )
    # Adam divides by the root of its second moment, which magnifies rounding.
    actual = task_vectors.apply(start, tau)
    assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_weight_decay_pulls_the_parameters_and_not_the_task_vector_to_zero():
    config = dataclasses.replace(CONFIG, weight_decay=0.5)
    (tau,) = run(config, [source(1)], [0.0])  # no gradient: decay alone
    rates = [float(train.schedule(config)(s)) for s in range(config.steps)]
    shrink = np.prod([1 - 0.5 * rate for rate in rates])
    expected = jax.tree.map(lambda leaf: leaf * (shrink - 1), params_0())
    assert_close(tau, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("penalty", [None, *tau_jp.MODES])
def test_tasks_trained_together_equal_tasks_trained_alone(penalty):
    config = dataclasses.replace(
        CONFIG, linearized=True, penalty=penalty, penalty_batch_size=2
    )
    sources = [source(i) for i in range(3)]
    together = run(config, sources, [1.0, 2.0, 3.0])
    batches = list(train.task_batches(sources, config, seeds=range(3)))
    for i, scale in enumerate([1.0, 2.0, 3.0]):
        own = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], b) for b in batches]
        (alone,) = train.fine_tune(
            apply_fn, params_0(), loss_fn, own, config,
            names=["alone"], constants=jnp.array([scale]),
        )  # fmt: skip
        # The same operations on the same numbers, perhaps fused in another order.
        assert_close(together[i], alone, rtol=1e-5, atol=1e-6)


def test_all_tasks_at_once_equal_one_after_the_other():
    sources, scales = [source(i) for i in range(3)], [1.0, 2.0, 3.0]
    one = run(CONFIG, sources, scales)
    all_ = run(dataclasses.replace(CONFIG, tasks_at_once=3), sources, scales)
    for a, b in zip(all_, one, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_compiles_once():
    config = dataclasses.replace(CONFIG, linearized=True, penalty="cyclic")
    step = train.make_step(train.objective(apply_fn, loss_fn, config), config)
    state, scales = train.init_state(params_0(), config, 2), jnp.ones(2)
    for batch in train.task_batches([source(1), source(2)], config, seeds=[0, 1]):
        state, _ = step(state, params_0(), batch, scales)
    assert step._cache_size() == 1


def test_the_objective_is_the_loss_plus_the_weighted_penalty():
    config = dataclasses.replace(
        CONFIG, linearized=True, penalty="strict", penalty_coef=0.7, penalty_power=2
    )
    sources = [source(1), source(2), source(3)]
    batch = train.task_batches(sources, config, seeds=range(3))[0]
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    rng = np.random.default_rng(5)
    start = params_0()
    tau = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params_0()
    )
    total, parts = train.objective(apply_fn, loss_fn, config)(tau, start, batch, 2.0)
    params = task_vectors.apply(start, tau)
    linear = tangent.linearize(apply_fn, start)
    outputs = linear(params, batch["image"])
    loss = 2.0 * np.mean((np.asarray(outputs) - batch["label"]) ** 2)
    others = batch["penalty"]["image"]
    moved = linear(params, others) - apply_fn(start, others)
    penalty = np.mean(np.sum(np.asarray(moved) ** 2, axis=-1))
    assert penalty > 0.1
    np.testing.assert_allclose(parts["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(parts["penalty"], penalty, rtol=1e-5)
    np.testing.assert_allclose(total, loss + 0.7 * penalty, rtol=1e-5)


def test_only_selected_leaves_are_trained():
    config = dataclasses.replace(CONFIG, trained="in/.*", linearized=True)
    (tau,) = run(config, [source(1)], [1.0])
    assert set(tree.flatten(tau)) == {"in/kernel", "in/bias"}
    assert float(task_vectors.norm(tau)) > 0


def test_training_reduces_the_loss_and_writes_a_json_line_per_step(tmp_path):
    log = tmp_path / "log.jsonl"
    config = dataclasses.replace(CONFIG, steps=60)
    run(config, [source(1), source(2)], [1.0, 1.0], log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(60))
    for name in ("task0", "task1"):
        losses = [line["loss"][name] for line in lines]
        assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_batches_depend_on_step_and_seed_alone():
    config = dataclasses.replace(CONFIG, linearized=True, penalty="mixed")
    sources = [source(1), source(2), source(3)]
    first, again = (
        list(train.task_batches(sources, config, seeds=range(3))) for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        assert_close(a, b, rtol=0)
    other = train.task_batches(sources, config, seeds=range(10, 13))[0]
    assert not np.array_equal(other["image"], first[0]["image"])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cyclic", lambda step: [1 + step % 2] * 2),
        ("strict", lambda step: [1, 1, 2, 2]),
    ],
)
def test_penalty_samples_come_from_the_tasks_that_the_mode_names(mode, expected):
    config = dataclasses.replace(
        CONFIG, linearized=True, penalty=mode, penalty_batch_size=2
    )
    marked = [
        [{"image": np.full(5, i, np.float32), "label": np.zeros(2)}] * 3
        for i in range(3)
    ]
    for step, batch in enumerate(train.task_batches(marked, config, seeds=range(3))):
        assert batch["penalty"]["image"][0, :, 0].tolist() == expected(step)
        assert set(batch["image"][0, :, 0]) == {0}


def test_every_sample_is_seen_once_an_epoch():
    data = [
        {"image": np.full(5, i, np.float32), "label": np.zeros(2)} for i in range(16)
    ]
    batches = train.task_batches([data], CONFIG, seeds=[0])  # 8 steps of 4: 2 epochs
    seen = np.concatenate([batch["image"][0, :, 0] for batch in batches])
    assert sorted(seen[:16]) == sorted(seen[16:]) == list(range(16))
    assert seen[:16].tolist() != seen[16:].tolist()


def test_a_loss_that_is_not_finite_stops_with_step_and_task():
    broken = source(2)
    for record in broken:
        record["label"] = record["label"] * np.nan
    with pytest.raises(
        FloatingPointError,
        match=r"loss of task task1 is nan and .* in 3 of 3 leaves, .* at step 0",
    ):
        run(CONFIG, [source(1), broken], [1.0, 1.0])


def test_optimizer_state_is_optaxs_own():
    taus, opt_state = train.init_state(params_0(), CONFIG, 2)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(taus))
    assert jax.tree.leaves(optax.tree.get(opt_state, "mu"))[0].shape[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "cyclic"}, "linearized=True"),
        (
            {"penalty": "sometimes", "linearized": True},
            "unknown penalty 'sometimes'; the modes of τJp are",
        ),
        ({"steps": 3, "warmup_steps": 3}, "shorter than the training"),
        ({"tasks_at_once": 0}, "tasks_at_once is 0"),
        ({"penalty_power": 3}, "penalty_power is 3"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train.TrainConfig(**options)


@pytest.mark.parametrize("count", [0, 5, 9])
def test_a_run_with_too_few_or_too_many_batches_is_refused(count):
    batch = train.task_batches([source(1)], CONFIG, seeds=[0])[0]
    with pytest.raises(ValueError, match="batches for"):
        train.fine_tune(
            apply_fn, params_0(), loss_fn, [batch] * count, CONFIG,
            names=["task"], constants=jnp.ones(1),
        )  # fmt: skip


@pytest.mark.parametrize("linearized", [False, True])
def test_integers_are_not_trained(linearized):
    start = params_0() | {"counter": jnp.arange(3)}
    config = dataclasses.replace(CONFIG, linearized=linearized)
    batches = train.task_batches([source(1)], config, seeds=[0])
    (tau,) = train.fine_tune(
        apply_fn, start, loss_fn, batches, config,
        names=["task"], constants=jnp.ones(1),
    )  # fmt: skip
    assert set(tau) == {"in", "out"}


def test_one_source_may_serve_two_tasks():
    config = dataclasses.replace(CONFIG, linearized=True, penalty="cyclic")
    batch = train.task_batches([source(1)] * 2, config, seeds=[0, 1])[0]
    assert batch["penalty"]["image"].shape == (2, 16, 5)


def test_wrong_data_is_refused():
    with pytest.raises(ValueError, match="no task"):
        train.task_batches([], CONFIG, seeds=[])
    with pytest.raises(ValueError, match="source is empty"):
        train.task_batches([[]], CONFIG, seeds=[0])
    with pytest.raises(ValueError, match="2 seeds for 1 task;"):
        train.task_batches([source(1)], CONFIG, seeds=[0, 1])
    penalised = dataclasses.replace(CONFIG, linearized=True, penalty="cyclic")
    with pytest.raises(ValueError, match="at least one other task"):
        list(train.task_batches([source(1)], penalised, seeds=[0]))
    with pytest.raises(ValueError, match="no leaf matches"):
        run(dataclasses.replace(CONFIG, trained="nothing"), [source(1)], [1.0])


def test_continued_training_starts_from_the_given_vectors():
    config = dataclasses.replace(CONFIG, learning_rate=1e-12)
    taus = [jax.tree.map(lambda x, i=i: x * 0.1 * (i + 1), params_0(7)) for i in (0, 1)]
    found = run(config, [source(1), source(2)], [1.0, 1.0], start=taus)
    for tau, expected in zip(found, taus, strict=True):
        assert_close(tau, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [1, 3])
def test_a_start_of_another_number_of_tasks_is_refused(count):
    taus = [params_0()] * count
    with pytest.raises(ValueError, match=f"{count} task vectors? .* for 2 tasks"):
        run(CONFIG, [source(1), source(2)], [1.0, 1.0], start=taus)


def test_a_start_without_a_trained_leaf_is_refused_with_its_path():
    with pytest.raises(ValueError, match="in/bias"):
        tau = params_0()
        del tau["in"]["bias"]
        run(CONFIG, [source(1)], [1.0], start=[tau])


@pytest.mark.parametrize("every", [4, {4, 8}])
def test_vectors_along_the_way_are_those_of_shorter_runs(every):
    config = dataclasses.replace(CONFIG, decay="constant")  # no end to steer for
    seen = {}
    (last,) = run(
        config,
        [source(1)],
        [1.0],
        observe=lambda done, taus, _: seen.update({done: taus[0]}),
        observe_every=every,
    )
    (half,) = run(dataclasses.replace(config, steps=4), [source(1)], [1.0])
    assert list(seen) == [4, 8]
    assert_close(seen[4], half, rtol=0, atol=0)
    assert_close(seen[8], last, rtol=0, atol=0)
    assert np.abs(np.subtract(seen[4]["in"]["bias"], seen[8]["in"]["bias"])).max() > 0


def test_augmentation_is_a_function_of_the_position_alone():
    def augment(sample, rng):
        return sample | {"image": sample["image"] + rng.normal(size=5).astype("f4")}

    config = dataclasses.replace(CONFIG, linearized=True, penalty="cyclic")
    sources = [source(1), source(2)]
    plain = train.task_batches(sources, config, seeds=[0, 1])
    first, again = (
        train.task_batches(sources, config, seeds=[0, 1], augment=augment)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first[3]["image"], again[3]["image"])
    np.testing.assert_array_equal(first[3]["label"], plain[3]["label"])
    for field in (lambda b: b["image"], lambda b: b["penalty"]["image"]):
        noise = field(first[3]) - field(plain[3])
        assert noise.std() > 0.5
        assert np.abs(noise - (field(first[4]) - field(plain[4]))).max() > 0.1


def test_a_joint_batch_takes_every_task_in_turn():
    sources = [source(1, 6), source(2, 9), source(3, 12)]
    config = dataclasses.replace(CONFIG, steps=3, warmup_steps=0, batch_size=2)
    batches = train.joint_batches(sources, config, seeds=range(3))
    assert len(batches) == 3 and batches[0]["image"].shape == (1, 6, 5)
    rows = np.concatenate([batch["image"][0] for batch in batches])
    assert batches[0]["task"].tolist() == [[0, 1, 2, 0, 1, 2]]
    for task, own in enumerate(sources):  # an epoch of the first: each sample once
        known = {sample["image"].tobytes() for sample in own}
        found = [row.tobytes() for row in rows[task::3]]
        assert set(found) <= known and len(set(found)) == 6


def test_batches_of_worker_processes_are_those_of_threads():
    config = dataclasses.replace(CONFIG, steps=4, warmup_steps=1)
    batches = train.task_batches([source(1)], config, seeds=[0])
    made = list(pipeline.prefetch(batches, 1, workers=2))
    assert len(made) == 3
    for batch, expected in zip(made, list(batches)[1:], strict=True):
        np.testing.assert_array_equal(batch["image"], expected["image"])


def test_own_seeds_make_the_samples_of_a_task_the_same_in_any_company():
    config = dataclasses.replace(
        CONFIG, linearized=True, penalty="mixed", penalty_batch_size=3
    )
    sources = [source(i) for i in range(3)]
    others = [[sources[j] for j in range(3) if j != i] for i in range(3)]
    together = train.task_batches(sources, config, others=others, seeds=[5, 900, 7])
    alone = train.task_batches([sources[1]], config, others=[others[1]], seeds=[900])
    for step in (0, 6):
        batch, own = together[step], alone[step]
        for found, expected in zip(
            jax.tree.leaves(batch), jax.tree.leaves(own), strict=True
        ):
            np.testing.assert_array_equal(found[1], expected[0])
    other = train.task_batches(sources, config, others=others, seeds=[6, 901, 8])
    assert not np.array_equal(other[0]["image"], together[0]["image"])


@pytest.mark.parametrize("every", [0, -1])
def test_to_observe_every_zero_steps_is_refused(every):
    with pytest.raises(ValueError, match="observe_every"):
        run(CONFIG, [source(1)], [1.0], observe=print, observe_every=every)
