"""Checkpoints: the same bits on any devices, and which of them are kept."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import (
    CONFIG,
    abstract,
    assert_restores,
    bits,
    folders,
    make_state,
    mesh,
    restore,
    save_all,
    sharding,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith.train import manifest
from jaxarith.train.checkpoint import Checkpoints


def test_states_of_different_steps_differ_in_each_leaf():
    one, two = bits(make_state(1)), bits(make_state(2))
    assert {path for path in one if one[path] == two[path]} == {"nothing"}


def test_bits_dtypes_structure_and_shardings_survive(tmp_path):
    state = make_state(3, mesh(8))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(3, state)
        restored = checkpoints.restore(state)
    assert restored.step == 3
    assert bits(restored.state) == bits(make_state(3))
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert state["taus"]["kernel"].addressable_shards[0].data.shape == (2, 24)
    for leaf, one in zip(*map(jax.tree.leaves, (restored.state, state)), strict=True):
        assert leaf.sharding.is_equivalent_to(one.sharding, one.ndim)


@pytest.mark.parametrize("saved_on, size", [(8, 1), (8, 4), (4, 8), (1, 8)])
def test_restores_on_another_number_of_devices(tmp_path, saved_on, size):
    state = make_state(3, mesh(saved_on))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(3, state)
    like = abstract(state, sharding(state, mesh(size)))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        restored = checkpoints.restore(like)
    assert bits(restored.state) == bits(state)
    for leaf, one in zip(*map(jax.tree.leaves, (restored.state, like)), strict=True):
        assert leaf.sharding.is_equivalent_to(one.sharding, one.ndim)
    kernel = restored.state["taus"]["kernel"]
    assert len(kernel.addressable_shards) == size
    assert kernel.addressable_shards[0].data.shape == (16 // size, 24)


def test_sharded_restores_replicated(tmp_path):
    state = make_state(3, mesh(8))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(3, state)
        everywhere = NamedSharding(mesh(8), P())
        like = abstract(state, jax.tree.map(lambda _: everywhere, state))
        restored = checkpoints.restore(like)
    assert bits(restored.state) == bits(state)
    for leaf in jax.tree.leaves(restored.state):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8


def test_leaves_without_a_device_join_those_of_a_mesh(tmp_path):
    state = {"w": make_state(1, mesh(8))["taus"]["kernel"], "count": jnp.int32(3)}
    like = state | {"free": jax.ShapeDtypeStruct((), jnp.float32)}
    state = state | {"free": jnp.float32(2), "key": jax.random.key(1)}
    like = like | {"key": jax.random.key(0)}
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(like).state
    assert bits(restored) == bits(state)
    noise = jax.jit(lambda s: s["w"] * s["count"] + jax.random.normal(s["key"]))
    np.testing.assert_array_equal(noise(restored), noise(state))


@pytest.fixture
def x64_in_all_threads():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_entries_of_64_bits_survive(tmp_path, x64_in_all_threads):
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=5))}
    assert state["w"].dtype == jnp.float64
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state)
        assert bits(checkpoints.restore(state).state) == bits(state)


def test_save_returns_early_and_stores_the_state_as_it_was(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(8, 2**18)).astype(np.float32) for _ in range(4)]  # 8 MB
    placed = NamedSharding(mesh(8), P("fsdp"))
    state = jax.block_until_ready(jax.device_put(arrays, placed))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return [leaf + 1 for leaf in state]

    def buffer(state):
        return state[0].addressable_shards[0].data.unsafe_buffer_pointer()

    # Compiled, and in buffers that are XLA's own and not NumPy's: donation is real.
    state = jax.block_until_ready(step(state))
    before = buffer(state)
    state = jax.block_until_ready(step(state))
    assert buffer(state) == before
    expected = [np.array(leaf) for leaf in state]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state)
        first = jax.block_until_ready(step(state))
        assert not (tmp_path / "step_00000001" / manifest.NAME).exists()
        for _ in range(20):
            first = step(first)
        restored = checkpoints.restore(like).state
    np.testing.assert_array_equal(first[0][0, :3], expected[0][0, :3] + 21)
    for leaf, array in zip(restored, expected, strict=True):
        np.testing.assert_array_equal(leaf, array)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_last_checkpoints_are_kept(tmp_path, keep):
    with Checkpoints(tmp_path, CONFIG, keep=keep) as checkpoints:
        for step in range(5):
            checkpoints.save(step, make_state(step))
            checkpoints.wait()
            kept = range(max(0, step - keep + 1), step + 1)
            assert folders(tmp_path) == [f"step_{s:08d}" for s in kept]
    assert_restores(tmp_path, 4)


def test_older_checkpoint_stays_until_the_newer_is_complete(tmp_path, monkeypatch):
    seen, write = [], manifest.write

    def observed(folder, content):
        seen.append(folders(tmp_path))
        write(folder, content)

    monkeypatch.setattr(manifest, "write", observed)
    with Checkpoints(tmp_path, CONFIG, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    assert seen[1] == ["step_00000001", "step_00000002"]
    assert folders(tmp_path) == ["step_00000002"]


def test_a_step_is_saved_once_and_never_before_a_later_one(tmp_path):
    save_all(tmp_path, 1, 5)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(5, make_state(5))
        with pytest.raises(ValueError, match="step 3 can't be saved: .* has step 5"):
            checkpoints.save(3, make_state(3))
    assert folders(tmp_path) == ["step_00000001", "step_00000005"]


def test_relative_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_all("run/checkpoints", 1, 2)
    assert_restores(tmp_path / "run" / "checkpoints", 2)


def test_another_configuration_is_refused_with_its_fields(tmp_path):
    save_all(tmp_path, 1, 2)
    before = folders(tmp_path)
    other = json.loads(json.dumps(CONFIG))
    other["train"] |= {"steps": 9, "linearized": True}
    del other["tasks"]
    with pytest.raises(ValueError, match="another configuration") as caught:
        Checkpoints(tmp_path, other)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1:-1] == [
        "train/steps: 8 there, 9 here",
        "tasks: ['a', 'b'] there, absent here",
        "train/linearized: absent there, True here",
    ]
    assert "another folder" in lines[-1]
    assert folders(tmp_path) == before
    assert_restores(tmp_path, 2)


def test_configurations_are_compared_as_json(tmp_path):
    save_all(tmp_path, 1, 2, config={"tasks": ("a", "b"), 3: 1.0})
    assert restore(tmp_path, {"3": 1.0, "tasks": ["a", "b"]}).step == 2
    with pytest.raises(ValueError, match="log: absent there, None here"):
        Checkpoints(tmp_path, {"3": 1.0, "tasks": ["a", "b"], "log": None})


def test_unfinished_checkpoints_are_ignored_and_removed(tmp_path):
    save_all(tmp_path, 1, 2)
    leftovers = ["step_00000003", "step_00000003/state.orbax-checkpoint-tmp", "other"]
    for name in leftovers:
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000003" / f".{manifest.NAME}.partial").write_text("{")
    assert_restores(tmp_path, 2)
    assert folders(tmp_path) == ["other", "step_00000001", "step_00000002"]


def test_folders_of_others_are_left_alone(tmp_path):
    theirs = tmp_path / "step_00010000"
    theirs.mkdir()
    (theirs / "weights.bin").write_text("theirs")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, make_state(1))
    assert_restores(tmp_path, 1)
    assert (theirs / "weights.bin").read_text() == "theirs"


@pytest.mark.parametrize("theirs", ["model.pt", "state", "manifest.json"])
def test_a_step_that_another_program_saved_is_an_error_and_stays(tmp_path, theirs):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for name in {theirs, "model.pt"}:
        (folder / name).write_text("theirs")
    with pytest.raises(OSError, match=r"step_00000001 is not a checkpoint of.*move"):
        with Checkpoints(tmp_path, CONFIG) as checkpoints:
            if theirs == "manifest.json":
                with pytest.warns(UserWarning, match="damaged"):
                    checkpoints.restore(make_state(0))
            checkpoints.save(1, make_state(1))
    assert {(folder / name).read_text() for name in (theirs, "model.pt")} == {"theirs"}


def test_links_to_checkpoints_are_restored_and_never_followed_to_remove(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    save_all(first, 1)
    second.mkdir()
    (second / "step_00000001").symlink_to(first / "step_00000001")
    with Checkpoints(second, CONFIG, keep=1) as checkpoints:
        assert checkpoints.restore(make_state(0)).step == 1
        checkpoints.save(2, make_state(2))
    assert folders(second) == ["step_00000002"]
    assert_restores(first, 1)


def test_files_added_to_a_checkpoint_stay_when_it_goes(tmp_path):
    save_all(tmp_path, 1)
    notes = tmp_path / "step_00000001" / "notes.txt"
    notes.write_text("mine")
    with Checkpoints(tmp_path, CONFIG, keep=1) as checkpoints:
        checkpoints.restore(make_state(0))
        checkpoints.save(2, make_state(2))
    assert [p.name for p in notes.parent.iterdir()] == ["notes.txt"]
    assert_restores(tmp_path, 2)


def test_a_tree_that_does_not_fit_is_an_error_with_the_paths(tmp_path):
    save_all(tmp_path, 1, 2)
    like = make_state(0)
    like["taus"] = {
        "kernel": jnp.zeros((16, 25)),
        "bias": jnp.zeros(24, jnp.float32),
        "head": jnp.zeros(2),
    }
    del like["mask"]
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.raises(ValueError, match="does not fit") as caught:
            checkpoints.restore(like)
        lines = [line.strip() for line in str(caught.value).splitlines()]
        assert sorted(lines[1:-1]) == [
            "mask: bool[24] there, absent here",
            "taus/bias: bfloat16[24] there, float32[24] here",
            "taus/head: absent there, float32[2] here",
            "taus/kernel: float32[16, 24] there, float32[16, 25] here",
        ]
        assert checkpoints.restore(make_state(0)).step == 2


def test_leaving_with_an_error_still_completes_the_checkpoint(tmp_path):
    with pytest.raises(KeyError):
        with Checkpoints(tmp_path, CONFIG) as checkpoints:
            checkpoints.save(1, make_state(1))
            raise KeyError("training")
    assert_restores(tmp_path, 1)
