"""Splits, preprocessing, batches, heads and losses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxarith import losses
from jaxarith.data import images, pipeline, splits
from jaxarith.models import heads


def test_the_first_index_of_mnists_split_is_the_papers():
    assert splits.torch_permutation(60000)[0] == 36044


@pytest.mark.torch
@pytest.mark.parametrize("n", [0, 1, 2, 1000])
@pytest.mark.parametrize("seed", [0, 3])
def test_permutations_are_pytorchs(n, seed):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of this test")
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randperm(n, generator=generator).tolist()
    assert splits.torch_permutation(n, seed).tolist() == expected


@pytest.mark.parametrize(("n", "size"), [(60000, 5000), (3760, 376), (9, 0)])
def test_a_tenth_and_at_most_5000_samples_validate(n, size):
    train, validation = splits.train_validation(n)
    assert len(validation) == size
    assert sorted(np.concatenate([train, validation])) == list(range(n))


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "size", [(300, 450), (451, 300), (224, 224), (50, 70), (40, 180)]
)
def test_preprocessing_equals_hugging_faces(size):
    transformers = pytest.importorskip("transformers", reason="the oracle of this test")
    image = noise(*size)
    processor = transformers.CLIPImageProcessorPil()
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    actual = images.Preprocessing()(image)
    # Theirs rounds to bytes after resizing and scales by a rounded 1/255, as ours.
    np.testing.assert_allclose(actual, expected.transpose(1, 2, 0), atol=1e-5)


def test_preprocessing_repeats_grey_and_reads_its_file(tmp_path):
    config = {
        "size": {"shortest_edge": 28},
        "image_mean": [0.1] * 3,
        "image_std": [0.5] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    preprocess = images.Preprocessing.from_folder(tmp_path)
    grey = np.arange(784, dtype=np.uint8).reshape(28, 28)
    expected = (np.repeat(grey[..., None], 3, -1) / 255 - 0.1) / 0.5
    np.testing.assert_allclose(preprocess(grey), expected, atol=1e-6)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"size": null}'])
def test_an_unusable_preprocessor_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match="preprocessor_config.json .* size"):
        images.Preprocessing.from_folder(tmp_path)


def test_empty_sources_are_refused():
    with pytest.raises(ValueError, match="empty"):
        pipeline.shuffled([], 0)
    with pytest.raises(ValueError, match="empty"):
        pipeline.evaluation_batches([], 4)


def encode(texts):
    """Features that differ by text and are not normalised."""
    rows = [np.random.default_rng(len(t) + ord(t[0])).normal(size=5) for t in texts]
    return jnp.asarray(np.stack(rows), jnp.float32)


def test_a_head_averages_normalised_templates_and_scales():
    classes, templates = ["a", "bb"], ["{}!", "photo of {}"]
    head = heads.zero_shot(encode, classes, templates, np.log(20.0))
    for row, name in zip(head, classes, strict=True):
        features = np.array(encode([t.format(name) for t in templates]))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        mean = features.mean(0)
        np.testing.assert_allclose(row, 20 * mean / np.linalg.norm(mean), rtol=1e-5)


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [([], ["{}"], "class"), (["a"], [], "template"), (["a"], ["photo"], "photo")],
)
def test_heads_without_classes_or_templates_are_refused(classes, templates, message):
    with pytest.raises(ValueError, match=message):
        heads.zero_shot(encode, classes, templates, 0.0)


def test_padding_a_head_changes_neither_loss_nor_gradient():
    rng = np.random.default_rng(0)
    small, large = (jnp.asarray(rng.normal(size=(c, 5)), jnp.float32) for c in (3, 7))
    features = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    labels = jnp.array([0, 2, 1, 2])
    padded = heads.pad([small, large])

    def loss(features, head, valid=None):
        return losses.cross_entropy(heads.logits(head, features, valid), labels)

    expected = jax.value_and_grad(loss)(features, small)
    actual = jax.value_and_grad(loss)(features, padded["head"][0], padded["valid"][0])
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_cross_entropy_is_its_formula_and_ignores_what_is_masked():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 3)), np.array([0, 2, 1, 1])
    mask = np.array([True, True, False, True])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses_ = -np.log(p[np.arange(4), labels])
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    np.testing.assert_allclose(losses.cross_entropy(*args), losses_.mean(), rtol=1e-6)
    masked = losses.cross_entropy(*args, jnp.asarray(mask))
    np.testing.assert_allclose(masked, losses_[mask].mean(), rtol=1e-6)


def test_token_losses_leave_out_what_does_not_count_and_shift_for_causal_models():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 5))
    labels = np.array([[1, 2, -100, 4], [0, -100, -100, 3]])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = [(b, s) for b in range(2) for s in range(4) if labels[b, s] >= 0]
    expected = -np.mean([log_p[b, s, labels[b, s]] for b, s in kept])
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    np.testing.assert_allclose(losses.token_cross_entropy(*args), expected, rtol=1e-6)
    expected = -np.mean([log_p[b, s - 1, labels[b, s]] for b, s in kept if s])
    actual = losses.next_token_cross_entropy(*args)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    nothing = losses.token_cross_entropy(args[0], jnp.full((2, 4), -100))
    assert nothing == 0


def test_a_stream_gives_the_batches_of_a_list_in_every_pass():
    source = [{"image": np.full(3, i, np.float32), "label": i} for i in range(11)]

    def doubled(sample):
        return sample | {"image": 2 * sample["image"]}

    expected = pipeline.evaluation_batches([doubled(s) for s in source], 4)
    stream = pipeline.evaluation_stream(source, 4, preprocess=doubled)
    assert len(stream) == len(expected) == 3
    for _ in range(2):
        for batch, whole in zip(stream, expected, strict=True):
            assert batch.keys() == whole.keys()
            for name, field in whole.items():
                np.testing.assert_array_equal(batch[name], field)
    with pytest.raises(ValueError, match="empty"):
        pipeline.evaluation_stream([], 4, preprocess=doubled)


@pytest.mark.parametrize("margin", range(8))
def test_the_middle_is_torchvisions_to_the_pixel(margin):
    """`int(round((side - crop) / 2.0))`, of which Hugging Face takes the floor."""
    image = noise(20, 20 + margin)
    left = int(round(margin / 2.0))
    actual = images.Preprocessing(20, (0, 0, 0), (1, 1, 1))(image)
    expected = np.asarray(image)[:, left : left + 20] / np.float32(255)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_eight_bits_are_refused_and_not_cut_off(mode):
    values = np.arange(64).reshape(8, 8) * 1000
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = Image.fromarray(values.astype(dtype))
    assert image.mode == mode
    for preprocess in (images.Preprocessing(8), lambda x: images.rgb(x)):
        with pytest.raises(ValueError, match=f"mode {mode}, with more than 8 bits"):
            preprocess(image)


def test_an_image_that_is_preprocessed_already_is_refused():
    preprocess = images.Preprocessing(8)
    once = preprocess(noise(8, 8))
    with pytest.raises(ValueError, match="float32; expected uint8"):
        preprocess(once)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_every_mode_of_eight_bits_or_less_becomes_rgb(mode):
    image = noise(9, 9).convert(mode)
    assert images.rgb(image).mode == "RGB"
    assert images.Preprocessing(8)(image).shape == (8, 8, 3)
