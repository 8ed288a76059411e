"""Checkpoints that are damaged, and writes that fail: what is left is whole."""

import contextlib
import json
import resource
import signal
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import (
    CONFIG,
    assert_restores,
    bits,
    folders,
    large_state,
    make_state,
    restore,
    save_all,
)

from jaxarith.train import checkpoint, manifest
from jaxarith.train.checkpoint import Checkpoints


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
    with pytest.warns(UserWarning, match="not as saved .taus/kernel"):
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


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("files"),
        lambda content: content.pop("config"),
        lambda content: content.update(fingerprints=[]),
        lambda content: content.update(files={"/dev/zero": 0}),
        lambda content: content.update(files={"../../secret": 0}),
        lambda content: content.update(files=[1]),
    ],
)
def test_a_manifest_with_its_checksum_and_no_sense_is_damage(tmp_path, change):
    save_all(tmp_path, 1, 2)
    path = tmp_path / "step_00000002" / manifest.NAME
    content = json.loads(path.read_text())
    del content["crc32"]
    change(content)
    content["crc32"] = manifest._crc32(content)
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="manifest.json is not what was written"):
        assert_restores(tmp_path, 1)
