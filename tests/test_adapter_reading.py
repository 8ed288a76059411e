"""DoRA, trained tokens, biases and parameters of experts, read as PEFT merges them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxarith import stream
from jaxarith.hub import Stored, lora

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch, under PEFT, is missing")


@pytest.fixture(scope="module")
def peft(torch):
    return pytest.importorskip("peft", reason="the oracle: pip install peft==0.21.2")


def net(torch, tied=False):
    """Layers of every kind that PEFT adapts; the head may be the embedding's matrix."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(11, 6),
            "fc": torch.nn.Linear(6, 10),
            "turned": Conv1D(8, 10),
            "conv": torch.nn.Conv2d(2, 4, 3),
            "head": torch.nn.Linear(6, 11, bias=False),
        }
    )
    if tied:
        model["head"].weight = model["embed"].weight
    return model


def state(model):
    return {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}


def stored(tensors):
    return {
        name: Stored.made(x.dtype, x.shape, lambda x=x: x)
        for name, x in tensors.items()
    }


def wrapped(torch, peft, model, folder, **options):
    """A model with an adapter away from zero, which is also in the folder."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options})
    adapted = peft.get_peft_model(model, config)
    marks = ("lora_", "trainable_tokens_delta")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(mark in name for mark in marks):
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


def check(folder, before, adapted):
    """What is read gives what PEFT merges; returns the names that are moved."""
    after = state(adapted.merge_and_unload(safe_merge=True))
    found = lora.read_adapter(folder, stored(before))
    for name, expected in after.items():
        actual = found.replaced[name].read() if name in found.replaced else before[name]
        if name in found.deltas:
            actual = actual + found.deltas[name].read()
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    return {n for n, x in after.items() if np.abs(x - before[n]).max() > 1e-2}


MODULES = ["embed", "fc", "turned", "conv"]


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_of_every_kind_of_layer(torch, peft, tmp_path, rslora):
    model = net(torch)
    before = state(model)
    adapted = wrapped(
        torch,
        peft,
        model,
        tmp_path,
        target_modules=MODULES,
        use_dora=True,
        use_rslora=rslora,
        rank_pattern={"fc": 3},
    )
    moved = check(tmp_path, before, adapted)
    assert moved == {f"{module}.weight" for module in MODULES}


def test_biases_of_factors(torch, peft, tmp_path):
    model = net(torch)
    before = state(model)
    options = {"target_modules": ["fc", "conv"], "lora_bias": True}
    adapted = wrapped(torch, peft, model, tmp_path, **options)
    moved = check(tmp_path, before, adapted)
    assert {"fc.bias", "conv.bias"} < moved


def test_trained_tokens_are_put_in_place_of_rows(torch, peft, tmp_path):
    model = net(torch)
    before = state(model)
    tokens = {"embed": [1, 7], "head": [0, 2, 10]}
    adapted = wrapped(
        torch,
        peft,
        model,
        tmp_path,
        target_modules=["fc"],
        trainable_token_indices=tokens,
    )
    assert check(tmp_path, before, adapted) == {
        "embed.weight",
        "fc.weight",
        "head.weight",
    }
    found = lora.read_adapter(tmp_path, stored(before)).deltas
    for name, indices in tokens.items():
        rows = np.flatnonzero(np.any(found[f"{name}.weight"].read(), axis=1))
        assert rows.tolist() == indices


def llama(transformers, tied):
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_follows_the_tokens(torch, peft, tmp_path, tied):
    import transformers

    torch.manual_seed(0)
    model = llama(transformers, tied)
    model.save_pretrained(tmp_path / "base")
    adapted = wrapped(
        torch,
        peft,
        model,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        trainable_token_indices=[4, 5],
        task_type="CAUSAL_LM",
    )
    after = state(adapted.merge_and_unload())
    opened = stream.open_models(tmp_path / "base", [tmp_path / "adapter"])
    [tau] = opened.taus
    for name, leaf in opened.base.items():
        actual = leaf.read() + (jnp.asarray(tau[name]) if name in tau else 0)
        np.testing.assert_allclose(actual, after[name], rtol=1e-6, atol=1e-6)
    same = np.array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert same == tied


def test_what_does_not_add_up_in_a_tied_matrix_is_refused(torch, peft, tmp_path):
    model = net(torch)
    options = {"target_modules": ["embed", "head"], "use_dora": True}
    wrapped(torch, peft, model, tmp_path, **options)
    base = stored(state(net(torch)))
    with pytest.raises(ValueError, match=r"embed and head, which are one tied matrix"):
        lora.read_adapter(tmp_path, base | {"head.weight": base["embed.weight"]})


PARAMETERS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def experts(transformers, kind, width):
    shared = {
        "vocab_size": 19,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts_per_tok": 2,
    }
    if kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **shared, num_experts=3, moe_intermediate_size=width
        )
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.GptOssConfig(
        **shared, num_local_experts=3, intermediate_size=width
    )
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize("targets", [PARAMETERS, PARAMETERS[:1], PARAMETERS[1:]])
@pytest.mark.parametrize("width", [8, 16, 12])  # of 8 and 16, one of the two is square
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_parameters_of_experts(torch, peft, tmp_path, kind, width, targets):
    import transformers

    torch.manual_seed(0)
    model = experts(transformers, kind, width)
    before = state(model)
    adapted = wrapped(
        torch,
        peft,
        model,
        tmp_path,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={"experts.gate_up_proj": 3},
        alpha_pattern={"experts.down_proj": 7},
    )
    layer = "model.layers.0."
    moved = {f"{layer}{target}" for target in targets}
    found = check(tmp_path, before, adapted)
    assert found == moved | {f"{layer}self_attn.q_proj.weight"}


def mixtral(transformers):
    config = transformers.MixtralConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_parameters_of_experts_that_files_hold_one_by_one(torch, peft, tmp_path, kind):
    import transformers

    torch.manual_seed(0)
    build = {"mixtral": mixtral, "qwen3_moe": lambda x: experts(x, "qwen3_moe", 12)}
    model = build[kind](transformers)
    model.save_pretrained(tmp_path / "base")
    adapted = wrapped(
        torch,
        peft,
        model,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        target_parameters=PARAMETERS,
    )
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    opened = stream.open_models(tmp_path / "base", [tmp_path / "adapter"])
    [tau] = opened.taus
    assert opened.base.keys() == after.keys()
    assert len(tau) == 3 * 3 + 1  # three matrices of three experts, and q_proj
    for name, leaf in opened.base.items():
        actual = leaf.read() + (jnp.asarray(tau[name]) if name in tau else 0)
        np.testing.assert_allclose(actual, after[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_vision_models_whose_files_have_other_names(torch, peft, tmp_path, kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    model.save_pretrained(tmp_path / "base")
    adapted = wrapped(
        torch,
        peft,
        model,
        tmp_path / "adapter",
        target_modules=["q_proj", "o_proj", "fc1", "fc2"],
        modules_to_save=["classifier"],
    )
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    opened = stream.open_models(tmp_path / "base", [tmp_path / "adapter"])
    [tau] = opened.taus
    assert len(tau) == 2 * 4 + 2
    for name, leaf in opened.base.items():
        actual = leaf.read() + (jnp.asarray(tau[name]) if name in tau else 0)
        np.testing.assert_allclose(actual, after[name], rtol=1e-6, atol=1e-6)


def spoiled(folder, config=None, **tensors):
    """The adapter of a folder, with another configuration or tensors."""
    file = folder / "adapter_model.safetensors"
    found = {**load_file(file), **tensors}
    save_file({name: x for name, x in found.items() if x is not None}, file)
    place = folder / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | (config or {})))
    return folder


def test_factors_that_fit_no_parameter_are_refused(torch, peft, tmp_path):
    import transformers

    model = experts(transformers, "gpt_oss", 12)
    before = state(model)
    options = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    wrapped(torch, peft, model, tmp_path, **options)
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    for shape in ((6, 5), (6,), (4, 16)):
        folder = spoiled(tmp_path, **{key: np.zeros(shape, "f4")})
        with pytest.raises(ValueError, match=r"experts has the factors A \["):
            lora.read_adapter(folder, stored(before))


TOKENS = "base_model.model.embed.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"trainable_token_indices": [1, 11]}}, "trained tokens up to 11"),
        ({"config": {"trainable_token_indices": [1]}}, r"1 trained token f32\[2, 6\]"),
        (
            {"config": {"trainable_token_indices": [1, 1]}},
            r"its trained tokens are \[1, 1\]",
        ),
        ({"config": {"trainable_token_indices": None}}, "expected one LoRA adapter"),
        ({TOKENS: None}, "has no trained tokens"),
    ],
)
def test_broken_tokens_are_refused(torch, peft, tmp_path, change, message):
    model = net(torch)
    before = state(model)
    options = {"trainable_token_indices": {"embed": [1, 7]}, "target_modules": ["fc"]}
    wrapped(torch, peft, model, tmp_path, **options)
    folder = spoiled(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        lora.read_adapter(folder, stored(before))
