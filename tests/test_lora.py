"""Adapters against the formula of LoRA, in folders of the form that PEFT writes."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxarith.hub import lora, stored

RANK, ALPHA = 3, 5.0
PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
EMBEDDING = "model.embed_tokens"
LLAMA = {
    f"{EMBEDDING}.weight": (11, 6),
    f"{QUERY}.weight": (6, 6),
    f"{DOWN}.weight": (6, 10),
    "lm_head.weight": (11, 6),
}
GPT2 = {
    "h.0.attn.c_attn.weight": (6, 18),
    "h.0.attn.c_attn.bias": (18,),
    "h.0.attn.c_proj.weight": (6, 6),
    "h.0.attn.c_proj.bias": (6,),
    "h.0.mlp.c_fc.weight": (6, 24),
    "h.0.mlp.c_fc.bias": (24,),
    "score.weight": (2, 6),
}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def factors(*shape, rank=RANK, seed=0):
    """A and B of a module that computes `[out, in, *window]`."""
    out, *rest = shape
    ones = (1,) * (len(rest) - 1)
    return normal(rank, *rest, seed=seed), normal(out, rank, *ones, seed=seed + 1)


def linear(module, *shape, name="", **options):
    a, b = factors(*shape, **options)
    key = f"{PREFIX}{module}.lora_"
    return {f"{key}A{name}.weight": a, f"{key}B{name}.weight": b}


def adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "loftq_config": {},
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def base_of(shapes, dtype="f32"):
    def load(count):
        raise AssertionError("the base is not to be read")

    found = stored.DTYPES[dtype.upper()]
    return {k: stored.Stored(found, shape, load) for k, shape in shapes.items()}


def test_delta_is_the_scaled_product_of_the_factors(tmp_path):
    folder = adapter(tmp_path, linear(QUERY, 6, 6) | linear(DOWN, 6, 10))
    found = lora.read_adapter(folder, base_of(LLAMA))
    assert found.deltas.keys() == {f"{QUERY}.weight", f"{DOWN}.weight"}
    assert found.replaced == {}
    for name, delta in found.deltas.items():
        a, b = factors(*LLAMA[name])
        expected = ALPHA / RANK * np.einsum("or,ri->oi", b.astype(float), a)
        assert np.abs(expected).max() > 1
        assert (delta.dtype, delta.shape) == (np.float32, LLAMA[name])
        np.testing.assert_allclose(delta.read(), expected, rtol=1e-5, atol=1e-6)
        assert delta.read().dtype == np.float32


def test_factors_of_bfloat16_are_multiplied_in_float32(tmp_path):
    tensors = linear(DOWN, 6, 10)
    narrow = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    folder = adapter(tmp_path, narrow)
    delta = lora.read_adapter(folder, base_of(LLAMA, "bf16")).deltas[f"{DOWN}.weight"]
    a, b = (x.astype(np.float64) for x in narrow.values())
    expected = ALPHA / RANK * b @ a
    np.testing.assert_allclose(delta.read(), expected, rtol=1e-5, atol=1e-6)
    rounded = expected.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.abs(rounded - expected).max() > 1e-3


def test_rank_stabilised_adapters_divide_by_the_root_of_the_rank(tmp_path):
    plain = adapter(tmp_path / "plain", linear(DOWN, 6, 10))
    stable = adapter(tmp_path / "stable", linear(DOWN, 6, 10), use_rslora=True)
    one, other = (
        lora.read_adapter(folder, base_of(LLAMA)).deltas[f"{DOWN}.weight"].read()
        for folder in (plain, stable)
    )
    np.testing.assert_allclose(other, one * np.sqrt(RANK), rtol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("down_proj", True),
        ("mlp.down_proj", True),
        (r"layers\.[12]\..*", True),
        ("^model.layers.1.mlp.down_proj", True),
        ("^layers.1.mlp.down_proj", False),
        ("own_proj", False),
        ("down", False),
    ],
)
def test_patterns_match_whole_words_at_the_end_of_a_name(tmp_path, pattern, matches):
    rank = 2 if matches else RANK
    folder = adapter(
        tmp_path,
        linear(DOWN, 6, 10, rank=rank) | linear(QUERY, 6, 6),
        rank_pattern={pattern: 2, "down_proj": rank},
        alpha_pattern={pattern: 7.0},
    )
    deltas = lora.read_adapter(folder, base_of(LLAMA)).deltas
    a, b = factors(6, 10, rank=rank)
    scaling = 7.0 / 2 if matches else ALPHA / RANK
    actual = deltas[f"{DOWN}.weight"].read()
    np.testing.assert_allclose(actual, scaling * b @ a, rtol=1e-5, atol=1e-6)
    a, b = factors(6, 6)
    actual = deltas[f"{QUERY}.weight"].read()
    np.testing.assert_allclose(actual, ALPHA / RANK * b @ a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flag", [True, False])
def test_conv1d_of_gpt2_gets_the_transpose_whatever_the_flag(tmp_path, flag):
    tensors = {}
    for name, shape in GPT2.items():
        if name.endswith("weight"):
            out_in = shape if "score" in name else shape[::-1]
            tensors |= linear(name.removesuffix(".weight"), *out_in)
    folder = adapter(tmp_path, tensors, fan_in_fan_out=flag)
    if flag:  # nothing else tells how a head without a bias lies
        with pytest.raises(ValueError, match=r"score.*A \[3, 6\] and B \[2, 3\]"):
            lora.read_adapter(folder, base_of(GPT2))
        tensors = {k: v for k, v in tensors.items() if "score" not in k}
        folder = adapter(tmp_path, tensors, fan_in_fan_out=flag)
    deltas = lora.read_adapter(folder, base_of(GPT2)).deltas
    assert len(deltas) == 3 + (not flag)
    for name, delta in deltas.items():
        a, b = factors(*(GPT2[name] if "score" in name else GPT2[name][::-1]))
        expected = ALPHA / RANK * (b @ a if "score" in name else (b @ a).T)
        np.testing.assert_allclose(delta.read(), expected, rtol=1e-5, atol=1e-6)


def test_square_matrices_without_a_bias_lie_as_the_flag_says(tmp_path):
    a, b = factors(6, 6)
    for flag in (True, False):
        folder = adapter(tmp_path, linear(QUERY, 6, 6), fan_in_fan_out=flag)
        found = lora.read_adapter(folder, base_of(LLAMA)).deltas[f"{QUERY}.weight"]
        expected = ALPHA / RANK * (b @ a)
        expected = expected.T if flag else expected
        np.testing.assert_allclose(found.read(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["", ".default"])
def test_embeddings_are_moved_by_the_transpose(tmp_path, name):
    a, b = factors(6, 11)
    key = f"{PREFIX}{EMBEDDING}.lora_embedding_"
    whole = normal(11, 6, seed=9)
    tensors = {f"{key}A{name}": a, f"{key}B{name}": b}
    tensors[f"{PREFIX}{EMBEDDING}.base_layer.weight"] = whole
    found = lora.read_adapter(adapter(tmp_path, tensors), base_of(LLAMA))
    delta = found.deltas[f"{EMBEDDING}.weight"].read()
    np.testing.assert_allclose(delta, ALPHA / RANK * (b @ a).T, rtol=1e-5, atol=1e-6)
    replaced = found.replaced[f"{EMBEDDING}.weight"].read()
    np.testing.assert_array_equal(replaced, whole)


@pytest.mark.parametrize("window", [(1, 1), (3, 3), (5,), (2, 3, 2)])
def test_convolutions_are_contracted_over_the_rank(tmp_path, window):
    shapes = {"stem.weight": (4, 2, *window), "stem.bias": (4,)}
    folder = adapter(tmp_path, linear("stem", 4, 2, *window))
    delta = lora.read_adapter(folder, base_of(shapes)).deltas["stem.weight"]
    a, b = factors(4, 2, *window)
    expected = ALPHA / RANK * np.tensordot(b.reshape(4, RANK), a, 1)
    assert delta.shape == shapes["stem.weight"]
    np.testing.assert_allclose(delta.read(), expected, rtol=1e-5, atol=1e-6)


def test_heads_and_trained_biases_are_replaced(tmp_path):
    shapes = {
        "bert.query.weight": (6, 6),
        "bert.query.bias": (6,),
        "bert.norm.bias": (6,),
        "classifier.weight": (2, 6),
        "classifier.bias": (2,),
    }
    expected = {name: normal(*shape, seed=4) for name, shape in shapes.items()}
    tensors = {
        **linear("bert.query", 6, 6),
        f"{PREFIX}bert.query.base_layer.bias": expected["bert.query.bias"],
        f"{PREFIX}bert.norm.bias": expected["bert.norm.bias"],
        f"{PREFIX}classifier.weight": expected["classifier.weight"],
        # As PEFT writes them for bias="all": the last one is of before the training.
        f"{PREFIX}classifier.bias": expected["classifier.bias"],
        f"{PREFIX}classifier.modules_to_save.bias": expected["classifier.bias"],
        f"{PREFIX}classifier.original_module.bias": np.zeros(2, np.float32),
    }
    folder = adapter(tmp_path, tensors, bias="all", modules_to_save=["classifier"])
    found = lora.read_adapter(folder, base_of(shapes))
    assert found.deltas.keys() == {"bert.query.weight"}
    assert found.replaced.keys() == expected.keys() - found.deltas.keys()
    for name, tensor in found.replaced.items():
        assert str(tensor) == f"f32{list(shapes[name])}"
        np.testing.assert_array_equal(tensor.read(), expected[name])


@pytest.mark.parametrize(
    ("rename", "wrapped"),
    [
        (lambda name: name, ""),
        (lambda name: name, ".default"),
        (lambda name: f"language_model.{name}", ""),
        (lambda name: name.removeprefix("model."), ".my_adapter"),
    ],
)
def test_names_fit_with_and_without_prefixes(tmp_path, rename, wrapped):
    folder = adapter(tmp_path, linear(DOWN, 6, 10, name=wrapped))
    base = base_of({rename(name): shape for name, shape in LLAMA.items()})
    found = lora.read_adapter(folder, base)
    assert found.deltas.keys() == {rename(f"{DOWN}.weight")}


OUTER = ("model", "model.language_model", "language_model.model")


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("trained", OUTER)
def test_a_language_model_in_another_is_found(tmp_path, trained, outer):
    layer = "layers.1.mlp.down_proj"
    folder = adapter(tmp_path, linear(f"{trained}.{layer}", 6, 10))
    tower = {f"model.visual.{layer}.weight": (6, 10)}
    found = lora.read_adapter(
        folder, base_of({f"{outer}.{layer}.weight": (6, 10)} | tower)
    )
    assert found.deltas.keys() == {f"{outer}.{layer}.weight"}
    noted = " ".join(found.notes)
    assert (f"{trained}.{layer}.weight is taken as" in noted) == (
        not (f".{outer}".endswith(f".{trained}") or f".{trained}".endswith(f".{outer}"))
    )


def test_a_language_model_that_may_be_one_of_two_is_refused(tmp_path):
    folder = adapter(tmp_path, linear("model.layers.1.fc", 6, 6))
    outers = ("model.language_model", "language_model.model.language_model")
    base = base_of({f"{outer}.layers.1.fc.weight": (6, 6) for outer in outers})
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.fc\.weight: not in the base"
    ):
        lora.read_adapter(folder, base)


def test_ambiguous_and_unknown_names_are_listed(tmp_path):
    tensors = linear("layers.0.fc", 6, 6) | linear("layers.9.fc", 6, 6)
    towers = {f"{top}.layers.0.fc.weight": (6, 6) for top in ("text", "vision")}
    with pytest.raises(ValueError) as error:
        lora.read_adapter(adapter(tmp_path, tensors), base_of(towers))
    assert "(2 tensors)" in str(error.value)
    ambiguous = "layers.0.fc.weight may be text.layers.0.fc.weight or vision.layers.0"
    assert ambiguous in str(error.value)
    assert "layers.9.fc.weight: not in the base" in str(error.value)


def test_two_modules_for_one_tensor_are_an_error(tmp_path):
    tensors = linear("a.b.fc", 6, 6) | linear("b.fc", 6, 6)
    with pytest.raises(ValueError, match=r"one more for b\.fc\.weight"):
        lora.read_adapter(adapter(tmp_path, tensors), base_of({"b.fc.weight": (6, 6)}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora, but has no magnitude_vector of .*down_proj"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"megatron_config": {"x": 1}}, "megatron_config is set"),
        ({"lora_bias": True}, "lora_bias, but has no bias of .*down_proj"),
        ({"trainable_token_indices": [3]}, "indices, but has no trained tokens"),
        ({"target_parameters": ["experts"]}, "no factors of parameters experts that"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*base's weights"),
        ({"init_lora_weights": "olora"}, "olora.*base's weights"),
        ({"r": None}, "must state r as a whole number"),
        ({"r": 0}, "must state r as a whole number"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"alpha_pattern": ["x"]}, "alpha_pattern"),
        ({"r": 4}, r"A \[3, 10\] and B \[6, 3\], but .* states the rank 4"),
        ({"rank_pattern": {"down_proj": 2}}, "states the rank 2"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, config, message):
    folder = adapter(tmp_path, linear(DOWN, 6, 10), **config)
    with pytest.raises(ValueError, match=message):
        lora.read_adapter(folder, base_of(LLAMA))


def spoiled(change):
    tensors = linear(DOWN, 6, 10)
    change(tensors)
    return tensors


A, B = (f"{PREFIX}{DOWN}.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), "holds lora_A for .*down_proj; expected both A and B"),
        (lambda t: t.pop(A), "holds lora_B for .*down_proj; expected both A and B"),
        (lambda t: t.clear(), "holds no tensors"),
        (lambda t: t.update({A: normal(3, 9)}), r"down_proj.weight is f32\[6, 10\]"),
        (lambda t: t.update({B: normal(3)}), r"B \[3\]"),
        (lambda t: t.update({B: normal(6, 3, 1)}), r"B \[6, 3, 1\]"),
        (
            lambda t: t.update({f"{PREFIX}{DOWN}.lora_magnitude_vector": normal(6)}),
            "lora_magnitude_vector",
        ),
        (
            lambda t: t.update({f"{PREFIX}{DOWN}.lora_A.two.weight": normal(3, 10)}),
            "several in one file",
        ),
        (
            lambda t: t.update({f"{PREFIX}lm_head.weight": normal(12, 6)}),
            r"lm_head.weight: f32\[11, 6\] in the base is replaced by f32\[12, 6\]",
        ),
        (
            lambda t: t.update({f"{PREFIX}score.weight": normal(2, 6)}),
            "score.weight: not in the base",
        ),
        (
            lambda t: t.update({"prompt_encoder.embedding": normal(2, 6)}),
            "prompt_encoder.embedding: not in the base",
        ),
    ],
)
def test_broken_adapters_are_refused(tmp_path, change, message):
    folder = adapter(tmp_path, spoiled(change))
    with pytest.raises(ValueError, match=message):
        lora.read_adapter(folder, base_of(LLAMA))


def test_quantised_bases_are_refused(tmp_path):
    folder = adapter(tmp_path, linear(DOWN, 6, 10))
    with pytest.raises(ValueError, match=r"down_proj.weight is i8\[6, 10\]"):
        lora.read_adapter(folder, base_of(LLAMA, "i8"))


def test_an_adapter_is_a_folder_with_its_config(tmp_path):
    assert not lora.is_adapter(tmp_path)
    folder = adapter(tmp_path / "a", linear(DOWN, 6, 10))
    assert lora.is_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="does not open pickles"):
        lora.read_adapter(folder, base_of(LLAMA))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        lora.read_adapter(folder, base_of(LLAMA))
