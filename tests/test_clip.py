"""The CLIP port against transformers' PyTorch model, block by block."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_not_degenerate
from layouts import generate
from tiny import random_params, tiny_clip, tiny_clip_config

from jaxarith import hub, tree
from jaxarith.hub import pickles
from jaxarith.merge import capture
from jaxarith.models import clip

END = 29  # the end token of the tiny vocabulary, and its largest
TEXTS = [[28, 3, 4, END], [28, 5, END], [28, 6, 7, 8, 9, 5, END], [28, END]]
close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def random_clip(torch):
    """Makes transformers' tiny CLIP; no weight is zero or one, LayerNorms included."""
    from transformers import CLIPConfig, CLIPModel

    def make(hidden_act="quick_gelu", eos_token_id=END):
        config = CLIPConfig(**tiny_clip_config(hidden_act, eos_token_id))
        model = CLIPModel(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                is_scale = "norm" in name and name.endswith("weight")
                parameter.copy_(0.3 * noise + is_scale)
        return model

    return make


def random_images():
    return np.random.default_rng(1).normal(size=(3, 12, 12, 3)).astype(np.float32)


def padded(pad):
    length = max(map(len, TEXTS))
    return np.array([text + [pad] * (length - len(text)) for text in TEXTS])


def load(model, folder):
    model.save_pretrained(folder)
    config = clip.CLIPConfig.from_json(hub.read_json(folder))
    return config, hub.load(folder, clip.layout(config))


def oracle_image_features(torch, model, images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.get_image_features(pixel_values=pixels).pooler_output.numpy()


def oracle_text_features(torch, model, input_ids, mask=None):
    mask = None if mask is None else torch.from_numpy(mask)
    with torch.no_grad():
        output = model.get_text_features(
            input_ids=torch.from_numpy(input_ids), attention_mask=mask
        )
    return output.pooler_output.numpy()


# Features and hidden states.


@pytest.mark.torch
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_features_equal_those_of_transformers(torch, random_clip, tmp_path, hidden_act):
    model = random_clip(hidden_act)
    config, params = load(model, tmp_path)
    assert config == tiny_clip(hidden_act)

    images = random_images()
    expected = oracle_image_features(torch, model, images)
    assert_not_degenerate(expected)
    actual = clip.image_encoder(config)(params, images)
    np.testing.assert_allclose(actual, expected, **close)

    input_ids = padded(END)
    expected = oracle_text_features(torch, model, input_ids)
    assert_not_degenerate(expected)
    actual = clip.text_encoder(config)(params, input_ids)
    np.testing.assert_allclose(actual, expected, **close)

    assert params["logit_scale"].shape == ()
    assert params["logit_scale"] == model.logit_scale.item()


@pytest.mark.torch
def test_activations_are_told_apart(random_clip, tmp_path):
    config, params = load(random_clip("gelu"), tmp_path)
    images = random_images()
    gelu = clip.image_encoder(config)(params, images)
    quick_gelu = clip.image_encoder(tiny_clip("quick_gelu"))(params, images)
    assert np.abs(gelu - quick_gelu).max() > 1e-3


@pytest.mark.torch
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_every_block_equals_that_of_transformers(torch, random_clip, tmp_path, tower):
    model = random_clip()
    config, params = load(model, tmp_path)
    if tower == "vision":
        module, inputs = clip.ImageTower(config), random_images()
        blocks = model.vision_model.encoder.layers
    else:
        module, inputs = clip.TextTower(config), padded(END)
        blocks = model.text_model.encoder.layers

    expected = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, output: expected.append(output))
    if tower == "vision":
        oracle_image_features(torch, model, inputs)
    else:
        oracle_text_features(torch, model, inputs)
    # A block may return its output in a tuple.
    expected = [x[0] if isinstance(x, tuple) else x for x in expected]

    _, state = module.apply(
        {"params": params}, inputs, capture_intermediates=True, mutable="intermediates"
    )
    layers = state["intermediates"][f"{tower}_model"]["encoder"]["layers"]
    assert len(expected) == 2
    for i, hidden in enumerate(expected):
        assert hidden.std() > 1e-2
        [actual] = layers[str(i)]["__call__"]
        if tower == "vision" and i == 1:  # nothing reads the other tokens
            hidden = hidden[:, :1]
        np.testing.assert_allclose(actual, hidden.numpy(), **close)


@pytest.mark.torch
@pytest.mark.parametrize("eos_token_id", [END, 2, 5])
@pytest.mark.parametrize("pad", [END, 1, 0])
def test_padded_texts_pool_where_transformers_does(
    torch, random_clip, tmp_path, eos_token_id, pad
):
    """The true end token, OpenAI's wrong one, and one that is not the largest."""
    model = random_clip(eos_token_id=eos_token_id)
    config, params = load(model, tmp_path)
    assert config.text.eos_token_id == eos_token_id
    input_ids = padded(pad)
    actual = clip.text_encoder(config)(params, input_ids)
    expected = oracle_text_features(torch, model, input_ids)
    np.testing.assert_allclose(actual, expected, **close)


@pytest.mark.torch
def test_attention_mask_of_the_padding_would_change_nothing(
    torch, random_clip, tmp_path
):
    model = random_clip()
    config, params = load(model, tmp_path)
    input_ids = padded(1)
    mask = (input_ids != 1).astype(np.int64)
    actual = clip.text_encoder(config)(params, input_ids)
    expected = oracle_text_features(torch, model, input_ids, mask)
    np.testing.assert_allclose(actual, expected, **close)


def test_text_features_do_not_depend_on_what_follows_the_end():
    """Exactly zero gradient, not a small one."""
    config = tiny_clip()
    params = random_params(0, clip.layout(config))
    before, after = [28, 3, 4, 5, END], [6, 7, 8]
    encode = clip.text_encoder(config)

    def feature(embeddings):
        text = {**params["text_model"], "embeddings": embeddings}
        return encode({**params, "text_model": text}, jnp.array([before + after])).sum()

    gradient = jax.jit(jax.grad(feature))(params["text_model"]["embeddings"])
    words = gradient["token_embedding"]["embedding"]
    positions = gradient["position_embedding"]["embedding"]
    assert (words[jnp.array(after)] == 0).all()
    assert (positions[len(before) :] == 0).all()
    assert (jnp.abs(words[jnp.array(before)]).max(axis=-1) > 1e-4).all()
    assert (jnp.abs(positions[: len(before)]).max(axis=-1) > 1e-4).all()


def test_every_patch_reaches_the_image_features():
    config = tiny_clip()
    params = random_params(0, clip.layout(config))
    encode = clip.image_encoder(config)
    gradient_of = jax.jit(jax.grad(lambda x: encode(params, x).sum()))
    gradient = gradient_of(random_images())
    assert (jnp.abs(gradient) > 0).all()


def test_towers_read_only_their_own_leaves():
    config = tiny_clip()
    params = random_params(0, clip.layout(config))
    encode = clip.image_encoder(config)
    part = tree.select(params, clip.IMAGE_ENCODER)
    np.testing.assert_array_equal(
        encode(params, random_images()), encode(part, random_images())
    )


# Files, from transformers and to it.


@pytest.mark.torch
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_saved_checkpoint_loads_in_transformers_with_same_features(
    torch, tmp_path, hidden_act
):
    from transformers import CLIPModel

    config = tiny_clip(hidden_act)
    params = random_params(1, clip.layout(config))
    hub.save(tmp_path / "clip", params, tiny_clip_config(hidden_act))
    model, info = CLIPModel.from_pretrained(
        tmp_path / "clip", output_loading_info=True, attn_implementation="eager"
    )
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()

    images, input_ids = random_images(), padded(END)
    expected = oracle_image_features(torch, model, images)
    assert_not_degenerate(expected)
    actual = clip.image_encoder(config)(params, images)
    np.testing.assert_allclose(actual, expected, **close)
    expected = oracle_text_features(torch, model, input_ids)
    assert_not_degenerate(expected)
    actual = clip.text_encoder(config)(params, input_ids)
    np.testing.assert_allclose(actual, expected, **close)


@pytest.mark.torch
def test_vision_models_of_transformers_load_as_the_part_that_they_are(
    torch, random_clip, tmp_path
):
    """Whether or not this version writes `vision_model.` in front of the names."""
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

    full = random_clip()
    config, params = load(full, tmp_path / "full")
    layout = clip.layout(config)

    tower = CLIPVisionModel(full.config.vision_config)
    weights = full.vision_model.state_dict()
    weights = {
        name: weights[name.removeprefix("vision_model.")]
        for name in (tower.state_dict())
    }
    tower.load_state_dict(weights)
    tower.save_pretrained(tmp_path / "tower")
    loaded = hub.load(tmp_path / "tower", layout, select="vision_model/.*")
    jax.tree.map(
        np.testing.assert_array_equal, loaded, tree.select(params, "vision_model/.*")
    )

    projecting = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "full")
    projecting.save_pretrained(tmp_path / "projecting")
    loaded = hub.load(tmp_path / "projecting", layout, select=clip.IMAGE_ENCODER)
    jax.tree.map(
        np.testing.assert_array_equal, loaded, tree.select(params, clip.IMAGE_ENCODER)
    )


@pytest.mark.torch
def test_shards_of_transformers_load_with_equal_bits(random_clip, tmp_path):
    model = random_clip()
    config, params = load(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = hub.load(tmp_path / "shards", clip.layout(config))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.torch
def test_bfloat16_of_transformers_loads_with_equal_values(torch, random_clip, tmp_path):
    model = random_clip().to(torch.bfloat16)
    config, loaded = load(model, tmp_path)
    kernel = loaded["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
    weight = model.vision_model.embeddings.patch_embedding.weight
    assert kernel.dtype == np.float32
    expected = weight.detach().float().permute(2, 3, 1, 0).numpy()
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.torch
def test_conversion_of_a_pickle_that_the_error_gives_works(
    torch, random_clip, tmp_path, monkeypatch
):
    model = random_clip()
    config, params = load(model, tmp_path / "whole")
    folder = tmp_path / "pickle"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = hub.load(folder, clip.layout(config))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    monkeypatch.setattr(pickles, "readable", lambda: False)
    with pytest.raises(FileNotFoundError) as error:
        hub.load(folder, clip.layout(config))
    lines = str(error.value).splitlines()
    code = [
        line.strip()
        for line in lines[lines.index("  import torch, safetensors.torch") :]
    ]
    monkeypatch.chdir(folder)
    exec("\n".join(code), {})
    loaded = hub.load(folder, clip.layout(config))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# Layouts of the real checkpoints.


def committed_layout(name):
    return json.loads((generate.FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("name", generate.CONFIGS)
def test_layout_equals_that_of_the_real_checkpoint(name):
    raw = {"text_config": {}, "vision_config": {}, **generate.CONFIGS[name]}
    layout = tree.flatten(clip.layout(clip.CLIPConfig.from_json(raw)))
    assert {path: list(leaf.shape) for path, leaf in layout.items()} == (
        committed_layout(name)
    )
    assert {leaf.dtype for leaf in layout.values()} == {jnp.dtype("float32")}


@pytest.mark.torch
@pytest.mark.parametrize("name", generate.CONFIGS)
def test_committed_layout_equals_that_of_transformers(torch, name):
    state_dict = generate.meta_model(name).state_dict()
    assert generate.flax_layout(state_dict) == committed_layout(name)


@pytest.mark.torch
def test_transformers_writes_the_names_that_the_layouts_are_made_from(
    random_clip, tmp_path
):
    from safetensors.numpy import load_file

    model = random_clip()
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == model.state_dict().keys()


# Configurations.


def test_default_config_equals_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    raw = transformers.CLIPConfig().to_dict()
    assert clip.CLIPConfig.from_json(raw) == clip.CLIPConfig()
    assert clip.CLIPConfig.from_json({"text_config": {}, "vision_config": {}}) == (
        clip.CLIPConfig()
    )


@pytest.mark.parametrize(
    "stated",
    [
        {"text_config_dict": {"hidden_size": 20, "num_attention_heads": 4}},
        {"vision_config_dict": {"hidden_size": 48, "patch_size": 16}},
        {"text_config_dict": None, "vision_config_dict": None},
    ],
)
def test_sizes_that_old_files_state_twice_are_read_as_transformers_does(stated):
    transformers = pytest.importorskip("transformers")
    raw = {**tiny_clip_config(), **stated}
    expected = transformers.CLIPConfig.from_dict(json.loads(json.dumps(raw))).to_dict()
    actual = clip.CLIPConfig.from_json(raw)
    assert actual == clip.CLIPConfig.from_json(
        {key: expected[key] for key in ("text_config", "vision_config")}
        | {"projection_dim": expected["projection_dim"]}
    )


@pytest.mark.parametrize("kind", ["clip_vision_model", "bert"])
def test_config_of_another_model_is_an_error_that_names_it(kind):
    with pytest.raises(ValueError, match=f"describes a '{kind}'; expected a CLIP"):
        clip.CLIPConfig.from_json({"model_type": kind, "hidden_size": 768})


def test_images_and_texts_of_another_size_are_refused():
    model = clip.load()
    for shape in ((1, 21, 21, 3), (1, 35, 35, 3), (1, 28, 28, 1)):
        with pytest.raises(ValueError, match=r"takes \[B, 28, 28, 3\]"):
            clip.image_encoder(model.config)(model.params, jnp.zeros(shape))
    texts = jnp.zeros((1, 40), jnp.int32)
    with pytest.raises(ValueError, match="40 tokens; this CLIP takes at most 24"):
        clip.text_encoder(model.config)(model.params, texts)


def test_an_activation_that_the_port_lacks_is_refused():
    raw = tiny_clip_config() | {"vision_config": {"hidden_act": "gelu_new"}}
    with pytest.raises(ValueError, match="gelu_new.*quick_gelu, gelu"):
        clip.CLIPConfig.from_json(raw)


def test_the_last_block_computes_the_class_token_alone():
    model = clip.load()
    seen = capture.dense_inputs(
        clip.image_encoder(model.config), model.params, jnp.zeros((2, 28, 28, 3))
    )
    count = model.config.vision.num_hidden_layers
    tokens = {
        name: seen[f"vision_model/encoder/layers/{count - 1}/{name}/kernel"][0].shape[1]
        for name in ("self_attn/q_proj", "self_attn/k_proj", "mlp/fc1")
    }
    assert tokens["self_attn/k_proj"] > 1
    assert tokens["self_attn/q_proj"] == tokens["mlp/fc1"] == 1
