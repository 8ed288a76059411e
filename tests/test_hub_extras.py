"""What files of the Hub hold beyond the parameters: buffers, copies, older names."""

import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from jaxarith import hub, tree

PATHS = {
    "transformer/wte/embedding": (5, 4),
    "transformer/h/0/attn/kernel": (3, 4),
    "transformer/ln/scale": (4,),
    "transformer/ln/bias": (4,),
    "score/kernel": (4, 2),
}
COPIES = {"lm_head/weight": "transformer/wte/embedding"}


def layout():
    return tree.unflatten({p: np.zeros(shape, "f4") for p, shape in PATHS.items()})


def tensors() -> dict:
    """The layout's leaves under PyTorch's names, all different."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype("f4")  # noqa: E731
    return {
        "transformer.wte.weight": draw(5, 4),
        "transformer.h.0.attn.weight": draw(4, 3),
        "transformer.ln.weight": draw(4),
        "transformer.ln.bias": draw(4),
        "score.weight": draw(2, 4),
    }


def write(folder, contents):
    save_file(contents, folder / "model.safetensors")
    return folder


def assert_loaded(params):
    expected = tensors()
    np.testing.assert_array_equal(
        params["transformer"]["wte"]["embedding"], expected["transformer.wte.weight"]
    )
    np.testing.assert_array_equal(
        params["transformer"]["h"]["0"]["attn"]["kernel"],
        expected["transformer.h.0.attn.weight"].T,
    )
    np.testing.assert_array_equal(
        params["transformer"]["ln"]["scale"], expected["transformer.ln.weight"]
    )
    assert {*tree.flatten(params)} == {*PATHS}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_ignored_names_are_left_out_with_and_without_prefix(tmp_path, prefix):
    mask = {f"{prefix}h.0.attn.bias": np.ones((1, 1, 3, 3), "f4")}
    write(tmp_path, tensors() | mask)
    assert_loaded(hub.load(tmp_path, layout(), ignore=r"h/\d+/attn/bias"))
    with pytest.raises(ValueError, match="h/0/attn/bias"):
        hub.load(tmp_path, layout(), ignore=r"h/\d+/attn")


def test_a_pattern_never_drops_a_parameter(tmp_path):
    write(tmp_path, tensors())
    assert_loaded(hub.load(tmp_path, layout(), ignore=".*"))


def test_equal_copies_of_tied_tensors_are_dropped(tmp_path):
    copy = tensors()["transformer.wte.weight"]
    write(tmp_path, tensors() | {"lm_head.weight": copy})
    assert_loaded(hub.load(tmp_path, layout(), copies=COPIES))
    with pytest.raises(ValueError, match="lm_head/weight"):
        hub.load(tmp_path, layout())


def test_a_copy_stands_in_for_the_leaf_that_it_is_tied_to(tmp_path):
    contents = tensors()
    contents["lm_head.weight"] = contents.pop("transformer.wte.weight")
    assert_loaded(hub.load(write(tmp_path, contents), layout(), copies=COPIES))


def test_a_copy_with_other_values_is_an_error(tmp_path):
    other = tensors()["transformer.wte.weight"].copy()
    other[4, 3] += 1
    write(tmp_path, tensors() | {"lm_head.weight": other})
    both = "lm_head/weight .* and transformer/wte/embedding .*different values"
    with pytest.raises(ValueError, match=both):
        hub.load(tmp_path, layout(), copies=COPIES)


def test_names_without_the_base_prefix_get_it_in_both_formats(tmp_path):
    bare = {k.removeprefix("transformer."): v for k, v in tensors().items()}
    assert_loaded(hub.load(write(tmp_path, bare), layout()))
    params = hub.load(tmp_path, layout())
    (tmp_path / "model.safetensors").unlink()
    content = {**params["transformer"], "score": params["score"]}
    (tmp_path / "flax_model.msgpack").write_bytes(
        serialization.msgpack_serialize(content)
    )
    assert_loaded(hub.load(tmp_path, layout()))


def test_gamma_and_beta_of_older_files_are_scale_and_bias(tmp_path):
    contents = tensors()
    contents["transformer.ln.gamma"] = contents.pop("transformer.ln.weight")
    contents["transformer.ln.beta"] = contents.pop("transformer.ln.bias")
    assert_loaded(hub.load(write(tmp_path, contents), layout()))


def test_names_lists_the_tensors_of_a_file_with_slashes(tmp_path):
    assert hub.names(write(tmp_path, {"a.b": np.zeros(1, "f4")})) == {"a/b"}
