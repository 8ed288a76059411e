"""float64 tensors are merged in float64 by the command, and named by the library."""

import numpy as np
import pytest
from merge_command import checkpoint, load

from jaxarith import cli, merge, stream

METHODS = {
    "average": (),
    "task_arithmetic": ("--coef", "0.5"),
    "ties": ("--density", "0.5", "--coef", "0.5"),
    "dare": ("--drop-rate", "0.5", "--coef", "0.5"),
    "slerp": ("--t", "0.5"),
    "tsv": ("--coef", "0.5"),
}


def tensors(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    wide = (1 + 1e-12 * rng.normal(size=(4, 3))) * scale
    return {"a.weight": wide, "b.weight": rng.normal(size=(3, 2)).astype("f4")}


def write(tmp_path, *models):
    return [checkpoint(tmp_path / f"m{i}", x) for i, x in enumerate(models)]


@pytest.mark.parametrize("method", METHODS)
def test_the_command_merges_in_float64(method, tmp_path):
    base, one, two = write(tmp_path, *(tensors(i) for i in range(3)))
    arguments = ["--model", one, "--model", two, *METHODS[method]]
    if method not in ("average", "slerp"):
        arguments += ["--base", base]
    out = tmp_path / "out"
    status = cli.main(["merge", "--method", method, *arguments, "--out", str(out)])
    assert status == 0
    found = load(out)
    assert {name: x.dtype for name, x in found.items()} == {
        name: x.dtype for name, x in tensors(0).items()
    }
    # What is lost in float32 is of the size of the differences between the models.
    assert 0 < np.abs(found["a.weight"] - 1).max() < 1e-11


def test_the_mean_is_exact_and_large_numbers_are_finite(tmp_path):
    one, two = write(tmp_path, tensors(1, 1e300), tensors(2, 1e300))
    out = str(tmp_path / "out")
    models = ["--model", one, "--model", two]
    assert cli.main(["merge", "--method", "average", *models, "--out", out]) == 0
    mean = (load(one)["a.weight"] + load(two)["a.weight"]) / 2
    np.testing.assert_allclose(load(out)["a.weight"], mean, rtol=1e-15)


def test_the_library_names_them_and_refuses_what_float32_lacks(tmp_path):
    base, one = write(tmp_path, tensors(0), tensors(1))
    opened = stream.open_models(base, [one])
    assert opened.narrowed == ("a.weight",)
    assert any("a.weight) is float64" in note for note in opened.notes)
    large = checkpoint(tmp_path / "large", tensors(2, 1e300))
    opened = stream.open_models(base, [large])
    with pytest.raises(ValueError, match="a.weight of model 0.* too large for float32"):
        stream.merge(merge.average, opened, tmp_path / "out", quiet=True)
