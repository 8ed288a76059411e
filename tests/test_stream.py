import functools
import json
import os
import shutil

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarith import hub, merge, stream, task_vectors, tree

pytestmark = pytest.mark.usefixtures("default_emitters")

KEY = jax.random.key(3)
METHODS = {
    "average": functools.partial(merge.average, weights=[1, 2, 3]),
    "task_arithmetic": functools.partial(merge.task_arithmetic, coef=0.3),
    "ties": merge.ties,
    "ties_tensor": functools.partial(merge.ties, trim="tensor", density=0.3),
    "awd": functools.partial(merge.awd, steps=30),
    "awd_layer": functools.partial(merge.awd, steps=30, scope="layer"),
    "awd_row": functools.partial(merge.awd, steps=10, scope="row"),
    "awd_adam": functools.partial(merge.awd, steps=5, solver="adam"),
    "dare": functools.partial(merge.dare, key=KEY),
    "dare_l1": lambda params_0, taus: merge.ties(
        params_0, merge.drop(taus, key=KEY, rescale="l1")
    ),
    "dare_magnitude": functools.partial(merge.dare, strategy="magnitude"),
    "della": functools.partial(merge.della, key=KEY),
    "breadcrumbs": merge.breadcrumbs,
    "consensus": merge.consensus,
    "iso_c": merge.iso_c,
    "iso_cts": merge.iso_cts,
    "dc_merge": functools.partial(merge.dc_merge, smoothing="average"),
    "cart": merge.cart,
    "esm": merge.esm,
    "ace": merge.ace,
    "karcher": merge.karcher,
    "magmax": merge.magmax,
    "model_stock": merge.model_stock,
    "pcb": merge.pcb,
    "topk": merge.topk,
    "tsv": merge.tsv,
    "wudi": functools.partial(merge.wudi, matrices=".*proj.*", steps=3),
}


def in_memory(method, base, models):
    params_0 = hub.read(base)
    taus = [task_vectors.difference(hub.read(model), params_0) for model in models]
    return method(params_0, taus)


def assert_same_bits(folder, expected):
    found = hub.read(folder)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        other = np.asarray(expected[name])
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
        assert tensor.tobytes() == other.tobytes(), name


def run(method, base, models, out, **options):
    opened = stream.open_models(base, models)
    return stream.merge(method, opened, out, quiet=True, **options)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return checkpoints.family(tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="module")
def small_family(tmp_path_factory):
    """A leaf of each kind: every shape is one more program of every method."""
    kinds = ("layers.0.mlp.up_proj.weight", "layers.0.norm.weight", "scale", "empty")
    names = [f"model.{kind}" for kind in kinds]
    shapes = {name: checkpoints.SHAPES[name] for name in names}
    folder = tmp_path_factory.mktemp("small")
    base, *models = (
        checkpoints.write(folder / f"{i}", checkpoints.tensors(i, shapes=shapes))
        for i in range(4)
    )
    return base, models


@pytest.mark.parametrize("name", METHODS)
def test_streamed_merges_have_the_bits_of_those_in_memory(name, small_family, tmp_path):
    base, models = small_family
    run(METHODS[name], base, models, tmp_path / "out")
    expected = in_memory(METHODS[name], base, models)
    moved = [n for n in expected if n not in (checkpoints.COUNTER, "model.empty")]
    start = hub.read(base)
    assert any(np.any(np.asarray(expected[n]) != start[n]) for n in moved)
    assert_same_bits(tmp_path / "out", expected)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", ["average", "dare_l1"])
def test_any_type_and_shards_give_the_same_bits(name, dtype, tmp_path):
    base, models = checkpoints.family(tmp_path / "in", dtype=dtype, shards=3)
    expected = in_memory(METHODS[name], base, models)
    for shard_bytes in (1, 1000, 10**9):
        out = tmp_path / f"out-{shard_bytes}"
        run(METHODS[name], base, models, out, shard_bytes=shard_bytes)
        assert_same_bits(out, expected)


def test_memory_that_is_used_again_changes_no_bit(tmp_path):
    # Smaller tensors are read into memory of their own.
    sizes = {"a": (1024, 600), "b": (900, 1100)}
    layout = {f"h.{i}.{key}": sizes[key] for i in range(2) for key in sizes}
    folders = [
        checkpoints.write(tmp_path / f"{i}", checkpoints.tensors(i, "bf16", layout))
        for i in range(4)
    ]
    for name in ("average", "ties_tensor"):
        expected = in_memory(METHODS[name], folders[0], folders[1:])
        run(METHODS[name], folders[0], folders[1:], tmp_path / name)
        assert_same_bits(tmp_path / name, expected)


def test_models_of_several_types_are_merged_in_float32(tmp_path):
    base = checkpoints.write(tmp_path / "base", checkpoints.tensors(0, "bf16"))
    models = [
        checkpoints.write(tmp_path / dtype, checkpoints.tensors(i, dtype))
        for i, dtype in enumerate(checkpoints.TYPES, 1)
    ]
    run(merge.average, base, models, tmp_path / "out")
    assert_same_bits(tmp_path / "out", in_memory(merge.average, base, models))


def test_shards_are_of_the_size_asked_for_and_indexed(family, tmp_path):
    base, models = family
    run(merge.average, base, models, tmp_path / "out", shard_bytes=1000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    tensors = hub.read(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert len(files) > 2
    of_file = {file.name: 0 for file in files}
    for name, file in index["weight_map"].items():
        of_file[file] += tensors[name].nbytes
    assert max(of_file.values()) <= 1000


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_are_rounded_once_to_the_type_asked_for(dtype, family, tmp_path):
    base, models = family
    run(merge.average, base, models, tmp_path / "out", dtype=dtype)
    start = hub.read(base)
    floats = {n: x for n, x in start.items() if n != checkpoints.COUNTER}
    wide = {n: np.asarray(x, np.float32) for n, x in floats.items()}
    taus = [
        {n: np.asarray(hub.read(model)[n], np.float32) - wide[n] for n in wide}
        for model in models
    ]
    merged = merge.average(wide, taus)
    expected = {n: np.asarray(x).astype(dtype) for n, x in merged.items()}
    assert_same_bits(
        tmp_path / "out", expected | {checkpoints.COUNTER: start[checkpoints.COUNTER]}
    )


def test_without_a_base_models_are_averaged_themselves(family, tmp_path):
    _, models = family
    run(merge.average, None, models, tmp_path / "out")
    tensors = [hub.read(model) for model in models]
    zero = {n: np.zeros_like(x) for n, x in tensors[0].items() if n != "model.num"}
    del zero[checkpoints.COUNTER]
    taus = [{n: t[n] for n in zero} for t in tensors]
    expected = merge.average(zero, taus)
    counter = {checkpoints.COUNTER: tensors[0][checkpoints.COUNTER]}
    assert_same_bits(tmp_path / "out", {**expected, **counter})


def test_the_gram_matrix_of_models_in_files_is_that_in_memory(family):
    base, models = family
    opened = stream.open_models(base, models)
    params_0 = hub.read(base)
    taus = [task_vectors.difference(hub.read(model), params_0) for model in models]
    np.testing.assert_array_equal(tree.gram(opened.taus), tree.gram(taus))


def test_every_pass_reads_each_tensor_once(family, tmp_path):
    base, models = family
    opened = stream.open_models(base, models)
    planned = stream.plan(opened)
    in_files = [hub.read(folder) for folder in (base, *models)]
    size = sum(
        x.nbytes for t in in_files for n, x in t.items() if n != checkpoints.COUNTER
    )
    assert planned.bytes_in == size
    report = stream.merge(merge.average, opened, tmp_path / "a", quiet=True)
    assert report.bytes_read == size
    assert planned.bytes_out == report.bytes_written
    assert report.bytes_written == os.path.getsize(tmp_path / "a" / "model.safetensors")
    report = stream.merge(merge.awd, opened, tmp_path / "b", quiet=True)
    assert report.bytes_read == 2 * size


def test_metadata_of_the_weights_is_kept(family, tmp_path):
    from safetensors import safe_open

    base, models = family
    run(merge.average, base, models, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_hashes_are_those_of_the_files(family, tmp_path):
    import hashlib

    base, models = family
    report = run(merge.average, base, models, tmp_path / "out")
    for folder in (base, *models):
        data = (folder / "model.safetensors").read_bytes()
        expected = {"model.safetensors": hashlib.sha256(data).hexdigest()}
        assert report.sha256[str(folder)] == expected


def test_a_nan_is_reported_with_its_tensor_and_model_and_nothing_is_written(tmp_path):
    base, models = checkpoints.family(tmp_path / "in", models=2)
    bad = checkpoints.tensors(2)
    bad["model.layers.1.norm.weight"][3] = np.nan
    bad = checkpoints.write(tmp_path / "bad", bad)
    for method in (merge.average, merge.ties):
        with pytest.raises(ValueError, match=r"layers.1.norm.weight of model 1 .*NaN"):
            run(method, base, [models[0], bad], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "in"]


def test_a_merge_that_fails_leaves_the_folder_that_was_there(family, tmp_path):
    base, models = family
    out = tmp_path / "out"
    run(merge.average, base, models, out)
    before = (out / "model.safetensors").read_bytes()

    def failing(params_0, taus):
        merge.average(params_0, taus)  # all of it is written
        raise RuntimeError("at the end")

    with pytest.raises(RuntimeError, match="at the end"):
        run(failing, base, models, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    family, tmp_path, monkeypatch
):
    base, models = family
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()
    replace, renamed = os.replace, []

    def failing(source, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        run(merge.average, base, models, out, overwrite=True)
    assert len(renamed) == 3 and os.listdir(out) == ["config.json"]


def test_a_file_that_is_cut_short_meanwhile_is_an_error(tmp_path):
    base, models = checkpoints.family(tmp_path / "in")

    def cutting(params_0, taus):
        os.truncate(models[1] / "model.safetensors", 1000)
        return merge.average(params_0, taus)

    with pytest.raises(ValueError, match=r"model-2.* was cut short"):
        run(cutting, base, models, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def replaced(path):
    new = path.with_name("new")
    shutil.copyfile(path, new)
    os.utime(new, ns=(0, os.stat(path).st_mtime_ns))  # only the inode tells
    os.replace(new, path)


def rewritten(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"1234")


@pytest.mark.parametrize("when", ["before it is read", "after it was read"])
@pytest.mark.parametrize("change", [replaced, rewritten, os.remove])
def test_an_input_that_changes_meanwhile_ends_the_merge(tmp_path, change, when):
    base, models = checkpoints.family(tmp_path / "in", dtype="f32")
    path = models[1] / "model.safetensors"

    def changing(params_0, taus):
        if when == "before it is read":
            change(path)
        merged = merge.average(params_0, taus)
        if when == "after it was read":
            change(path)
        return merged

    error = r"model-2.* was (replaced|removed)|No such file.*model-2"
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        run(changing, base, models, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_a_merge_that_overflows_its_type_says_so(family, tmp_path):
    base, models = family
    with pytest.raises(ValueError, match="overflows the written dtype"):
        run(
            functools.partial(merge.task_arithmetic, coef=1e6),
            base,
            models,
            tmp_path / "out",
            dtype="float16",
        )
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_or_replaced_as_a_whole(family, tmp_path):
    base, models = family
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(merge.average, base, models, out)
    assert (out / "config.json").exists()
    run(merge.average, base, models, out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]


def test_too_little_space_is_told_before_anything_is_computed(
    family, tmp_path, monkeypatch
):
    base, models = family
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="GB left"):
        run(merge.average, base, models, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_leaves_in_files_are_differences_that_jax_computes_with(family):
    base, models = family
    leaf = stream.open_models(base, models).taus[0]["model.scale"].read()
    expected = checkpoints.tensors(1)["model.scale"].astype(np.float32)
    expected -= checkpoints.tensors(0)["model.scale"].astype(np.float32)
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(jnp.abs)(leaf), abs(expected))
