"""The bank of task vectors: what is taken from it, and what is not."""

import json

import numpy as np
import pytest

from experiments.common import bank

TAU = {"a": {"w": np.arange(3, dtype=np.float32)}}
CONFIGURATION = {"method": "linear", "recipe": {"steps": 3, "trained": ".*"}}


@pytest.fixture
def file(tmp_path):
    file = bank.vector_file(tmp_path, "someone/clip", "linear", "dtd")
    bank.write(file, TAU, CONFIGURATION, {"loss": 0.5})
    return file


def test_a_vector_comes_back_with_what_is_known_of_it(file):
    found = bank.read(file, CONFIGURATION)
    np.testing.assert_array_equal(found["a"]["w"], TAU["a"]["w"])
    bank.add_metrics(file, {"accuracy": 0.9})
    record = bank.record(file)
    assert record["configuration"] == CONFIGURATION
    assert record["metrics"] == {"loss": 0.5, "accuracy": 0.9}


def test_a_vector_that_is_missing_is_none(file):
    assert bank.read(file.with_name("svhn.safetensors"), CONFIGURATION) is None


def test_a_vector_of_another_configuration_is_refused_with_the_difference(file):
    other = {"method": "linear", "recipe": {"steps": 4, "trained": ".*"}}
    with pytest.raises(ValueError, match="recipe/steps: 3 there, 4 here"):
        bank.read(file, other)


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_vector_that_nothing_describes_is_refused(file, content):
    described = file.with_suffix(".json")
    described.unlink() if content is None else described.write_text(content)
    with pytest.raises(ValueError, match="dtd.json.*cannot be read"):
        bank.read(file, CONFIGURATION)


def test_a_local_model_is_named_by_its_last_part(tmp_path):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    file = bank.vector_file(tmp_path, str(folder), "linear", "dtd")
    assert file == tmp_path / "mine" / "linear" / "dtd.safetensors"


def test_what_describes_a_vector_is_there_before_it(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(bank.hub, "save_tree", fail)
    file = tmp_path / "m" / "linear" / "dtd.safetensors"
    with pytest.raises(OSError, match="no space"):
        bank.write(file, TAU, CONFIGURATION, {})
    assert not file.exists() and bank.read(file, CONFIGURATION) is None
    assert json.loads(file.with_suffix(".json").read_text())["metrics"] == {}
