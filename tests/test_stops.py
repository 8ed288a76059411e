"""A command that is stopped or runs out of something leaves nothing, and says why."""

import os
import resource
import signal
import subprocess
import sys
import time

import checkpoints
import merge_command
import numpy as np
import pytest
from merge_command import models  # noqa: F401

from jaxarith import cli, merge, report, stream
from jaxarith.commands import inspect, signals
from jaxarith.train import interrupts

LARGE = {f"layers.{i}.weight": (64, 64) for i in range(300)}


@pytest.mark.usefixtures("heard_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_as_ctrl_c_does(
    models,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
    number,
):
    real, before = stream.merge, signal.getsignal(number)

    def merged(method, opened, out, **options):
        def stopping(params_0, taus):
            os.kill(os.getpid(), number)
            time.sleep(10)
            return method(params_0, taus)

        return real(stopping, opened, out, **options)

    monkeypatch.setattr(stream, "merge", merged)
    out = tmp_path / "x" / "out"
    status = merge_command.run(models, out, "--method", "average")
    assert status == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_where_exceptions_are_lost_is_raised_later():
    class Dying:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)

    with pytest.raises(signals.Stopped), signals.raised():
        Dying()
        time.sleep(10)


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raised():
            os.kill(os.getpid(), signal.SIGHUP)
        with interrupts.noted() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert noted() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_killed_merge_is_named_by_the_next(tmp_path):
    for name in "ab":
        checkpoints.write(tmp_path / name, checkpoints.tensors(1, "f32", LARGE))
    arguments = "merge --method average --model a --model b --out out".split()
    command = [sys.executable, "-m", "jaxarith.cli", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (left := list(tmp_path.glob(".jaxarith-*"))):
        time.sleep(0.005)
    process.kill()
    process.wait()
    os.utime(left[0], (0, 0))
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0
    [note] = [line for line in ended.stderr.splitlines() if "killed" in line]
    assert note.startswith("note: ") and left[0].name in note and "remove it" in note


def test_more_files_than_a_process_may_open_are_told_and_none_stays(tmp_path):
    base, others = checkpoints.family(tmp_path / "in", models=1)
    shapes = {f"w{i}": (2, 2) for i in range(300)}
    model = checkpoints.write(tmp_path / "many", checkpoints.tensors(0, "f32", shapes))
    opened = stream.open_models(None, [model])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 100, before[1]))
    try:
        with pytest.raises(OSError, match=r"30\d files are more than .*--shard-size"):
            stream.merge(
                merge.average, opened, tmp_path / "out", shard_bytes=16, quiet=True
            )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "many"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 40 GiB"), "out of memory. Unable to allocate"),
        (RuntimeError("RESOURCE_EXHAUSTED: 40 GiB"), "out of memory. RESOURCE"),
        (OverflowError("int too large"), "int too large"),
        (RecursionError("maximum depth"), "maximum depth"),
    ],
)
def test_what_a_machine_lacks_is_one_line(monkeypatch, capsys, error, message):
    def failing(model):
        raise error

    monkeypatch.setattr(inspect.command.figures, "checkpoint", failing)
    assert cli.main(["inspect", "x"]) == 1
    found = capsys.readouterr().err
    assert found.startswith(f"jaxarith inspect: {message}") and found.count("\n") == 1


def test_names_never_command_a_terminal(tmp_path, capsys):
    evil = "layers.\x1b[2J\x1b]0;pwn\x07\u202e\r"
    other = {"layers.0": np.ones(2, np.float32)}
    a = checkpoints.write(tmp_path / "a", {evil: np.ones((2, 2), np.float32)})
    b = checkpoints.write(tmp_path / "b", other)
    merged = ["merge", "--method", "average", "--model", a, "--model", b, "--quiet"]
    for arguments in (
        ["inspect", a, "--tensors"],
        [*merged, "--out", tmp_path / "out"],
    ):
        cli.main([str(word) for word in arguments])
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert "\\x1b[2J" in printed
        assert not set("\x1b\x07\u202e") & set(printed)
        assert "\\u202e\\r" in printed


def test_long_messages_are_cut():
    assert len(report.shown("x" * 10**6)) < 5000
