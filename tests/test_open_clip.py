"""OpenCLIP's checkpoints: against transformers' CLIPModel with the same weights."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from clip_checkpoint import LAYOUT
from safetensors.numpy import load_file, save_file
from tiny import random_params, tiny_clip_config

from jaxarith import cli, hub, tree
from jaxarith.data import images
from jaxarith.hub import open_clip
from jaxarith.models import clip

MODEL = {
    "embed_dim": 12,
    "vision_cfg": {
        **{"image_size": 12, "layers": 2, "width": 24, "patch_size": 4},
        **{"head_width": 8, "mlp_ratio": 40 / 24},
    },
    "text_cfg": {
        **{"context_length": 10, "vocab_size": 30, "width": 16, "heads": 2},
        "layers": 2,
    },
}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.fixture(scope="module")
def params():
    return random_params(0, LAYOUT)


@pytest.fixture(scope="module")
def tensors(params):
    """The parameters as OpenCLIP names and lays them out, written by hand."""
    return renamed(params)


def renamed(params):
    found = {
        "visual.class_embedding": params["vision_model"]["embeddings"][
            "class_embedding"
        ],
        "visual.conv1.weight": params["vision_model"]["embeddings"]["patch_embedding"][
            "kernel"
        ].transpose(3, 2, 0, 1),
        "visual.proj": params["visual_projection"]["kernel"],
        "text_projection": params["text_projection"]["kernel"],
        "logit_scale": params["logit_scale"],
        "attn_mask": np.zeros((10, 10), np.float32),
    }
    text, vision = params["text_model"], params["vision_model"]
    position = vision["embeddings"]["position_embedding"]["embedding"]
    found["visual.positional_embedding"] = position
    found["positional_embedding"] = text["embeddings"]["position_embedding"][
        "embedding"
    ]
    found["token_embedding.weight"] = text["embeddings"]["token_embedding"]["embedding"]
    for name, norm in (
        ("visual.ln_pre", vision["pre_layrnorm"]),
        ("visual.ln_post", vision["post_layernorm"]),
        ("ln_final", text["final_layer_norm"]),
    ):
        found |= {f"{name}.weight": norm["scale"], f"{name}.bias": norm["bias"]}
    for prefix, tower in (("visual.", vision), ("", text)):
        for i, block in tower["encoder"]["layers"].items():
            place = f"{prefix}transformer.resblocks.{i}"
            attention = [block["self_attn"][f"{role}_proj"] for role in "qkv"]
            fused = [part["kernel"].T for part in attention]
            found[f"{place}.attn.in_proj_weight"] = np.concatenate(fused)
            biases = [part["bias"] for part in attention]
            found[f"{place}.attn.in_proj_bias"] = np.concatenate(biases)
            for name, linear in (
                ("attn.out_proj", block["self_attn"]["out_proj"]),
                ("mlp.c_fc", block["mlp"]["fc1"]),
                ("mlp.c_proj", block["mlp"]["fc2"]),
            ):
                found[f"{place}.{name}.weight"] = linear["kernel"].T
                found[f"{place}.{name}.bias"] = linear["bias"]
            for number in "12":
                norm = block[f"layer_norm{number}"]
                found[f"{place}.ln_{number}.weight"] = norm["scale"]
                found[f"{place}.ln_{number}.bias"] = norm["bias"]
    return {name: np.asarray(leaf, order="C") for name, leaf in found.items()}


def write_config(folder, **changes):
    content = {"model_cfg": {**MODEL, **changes}, "preprocess_cfg": PREPROCESS}
    (folder / open_clip.CONFIG).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path, tensors):
    folder = tmp_path / "open"
    folder.mkdir()
    save_file(tensors, folder / "open_clip_model.safetensors")
    write_config(folder)
    return folder


def assert_same(found, params):
    expected = tree.flatten(params)
    found = tree.flatten(found)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], path)


@pytest.mark.torch
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_features_are_those_of_transformers(torch, folder, params, quick_gelu):
    """The oracle gets its weights from the tree, by names written in `to_torch`."""
    from transformers import CLIPConfig, CLIPModel

    write_config(folder, **({"quick_gelu": True} if quick_gelu else {}))
    act = "quick_gelu" if quick_gelu else "gelu"
    oracle = CLIPModel(CLIPConfig(**tiny_clip_config(act, 2))).eval()
    state = hub.layouts.to_torch(tree.flatten(params))
    oracle.load_state_dict(
        {name: torch.tensor(leaf) for name, leaf in state.items()}, strict=True
    )
    model = clip.load(folder)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 12, 12, 3)).astype(np.float32)
    ids = np.array([[28, 3, 9, 29, 0, 0], [28, 7, 29, 0, 0, 0]])
    with torch.no_grad():
        of_images = oracle.get_image_features(
            torch.tensor(pixels.transpose(0, 3, 1, 2))
        ).pooler_output
        of_texts = oracle.get_text_features(torch.tensor(ids)).pooler_output
    found = clip.image_encoder(model.config)(model.params, pixels)
    np.testing.assert_allclose(found, of_images, rtol=1e-5, atol=1e-5)
    found = clip.text_encoder(model.config)(model.params, ids)
    np.testing.assert_allclose(found, of_texts, rtol=1e-5, atol=1e-5)
    assert np.ptp(of_images.numpy(), axis=0).min() > 1e-3


def test_folders_and_files_of_safetensors_load(folder, params):
    model = clip.load(folder)
    assert_same(model.params, params)
    assert model.config.vision.hidden_act == "gelu"  # OpenCLIP's default
    assert model.config.vision.num_attention_heads == 3
    assert model.config.text.num_attention_heads == 2
    assert_same(clip.load(folder / "open_clip_model.safetensors").params, params)
    preprocess = images.Preprocessing.from_folder(folder)
    assert (preprocess.size, preprocess.mean) == (12, (0.1, 0.2, 0.3))


def test_folders_of_both_formats_are_those_of_transformers(folder, params):
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    hub.save(folder.parent / "clip", other, tiny_clip_config())
    shutil.copytree(folder.parent / "clip", folder, dirs_exist_ok=True)
    assert_same(clip.load(folder).params, other)


@pytest.mark.torch
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "epoch_16.pt"])
def test_files_of_pytorch_load(torch, folder, tensors, params, name, prefix):
    (folder / "open_clip_model.safetensors").unlink()
    state = {f"{prefix}{key}": torch.tensor(leaf) for key, leaf in tensors.items()}
    nested = name.startswith("epoch")
    torch.save({"epoch": 16, "state_dict": state} if nested else state, folder / name)
    assert_same(clip.load(folder / name if nested else folder).params, params)


@pytest.mark.torch
def test_bfloat16_keeps_its_bits(torch, tmp_path, folder, tensors):
    state = {key: torch.tensor(leaf).bfloat16() for key, leaf in tensors.items()}
    torch.save(state, folder / "half.bin")
    stored = open_clip.open_file(folder / "half.bin").tensors
    name = "visual.ln_pre.weight"
    found = stored["vision_model.pre_layrnorm.weight"].read()
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found.astype("f4"), state[name].float().numpy())


class Encoder:
    """What the papers' pickled image encoders are to PyTorch."""


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pickled_models_are_refused_with_the_reason(torch, folder):
    file = folder / "finetuned.pt"
    torch.save(Encoder(), file)
    with pytest.raises(ValueError, match="runs code when it is opened") as error:
        clip.load(file)
    assert "Encoder" in str(error.value)
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, str(folder / "ViT-B-32.pt"))
    with pytest.raises(ValueError, match=r"TorchScript archive, as OpenAI's are"):
        clip.load(folder / "ViT-B-32.pt")
    torch.save({"lr": 0.1}, file)
    with pytest.raises(ValueError, match="not hold a state dict"):
        clip.load(file)


def test_without_pytorch_the_error_names_the_install(folder, monkeypatch):
    file = folder / "model.pt"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        clip.load(file)


def test_the_activation_is_stated_or_asked_for(folder, tensors):
    """Without a configuration heads are known of some widths alone."""
    (folder / open_clip.CONFIG).unlink()
    file = folder / "open_clip_model.safetensors"
    with pytest.raises(ValueError, match="nothing states the activation"):
        clip.load(folder)
    with pytest.raises(ValueError, match="how many heads"):
        clip.load(folder, hidden_act="gelu")
    sizes = {name: np.array(1) for name in open_clip._OF_OPENAI}
    save_file({**tensors, **sizes}, file)
    with pytest.raises(
        ValueError, match="quick_gelu according to its tensors, as all of OpenAI"
    ):
        clip.load(folder, hidden_act="gelu")
    write_config(folder, quick_gelu=True)
    with pytest.raises(ValueError, match=f"quick_gelu according to {open_clip.CONFIG}"):
        clip.load(folder, hidden_act="gelu")
    assert clip.load(folder).config.text.hidden_act == "quick_gelu"


def test_heads_of_known_widths_are_64_wide(tmp_path):
    """Of ViT-B/32 from OpenAI, but for its depth and its vocabulary."""
    sizes = {"hidden_size": 768, "intermediate_size": 8, "num_hidden_layers": 1}
    raw = tiny_clip_config()
    raw["vision_config"] |= {**sizes, "num_attention_heads": 12}
    raw["text_config"] |= {**sizes, "hidden_size": 512, "num_attention_heads": 8}
    params = random_params(0, clip.layout(clip.CLIPConfig.from_json(raw)))
    marks = {name: np.array(1) for name in open_clip._OF_OPENAI}
    save_file({**renamed(params), **marks}, tmp_path / "clip.safetensors")
    file = open_clip.open_file(tmp_path / "clip.safetensors")
    config = open_clip.read_config(file)
    assert config["vision_config"]["num_attention_heads"] == 12
    assert config["text_config"]["num_attention_heads"] == 8
    assert config["vision_config"]["hidden_act"] == "quick_gelu"
    assert config["vision_config"]["image_size"] == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_logit_bias": -10}, "init_logit_bias in model_cfg"),
        ({"vision_cfg": {**MODEL["vision_cfg"], "timm_model_name": "x"}}, "in vision"),
        ({"text_cfg": {**MODEL["text_cfg"], "hf_model_name": "x"}}, "in text_cfg"),
        ({"text_cfg": None}, "has no text_cfg"),
    ],
)
def test_other_architectures_are_refused(folder, change, said):
    write_config(folder, **change)
    with pytest.raises(ValueError, match=said):
        clip.load(folder)


def test_other_ways_to_resize_are_refused(folder):
    content = {"model_cfg": MODEL, "preprocess_cfg": {"resize_mode": "squash"}}
    (folder / open_clip.CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="resize_mode 'squash'"):
        images.Preprocessing.from_folder(folder)


def test_what_does_not_fit_is_listed(folder, tensors):
    file = folder / "open_clip_model.safetensors"
    fewer = {n: x for n, x in tensors.items() if n != "visual.ln_post.bias"}
    save_file({**fewer, "text.extra": np.zeros(2, np.float32)}, file)
    with pytest.raises(ValueError) as error:
        clip.load(folder)
    assert "- vision_model/post_layernorm/bias" in str(error.value)
    assert "+ text/extra" in str(error.value)
    hub.save(folder / "clip", random_params(0, LAYOUT), tiny_clip_config())
    with pytest.raises(ValueError, match=r"has no visual\.conv1\.weight"):
        clip.load(folder / "clip" / "model.safetensors")


def test_convert_makes_a_folder_of_transformers(tmp_path, folder, params, capsys):
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    new = tmp_path / "new"
    assert_same(hub.load(new, LAYOUT), params)
    assert (new / "vocab.json").exists() and not (new / open_clip.CONFIG).exists()
    model = clip.load(new)
    assert model.config == clip.load(folder).config
    assert images.Preprocessing.from_folder(new).std == (0.4, 0.5, 0.6)
    hub.save(tmp_path / "same", params, hub.read_json(new))
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert load_file(new / "model.safetensors").keys() == same.keys()


@pytest.mark.torch
def test_converted_folders_load_in_transformers(torch, tmp_path, folder):
    from transformers import CLIPModel

    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    _, info = CLIPModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}


def test_convert_of_a_lone_file_takes_nothing_from_beside_it(tmp_path, folder, capsys):
    (folder / "tokenizer.json").write_text("{}")
    file = folder / "open_clip_model.safetensors"
    assert cli.main(["convert", str(file), str(tmp_path / "new")]) == 0
    assert "no tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "new" / "tokenizer.json").exists()


def test_convert_refuses_options_that_do_not_apply(tmp_path, folder, capsys):
    out = str(tmp_path / "new")
    assert cli.main(["convert", str(folder), out, "--names", "keep"]) == 1
    assert "always converted" in capsys.readouterr().err
    hub.save(tmp_path / "clip", random_params(0, LAYOUT), tiny_clip_config())
    words = ["convert", str(tmp_path / "clip"), out, "--hidden-act", "gelu"]
    assert cli.main(words) == 1
    assert "for models of OpenCLIP" in capsys.readouterr().err


def test_merges_name_the_conversion(tmp_path, folder, capsys):
    words = ["merge", "--method", "average", "--model", str(folder)]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "jaxarith convert" in capsys.readouterr().err


def test_tokenizers_are_openclips_or_asked_for(folder):
    model = clip.load(folder)
    with pytest.raises(FileNotFoundError, match="openai/clip-vit-base-patch32"):
        clip.zero_shot_head(model, ["cat"], ["a {}"])
    for file in clip.TINY_CLIP.glob("*token*"):
        shutil.copy(file, folder)
    tokenizer = clip._tokenizer(folder)
    expected = clip._tokenizer(clip.TINY_CLIP)("a photo of a 3")["input_ids"]
    assert tokenizer("a photo of a 3")["input_ids"] == expected
