"""Merges of slices and of vocabularies that are killed leave their output whole.

Run as a script, this file kills a process at one moment after another: while it writes
weights, tokenizer and record, and before the renames that make the new folder.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stacked_models

from jaxarith import cli
from jaxarith.hub import safetensors

FLAGS = ("--quiet", "--overwrite", "--shard-size", "1KB")


def content(folder):
    """The files of a folder; none where there is no folder, or an empty one."""
    return {x.name: x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def killed(config, out, moment):
    """Merges in a process that kills itself at the moment; whether it came to it."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            kill_at(moment)
            cli.main(["merge", str(config), str(out), *FLAGS])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_at(moment):
    """Kills this process before the n-th write of a kind."""
    kind, _, number = moment.partition(" ")
    owner, name = {
        "tensor": (safetensors.Writer, "put"),
        "text": (Path, "write_text"),
        "rename": (os, "replace"),
    }[kind]
    real, calls = getattr(owner, name), []

    def watched(*args, **options):
        calls.append(args)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(owner, name, watched)


# Moments, each with whether an old folder is replaced.
MOMENTS = [
    ("tensor 1", True),
    ("tensor 8", False),
    ("text 1", False),
    ("text 4", True),
    ("rename 1", False),
    ("rename 1", True),
    ("rename 2", True),
]


def run(folder, path):
    """Prints, for each moment, what was found afterwards."""
    stacked_models.write(folder / "in")
    config = folder / "c.yaml"
    text = stacked_models.PATHS[path](folder / "in", "linear", weight=0.5)
    config.write_text(text)
    found = []
    # Nothing has computed yet: XLA's threads would not come along to a child.
    for number, (moment, old) in enumerate(MOMENTS):
        place = folder / str(number)
        place.mkdir()
        out = place / "out"
        if old:
            shutil.copytree(folder / "in" / "c", out)
        before = content(out)
        was_killed = killed(config, out, moment)
        left = [*place.glob(".jaxarith-*")]
        found.append(
            {
                "killed": was_killed,
                "left": len(left),
                "as before": content(out) == before,
                "aside": old and content(left[0] / "old") == before,
            }
        )
    assert not killed(config, folder / "whole", "tensor 1000")
    print(json.dumps([found, sorted(content(folder / "whole"))]))


@pytest.mark.parametrize("path", stacked_models.PATHS)
def test_a_kill_at_any_moment_leaves_the_output_whole(path, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path), path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, names = json.loads(done.stdout.splitlines()[-1])
    assert {"config.json", "tokenizer.json", "jaxarith_merge.json"} <= set(names)
    for moment, result in zip(MOMENTS, found, strict=True):
        # Between the two renames, the old folder is in the temporary one.
        between = moment == ("rename 2", True)
        assert result == {
            "killed": True,
            "left": 1,
            "as before": not between,
            "aside": between,
        }, moment


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
