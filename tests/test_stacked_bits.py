"""Slices and vocabularies: the same bits for all threads, files and ways to read."""

import numpy as np
import pytest
import stacked_models

from jaxarith import cli, hub, lazy

METHODS = {
    "linear": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
}
# Threads, the most bytes of a file, and the bytes from which leaves go through threads.
WAYS = [(1, "5GB", 1), (2, "600B", 1), (3, "1KB", 200), (5, "600B", 2**18)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    stacked_models.write(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", stacked_models.PATHS)
def test_threads_and_files_change_no_bit(path, method, models, tmp_path, monkeypatch):
    config = tmp_path / "c.yaml"
    config.write_text(stacked_models.PATHS[path](models, method, **METHODS[method]))
    found = []
    for number, (threads, size, small) in enumerate(WAYS):
        monkeypatch.setattr(lazy, "SMALL", small)
        out = tmp_path / str(number)
        flags = ["--threads", str(threads), "--shard-size", size, "--quiet"]
        assert cli.main(["merge", str(config), str(out), *flags]) == 0
        files = sorted(file.name for file in out.glob("*.safetensors"))
        assert len(files) == 1 if size == "5GB" else len(files) > 2
        found.append(hub.read(out))
    first, *others = found
    assert any(np.ptp(tensor) > 0.1 for tensor in first.values())
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in other.items():
            np.testing.assert_array_equal(tensor, first[name], err_msg=name)
