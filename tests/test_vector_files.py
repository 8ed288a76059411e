"""Files of task vectors in `jaxarith merge` and `jaxarith inspect`."""

import json
import re

import jax
import numpy as np
import pytest
from clip_checkpoint import CONFIG, LAYOUT
from tiny import random_params

from jaxarith import cli, hub, merge, stream, task_vectors, tree
from jaxarith.commands.inspect import figures
from jaxarith.hub import layouts
from jaxarith.models import clip
from jaxarith.stream import policies

COEF = 0.3


@pytest.fixture(scope="module")
def params_0():
    return random_params(0, LAYOUT)


@pytest.fixture(scope="module")
def taus():
    """Task vectors of the image encoder, as in the bank."""
    others = [random_params(seed, LAYOUT) for seed in (1, 2)]
    return [
        jax.tree.map(lambda leaf: 0.1 * leaf, tree.select(x, clip.IMAGE_ENCODER))
        for x in others
    ]


@pytest.fixture
def base(tmp_path, params_0):
    hub.save(tmp_path / "clip", params_0, CONFIG)
    return tmp_path / "clip"


@pytest.fixture
def files(tmp_path, taus):
    for name, tau in zip(("dtd", "svhn"), taus, strict=True):
        metadata = {"task": name, "method": "nonlinear"}
        hub.save_tree(tmp_path / f"{name}.safetensors", tau, metadata)
    return [tmp_path / "dtd.safetensors", tmp_path / "svhn.safetensors"]


def merged(out, base, models, *options):
    named = [word for model in models for word in ("--model", str(model))]
    words = ["merge", "--method", "task_arithmetic", "--base", str(base), *named]
    return cli.main([*words, "--out", str(out), *options])


def assert_same_bits(folder, expected):
    found = tree.flatten(hub.load(folder, LAYOUT))
    for path, leaf in tree.flatten(expected).items():
        assert found[path].tobytes() == np.asarray(leaf).tobytes(), path


def in_python(params_0, taus, coef=COEF):
    """The sum in memory; leaves that no task vector has stay."""
    part = tree.select(params_0, clip.IMAGE_ENCODER)
    moved = merge.task_arithmetic(part, taus, coef=coef)
    return {**params_0, **moved}


def test_vectors_are_added_with_the_bits_of_python(
    tmp_path, base, files, params_0, taus, capsys
):
    assert merged(tmp_path / "out", base, files, "--coef", str(COEF)) == 0
    assert_same_bits(tmp_path / "out", in_python(params_0, taus))
    said = capsys.readouterr().err
    assert "the task vector of dtd by the method nonlinear" in said
    count = len(tree.flatten(taus[0]))
    assert re.search(
        rf"of {count} tensors?, without .* of the base, which do not move", said
    )
    record = json.loads((tmp_path / "out" / "jaxarith_merge.json").read_text())
    inputs = record["inputs"]
    assert [entry["local"] for entry in inputs] == [True] * 3
    assert [list(entry["sha256"]) for entry in inputs[1:]] == [
        ["dtd.safetensors"],
        ["svhn.safetensors"],
    ]


def test_models_and_vectors_in_one_merge(tmp_path, base, files, params_0, taus):
    other = random_params(3, LAYOUT)
    hub.save(tmp_path / "model", other, CONFIG)
    models = [tmp_path / "model", files[0]]
    assert merged(tmp_path / "out", base, models, "--coef", str(COEF)) == 0
    zeros = jax.tree.map(np.zeros_like, params_0)
    vectors = [task_vectors.difference(other, params_0), {**zeros, **taus[0]}]
    expected = merge.task_arithmetic(params_0, vectors, coef=COEF)
    assert_same_bits(tmp_path / "out", expected)


def test_yaml_names_files_of_vectors(tmp_path, base, files, params_0, taus):
    text = json.dumps(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [
                {"model": str(file), "parameters": {"weight": COEF}} for file in files
            ],
        }
    )
    (tmp_path / "merge.yaml").write_text(text)
    out = tmp_path / "out"
    assert cli.main(["merge", str(tmp_path / "merge.yaml"), str(out), "--quiet"]) == 0
    assert_same_bits(out, in_python(params_0, taus))


def test_norms_and_cosines_are_those_in_memory(base, files, taus):
    found = figures.task_vectors(str(base), [str(file) for file in files])
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in tree.flatten(tau).values()])
        for tau in taus
    ]
    norms = [np.linalg.norm(vector.astype(float)) for vector in flat]
    np.testing.assert_allclose(
        [model["norm"] for model in found["models"]], norms, rtol=1e-5
    )
    cosine = flat[0].astype(float) @ flat[1] / np.prod(norms)
    np.testing.assert_allclose(found["cosines"][0][1], cosine, atol=1e-6)


def test_a_vector_alone_is_inspected(files, taus, capsys):
    assert cli.main(["inspect", str(files[0]), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert "vision_model.pre_layrnorm.weight" in said
    assert f"{sum(leaf.size for leaf in tree.flatten(taus[0]).values()):,}" in said


@pytest.mark.parametrize("change", ["extra", "shape"])
def test_a_vector_that_does_not_fit_is_refused(tmp_path, base, taus, change, capsys):
    tau = dict(taus[0])
    if change == "extra":
        tau["score"] = {"kernel": np.ones((3, 2), np.float32)}
    else:
        tau["visual_projection"] = {"kernel": np.ones((3, 2), np.float32)}
    hub.save_tree(tmp_path / "tau.safetensors", tau, {"task": "dtd"})
    assert merged(tmp_path / "out", base, [tmp_path / "tau.safetensors"]) == 1
    said = capsys.readouterr().err
    line = {
        "extra": "+ score.weight f32[2, 3]: no such weight in the base",
        "shape": "! visual_projection.weight: [2, 3], but [12, 24] in the base",
    }[change]
    assert "does not fit the base (1 tensor)" in said and line in said
    if change == "extra":
        options = ["--missing", "base", "--coef", "1"]
        files = [tmp_path / "tau.safetensors"]
        assert merged(tmp_path / "out", base, files, *options) == 0


def test_what_is_no_task_vector_is_refused(tmp_path, base, files, capsys):
    hub.save_tree(tmp_path / "tree.safetensors", {"a": {"kernel": np.ones((3, 2))}})
    assert merged(tmp_path / "out", base, [tmp_path / "tree.safetensors"]) == 1
    assert "its metadata names no task" in capsys.readouterr().err
    assert merged(tmp_path / "out", base, [tmp_path / "none.safetensors"]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert merged(tmp_path / "out", files[0], [files[1]]) == 1
    assert "is a task vector or another tree" in capsys.readouterr().err


def test_a_vector_needs_a_base(files):
    with pytest.raises(ValueError, match="which moves a base"):
        stream.open_models(None, files)


def test_tied_copies_of_what_moves_move_too():
    embedding = _stored(np.arange(6.0).reshape(3, 2))
    base = {
        "shared.weight": embedding,
        "encoder.embed_tokens.weight": embedding,
        "lm_head.weight": _stored(np.ones((3, 2))),
        "encoder.block.0.layer.1.layer_norm.weight": _stored(np.ones(2)),
    }
    delta = _stored(np.full((3, 2), 0.5))
    found, notes = policies.fit_vector(base, {"shared.weight": delta}, "tau")
    assert found == {"shared.weight": delta, "encoder.embed_tokens.weight": delta}
    assert notes[0].startswith("tau: encoder.embed_tokens.weight is tied to shared")


def _stored(array):
    array = array.astype(np.float32)
    return hub.Stored.made(array.dtype, array.shape, lambda: array)


def test_narrow_vectors_are_widened(tmp_path):
    tau = {"a": {"kernel": np.ones((3, 2), np.float16)}}
    hub.save_tree(tmp_path / "tau.safetensors", tau, {"task": "dtd"})
    vector = hub.open_vector(tmp_path / "tau.safetensors")
    assert vector.tensors["a.weight"].read().dtype == np.float32
    assert vector.tensors["a.weight"].shape == (2, 3)
    assert (vector.task, vector.method) == ("dtd", None)


def test_names_are_those_of_arrays_in_memory(params_0):
    """`stored_to_torch` is `to_torch` of tensors that are not read."""
    arrays = tree.flatten(params_0)
    expected = layouts.to_torch(arrays)
    found = layouts.stored_to_torch({path: _stored(x) for path, x in arrays.items()})
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.shape == expected[name].shape
        np.testing.assert_array_equal(leaf.read(), expected[name])
