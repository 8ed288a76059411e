import json
import shutil
import tracemalloc

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxarith import merge, stream
from jaxarith.hub import safetensors
from jaxarith.hub.memory import Memory
from jaxarith.stream import opened

NAME = "model.layers.0.norm.weight"
TYPES = [
    *("float64", "float32", "float16", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool", ml_dtypes.bfloat16),
]


def content(dtype):
    values = np.random.default_rng(0).integers(0, 2, (5, 3))
    return {"odd": values.astype(dtype), "b": np.ones(7, "i1"), "scalar": np.array(2.0)}


@pytest.mark.parametrize("dtype", TYPES)
def test_files_of_the_safetensors_package_are_read_as_it_reads_them(dtype, tmp_path):
    save_file(content(dtype), tmp_path / "x.safetensors", {"note": "kept"})
    tensors, metadata = safetensors.open_file(tmp_path / "x.safetensors")
    assert metadata == {"note": "kept"}
    for name, expected in load_file(tmp_path / "x.safetensors").items():
        found = tensors[name].read()
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_files_are_written_as_the_safetensors_package_reads_them(dtype, tmp_path):
    files = safetensors.plan(content(dtype), 10**6, {"note": "kept"})
    with safetensors.Writer(tmp_path, files) as writer:
        for name in reversed(content(dtype)):
            writer.put(name, content(dtype)[name])
    found = load_file(tmp_path / "model.safetensors")
    for name, expected in content(dtype).items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_a_tensor_that_is_not_put_is_an_error(tmp_path):
    files = safetensors.plan(content("f4"), 10**6, {})
    with (
        pytest.raises(ValueError, match="2 tensors were not merged, such as b"),
        safetensors.Writer(tmp_path, files) as writer,
    ):
        writer.put("odd", content("f4")["odd"])


def test_a_tensor_is_never_in_two_files_nor_split():
    layout = {f"t{i}": np.zeros(i, np.float32) for i in range(10)}
    files = safetensors.plan(layout, 40, {})
    assert [list(file.offsets) for file in files] == [
        *(["t0", "t1", "t2", "t3", "t4"], ["t5"], ["t6"], ["t7"], ["t8"], ["t9"])
    ]
    assert files[0].name == "model-00001-of-00006.safetensors"


def test_memory_is_used_again_once_nobody_holds_it():
    memory = Memory()
    first = memory.take(2**21)
    place, view = first.ctypes.data, first[5:].view(np.uint8)
    del first
    second = memory.take(2**21)
    assert second.ctypes.data != place  # the view holds the first
    del view
    third = memory.take(2**21 - 100)
    assert third.ctypes.data == place
    assert second.ctypes.data % 64 == third.ctypes.data % 64 == 0


# Corrupt files. The header of a good one is taken, changed and written back.


def damaged(change):
    """A file whose header, as a dict, was put through `change`."""

    def damage(file):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = change(header)
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def entry(**changes):
    return damaged(lambda header: header | {NAME: header[NAME] | changes})


def shifted(header, by):
    begin, end = header[NAME]["data_offsets"]
    return header | {NAME: header[NAME] | {"data_offsets": [begin + by, end + by]}}


def cut(size):
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def length(value):
    def damage(file):
        data = file.read_bytes()
        file.write_bytes(value.to_bytes(8, "little") + data[8:])

    return damage


CORRUPT = {
    "empty": cut(0),
    "seven bytes": cut(7),
    "truncated header": cut(60),
    "truncated data": cut(-10),
    "data after the end": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "huge header": length(2**63),
    "header of a terabyte": length(2**40),
    "header longer than the file": length(10**5),
    "short header": length(10),
    "header of length zero": length(0),
    "no JSON": damaged(lambda header: b"{" * 40),
    "no UTF-8": damaged(lambda header: b"\xff" * 40),
    "a list": damaged(lambda header: [1, 2]),
    "unknown dtype": entry(dtype="F31"),
    "type of another size": entry(dtype="F64"),
    "packed type": entry(dtype="F8_E4M3", shape=[16]),
    "another shape": entry(shape=[9]),
    "shape that overflows": entry(shape=[2**40, 2**40]),
    "negative shape": entry(shape=[-8]),
    "overlap": damaged(lambda header: shifted(header, -8)),
    "gap": damaged(lambda header: shifted(header, 8)),
    "out of range": damaged(lambda header: shifted(header, 10**9)),
    "negative offset": entry(data_offsets=[-16, 0]),
    "end before the beginning": entry(data_offsets=[16, 0]),
    "one offset": entry(data_offsets=[0]),
    "no shape": damaged(lambda h: h | {NAME: {"dtype": "BF16"}}),
    "metadata of numbers": damaged(lambda h: h | {"__metadata__": {"a": 1}}),
}


def refuses(base, model, out):
    """Asserts one clear error, no output, and no large allocation."""
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            models = stream.open_models(base, [model, base])
            stream.merge(merge.average, models, out, quiet=True)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert not [p for p in out.parent.iterdir() if p.name not in ("base", "model")]
    return str(caught.value)


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_file_is_one_error_and_nothing_is_written(kind, tmp_path):
    base = checkpoints.write(tmp_path / "base", checkpoints.tensors(0))
    model = shutil.copytree(base, tmp_path / "model")
    CORRUPT[kind](model / "model.safetensors")
    message = refuses(base, model, tmp_path / "out")
    if kind == "packed type":
        assert "model is quantised (f8_e4m3 numbers)" in message
    else:
        assert "model.safetensors" in message
        assert "corrupt" in message


INDICES = {
    "parent folder": {"lm_head.weight": "../base/model.safetensors"},
    "absolute path": {"lm_head.weight": "/etc/hostname"},
    "path through a folder": {"lm_head.weight": "x/../model-1.safetensors"},
    "no such file": {"lm_head.weight": "model-9.safetensors"},
    "a number": {"lm_head.weight": 3},
    "a tensor that is in no file": {"of.another.model": "model-1.safetensors"},
    "empty": {},
    "a list": ["model-1.safetensors"],
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_with_tricks_is_one_error_and_nothing_is_written(kind, tmp_path):
    base = checkpoints.write(tmp_path / "base", checkpoints.tensors(0))
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(base / "model.safetensors", model / "model-1.safetensors")
    weight_map = INDICES[kind]
    if isinstance(weight_map, dict) and weight_map:
        good = dict.fromkeys(checkpoints.SHAPES, "model-1.safetensors")
        weight_map = good | weight_map
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json" in refuses(base, model, tmp_path / "out")


def test_pickles_and_msgpack_are_refused_with_what_to_do(tmp_path):
    for name, advice in (("other.bin", "torch"), ("weights.h5", "looked for")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(FileNotFoundError, match=advice):
            opened.open_checkpoint(folder)
