"""Checkpoints: the same bits anywhere, through kills, damage and full disks."""

import contextlib
import functools
import json
import resource
import signal
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarith import tree
from jaxarith.train import checkpoint, manifest
from jaxarith.train.checkpoint import Checkpoints

CONFIG = {"train": {"steps": 8, "rates": [0.1, 0.2]}, "tasks": ["a", "b"], "log": None}


def mesh(size, name="fsdp"):
    devices = jax.devices()[:size]
    return jax.make_mesh((size,), (name,), axis_types=(AxisType.Auto,), devices=devices)


def make_state(step, spread=None):
    """A state with every kind of leaf, whose bits depend on the step."""
    rng = np.random.default_rng(step)
    kernel = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    adam = optax.ScaleByAdamState(
        jnp.int32(step), {"kernel": kernel * 2}, {"kernel": kernel**2}
    )
    state = {
        "taus": {"kernel": kernel, "bias": kernel[0].astype(jnp.bfloat16)},
        "opt_state": (adam, optax.EmptyState()),
        "mask": kernel[1] > 0,
        "nothing": jnp.zeros((0, 3)),
        "key": jax.random.key(step),
        "keys": jax.random.split(jax.random.key(step), 8),
    }
    return state if spread is None else jax.device_put(state, sharding(state, spread))


def sharding(state, spread):
    """Over the first axis where it can be divided, over all devices of the mesh."""

    def of(leaf):
        divisible = leaf.ndim and leaf.size and leaf.shape[0] % spread.size == 0
        return NamedSharding(spread, P("fsdp") if divisible else P())

    return jax.tree.map(of, state)


def abstract(state, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings,
    )


def bits(state):
    return {
        path: (str(leaf.dtype), leaf.shape, _data(leaf).tobytes())
        for path, leaf in tree.flatten(state).items()
    }


def _data(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def folders(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def save_all(folder, *steps, config=CONFIG, **options):
    with Checkpoints(folder, config, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))
    assert folders(folder) == [f"step_{s:08d}" for s in steps[-2:]]


def restore(folder, config=CONFIG):
    with Checkpoints(folder, config) as checkpoints:
        return checkpoints.restore(make_state(0))


def assert_restores(folder, step):
    restored = restore(folder)
    assert restored.step == step
    assert bits(restored.state) == bits(make_state(step))


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


def files_of(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


@contextlib.contextmanager
def damaged(path, data):
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def test_truncated_or_missing_file_means_the_checkpoint_before(tmp_path):
    save_all(tmp_path, 1, 2)
    newest = tmp_path / "step_00000002"
    files = files_of(newest)
    assert sum(path.stat().st_size > 1000 for path in files) > 2
    for path in files:
        whole = path.read_bytes()
        # Two bytes less, as the last one of the manifest is a line's end.
        for size in {0, len(whole) // 2, len(whole) - 2} if whole else ():
            with (
                damaged(path, whole[:size]),
                pytest.warns(UserWarning, match="damaged") as caught,
            ):
                assert_restores(tmp_path, 1)
            (message,) = [str(w.message) for w in caught]
            assert str(newest) in message and path.name in message
            assert message.endswith("step_00000001 is used instead.")
        if path.name != manifest.NAME:
            path.unlink()
            with pytest.warns(UserWarning, match=f"{path.name} can't be read"):
                assert_restores(tmp_path, 1)
            path.write_bytes(whole)
    assert_restores(tmp_path, 2)


def test_flipped_bits_never_give_other_bits(tmp_path):
    save_all(tmp_path, 1, 2)
    rng = np.random.default_rng(0)
    used = []
    for path in files_of(tmp_path / "step_00000002"):
        whole = path.read_bytes()
        for position in rng.integers(len(whole), size=8) if whole else ():
            data = bytearray(whole)
            data[position] ^= 1 << rng.integers(8)
            with damaged(path, data), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                restored = restore(tmp_path)
            assert bits(restored.state) == bits(make_state(restored.step))
            texts = [str(w.message) for w in caught]
            assert any("damaged" in text for text in texts) == (restored.step == 1)
            used.append(restored.step)
    # Spaces between the tokens of the manifest may change; nothing else may.
    assert used.count(1) > 0.9 * len(used)


def test_orbax_errors_and_other_bits_are_damage_too(tmp_path, monkeypatch):
    save_all(tmp_path, 1, 2)
    load, newest = checkpoint.ocp.load, tmp_path / "step_00000002" / "state"

    def failing(path, like):
        if path == newest:
            raise RuntimeError("unreadable")
        return load(path, like)

    def wrong(path, like):
        state = load(path, like)
        if path == newest:
            state["taus"]["kernel"] = state["taus"]["kernel"].at[3, 5].add(1e-6)
        return state

    monkeypatch.setattr(checkpoint.ocp, "load", failing)
    with pytest.warns(UserWarning, match="damaged: RuntimeError: unreadable"):
        assert_restores(tmp_path, 1)
    monkeypatch.setattr(checkpoint.ocp, "load", wrong)
    with pytest.warns(UserWarning, match="not what was saved .taus/kernel"):
        assert_restores(tmp_path, 1)


def test_edited_manifest_is_damage_not_another_configuration(tmp_path):
    save_all(tmp_path, 1, 2)
    path = tmp_path / "step_00000002" / manifest.NAME
    content = json.loads(path.read_text())
    content["config"]["train"]["steps"] = 9
    with damaged(path, json.dumps(content).encode()):
        with pytest.warns(UserWarning, match="manifest.json is not what was written"):
            assert_restores(tmp_path, 1)
    for text in (b"[]", b"{}", b"3", b'{"crc32": 0}', b"\xff"):
        with damaged(path, text), pytest.warns(UserWarning, match="manifest.json"):
            assert_restores(tmp_path, 1)


def test_without_an_undamaged_checkpoint_the_run_starts_anew(tmp_path):
    save_all(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}" / manifest.NAME).write_text("{}")
    with pytest.warns(UserWarning, match="No undamaged .* starts anew") as caught:
        assert restore(tmp_path) is None
    assert str(caught[0].message).count("is damaged: manifest.json") == 2
    assert folders(tmp_path) == ["step_00000001", "step_00000002"]
    with pytest.warns(UserWarning), Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.restore(make_state(0))
        checkpoints.save(1, make_state(1))
    assert_restores(tmp_path, 1)


def test_folders_of_others_are_left_alone(tmp_path):
    theirs = tmp_path / "step_00010000"
    theirs.mkdir()
    (theirs / "weights.bin").write_text("theirs")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, make_state(1))
    assert_restores(tmp_path, 1)
    assert (theirs / "weights.bin").read_text() == "theirs"


@pytest.mark.parametrize("next_step", [2, 3])
def test_damaged_checkpoint_gives_way_to_the_next_save(tmp_path, next_step):
    save_all(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / manifest.NAME).write_text("{}")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.warns(UserWarning, match="step_00000002 is damaged"):
            assert checkpoints.restore(make_state(0)).step == 1
        assert folders(tmp_path) == ["step_00000001", "step_00000002"]
        checkpoints.save(next_step, make_state(next_step))
    assert folders(tmp_path) == ["step_00000001", f"step_{next_step:08d}"]
    assert_restores(tmp_path, next_step)


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


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't be written to .*Name another folder"):
        Checkpoints(tmp_path / "file" / "run", CONFIG)


def test_missing_space_is_an_error_before_training(tmp_path, monkeypatch):
    state = {"w": jax.ShapeDtypeStruct((250, 10**6), jnp.float32)}
    usage = checkpoint.shutil.disk_usage(tmp_path)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        monkeypatch.setattr(
            checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=3 * 10**9)
        )
        checkpoints.reserve(state)
        monkeypatch.setattr(
            checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=2.9 * 10**9)
        )
        with pytest.raises(OSError, match="2.9 GB free; 3 more .* 1 GB need 3 GB"):
            checkpoints.reserve(state)
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        checkpoints.reserve(state)  # two more


@contextlib.contextmanager
def files_no_larger_than(size):
    """As on a full disk, writing beyond it fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def large_state(step):
    noise = np.random.default_rng(step).normal(size=(8, 2**15))
    return {"w": jnp.asarray(noise, jnp.float32)}


def test_failed_write_names_the_step_and_the_last_good_one(tmp_path):
    message = "step 2 was not saved: .* last good one: .*step_00000001"
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, large_state(1))
        checkpoints.wait()
        with files_no_larger_than(2**16):
            checkpoints.save(2, large_state(2))
            with pytest.raises(OSError, match=message):
                checkpoints.wait()
        assert folders(tmp_path) == ["step_00000001"]
        restored = checkpoints.restore(large_state(0))
        assert restored.step == 1 and bits(restored.state) == bits(large_state(1))
        with files_no_larger_than(2**16):
            checkpoints.save(2, large_state(2))
            time.sleep(1)
        with pytest.raises(OSError, match=message):
            checkpoints.save(3, large_state(3))
        checkpoints.save(3, large_state(3))
    assert folders(tmp_path) == ["step_00000001", "step_00000003"]


def test_failed_write_shows_on_exit_and_beside_another_error(tmp_path):
    with files_no_larger_than(2**16):
        with pytest.raises(OSError, match="step 2 was not saved.* last good one: none"):
            with Checkpoints(tmp_path, CONFIG) as checkpoints:
                checkpoints.save(2, large_state(2))
        with pytest.raises(KeyError) as caught:
            with Checkpoints(tmp_path, CONFIG) as checkpoints:
                checkpoints.save(3, large_state(3))
                raise KeyError("training")
    assert "step 3 was not saved" in caught.value.__notes__[0]
    assert folders(tmp_path) == []


def test_leaving_with_an_error_still_completes_the_checkpoint(tmp_path):
    with pytest.raises(KeyError):
        with Checkpoints(tmp_path, CONFIG) as checkpoints:
            checkpoints.save(1, make_state(1))
            raise KeyError("training")
    assert_restores(tmp_path, 1)
