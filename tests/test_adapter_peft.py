"""Merged adapters in PEFT: they load, and give the outputs that the deltas give."""

import functools
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxarith import cli

pytestmark = pytest.mark.torch
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch, under PEFT, is missing")


@pytest.fixture(scope="module")
def peft(torch):
    return pytest.importorskip("peft", reason="the oracle: pip install peft==0.21.2")


def llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=12, n_embd=16, n_layer=2, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)


MODELS = {"llama": llama, "gpt2": gpt2}
LLAMA = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
ADAPTERS = {
    "llama": [
        LLAMA | {"target_modules": ["q_proj", "up_proj"], "r": 2, "lora_alpha": 3},
        LLAMA
        | {
            "target_modules": ["v_proj", "up_proj", "embed_tokens"],
            "r": 3,
            "use_rslora": True,
            "rank_pattern": {"layers.1.mlp.up_proj": 4},
            "alpha_pattern": {"v_proj": 7},
        },
    ],
    "gpt2": [
        {"target_modules": ["c_attn", "c_fc"], "r": 2, "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_proj"], "r": 1, "fan_in_fan_out": True},
    ],
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, torch, peft, tmp_path_factory):
    """The folder of a base, those of two adapters, and the class of the model."""
    import transformers

    kind, place = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MODELS[kind](transformers).save_pretrained(place / "base")
    build = type(MODELS[kind](transformers))
    for i, options in enumerate(ADAPTERS[kind]):
        model = build.from_pretrained(place / "base")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        adapted.save_pretrained(place / f"{i}")
    return place / "base", [place / "0", place / "1"], build


def logits(torch, model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS)).logits.numpy()


@pytest.fixture(scope="module")
def tuned(torch, case):
    """A model whose parameters all differ from the base's."""
    base, _, build = case
    model = build.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(base.parent / "tuned")
    return base.parent / "tuned"


def merged(base, models, out, *options, method):
    named = [part for model in models for part in ("--model", str(model))]
    arguments = ["merge", "--quiet", "--method", method, "--base", str(base), *named]
    assert cli.main([*arguments, "--out", str(out), *map(str, options)]) == 0
    return out


@pytest.mark.parametrize("coefs", [(1, 1), (0.5, -1.5)])
def test_peft_gives_the_outputs_of_the_merged_model(torch, peft, case, tmp_path, coefs):
    base, models, build = case
    options = {"method": "task_arithmetic"}
    flags = ("--coef", *coefs)
    merged(base, models, tmp_path / "model", *flags, **options)
    merged(base, models, tmp_path / "lora", "--to-adapter", *flags, **options)
    expected = logits(torch, build.from_pretrained(tmp_path / "model"))
    start = build.from_pretrained(base)
    plain = logits(torch, start)
    found = peft.PeftModel.from_pretrained(start, tmp_path / "lora")
    actual = logits(torch, found)
    assert np.abs(expected - plain).max() > 0.02
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    whole = logits(torch, found.merge_and_unload())
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)


def test_one_adapter_comes_back(torch, peft, case, tmp_path):
    base, models, build = case
    for i, model in enumerate(models):
        out = tmp_path / f"{i}"
        flags = ("--to-adapter", "--coef", 1)
        merged(base, [model], out, *flags, method="task_arithmetic")
        expected, actual = (
            logits(
                torch,
                peft.PeftModel.from_pretrained(build.from_pretrained(base), folder),
            )
            for folder in (model, out)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_peft_merges_is_verified(torch, peft, case, tmp_path, capsys, dtype):
    base, models, build = case
    start = build.from_pretrained(base, dtype=getattr(torch, dtype))
    base = tmp_path / "base"
    start.save_pretrained(base)
    found = peft.PeftModel.from_pretrained(start, models[0])
    found.merge_and_unload().save_pretrained(tmp_path / "merged")
    given = ["verify", *map(str, (base, models[0], tmp_path / "merged"))]
    roundings = "1" if dtype == "float32" else "3"
    assert cli.main([*given, "--roundings", roundings]) == 0
    other = ["verify", *map(str, (base, models[1], tmp_path / "merged"))]
    assert cli.main([*other, "--roundings", "3"]) == 1
    assert "is NOT" in capsys.readouterr().out


def check_extracted(torch, peft, build, base, tuned, out):
    """An adapter of full rank gives the outputs of the model, merged and not."""
    arguments = ["extract", str(base), str(tuned), "--rank", "16", "--keep-rest"]
    assert cli.main([*arguments, "--out", str(out), "--quiet"]) == 0
    expected = logits(torch, build.from_pretrained(tuned))
    start = build.from_pretrained(base)
    plain = logits(torch, start)
    found = peft.PeftModel.from_pretrained(start, out)
    assert np.abs(expected - plain).max() > 0.02
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    close(logits(torch, found), expected)
    close(logits(torch, found.merge_and_unload()), expected)


def test_an_extracted_adapter_gives_the_outputs_of_the_model(
    torch, peft, case, tuned, tmp_path
):
    base, _, build = case
    check_extracted(torch, peft, build, base, tuned, tmp_path / "out")


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_an_adapter_of_a_file_without_the_classes_prefix(
    torch, peft, case, tuned, tmp_path
):
    base, _, build = case
    short = [without_prefix(x, tmp_path / x.name) for x in (base, tuned)]
    check_extracted(torch, peft, build, *short, tmp_path / "out")


TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE = {x: TEXT[x] for x in TEXT if x != "vocab_size"}
IMAGE |= {"image_size": 8, "patch_size": 4}


def vit(transformers):
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE))


def t5(transformers):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, **sizes)
    )


def llava(transformers):
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**IMAGE),
        image_token_index=19,
    )
    return transformers.LlavaForConditionalGeneration(config)


def clip(transformers):
    config = transformers.CLIPConfig(
        text_config={**TEXT, "projection_dim": 8, "eos_token_id": 1},
        vision_config={**IMAGE, "projection_dim": 8},
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


@pytest.mark.parametrize("make", [vit, t5, llava, clip])
def test_extracted_adapters_have_the_names_of_the_class(
    torch, peft, tmp_path, capsys, make
):
    """Files of ViT and LLaVA have other names than the modules of their classes."""
    import transformers

    torch.manual_seed(0)
    model = make(transformers)
    model.save_pretrained(tmp_path / "base")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    given = ["extract", str(tmp_path / "base"), str(tmp_path / "tuned")]
    options = ["--rank", "24", "--keep-rest", "--out", str(tmp_path / "out")]
    assert cli.main([*given, *options]) == 0
    told = capsys.readouterr().out
    alone = {"logit_scale"} if make is clip else set()
    assert ("not in the adapter (no adapter can keep them): 1 changed" in told) == bool(
        alone
    )
    start = type(model).from_pretrained(tmp_path / "base")
    found = peft.PeftModel.from_pretrained(start, tmp_path / "out")
    after = found.merge_and_unload().state_dict()
    for name, expected in model.state_dict().items():
        wanted = before[name] if name in alone else expected
        torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=2e-6)
    # The adapter is read on the base's file, whatever names that has.
    given = ["verify", *(str(tmp_path / x) for x in ("base", "out", "tuned"))]
    # An SVD is not exact: its errors are those of more than one rounding.
    assert cli.main([*given, "--roundings", "64"]) == bool(alone)
    told = capsys.readouterr().out
    assert all(f"| {name}" in told for name in alone)


def without_prefix(folder, new):
    """The checkpoint with the names that OpenAI's files have."""
    new.mkdir()
    for file in folder.glob("*.json"):
        shutil.copyfile(file, new / file.name)
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    save_file(short, new / "model.safetensors", {"format": "pt"})
    return new
