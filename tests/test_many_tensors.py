"""What a command does for one tensor does not depend on how many others there are."""

import sys

import numpy as np
import pytest
from merge_command import checkpoint, run

from jaxarith import cli


def calls(command, *args):
    """How many Python functions are called meanwhile, in this thread."""
    count = 0

    def see(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        assert command(*args) == 0
    finally:
        sys.setprofile(None)
    return count


def folders(place, count):
    values = np.random.default_rng(0).standard_normal((count, 2, 3)).astype("f4")
    return [
        checkpoint(
            place / f"{name}{count}",
            {f"layers.{i}.mlp.weight": x + j for i, x in enumerate(values)},
        )
        for j, name in enumerate(("base", "m1", "m2"))
    ]


def merge(places, out):
    return run(places, out, "--method", "average", "--quiet")


def inspect(places, out):
    return cli.main(["inspect", *map(str, places[1:]), "--base", str(places[0])])


def inspect_alone(places, out):
    return cli.main(["inspect", str(places[1])])


@pytest.mark.parametrize("command", [merge, inspect, inspect_alone])
def test_the_work_is_in_proportion_to_the_tensors(command, tmp_path):
    places = {count: folders(tmp_path, count) for count in (50, 100, 150)}
    command(places[50], tmp_path / "first")  # compiles
    found = [calls(command, x, tmp_path / f"o{n}") for n, x in places.items()]
    first, second = np.diff(found) / 50
    assert abs(second - first) < 0.05 * first
    assert first < 1000
