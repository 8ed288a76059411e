"""Merges of slices: the layers of one model after those of another."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from checks import assert_close
from merge_command import fails, write

from jaxarith import cli, hub
from jaxarith.commands.merge import model_card
from jaxarith.merge import mergekit

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
PART = "self_attn.q_proj.weight"


def saved(transformers, torch, folder, name, seed, **options):
    torch.manual_seed(seed)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model = model_class(model_class.config_class(**LLAMA | options)).eval()
    with torch.no_grad():  # norms are all ones, and would be the same in all models
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(torch, tmp_path_factory):
    """Two Llamas of three and of four layers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llamas")
    return [
        saved(transformers, torch, folder / name, "Llama", i, num_hidden_layers=3 + i)
        for i, name in enumerate("ab")
    ]


@pytest.fixture
def merged(tmp_path):
    """A function that merges by a file, and returns the new folder and its tensors."""

    def run(text, *flags):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        path = write(tmp_path / f"{out.name}.yaml", text)
        assert cli.main(["merge", path, str(out), "--quiet", *flags]) == 0
        return out, hub.read(out)

    return run


def layer(tensors, index):
    prefix = f"model.layers.{index}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def generated(torch, folder):
    """The model, after it has made a text, and its logits."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, output_loading_info=True)  # pyright: ignore
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    texts = torch.arange(3, 13).reshape(2, 5)
    with torch.no_grad():
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert model.generate(texts, **options).shape == (2, 8)
        return model, model(texts).logits.numpy()


def passed(*sources, rest=""):
    lines = "".join(
        f"- sources: [{{model: {model}, layer_range: {[*layers]}}}]\n"
        for model, *layers in sources
    )
    return f"merge_method: passthrough\nslices:\n{lines}{rest}"


def test_layers_of_two_llamas_follow_each_other(torch, models, merged):
    a, b = models
    out, found = merged(passed((a, 0, 2), (b, 1, 3), (b, 2, 4)))
    ours, theirs = hub.read(a), hub.read(b)
    sources = [(ours, 0), (ours, 1), (theirs, 1), (theirs, 2), (theirs, 2), (theirs, 3)]
    for i, (tensors, index) in enumerate(sources):
        assert_same(layer(found, i), layer(tensors, index))
    assert not layer(found, len(sources))
    for name, tensors in (
        ("model.embed_tokens.weight", ours),
        ("model.norm.weight", theirs),
        ("lm_head.weight", theirs),
    ):
        np.testing.assert_array_equal(found[name], tensors[name])
    model, _ = generated(torch, out)
    assert model.config.num_hidden_layers == 6
    facts = json.loads((out / "jaxarith_merge.json").read_text())
    assert [x["model"] for x in facts["inputs"]] == models
    digests = [hashlib.sha256(weights(model)).hexdigest() for model in models]
    assert [[*x["sha256"].values()] for x in facts["inputs"]] == [[x] for x in digests]
    recipe = facts["recipe"]
    again, tensors = merged(model_card.dump(recipe))
    assert_same(tensors, found)
    assert json.loads((again / "jaxarith_merge.json").read_text())["recipe"] == recipe


def test_two_qwen3_keep_what_each_layer_is(torch, tmp_path, merged):
    transformers = pytest.importorskip("transformers")
    full, sliding = "full_attention", "sliding_attention"
    options = {"head_dim": 8, "sliding_window": 4, "use_sliding_window": True}
    kinds = {"a": [full, sliding, sliding], "b": [sliding, full, sliding, full]}
    a, b = (
        saved(
            *(transformers, torch, tmp_path / name, "Qwen3", i),
            **options,
            num_hidden_layers=len(types),
            layer_types=types,
            max_window_layers=2,
        )
        for i, (name, types) in enumerate(kinds.items())
    )
    out, found = merged(passed((a, 0, 3), (b, 0, 2), (b, 1, 4)))
    model, logits = generated(torch, out)
    assert model.config.layer_types == [
        *kinds["a"],
        *kinds["b"][:2],
        *kinds["b"][1:],
    ]
    for i, (folder, index) in enumerate([(a, 2), (b, 0), (b, 1), (b, 1)], start=2):
        assert_same(layer(found, i), layer(hub.read(folder), index))
    assert np.isfinite(logits).all()


def test_copies_that_pass_on_what_they_get_change_nothing(torch, models, merged):
    a, _ = models
    zeros = "[{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0}, {value: 1}]"
    text = passed((a, 0, 2), (a, 1, 2), (a, 2, 3))
    second = "layer_range: [1, 2]"
    assert second in text
    text = text.replace(second, f"{second}, parameters: {{scale: {zeros}}}")
    out, found = merged(text)
    assert len({name.split(".")[2] for name in found if ".layers." in name}) == 4
    expected = generated(torch, a)[1]
    np.testing.assert_allclose(generated(torch, out)[1], expected, rtol=1e-5, atol=1e-6)


def test_one_slice_of_all_layers_is_the_model(models, merged):
    for model in models:
        count = 3 + models.index(model)
        out, found = merged(passed((model, 0, count)))
        assert_same(found, hub.read(model))
        config = json.loads((out / "config.json").read_text())
        assert config == hub.read_json(model)


def test_slices_are_merges_of_the_layers_that_they_take(models, merged):
    a, b = models
    text = f"""
merge_method: slerp
base_model: {a}
slices:
- sources: [{{model: {a}, layer_range: [0, 2]}}, {{model: {b}, layer_range: [0, 2]}}]
- sources: [{{model: {b}, layer_range: [1, 4]}}, {{model: {a}, layer_range: [0, 3]}}]
  parameters: {{t: [0, 1]}}
parameters:
  t: [{{filter: mlp, value: 0.3}}, {{value: 0.6}}]
"""
    _, found = merged(text)
    ours, theirs = hub.read(a), hub.read(b)
    for i in range(5):
        first = layer(ours, i if i < 2 else i - 2)
        second = layer(theirs, i if i < 2 else i - 1)
        zero = {name: np.zeros_like(tensor) for name, tensor in first.items()}

        def t(name, i=i):
            return (0.3 if "mlp" in name else 0.6) if i < 2 else (i - 2) / 2

        expected = mergekit.slerp(zero, [first, second], t=t)
        assert_same(layer(found, i), {n: np.asarray(x) for n, x in expected.items()})
    # Outside of layers t is that of the first and of the last slice, at depth 0.
    np.testing.assert_array_equal(found["lm_head.weight"], ours["lm_head.weight"])
    assert not np.allclose(
        found["model.embed_tokens.weight"], ours["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_slices_of_whole_models_are_their_merge(method, torch, tmp_path, merged):
    transformers = pytest.importorskip("transformers")
    base, a, b = (
        saved(transformers, torch, tmp_path / n, "Llama", i, num_hidden_layers=4)
        for i, n in enumerate(("base", "a", "b"))
    )
    density = "" if method == "linear" else ", density: 0.5"
    rest = f"merge_method: {method}\n" + (
        f"base_model: {base}\n" if method != "linear" else ""
    )
    models = [(a, 0.25), (b, 0.5)]

    def sources(layers):
        return "\n".join(
            f"  - {{model: {model}, {layers}parameters: {{weight: {w}{density}}}}}"
            for model, w in models
        )

    _, whole = merged(f"models:\n{sources('')}\n{rest}")
    for ranges in ([(0, 4)], [(0, 1), (1, 4)], [(0, 2), (2, 2), (2, 4)]):
        slices = "".join(
            f"- sources:\n{sources(f'layer_range: [{x}, {y}], ')}\n" for x, y in ranges
        )
        _, found = merged(f"slices:\n{slices}{rest}")
        assert_same(found, whole)


def test_a_layer_that_is_taken_twice_is_written_twice(models, merged):
    a, _ = models
    out, found = merged(passed((a, 1, 2), (a, 1, 2), (a, 1, 2)))
    one = layer(hub.read(a), 1)
    for i in range(3):
        assert_same(layer(found, i), one)
    size = sum(tensor.nbytes for tensor in found.values())
    assert (out / "model.safetensors").stat().st_size > size


def test_a_slice_without_layers_has_the_embedding_alone(models, merged):
    a, b = models
    _, found = merged(passed((b, 0, 0), (a, 0, 3)))
    ours, theirs = hub.read(a), hub.read(b)
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(found[name], theirs[name])
    assert_same({**found, name: 0}, {**ours, name: 0})


def test_fewer_layers_than_the_models_have(torch, models, merged):
    a, b = models
    out, found = merged(passed((b, 0, 2)))
    assert generated(torch, out)[0].config.num_hidden_layers == 2
    assert_same(layer(found, 1), layer(hub.read(b), 1))
    text = f"""
merge_method: linear
slices:
- sources:
  - {{model: {a}, layer_range: [0, 3], parameters: {{weight: 1}}}}
  - {{model: {b}, layer_range: [0, 3], parameters: {{weight: 3}}}}
"""
    _, found = merged(text)
    ours, theirs = hub.read(a), hub.read(b)
    np.testing.assert_allclose(
        layer(found, 2)[PART],
        layer(ours, 2)[PART] / 4 + 3 * layer(theirs, 2)[PART] / 4,
        rtol=1e-6,
    )


def test_an_adapter_moves_the_layers_that_a_slice_takes(models, tmp_path, merged):
    peft = pytest.importorskip("peft")
    import transformers

    a, b = models
    model = transformers.AutoModelForCausalLM.from_pretrained(b)
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = {
        name: tensor.numpy()
        for name, tensor in adapted.merge_and_unload().state_dict().items()
    }
    _, found = merged(passed((a, 0, 1), (f"{b}+{tmp_path / 'adapter'}", 2, 4)))
    for i in (1, 2):
        moved, still = layer(expected, i + 1), layer(hub.read(b), i + 1)
        assert not np.allclose(moved[PART], still[PART])
        assert_close(layer(found, i), moved, 1e-6)


def test_task_vectors_are_measured_from_the_base_of_the_same_range(models, merged):
    a, b = models
    text = f"""
merge_method: task_arithmetic
base_model: {a}
slices:
- sources: [{{model: {b}, layer_range: [0, 2]}}]
- sources:
  - {{model: {b}, layer_range: [1, 3]}}
  - {{model: {a}, layer_range: [0, 2]}}
parameters: {{weight: 0.5}}
"""
    _, found = merged(text)
    ours, theirs = hub.read(a), hub.read(b)
    for i, j, k in ((0, 0, 0), (1, 1, 1), (2, 0, 1), (3, 1, 2)):
        expected = layer(ours, j)[PART] / 2 + layer(theirs, k)[PART] / 2
        np.testing.assert_allclose(layer(found, i)[PART], expected, atol=1e-6)


def test_tied_heads_stay_tied_and_others_are_written(torch, tmp_path, models, merged):
    transformers = pytest.importorskip("transformers")
    options = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    tied = [
        saved(transformers, torch, tmp_path / f"t{i}", "Llama", 5 + i, **options)
        for i in range(2)
    ]
    out, found = merged(passed((tied[0], 0, 1), (tied[1], 1, 2)))
    assert "lm_head.weight" not in found
    assert generated(torch, out)[0].config.tie_word_embeddings
    notes = json.loads((out / "jaxarith_merge.json").read_text())["notes"]
    assert any("head is tied to the embedding, which comes from" in x for x in notes)

    for first, last in ((tied[0], models[0]), (models[0], tied[0])):
        out, found = merged(passed((first, 0, 1), (last, 1, 2)))
        head = hub.read(last)
        name = "lm_head.weight" if last == models[0] else "model.embed_tokens.weight"
        np.testing.assert_array_equal(found["lm_head.weight"], head[name])
        model, _ = generated(torch, out)
        assert not model.config.tie_word_embeddings
        np.testing.assert_array_equal(model.lm_head.weight.detach(), head[name])


def test_other_names_of_stacks(torch, tmp_path, merged):
    transformers = pytest.importorskip("transformers")
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**gpt2, vocab_size=64)
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        # The second file has other names: no `transformer.` in front.
        model = transformers.GPT2LMHeadModel(config)
        (model if name == "a" else model.transformer).save_pretrained(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    out, found = merged(passed((a, 0, 2), (b, 1, 2)))
    model, _ = generated(torch, out)
    assert model.config.n_layer == 3
    for name in ("h.2.mlp.c_fc.weight", "ln_f.weight"):
        ours = name.replace("h.2", "h.1")
        np.testing.assert_array_equal(found[f"transformer.{name}"], hub.read(b)[ours])


def test_the_language_model_beside_an_encoder_of_images(torch, tmp_path, merged):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    images = small | {"num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**LLAMA, num_hidden_layers=2),
        vision_config=transformers.CLIPVisionConfig(**images),
        image_token_index=60,
    )
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        model = transformers.LlavaForConditionalGeneration(config)
        model.save_pretrained(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    out, found = merged(passed((a, 0, 2), (b, 0, 2)))
    ours, theirs = hub.read(a), hub.read(b)
    for name, tensor in found.items():
        if "layers.3." in name:
            twin = theirs[name.replace("layers.3.", "layers.1.")]
        else:
            from_first = (
                "vision" in name or "embed_tokens" in name or "layers.0" in name
            )
            twin = (ours if from_first or "projector" in name else theirs).get(name)
        if twin is not None and ".layers.1." not in name:
            np.testing.assert_array_equal(tensor, twin)
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    notes = json.loads((out / "jaxarith_merge.json").read_text())["notes"]
    assert any(x.endswith(f"the encoder beside them comes from {a}") for x in notes)
    model, info = load(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert model.config.text_config.num_hidden_layers == 4
    assert model.config.vision_config.num_hidden_layers == 3
    texts = torch.tensor([[1, 60, 60, 60, 60, 2]])
    assert (
        model(input_ids=texts, pixel_values=torch.zeros(1, 3, 8, 8)).logits.shape[1]
        == 6
    )


def test_a_dry_run_plans_slices(models, tmp_path, capsys):
    text = passed((models[0], 0, 2), (models[1], 0, 4))
    text += "parameters: {scale: [{filter: nothing, value: 2}]}\n"
    path = write(tmp_path / "config.yaml", text)
    assert cli.main(["merge", path, str(tmp_path / "out"), "--dry-run"]) == 0
    found = capsys.readouterr().out
    assert "lists the 6 layers of the slices" in found
    assert "the filter 'nothing' fits no tensor" in found
    assert not (tmp_path / "out").exists()


def test_models_of_other_sizes_are_refused(torch, tmp_path, models, capsys):
    transformers = pytest.importorskip("transformers")
    options = {"num_hidden_layers": 2, "intermediate_size": 40}
    wide = saved(transformers, torch, tmp_path / "wide", "Llama", 7, **options)
    path = write(tmp_path / "c.yaml", passed((models[0], 0, 1), (wide, 1, 2)))
    message = fails(capsys, path, tmp_path / "out")
    assert "c.yaml, line 4: " in message and "mlp.down_proj" in message


MISTAKES = {
    "range": ([("a", 0, 2), ("b", 1, 5)], 4, r"\[1, 5\], but .*b has 4 layers"),
    "unknown": ([("a", 0, 2), ("nowhere", 0, 1)], 4, "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_line(mistake, models, tmp_path, capsys):
    sources, line, message = MISTAKES[mistake]
    known = dict(zip("ab", models, strict=True))
    text = passed(*((known.get(n, f"{tmp_path}/{n}"), *r) for n, *r in sources))
    path = write(tmp_path / "config.yaml", text)
    found = fails(capsys, path, tmp_path / "out")
    assert re.search(rf"config\.yaml, line {line}: .*{message}", found)
