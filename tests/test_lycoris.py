"""Files of kohya and LyCORIS against their formulas, written out."""

import numpy as np
import pytest
from adapter_folders import normal
from merge_command import checkpoint
from safetensors.numpy import load_file, save_file

from jaxarith import cli
from jaxarith.hub import Stored, lycoris

QUERY, CONV, POINT = "blocks.0.to_q", "blocks.0.conv", "blocks.1.proj_in"
SHAPES = {
    f"{QUERY}.weight": (6, 8),
    f"{QUERY}.bias": (6,),
    f"{CONV}.weight": (4, 6, 3, 3),
    f"{POINT}.weight": (6, 4, 1, 1),
}
BASE = {name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}


def stored(tensors):
    return {
        name: Stored.made(x.dtype, x.shape, lambda x=x: x)
        for name, x in tensors.items()
    }


def write(folder, modules, prefix="lora_unet_"):
    """A file of modules, by their names with dots, and kinds."""
    tensors = {
        f"{prefix}{module.replace('.', '_')}.{kind}": np.asarray(x, np.float32)
        for module, kinds in modules.items()
        for kind, x in kinds.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors"


def read(folder, modules, **options):
    file = write(folder, modules, **options)
    assert lycoris.is_lycoris(file)
    found = lycoris.read(file, stored(BASE))
    assert found.replaced == {}
    return {name: delta.read() for name, delta in found.deltas.items()}


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def lora(out, *rest, rank=2, alpha=None):
    ones = (1,) * (len(rest) - 1)
    kinds = {
        "lora_up.weight": normal(1, out, rank, *ones),
        "lora_down.weight": normal(2, rank, *rest),
    }
    return kinds if alpha is None else {**kinds, "alpha": alpha}


@pytest.mark.parametrize(
    ("alpha", "scale"), [(None, 1), (0, 1), (1, 0.5), (2, 1), (3, 1.5)]
)
def test_lora_is_scaled_by_alpha_over_rank(tmp_path, alpha, scale):
    found = read(tmp_path, {QUERY: lora(6, 8, alpha=alpha)})
    close(found[f"{QUERY}.weight"], scale * normal(1, 6, 2) @ normal(2, 2, 8))


def test_convolutions(tmp_path):
    found = read(tmp_path, {CONV: lora(4, 6, 3, 3), POINT: lora(6, 4)})
    up, down = normal(1, 4, 2, 1, 1), normal(2, 2, 6, 3, 3)
    wanted = sum(up[:, r, 0, 0, None, None, None] * down[r] for r in range(2))
    close(found[f"{CONV}.weight"], wanted)
    # A linear layer in place of a convolution with a window of 1.
    close(found[f"{POINT}.weight"][..., 0, 0], normal(1, 6, 2) @ normal(2, 2, 4))


def tucker(middle, left, right):
    """[out, in, h, w], by loops."""
    _, outputs = left.shape
    result = np.zeros((outputs, right.shape[1], *middle.shape[2:]))
    for i in range(len(left)):
        for j in range(len(right)):
            for o in range(outputs):
                for n in range(right.shape[1]):
                    result[o, n] += middle[i, j] * left[i, o] * right[j, n]
    return result


def test_lora_with_a_small_convolution_in_the_middle(tmp_path):
    kinds = lora(4, 6, 1, 1, alpha=1) | {"lora_mid.weight": normal(3, 2, 2, 3, 3)}
    found = read(tmp_path, {CONV: kinds})[f"{CONV}.weight"]
    up, down = normal(1, 4, 2, 1, 1)[..., 0, 0], normal(2, 2, 6, 1, 1)[..., 0, 0]
    close(found, 0.5 * tucker(normal(3, 2, 2, 3, 3), up.T, down))


def hada(*shapes):
    names = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    return {
        f"hada_{name}": normal(10 + i, *shape)
        for i, (name, shape) in enumerate(zip(names, shapes, strict=False))
    }


def test_loha_is_the_product_of_the_entries(tmp_path):
    linear = hada((6, 2), (2, 8), (6, 2), (2, 8)) | {"alpha": 3}
    flat = hada((4, 2), (2, 54), (4, 2), (2, 54))
    found = read(tmp_path, {QUERY: linear, CONV: flat})
    a1, b1, a2, b2 = (linear[f"hada_{x}"] for x in ("w1_a", "w1_b", "w2_a", "w2_b"))
    close(found[f"{QUERY}.weight"], 1.5 * (a1 @ b1) * (a2 @ b2))
    a1, b1, a2, b2 = (flat[f"hada_{x}"] for x in ("w1_a", "w1_b", "w2_a", "w2_b"))
    close(found[f"{CONV}.weight"].reshape(4, 54), (a1 @ b1) * (a2 @ b2))


def test_loha_of_small_convolutions(tmp_path):
    kinds = hada((2, 4), (2, 6), (2, 4), (2, 6), (2, 2, 3, 3), (2, 2, 3, 3))
    found = read(tmp_path, {CONV: kinds | {"alpha": 1}})[f"{CONV}.weight"]
    a1, b1, a2, b2, t1, t2 = kinds.values()
    close(found, 0.5 * tucker(t1, a1, b1) * tucker(t2, a2, b2))


def kron(first, second):
    """The Kronecker product over the first two axes, by loops."""
    (a, c), (b, d, *window) = first.shape, second.shape
    result = np.zeros((a * b, c * d, *window))
    for i in range(a):
        for j in range(c):
            block = first[i, j] * second
            result[i * b : (i + 1) * b, j * d : (j + 1) * d] = block
    return result


W1 = {"lokr_w1": normal(20, 2, 2)}
W1_AB = {"lokr_w1_a": normal(21, 2, 1), "lokr_w1_b": normal(22, 1, 2)}


@pytest.mark.parametrize("first", [W1, W1_AB], ids=["w1", "w1_ab"])
@pytest.mark.parametrize(
    ("module", "second"),
    [
        *((QUERY, second) for second in ("whole", "factors")),
        *((CONV, second) for second in ("whole", "factors", "flat", "middle")),
    ],
)
def test_lokr_is_the_kronecker_product(tmp_path, module, first, second):
    out, inner, *window = BASE[f"{module}.weight"].shape
    b, d = out // 2, inner // 2
    left, right = normal(23, b, 3), normal(24, 3, d, *window)
    if second == "whole":
        kinds = {"lokr_w2": normal(25, b, d, *window)}
        wanted, rank = kinds["lokr_w2"], None
    elif second == "middle":
        kinds = {
            "lokr_w2_a": normal(23, 3, b),
            "lokr_w2_b": normal(24, 3, d),
            "lokr_t2": normal(26, 3, 3, *window),
        }
        wanted, rank = tucker(kinds["lokr_t2"], *[*kinds.values()][:2]), 3
    else:
        flat = right.reshape(3, -1)
        kinds = {"lokr_w2_a": left, "lokr_w2_b": flat if second == "flat" else right}
        wanted, rank = np.tensordot(left, right, 1), 3
    small = first.get("lokr_w1")
    if small is None:
        small, rank = first["lokr_w1_a"] @ first["lokr_w1_b"], 1
    found = read(tmp_path, {module: first | kinds | {"alpha": 6}})
    scale = 1 if rank is None else 6 / rank
    close(found[f"{module}.weight"], scale * kron(small, wanted))


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("module", [QUERY, CONV])
def test_dora_scale_gives_new_lengths(tmp_path, module, outputs):
    start = BASE[f"{module}.weight"]
    axes = tuple(range(start.ndim))
    axes = axes[1:] if outputs else (0, *axes[2:])
    shape = [1 if axis in axes else n for axis, n in enumerate(start.shape)]
    lengths = 1 + np.abs(normal(30, *shape))
    kinds = lora(*start.shape, alpha=1) | {"dora_scale": lengths}
    plain = read(tmp_path, {module: lora(*start.shape, alpha=1)})[f"{module}.weight"]
    moved = start.astype(float) + plain
    norms = np.sqrt(np.sum(moved**2, axis=axes, keepdims=True))
    found = read(tmp_path, {module: kinds})[f"{module}.weight"]
    close(start + found, moved * lengths / norms)


def test_full_differences(tmp_path):
    change, bias = normal(40, 6, 8), normal(41, 6)
    found = read(tmp_path, {QUERY: {"diff": change, "diff_b": bias}})
    close(found[f"{QUERY}.weight"], change)
    close(found[f"{QUERY}.bias"], bias)


@pytest.mark.parametrize(
    "prefix", ["lora_unet_", "lycoris_", "lora_unet_model_diffusion_model_", "model."]
)
def test_names_with_other_prefixes(tmp_path, prefix):
    assert read(tmp_path, {QUERY: lora(6, 8)}, prefix=prefix).keys() == {
        f"{QUERY}.weight"
    }


def test_a_base_with_a_longer_name(tmp_path):
    file = write(tmp_path, {QUERY: lora(6, 8)})
    base = {f"model.diffusion_model.{name}": x for name, x in BASE.items()}
    found = lycoris.read(file, stored(base))
    assert found.deltas.keys() == {f"model.diffusion_model.{QUERY}.weight"}


def test_modules_of_another_model_are_left_out_and_noted(tmp_path):
    tensors = load_file(write(tmp_path, {QUERY: lora(6, 8)}))
    other = load_file(write(tmp_path, {"text.fc1": lora(5, 5)}, prefix="lora_te1_"))
    save_file(tensors | other, tmp_path / "both.safetensors")
    found = lycoris.read(tmp_path / "both.safetensors", stored(BASE))
    assert found.deltas.keys() == {f"{QUERY}.weight"}
    [note] = found.notes
    assert "1 module of lora_te1 is of another model, and left out" in note


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"blocks.7.to_q": lora(6, 8)}, "lora_unet_blocks_7_to_q: not in the base"),
        (
            {QUERY: lora(6, 8), "blocks.7.to_q": lora(6, 8)},
            "lora_unet_blocks_7_to_q: not in the base",
        ),
        ({QUERY: lora(6, 9)}, r"has shape \[6, 9\]"),
        ({QUERY: {"lora_up.weight": normal(0, 6, 2), "alpha": 1}}, "is incomplete"),
        ({QUERY: lora(6, 8) | {"lora_up.weight": normal(0, 6, 3)}}, "do not match"),
        ({QUERY: lora(6, 8) | {"lora_down.weight": normal(0, 8)}}, "do not match"),
        ({QUERY: hada((6, 2), (2, 8), (6, 3), (2, 8))}, "do not match"),
        (
            {QUERY: {**W1, "lokr_w2_a": normal(0, 3, 2), "lokr_w2_b": normal(0, 3, 4)}},
            "fit",
        ),
        ({QUERY: {"oft_blocks": normal(0, 2, 2), **lora(6, 8)}}, "supported are"),
        ({QUERY: {"dora_scale": normal(0, 6), **lora(6, 8)}}, "has dora_scale"),
        ({QUERY: {"diff_b": normal(0, 5), **lora(6, 8)}}, "has diff_b"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, modules, message):
    file = write(tmp_path, modules)
    with pytest.raises(ValueError, match=message):
        lycoris.read(file, stored(BASE))


def test_names_that_may_be_two_are_refused(tmp_path):
    file = write(tmp_path, {QUERY: lora(6, 8)})
    towers = {f"{x}.{QUERY}.weight": BASE[f"{QUERY}.weight"] for x in ("a", "b")}
    with pytest.raises(ValueError, match=r"may be a\.blocks.* or b\.blocks"):
        lycoris.read(file, stored(towers))


def test_the_command_merges_such_files(tmp_path, capsys):
    base = checkpoint(tmp_path / "base", BASE)
    kinds = lora(6, 8, alpha=1)
    file = write(tmp_path / "file", {QUERY: kinds})
    arguments = [
        "merge",
        "--method",
        "task_arithmetic",
        "--base",
        base,
        "--coef",
        "0.5",
    ]
    out = tmp_path / "out"
    assert cli.main([*arguments, "--model", str(file), "--out", str(out)]) == 0
    found = load_file(out / "model.safetensors")
    delta = 0.5 * normal(1, 6, 2) @ normal(2, 2, 8)
    close(found[f"{QUERY}.weight"], BASE[f"{QUERY}.weight"] + 0.5 * delta)
    np.testing.assert_array_equal(found[f"{CONV}.weight"], BASE[f"{CONV}.weight"])
    assert not lycoris.is_lycoris(out / "model.safetensors")
    capsys.readouterr()
