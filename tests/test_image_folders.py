"""Image folders that others made: links, other formats, and images of any size."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxarith.data import images, sources, vision


@pytest.fixture
def pets(tmp_path):
    """Two splits of two classes with 12 images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for i in range(12):
                pixels = rng.integers(256, size=(5, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i:02}.png")
    return tmp_path / "pets"


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("train/cat/loop", ".."),
        ("train/loop", "."),
        ("train/cat/all", "../../.."),
        ("train/cat/deep/root", "/"),
        ("train/cat/self", "self"),
    ],
)
def test_links_that_lead_back_repeat_nothing(pets, place, target):
    before = vision.load_folder("pets", pets)
    (pets / place).parent.mkdir(exist_ok=True)
    (pets / place).symlink_to(target)
    if "deep" in place:
        (pets / place).with_name("other.png").symlink_to(pets.parent / "other.png")
        Image.new("RGB", (4, 4)).save(pets.parent / "other.png")
        assert len(sources.Folder(pets / "train")) == 25
        return
    task = vision.load_folder("pets", pets)
    assert len(task.train) + len(task.validation) == 24
    assert task.classes == before.classes and task.origin == before.origin


@pytest.mark.parametrize(
    ("place", "target"),
    [("train/dog/twice.png", "../cat/03.png"), ("train/kitten", "cat")],
)
def test_links_that_repeat_images_of_a_split_are_refused(pets, place, target):
    (pets / place).symlink_to(target)
    with pytest.raises(ValueError, match=r"is the same file as .*Remove the link"):
        vision.load_folder("pets", pets)


def test_links_to_images_elsewhere_are_followed(pets):
    elsewhere = (pets / "train" / "dog").rename(pets.parent / "dogs")
    (pets / "train" / "dog").symlink_to(elsewhere)
    moved = (pets / "train" / "cat" / "00.png").rename(pets.parent / "00.png")
    (pets / "train" / "cat" / "00.png").symlink_to(moved)
    found = sources.Folder(pets / "train")
    assert len(found) == 24 and found.names == ("cat", "dog")
    assert found[0][0].size == (6, 5)


def test_no_decoder_starts_another_program(pets, monkeypatch):
    path = pets / "train" / "cat" / "00.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ValueError, match="cannot read the image .*00.png.*identify"):
        sources.Folder(pets / "train")[0]
    with pytest.raises(ValueError, match="cannot identify"):
        images.decode(path.read_bytes(), "of a dataset")


def test_formats_that_are_read_are_those_of_the_suffixes(pets):
    for suffix in sources.SUFFIXES:
        path = pets / "train" / "cat" / f"00{suffix}"
        Image.new("L", (4, 4)).save(path)
        assert images.decode(path.read_bytes(), path.name).size == (4, 4)


def chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(ValueError, match="9000 x 9000 pixels; expected at most 67,"):
        images.decode(bomb, "bomb.png")


def test_a_pipe_among_the_images_is_an_error_with_its_name(pets):
    path = pets / "train" / "cat" / "00.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="00.png is a named pipe"):
        sources.Folder(pets / "train")[0]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"classes": ' * 100 + "}" * 100])
def test_nested_json_beside_images_is_an_error_with_its_file(pets, text):
    for name, read in (
        ("task.json", lambda: vision.load_folder("pets", pets)),
        ("preprocessor_config.json", lambda: images.Preprocessing.from_folder(pets)),
    ):
        (pets / name).write_text(text)
        with pytest.raises(ValueError, match=f"cannot read .*{name}.*nested|Expecting"):
            read()
        (pets / name).unlink()
