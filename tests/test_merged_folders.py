"""Merged folders are models: transformers loads them, whatever the architecture."""

import numpy as np
import pytest

from jaxarith import cli, hub, merge, task_vectors

TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "intermediate_size": 32}
GROUPS = TEXT | HEADS | {"num_key_value_heads": 1, "max_position_embeddings": 32}
IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "image_size": 8,
    "patch_size": 4,
} | HEADS
TOWER = HEADS | {"hidden_size": 16, "num_hidden_layers": 1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
# The class, its configuration, and what it does with a text or an image.
MODELS = {
    "llama": ("LlamaForCausalLM", GROUPS, "generate"),
    "qwen2": ("Qwen2ForCausalLM", GROUPS | {"tie_word_embeddings": True}, "generate"),
    "mistral": ("MistralForCausalLM", GROUPS, "generate"),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"vocab_size": 64}, "generate"),
    "t5": (
        "T5ForConditionalGeneration",
        T5 | {"vocab_size": 64, "decoder_start_token_id": 0},
        "generate",
    ),
    "bert": ("BertForSequenceClassification", TEXT | HEADS, "text"),
    "vit": ("ViTForImageClassification", IMAGES, "image"),
    "clip": (
        "CLIPModel",
        {
            "text_config": TOWER | {"vocab_size": 64},
            "vision_config": TOWER | {"image_size": 8, "patch_size": 4},
            "projection_dim": 8,
        },
        "both",
    ),
}


def outputs(torch, model, kind):
    texts = torch.arange(3, 13).reshape(2, 5)
    images = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
    with torch.no_grad():
        if kind == "generate":
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            return model.generate(texts, **options).float()
        if kind == "text":
            return model(input_ids=texts).logits
        if kind == "image":
            return model(pixel_values=images).logits
        return model(input_ids=texts, pixel_values=images).logits_per_image


@pytest.mark.parametrize("architecture", MODELS)
def test_a_merged_folder_loads_and_is_the_merge_in_memory(
    architecture, torch, tmp_path, monkeypatch
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    name, settings, kind = MODELS[architecture]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**settings)
    for i, folder in enumerate(("base", "a", "b")):
        torch.manual_seed(i)
        model_class(config).eval().save_pretrained(folder)
    status = cli.main(
        [
            *("merge", "--method", "ties", "--base", "base", "--density", "0.6"),
            *("--model", "a", "--model", "b", "--out", "merged", "--quiet"),
        ]
    )
    assert status == 0

    params_0 = hub.read("base")
    taus = [task_vectors.difference(hub.read(folder), params_0) for folder in "ab"]
    expected = merge.ties(params_0, taus, density=0.6)
    found = hub.read("merged")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor, np.asarray(expected[key]))

    model, info = model_class.from_pretrained("merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    model.save_pretrained("again")  # under the names of files; ViT has others within
    for key, tensor in hub.read("again").items():
        np.testing.assert_array_equal(tensor, found[key])
    assert torch.isfinite(outputs(torch, model.eval(), kind)).all()
