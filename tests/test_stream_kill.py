"""A merge that is killed leaves its output as it was: absent, or the whole of another.

Run as a script, this file is the process that is killed.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import numpy as np

from jaxarith import hub, merge, stream

SHAPES = {f"layers.{i}.weight": (256, 256) for i in range(64)}


def run(folder):
    opened = stream.open_models(folder / "0", [folder / "1", folder / "2"])
    print("ready", flush=True)
    begin = time.perf_counter()
    stream.merge(
        merge.ties,
        opened,
        folder / "out",
        **{"shard_bytes": 2**20, "overwrite": True, "quiet": True},
    )
    print(time.perf_counter() - begin, flush=True)


def start(folder):
    process = subprocess.Popen(
        [sys.executable, __file__, folder],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_after_six_kills_the_output_is_absent_or_complete(tmp_path):
    for model in range(3):
        tensors = checkpoints.tensors(model, "f32", SHAPES)
        checkpoints.write(tmp_path / str(model), tensors)
    process = start(tmp_path)
    seconds = float(process.communicate()[0])
    assert process.returncode == 0
    expected = hub.read(tmp_path / "out")
    assert len(expected) == len(SHAPES) + 1
    random.seed(0)
    ends = []
    for kill in range(6):
        if kill % 2 and (tmp_path / "out").exists():  # nothing to replace
            (tmp_path / "out").rename(tmp_path / f"out-{kill}")
        process = start(tmp_path)
        time.sleep(random.uniform(0, 1.1 * seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        ends.append(process.returncode)
        if not (tmp_path / "out").exists():
            assert process.returncode == -signal.SIGKILL
            continue
        found = hub.read(tmp_path / "out")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor, expected[name])
    assert ends.count(-signal.SIGKILL) >= 3
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".jaxarith-")]
    assert left  # some were killed while they wrote


if __name__ == "__main__":
    run(Path(sys.argv[1]))
