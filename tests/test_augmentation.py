"""The training augmentation against its definition, and decoding."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.bench import input_rate
from jaxarith.data import images


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def bicubic(pixels, size):
    """Pillow's antialiased bicubic filter along the first axis, of floats."""
    scale = max(len(pixels) / size, 1)
    centers = (np.arange(size) + 0.5) * len(pixels) / size
    x = np.abs(np.arange(len(pixels)) + 0.5 - centers[:, None]) / scale
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return np.tensordot(weights / weights.sum(1, keepdims=True), pixels, 1)


def test_a_crop_is_cut_resized_scaled_and_normalised():
    pixels = noise(150, 120)
    augmentation = images.Augmentation(32)
    left, upper, right, lower = images.random_crop(150, 120, np.random.default_rng(1))
    assert (right - left, lower - upper) != (150, 120)
    crop = pixels[upper:lower, left:right].astype(float)
    resized = bicubic(bicubic(crop, 32).swapaxes(0, 1), 32).swapaxes(0, 1)
    expected = (np.clip(resized, 0, 255) / 255 - augmentation.mean) / augmentation.std
    actual = augmentation(Image.fromarray(pixels), np.random.default_rng(1))
    assert actual.shape == (32, 32, 3) and actual.dtype == np.float32
    # Pillow rounds to bytes after every axis.
    np.testing.assert_allclose(actual, expected, atol=1.6 / 255 / 0.26)


def test_no_pixel_outside_the_crop_matters():
    pixels = noise(150, 120)
    left, upper, right, lower = images.random_crop(150, 120, np.random.default_rng(1))
    other = 255 - pixels
    other[upper:lower, left:right] = pixels[upper:lower, left:right]
    assert (other != pixels).any()
    results = [
        images.Augmentation(32)(array, np.random.default_rng(1))
        for array in (pixels, other)
    ]
    np.testing.assert_array_equal(*results)


def defined_crops(width, height, count, rng):
    """Areas and log-ratios of torchvision's definition, without its placement."""
    areas = width * height * rng.uniform(0.9, 1.0, (count, 10))
    ratios = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (count, 10)))
    w, h = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (w <= width) & (h <= height)
    first = fits.argmax(1)[:, None]
    chosen = [np.take_along_axis(x, first, 1)[:, 0] for x in (w, h)]
    return np.stack(chosen, 1)[fits.any(1)], fits.any(1).mean()


def distance(a, b):
    """Kolmogorov and Smirnov's, between two samples."""
    grid = np.sort(np.concatenate([a, b]))
    shares = [np.searchsorted(np.sort(x), grid, "right") / len(x) for x in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 256)])
def test_crops_have_torchvisions_distribution(width, height):
    rng = np.random.default_rng(0)
    boxes = np.array([images.random_crop(width, height, rng) for _ in range(3000)])
    corners, ends = boxes[:, :2], boxes[:, 2:]
    sizes = ends - corners
    assert (corners >= 0).all() and (ends <= (width, height)).all()
    fallback = (width, min(height, width * 4 // 3))
    drawn = sizes[(sizes != fallback).any(1)]
    defined, share = defined_crops(width, height, 30000, rng)
    assert abs(len(drawn) / len(sizes) - share) < 0.03
    for measure in (lambda s: s[:, 0] * s[:, 1], lambda s: s[:, 0] / s[:, 1]):
        assert distance(measure(drawn), measure(defined)) < 0.04
    room = (width, height) - sizes
    for axis in range(2):
        free = room[:, axis] > 20
        if free.sum() > 200:
            places = corners[free, axis] / room[free, axis]
            assert distance(places, rng.uniform(size=20000)) < 0.09
            assert places.min() < 0.05 and places.max() > 0.95


@pytest.mark.parametrize(
    ("size", "scale", "box"),
    [
        ((1000, 100), (0.9, 1.0), (433, 0, 566, 100)),
        ((100, 1000), (0.9, 1.0), (0, 433, 100, 566)),
        ((100, 90), (4.0, 4.0), (0, 0, 100, 90)),
    ],
)
def test_where_no_crop_fits_the_largest_allowed_one_is_in_the_middle(size, scale, box):
    rng = np.random.default_rng(0)
    assert images.random_crop(*size, rng, scale) == box


def test_whole_images_of_the_right_size_are_preprocessed_alike(monkeypatch):
    monkeypatch.setattr(images, "random_crop", lambda w, h, rng: (0, 0, w, h))
    pixels = noise(24, 24)
    actual = images.Augmentation(24)(pixels, np.random.default_rng(0))
    np.testing.assert_array_equal(actual, images.Preprocessing(24)(pixels))


def test_grey_images_become_three_equal_channels():
    augmentation = images.Augmentation(16, (0.0,) * 3, (1.0,) * 3)
    result = augmentation(noise(28, 28)[..., 0], np.random.default_rng(0))
    assert result.std() > 0.05
    np.testing.assert_array_equal(result, result[..., :1].repeat(3, -1))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_an_incomplete_image_is_refused_with_its_name(format):
    file = io.BytesIO()
    Image.fromarray(noise(60, 50)).save(file, format)
    content = file.getvalue()
    assert images.decode(content, "cat").size == (60, 50)
    for part in (content[: len(content) // 2], b"", b"not an image"):
        with pytest.raises(ValueError, match="cannot read the image cat.jpg"):
            images.decode(part, "cat.jpg")


def test_the_input_rate_is_measured_with_threads_and_worker_processes(tmp_path):
    config = input_rate.Config(tmp_path / "out", (0, 1), 16, 4, 3, 20)
    rows = input_rate.main(config)["rows"]
    assert [row["workers"] for row in rows] == [0, 1]
    for row in rows:
        assert row["images/s"] == pytest.approx(4 * row["steps/s"])
        assert row["images/s"] > 0
    assert "steps/s" in (tmp_path / "out" / "report.md").read_text()
