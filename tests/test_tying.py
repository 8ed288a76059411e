"""Adapters of tied heads and embeddings: merged as PEFT's `merge_and_unload` does."""

import json

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxarith import cli, merge, stream
from jaxarith.stream import tying

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
LLAMA = SIZES | {"vocab_size": 32, "intermediate_size": 8, "num_key_value_heads": 1}
GPT2 = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
KINDS = {
    "embed": {"modules_to_save": ["EMBED"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["EMBED", "lm_head"]},
    "ensured": {"modules_to_save": ["EMBED"], "ensure_weight_tying": True},
    "factors of the head": {"target_modules": ["lm_head"]},
    "factors of the embedding": {"target_modules": ["EMBED"]},
    "factors of both": {"target_modules": ["lm_head", "EMBED"]},
    "embed, factors of the head": {
        "modules_to_save": ["EMBED"],
        "target_modules": ["lm_head"],
    },
    "ensured factors": {"target_modules": ["EMBED"], "ensure_weight_tying": True},
}


T5 = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
STACKS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The class, its sizes, a layer to adapt and the embedding.
FAMILIES = {
    "Llama": ("LlamaForCausalLM", LLAMA, "q_proj", "embed_tokens"),
    "GPT2": ("GPT2LMHeadModel", GPT2, "c_attn", "wte"),
    "T5": (
        "T5ForConditionalGeneration",
        T5 | {"num_heads": 2, "decoder_start_token_id": 0},
        "q",
        "shared",
    ),
}


def logits(torch, model):
    tokens = torch.arange(8)[None]
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(tokens, **more).logits.numpy()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "kind", "head_in_file"),
    [
        *(("Llama", kind, stored) for kind in KINDS for stored in (False, True)),
        ("GPT2", "embed", False),
        ("GPT2", "factors of both", True),
        ("T5", "factors of the embedding", False),
        ("T5", "factors of the head", True),
    ],
)
def test_the_logits_are_those_of_peft(family, kind, head_in_file, torch, tmp_path):
    peft = pytest.importorskip("peft", reason="the oracle: pip install peft==0.21.2")
    import transformers

    name, sizes, layer, embedding = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    config = model_class.config_class(**sizes, tie_word_embeddings=True)
    model_class(config).save_pretrained(tmp_path / "base")
    if head_in_file:
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        [full] = [key for key in tensors if key.endswith(f"{embedding}.weight")]
        more = (HEAD, *STACKS[1:]) if family == "T5" else (HEAD,)
        tensors |= {name: tensors[full].copy() for name in more}
        save_file(tensors, file, {"format": "pt"})
    options = {
        key: [embedding if name == "EMBED" else name for name in value]
        if isinstance(value, list)
        else value
        for key, value in KINDS[kind].items()
    }
    options["target_modules"] = [layer, *options.get("target_modules", [])]
    base = model_class.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    live = logits(torch, adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    expected = logits(torch, model_class.from_pretrained(tmp_path / "peft"))
    if kind == "ensured factors":
        # PEFT wraps the head too, and adds the same factors once for each name.
        assert np.abs(expected - live).max() > 0.01
        expected = live

    status = cli.main(
        [
            *("merge", "--preset", "mergekit", "--method", "linear", "--weight", "1"),
            *("--model", f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", "--quiet"),
            *("--out", str(tmp_path / "out")),
        ]
    )
    assert status == 0
    actual = logits(torch, model_class.from_pretrained(tmp_path / "out"))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def make(folder, content, config):
    return checkpoints.write(folder, content, config=config)


def f32(seed):
    return checkpoints.tensors(seed, "f32")


def half(base, model, tmp_path):
    opened = stream.open_models(base, [model])
    stream.merge(merge.task_arithmetic, opened, tmp_path / "out", quiet=True)
    return opened, load_file(tmp_path / "out" / "model.safetensors")


def adapter(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_a_new_embedding_unties_the_head_which_keeps_its_values(tmp_path):
    tensors = f32(0)
    del tensors[HEAD]
    base = make(tmp_path / "base", tensors, TIED)
    new = tensors[EMBEDDING] + 1
    folder = adapter(tmp_path / "a", {f"base_model.model.{EMBEDDING}": new})
    opened, found = half(base, folder, tmp_path)
    np.testing.assert_array_equal(found[HEAD], tensors[EMBEDDING])
    np.testing.assert_allclose(found[EMBEDDING], new, rtol=1e-6)
    assert opened.untied and "apart" in " ".join(opened.notes)


def test_other_models_of_the_merge_get_a_head_that_is_their_embedding(tmp_path):
    tensors, other = f32(0), f32(1)
    del tensors[HEAD], other[HEAD]
    base = make(tmp_path / "base", tensors, TIED)
    plain = make(tmp_path / "plain", other, TIED)
    head = {f"base_model.model.{HEAD}": tensors[EMBEDDING] + 1}
    opened = stream.open_models(base, [plain, adapter(tmp_path / "a", head)])
    stream.merge(merge.task_arithmetic, opened, tmp_path / "out", quiet=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(found[HEAD], other[EMBEDDING] + 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[EMBEDDING], other[EMBEDDING], rtol=1e-5, atol=1e-6)


def test_a_head_that_differs_though_it_should_be_tied_unties_the_configuration(
    tmp_path, capsys
):
    base = make(tmp_path / "base", f32(0), TIED)
    other = make(tmp_path / "other", f32(1), TIED)
    arguments = ["--model", str(base), "--model", str(other), "--quiet"]
    out = tmp_path / "out"
    assert (
        cli.main(["merge", "--method", "average", *arguments, "--out", str(out)]) == 0
    )
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    facts = json.loads((out / "jaxarith_merge.json").read_text())
    assert "tie_word_embeddings is true, but its head and" in str(facts["notes"])


@pytest.mark.parametrize("kind", [{"model_type": "t5"}, {"is_encoder_decoder": True}])
def test_an_encoder_decoder_is_not_untied(kind, tmp_path):
    config = TIED | kind | {"architectures": ["BartForConditionalGeneration"]}
    base = make(tmp_path / "base", {"shared.weight": np.ones((4, 2), "f4")}, config)
    head = {"base_model.model.lm_head.weight": np.zeros((4, 2), "f4")}
    with pytest.raises(ValueError, match="an untied T5 scales its outputs"):
        stream.open_models(base, [adapter(tmp_path / "a", head)])


ENCODER_DECODER = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}


def of_stacks(folder):
    tensors = {name: np.ones((4, 2), "f4") for name in STACKS}
    return make(folder, tensors, ENCODER_DECODER | {"tie_word_embeddings": True})


@pytest.mark.parametrize("module", ["shared", "lm_head"])
def test_factors_move_a_tied_matrix_under_all_of_its_names(module, tmp_path):
    key = f"base_model.model.{module}.lora_"
    ends = (
        ("A.weight", "B.weight")
        if module == "lm_head"
        else ("embedding_A", "embedding_B")
    )
    a, b = np.ones((2, 2), "f4"), np.ones((4, 2), "f4")
    if module == "shared":
        a, b = b.T, a
    factors = dict(zip((key + end for end in ends), (a.copy(), b), strict=True))
    _, found = half(
        of_stacks(tmp_path / "base"), adapter(tmp_path / "a", factors), tmp_path
    )
    for name in (*STACKS, HEAD):
        if name in found:
            np.testing.assert_array_equal(found[name], 3 * np.ones((4, 2)))


def test_factors_of_one_stacks_embedding_are_refused_where_it_is_tied(tmp_path):
    key = "base_model.model.encoder.embed_tokens.lora_embedding_"
    factors = {f"{key}A": np.ones((2, 4), "f4"), f"{key}B": np.ones((2, 2), "f4")}
    base = of_stacks(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"moves encoder\.embed_tokens.*tied to shared"
    ):
        stream.open_models(base, [adapter(tmp_path / "a", factors)])


def test_pairs_are_known_from_configuration_and_files():
    tensors = {name: np.ones((4, 2)) for name in (EMBEDDING, "model.layers.0.w")}
    assert tying.pair(tensors, TIED) == (EMBEDDING, HEAD)
    assert tying.pair(tensors, TIED | {"tie_word_embeddings": False}) is None
    assert tying.pair(tensors, {"architectures": ["LlamaModel"]}) is None
    bert = {"bert.embeddings.word_embeddings.weight": np.ones((4, 2))}
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    assert tying.pair(bert, config).head == "cls.predictions.decoder.weight"


def test_an_adapter_of_a_quantised_base_says_so(tmp_path):
    base = make(tmp_path / "base", f32(0), TIED)
    factors = {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, 8)),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": np.ones((24, 2)),
    }
    name = "unsloth/llama-3-8b-bnb-4bit"
    folder = adapter(tmp_path / "a", factors, base_model_name_or_path=name)
    [note] = [x for x in stream.open_models(base, [folder]).notes if "trained on" in x]
    assert "which is quantised" in note
