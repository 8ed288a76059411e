"""Merges that are spread over devices have the bits of one; threads are limited."""

import os
import subprocess
import sys
import threading

import checkpoints
import jax
import numpy as np
import pytest

from jaxarith import cli, hub, lazy, resources, stream
from jaxarith.merge import _blas

# Large enough to be spread, and small ones, which are not.
SHAPES = {
    **{f"model.layers.{i}.mlp.weight": (256, 256) for i in range(8)},
    **{f"model.layers.{i}.norm.weight": (256,) for i in range(5)},
}
METHODS = [
    ("average",),
    ("task_arithmetic", "--coef", "0.3"),
    ("task_arithmetic", "--coef", "0.3", "--after", "svc"),
    ("slerp", "--preset", "mergekit", "--t", "0.3"),
    ("ties", "--density", "0.3"),
    ("ties", "--preset", "mergekit", "--weight", "0.5", "--density", "0.3"),
    ("dare", "--drop-rate", "0.5"),
    ("tsv",),
]
# These compile for seconds on each device.
LONG = ("ties", "dare", "tsv")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for i in range(3):
        content = checkpoints.tensors(i, "f32", SHAPES)
        checkpoints.write(folder / str(i), content)
    return folder


@pytest.fixture
def merged(models, tmp_path, monkeypatch):
    """A function that merges on some devices; returns the tensors and the devices."""
    seen = set()

    def run(count, method, *options):
        monkeypatch.setattr(
            jax, "local_devices", lambda backend: jax.devices(backend)[:count]
        )
        of = [str(models / str(i)) for i in range(3)]
        if method == "slerp":
            of = of[:2]
        out = tmp_path / f"{count}"
        flags = ["--base", of[0], *(f"--model={model}" for model in of[1:])]
        flags += ["--method", method, *options, "--device", "cpu", "--quiet"]
        seen.clear()
        assert cli.main(["merge", *flags, "--out", str(out), "--overwrite"]) == 0
        return hub.read(out), set(seen)

    put = stream.written._Places.put

    def watched(self, name, array):
        if array.nbytes >= lazy.SMALL:
            seen.update(getattr(array, "devices", set)())
        put(self, name, array)

    monkeypatch.setattr(stream.written._Places, "put", watched)
    return run


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_leaves_spread_over_devices_have_the_bits_of_one(merged, method):
    expected, devices = merged(1, *method)
    assert devices == {jax.devices()[0]}
    for count in (2,) if method[0] in LONG else (2, 8):
        found, devices = merged(count, *method)
        assert devices == set(jax.devices()[:count])
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    assert jax.config.jax_default_device is None  # pyright: ignore
    assert resources.devices() == 1


def test_leaves_go_where_the_fewest_bytes_are():
    devices = jax.devices()[:3]
    assert resources.spread({"a": 1}) == {}
    with resources.used(devices=devices):
        found = resources.spread({"a": 5, "b": 2, "c": 1, "d": 1, "e": 3, "f": 1})
    assert [devices.index(x) for x in found.values()] == [0, 1, 2, 2, 1, 2]


def test_threads_are_at_most_as_many_as_asked_for(models, tmp_path, monkeypatch):
    readers, read = set(), lazy._read_to
    limits = []

    def watched(device, source):
        readers.add(threading.get_ident())
        limits.append(_blas.Queue(print)._most)
        limits.append(os.environ["NPROC"])
        return read(device, source)

    monkeypatch.setattr(lazy, "_read_to", watched)
    before = dict(os.environ)
    of = [str(models / str(i)) for i in range(3)]
    flags = ["--base", of[0], *(f"--model={model}" for model in of[1:]), "--quiet"]
    flags += ["--method", "average", "--threads", "1", "--out", str(tmp_path / "out")]
    assert cli.main(["merge", *flags]) == 0
    assert len(readers) == 1
    assert set(limits) == {1, "1"}
    assert dict(os.environ) == before
    assert resources.at_most(7) == 7


def test_xla_has_as_many_threads_as_asked_for():
    code = """if True:
        import os
        from jaxarith.commands.merge.devices import with_threads
        import jax.numpy as jnp
        with with_threads(3):
            (jnp.ones((900, 900)) @ jnp.ones((900, 900))).block_until_ready()
        tasks = [f"/proc/self/task/{x}/comm" for x in os.listdir("/proc/self/task")]
        print([open(x).read().strip() for x in tasks].count("tf_XLAEigen"))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "3\n", run.stderr


def test_threads_are_a_whole_number(capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "x.yaml", "out", "--threads", "0"])
    assert "'0' is not a whole number above 0" in capsys.readouterr().err
