"""Many devices: what they compute is what one computes, and where arrays lie."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
import tiny
from checks import assert_close
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith import (
    evaluate,
    fingerprint,
    losses,
    sharding,
    tangent,
    tau_jp,
    train,
    tree,
)
from jaxarith.models import clip, heads

pytestmark = pytest.mark.devices

CONFIG = train.TrainConfig(
    steps=3, warmup_steps=1, batch_size=16, penalty_batch_size=8, learning_rate=1e-3
)
MIXED = "task=2,data=2,fsdp=2"
STEPS = {
    "ordinary": {},
    "linearised": {"linearized": True},
    **{mode: {"linearized": True, "penalty": mode} for mode in tau_jp.MODES},
}
RAW = tiny.tiny_clip_config()
RAW["vision_config"]["num_hidden_layers"] = 1  # every test compiles it anew
MODEL = clip.CLIPConfig.from_json(RAW)
encode = clip.image_encoder(MODEL)


@pytest.fixture(autouse=True)
def all_leaves_are_large(monkeypatch):
    """The models here are so small that no leaf would be worth sharding."""
    monkeypatch.setattr(sharding.mesh, "SMALLEST_SHARDED", 8)


@pytest.fixture(scope="module")
def params_0():
    layout = tree.select(clip.layout(MODEL), clip.IMAGE_ENCODER)
    return tiny.random_params(0, layout)


def loss_fn(features, batch, head):
    return losses.cross_entropy(heads.logits(head, features), batch["label"])


def source(seed, size=40):
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.normal(size=(12, 12, 3)).astype(np.float32),
            "label": np.int32(rng.integers(5)),
        }
        for _ in range(size)
    ]


SOURCES = [source(i) for i in range(2)]
HEADS = np.random.default_rng(9).normal(size=(2, 5, 12)).astype(np.float32)


def prepared(config, mesh, params_0):
    """A step on a mesh and its arguments, of task vectors that are not zero."""
    objective = train.objective(encode, loss_fn, config, mesh=mesh)
    taus, opt_state = train.init_state(params_0, config, 2, mesh)
    keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(taus)))
    moved = [
        0.05 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, jax.tree.leaves(taus), strict=True)
    ]
    taus = sharding.shard(
        jax.tree.unflatten(jax.tree.structure(taus), moved), mesh, tasks=True
    )
    batch = train.task_batches(SOURCES, config, seeds=[0, 1], mesh=mesh)[0]
    arguments = (
        (taus, opt_state),
        sharding.shard(params_0, mesh),
        sharding.from_local_rows(batch, mesh),
        sharding.put(HEADS, NamedSharding(mesh, P("task"))),
    )
    return train.make_step(objective, config, mesh), arguments


def sgd(config):
    """An optimizer whose update is the gradient."""
    return optax.sgd(1.0)


@functools.cache
def gradients(kind, sizes, micro_batches=1, product_dtype=None):
    """What a step takes from the task vectors, its metrics, and its program."""
    mesh = sharding.make_mesh(sizes)
    options = {"micro_batches": micro_batches, "product_dtype": product_dtype}
    config = dataclasses.replace(CONFIG, **STEPS[kind], **options)
    layout = tree.select(clip.layout(MODEL), clip.IMAGE_ENCODER)
    step, arguments = prepared(config, mesh, tiny.random_params(0, layout))
    before = sharding.to_host(arguments[0][0])
    compiled = step.lower(*arguments).compile()
    (taus, _), metrics = sharding.to_host(compiled(*arguments))
    return jax.tree.map(np.subtract, before, taus), metrics, compiled


# The program of a step is the same whichever tasks the penalty's samples come from.
ON_MESHES = [(kind, "data=8") for kind in STEPS]
ON_MESHES += [("ordinary", "fsdp=8"), ("mixed", "fsdp=8"), ("cyclic", MIXED)]
ON_MESHES += [("linearised", "data=2,fsdp=4")]


@pytest.mark.parametrize(("kind", "mesh"), ON_MESHES)
def test_gradients_are_those_of_one_device(kind, mesh, monkeypatch):
    monkeypatch.setattr(train.step, "optimizer", sgd)
    expected, expected_metrics, _ = gradients(kind, "data=1")
    actual, metrics, compiled = gradients(kind, mesh)
    for path, leaf in tree.flatten(expected).items():
        # A bias of all keys changes no softmax.
        assert np.abs(leaf).max() > 1e-3 or path.endswith("k_proj/bias"), path
    assert_close(actual, expected, rtol=0, atol=1e-6)
    assert_close(metrics, expected_metrics, rtol=1e-5, atol=1e-6)
    if mesh == "data=8":  # the devices meet once a step
        [(name, shapes)] = collectives(compiled)
        assert name == "all-reduce"
        scalars = 2 if STEPS[kind].get("penalty") else 1  # which are reported
        assert shapes.count("") == scalars
        assert len(shapes) == scalars + len(jax.tree.leaves(expected))


def collectives(compiled):
    """Name and shapes of the results of every collective of a compiled program."""
    names = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    found = re.findall(rf"= (.*?) ({names})(?:-start)?\(", compiled.as_text())
    return [(name, re.findall(r"\w+\[([\d,]*)\]", shapes)) for shapes, name in found]


def test_devices_with_tasks_of_their_own_exchange_what_is_reported_alone(params_0):
    step, arguments = prepared(CONFIG, sharding.make_mesh("task=2,data=1"), params_0)
    found = collectives(step.lower(*arguments).compile())
    leaves = len(jax.tree.leaves(params_0))
    assert {shape for _, shapes in found for shape in shapes} == {"2", f"2,{leaves}"}


def test_a_sharded_state_takes_an_eighth_of_every_device(params_0):
    mesh = sharding.make_mesh("fsdp=8")
    step, (state, start, *arguments) = prepared(CONFIG, mesh, params_0)
    assert_an_eighth(start)
    assert_an_eighth(state)
    assert_an_eighth(step(state, start, *arguments)[0])


def assert_an_eighth(tree_):
    leaves = jax.tree.leaves(tree_)
    sharded = [leaf for leaf in leaves if not leaf.sharding.is_fully_replicated]
    whole = sum(leaf.nbytes for leaf in leaves)
    # A few biases of a width that 8 does not divide, and counters.
    assert sum(leaf.nbytes for leaf in sharded) > 0.99 * whole
    for device in jax.devices():
        held = sum(
            shard.data.nbytes
            for leaf in sharded
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert held == sum(leaf.nbytes for leaf in sharded) / 8


def test_leaves_that_are_not_sharded_are_a_thousandth_of_a_vit(monkeypatch):
    monkeypatch.undo()
    model = clip.CLIPConfig.from_json(
        {"vision_config": {}, "text_config": {}, "projection_dim": 512}
    )
    layout = tree.select(clip.layout(model), clip.IMAGE_ENCODER)
    mesh = jax.sharding.AbstractMesh((1, 1, 8), sharding.AXES)
    whole = [
        leaf
        for leaf in jax.tree.leaves(layout)
        if sharding.spec(leaf.shape, mesh) == P()
    ]
    assert tree.size(layout) > 8e7
    assert 0 < tree.size(whole) < 2e-3 * tree.size(layout)


def test_a_step_on_a_mesh_compiles_once(params_0):
    step, (state, *arguments) = prepared(CONFIG, sharding.make_mesh(MIXED), params_0)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    for _ in range(3):
        state, _ = step(state, *arguments)
    assert step._cache_size() == 1
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places


@pytest.mark.parametrize(
    ("kind", "mesh"), [("ordinary", "data=1"), ("strict", "data=2,fsdp=2")]
)
def test_micro_batches_give_the_gradient_of_the_batch(kind, mesh, monkeypatch):
    monkeypatch.setattr(train.step, "optimizer", sgd)
    expected, expected_metrics, _ = gradients(kind, "data=1")
    actual, metrics, _ = gradients(kind, mesh, micro_batches=2)
    assert_close(actual, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)


def test_products_are_rounded_on_a_mesh_as_on_one_device(monkeypatch):
    monkeypatch.setattr(train.step, "optimizer", sgd)
    exact, _, _ = gradients("linearised", "data=1")
    rounded, _, _ = gradients("linearised", "data=1", product_dtype="bfloat16")
    actual, _, _ = gradients("linearised", MIXED, product_dtype="bfloat16")
    # An operand that a sum in another order moves by a bit may be rounded to the next
    # number in bfloat16: images multiplied by 1 + 1e-6 move these gradients as much.
    assert distance(exact, rounded) > 2e-3
    assert distance(actual, rounded) < 0.6 * distance(exact, rounded)


def distance(one, other):
    """Relative, in the Euclidean norm of whole trees."""
    one, other = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree_)])
        for tree_ in (one, other)
    )
    return np.linalg.norm(one - other) / np.linalg.norm(other)


def test_training_on_a_mesh_ends_where_one_device_does(params_0, monkeypatch):
    monkeypatch.setattr(train.step, "optimizer", lambda config: optax.sgd(0.1))
    config = dataclasses.replace(CONFIG, linearized=True, penalty="cyclic")

    def run(mesh):
        return train.fine_tune(
            encode, params_0, loss_fn,
            train.task_batches(SOURCES, config, seeds=[0, 1], mesh=mesh), config,
            names=["a", "b"], constants=HEADS, mesh=mesh,
        )  # fmt: skip

    expected, actual = run(sharding.one_device()), run(sharding.make_mesh("fsdp=8"))
    for tau, other in zip(actual, expected, strict=True):
        assert_close(tau, other, rtol=0, atol=1e-6)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(other)) > 1e-2


def assert_close_outputs(actual, expected):
    # Small entries are differences of large terms, which round as those do.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6 * scale)


def batches(count, size):
    rng = np.random.default_rng(count)
    return [
        {
            "image": rng.normal(size=(size, 12, 12, 3)).astype(np.float32),
            "mask": np.arange(size) < (size - 2 if i == count - 1 else size),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def taus(params_0):
    rng = np.random.default_rng(4)
    return [
        jax.tree.map(
            lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params_0
        )
        for _ in range(2)
    ]


def test_outputs_on_a_mesh_are_those_of_one_device(params_0, taus):
    data = batches(2, 13)  # which no mesh here divides
    mesh = sharding.make_mesh(MIXED)
    model = (encode, params_0, taus, data)
    for of in (evaluate.forward, evaluate.tangent):
        expected, actual = of(*model)([0.3, -0.7]), of(*model, mesh=mesh)([0.3, -0.7])
        assert expected.shape == (24, 12)
        assert_close_outputs(actual, expected)
    matrix = functools.partial(tau_jp.matrix, encode, params_0, taus, [data])
    assert matrix().min() > 0.1
    np.testing.assert_allclose(matrix(mesh=mesh), matrix(), rtol=1e-5)


def largest(features):
    return features.argmax(-1)


@pytest.mark.parametrize("mesh", ["data=8", "task=2,data=2"])
def test_a_sweep_over_devices_is_one_pass_after_the_other(mesh, params_0, taus):
    data, grid = batches(2, 5), [(a, b) for a in (-1.0, 0.0, 1.0) for b in (0.0, 0.5)]
    one_by_one = evaluate.forward(encode, params_0, taus, data)
    expected = np.stack([one_by_one(coefs) for coefs in grid])
    mesh = sharding.make_mesh(mesh)
    actual = evaluate.sweep(encode, params_0, taus, data, grid, mesh=mesh)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    model = (encode, params_0, taus, data, grid)
    labels = evaluate.sweep(*model, mesh=mesh, readout=largest)
    np.testing.assert_array_equal(labels, expected.argmax(-1))


def test_a_xi_grid_is_read_off_a_sweep(params_0, taus):
    coefs, data = [-1.0, 0.0, 2.0], [batches(1, 8), batches(2, 8)]

    def predict(features):
        return np.asarray(features).argmax(-1)

    passes = [evaluate.forward(encode, params_0, taus, batch) for batch in data]
    expected = evaluate.disentanglement_error(passes, [predict] * 2, coefs)
    grid = [(a, b) for a in coefs for b in coefs]
    model = (encode, params_0, taus)
    swept = [evaluate.sweep(*model, batch, grid, readout=largest) for batch in data]
    at = [lambda c, of=of: of[grid.index(tuple(c))] for of in swept]
    actual = evaluate.disentanglement_error(at, [np.asarray] * 2, coefs)
    assert expected.max() > 0.1
    np.testing.assert_array_equal(actual, expected)


def test_a_model_is_measured_where_it_is(params_0, taus):
    data, mesh = batches(1, 8), sharding.make_mesh("data=2,fsdp=4")
    model = sharding.shard((params_0, taus), mesh)
    assert sharding.mesh_of(model) == mesh
    assert sharding.mesh_of(params_0) == sharding.one_device()
    with jax.default_device(jax.devices()[3]):
        assert list(sharding.one_device().devices.flat) == [jax.devices()[3]]
    expected = evaluate.forward(encode, params_0, taus, data)([0.3, -0.7])
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        at = evaluate.forward(encode, *model, data)
    np.testing.assert_allclose(at([0.3, -0.7]), expected, rtol=1e-5, atol=1e-6)


def test_many_sharded_leaves_are_read_without_a_deadlock():
    leaves = {f"{i}": np.ones((64, 64), np.float32) for i in range(60)}
    sharded = sharding.shard(leaves, sharding.make_mesh("fsdp=8"))
    for _ in range(5):
        tree.check_finite(sharded, "tree")
        assert tree.is_finite(sharded)
        assert fingerprint.combined(sharded) == fingerprint.combined(leaves)


def test_a_linearised_model_on_a_mesh_gathers_what_it_reads(params_0, taus):
    mesh = sharding.make_mesh("fsdp=8")
    image = batches(1, 8)[0]["image"]
    model = sharding.on_mesh(encode, mesh)
    placed = sharding.shard((params_0, taus[0]), mesh)
    spread = sharding.spread(image, mesh)
    outputs, moved = jax.jit(functools.partial(tangent.jvp, model))(*placed, spread)
    assert outputs.sharding.spec == moved.sharding.spec == P("fsdp")
    alone = jax.jit(functools.partial(tangent.jvp, encode))
    assert_close_outputs(moved, alone(params_0, taus[0], image)[1])


def test_what_cannot_be_shared_equally_is_refused(params_0):
    mesh, seeds = sharding.make_mesh("data=8"), [0, 1]
    with pytest.raises(
        ValueError, match="4 micro-batches of 16 samples .* on 8 devices"
    ):
        train.task_batches(
            SOURCES,
            dataclasses.replace(CONFIG, micro_batches=4),
            seeds=seeds,
            mesh=mesh,
        )
    with pytest.raises(ValueError, match="2 tasks cannot be shared by 8 devices"):
        mesh_of_tasks = sharding.make_mesh("task=8")
        train.task_batches(SOURCES, CONFIG, seeds=seeds, mesh=mesh_of_tasks)
    with pytest.raises(ValueError, match="12 samples cannot be shared by 8 devices"):
        sharding.from_local_rows({"image": np.zeros((2, 12))}, mesh)


@pytest.mark.parametrize(
    ("shape", "tasks", "expected"),
    [
        ((768, 3072), False, P(None, "fsdp")),
        ((3072, 768), False, P("fsdp")),
        ((768, 768), False, P(None, "fsdp")),
        ((4, 768, 3072), True, P("task", None, "fsdp")),
        ((4096, 8, 64), True, P("task")),  # a leaf of 512 entries, of 4096 tasks
        ((49409, 3), False, P()),
        ((768,), False, P()),
        ((), False, P()),
        ((4,), True, P("task")),
    ],
)
def test_the_largest_divisible_dimension_is_sharded(
    shape, tasks, expected, monkeypatch
):
    monkeypatch.undo()
    mesh = jax.sharding.AbstractMesh((4, 1, 8), sharding.AXES)
    assert sharding.spec(shape, mesh, tasks=tasks) == expected
