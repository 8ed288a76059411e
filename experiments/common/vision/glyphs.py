"""Images of glyphs: lists of fonts, rendering with the layout of MNIST, distortion.

LeCun, Bottou, Bengio, Haffner. Gradient-Based Learning Applied to Document
Recognition. Proc. IEEE 1998 (the 20x20 box, centred by mass, in a 28x28 image).
Simard, Steinkraus, Platt. Best Practices for Convolutional Neural Networks Applied
to Visual Document Analysis. ICDAR 2003 (elastic distortion).

The two sets of freely licensed fonts are disjoint. `packaged_fonts` trains tiny_clip.
`matplotlib_fonts` is held out from that training, for the quickstart's letter tasks.
"""

import functools
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase

FONTPKG = "fontpkg==0.2.2"  # finds the packages of fonts

# A font is kept if its name table (ids 13 and 14: licence, licence URL) matches this.
_FREE = re.compile(
    r"SIL Open Font Licen[cs]e|OFL|Apache License|Ubuntu Font Licence|public domain",
    re.IGNORECASE,
)

# Distance fields have units of 1/_STEPS pixel of a 28-pixel image, clipped to int8.
_STEPS = 16
_FINE = 56


def matplotlib_fonts() -> list[Path]:
    """Returns the text fonts that matplotlib ships: DejaVu, STIX, Computer Modern."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    # The other files in the folder hold mathematical symbols and brackets.
    wanted = re.compile(
        r"DejaVu(Sans|SansMono|Serif)(-.*)?|STIXGeneral.*|cm(b10|r10|ss10|ti10|tt10)"
    )
    return sorted(f for f in folder.glob("*.ttf") if wanted.fullmatch(f.stem))


def packaged_fonts(families: Mapping[str, str]) -> list[Path]:
    """Returns the free font files of `fontpkg` packages that have 0-9A-Za-z.

    The name table of the file decides whether it is free, not its package. A file that
    states no licence is left out.

    Args:
      families: dict from the name of a package, as in `fontpkg-<name>`, to its version.

    Raises:
      ImportError: packages are missing; the message says how to install all of them.
    """
    try:
        import fontpkg  # pyright: ignore[reportMissingImports]
        import fontTools  # noqa: F401 (`_usable` needs it)
    except ImportError:
        installed = {}
    else:
        installed = fontpkg.families()
    missing = [name for name in families if name not in installed]
    if missing:
        pins = [f"fontpkg-{name}=={families[name]}" for name in missing]
        raise ImportError(
            f"{len(missing)} of {len(families)} font packages are not installed; run: "
            f"pip install fonttools {FONTPKG} {' '.join(pins)}"
        )
    files = [file.path for family in families for file in installed[family].files]
    return [file for file in files if _usable(file)]


def _usable(file):
    from fontTools.ttLib import TTFont

    with TTFont(file, lazy=True) as font:
        stated = " ".join(font["name"].getDebugName(i) or "" for i in (13, 14))
        known = font.getBestCmap() or {}
        complete = all(ord(c) in known for c in CHARACTERS)
    return complete and bool(_FREE.search(stated))


@functools.cache
def _load(font, weight):
    face = ImageFont.truetype(str(font), 96)
    if weight is not None:
        axes: Any = face.get_variation_axes()
        face.set_variation_by_axes(
            [weight if a["name"] == b"Weight" else a["default"] for a in axes]
        )
    return face


def weights(font: Path) -> list[float | None]:
    """Returns three values for `render(weight=)`, light first.

    Returns `[None]` for a font with one fixed weight.
    """
    try:
        axes: Any = ImageFont.truetype(str(font), 96).get_variation_axes()
    except OSError:  # PIL raises it for a font with one fixed weight
        return [None]
    for axis in axes:
        if axis["name"] == b"Weight":
            low, high = axis["minimum"], axis["maximum"]
            return [low, (2 * low + high) / 3, (low + 2 * high) / 3]
    return [None]


def render(
    font: Path,
    character: str,
    *,
    size: int = 28,
    weight: float | None = None,
    rotate: float = 0.0,
    shear: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Draws a glyph in white on black with the layout of MNIST, `uint8[size, size]`.

    The longer side of the glyph fills 20/28 of the image. Its centre of mass is the
    centre of the image.

    Args:
      font: path of the font.
      character: the character to draw.
      size: side of the image in pixels.
      weight: weight of a variable font; one of `weights(font)`.
      rotate: degrees, counter-clockwise.
      shear: horizontal displacement per unit of height; positive leans to the right.
      scale: size of the glyph, relative to the box.
      shift: (right, down) as fractions of the image.

    Raises:
      ValueError: the font draws nothing for this character.
    """
    face = _load(font, weight)
    left, top, right, bottom = map(int, face.getbbox(character))
    # A margin for shear and rotation, which come before the glyph is fitted.
    pad = max(right - left, bottom - top)
    extent = (right - left + 2 * pad, bottom - top + 2 * pad)
    drawn = Image.new("L", extent)
    ImageDraw.Draw(drawn).text((pad - left, pad - top), character, 255, font=face)
    if shear or rotate:
        middle = extent[1] / 2
        lean = (1, shear, -shear * middle, 0, 1, 0)
        drawn = drawn.transform(
            extent, Image.Transform.AFFINE, lean, Image.Resampling.BILINEAR
        )
        drawn = drawn.rotate(rotate, Image.Resampling.BILINEAR)

    box = drawn.getbbox()
    if box is None:
        raise ValueError(
            f"{font.name} draws nothing for {character!r}; expected a visible glyph. "
            "Leave the font out."
        )
    drawn = drawn.crop(box)
    ratio = scale * size * 20 / 28 / max(drawn.size)
    width, height = (max(1, round(side * ratio)) for side in drawn.size)
    fitted = drawn.resize((width, height), Image.Resampling.LANCZOS)
    ink = np.asarray(fitted, np.float64)
    row, column = (
        (np.arange(n) + 0.5) @ ink.sum(axis) / ink.sum()
        for axis, n in ((1, ink.shape[0]), (0, ink.shape[1]))
    )
    image = Image.new("L", (size, size))
    corner = (
        round(size / 2 - column + shift[0] * size),
        round(size / 2 - row + shift[1] * size),
    )
    image.paste(fitted, corner)
    return np.asarray(image)


def enlarge(image: np.ndarray) -> np.ndarray:
    """Returns an 8x8 digit with values 0..16 in the layout of MNIST, `u8[28, 28]`."""
    digit = Image.fromarray((image * 255 / 16).astype(np.uint8))
    # The 8x8 images fill their frame; MNIST's digits fill 20 of 28 pixels.
    framed = Image.new("L", (28, 28))
    framed.paste(digit.resize((20, 20), Image.Resampling.BICUBIC), (4, 4))
    return np.asarray(framed)


def distance_field(image: np.ndarray) -> np.ndarray:
    """Returns signed distances to the outline, `int8[56, 56]`, for `augment`.

    Distances are positive inside, in sixteenths of a pixel of a 28-pixel image.

    Args:
      image: a large rendering, `uint8[S, S]` with S a multiple of 56.
    """
    from scipy import ndimage

    inside = image > 127
    signed = np.asarray(ndimage.distance_transform_edt(inside))
    signed = signed - np.asarray(ndimage.distance_transform_edt(~inside))
    step = len(image) // _FINE
    signed = signed.reshape(_FINE, step, _FINE, step).mean((1, 3))
    return np.clip(signed * 28 / len(image) * _STEPS, -127, 127).astype(np.int8)


def augment(fields: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Makes random images of glyphs from their distance fields.

    Each image draws a random position between print and handwriting. Within that
    range it draws its own affine map, elastic distortion, stroke width, softness and
    noise. On distances the stroke width is a threshold, so one formula thickens, thins
    and blurs.

    Args:
      fields: `int8[N, 56, 56]` from `distance_field`.

    Returns:
      `uint8[N, 28, 28]`.
    """
    from scipy import ndimage

    n = len(fields)

    def uniform(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    hand = np.sqrt(uniform(0, 1))
    turn = np.deg2rad(uniform(-1, 1) * (3 + 9 * hand))
    lean = uniform(-0.05 - 0.2 * hand, 0.1 + 0.4 * hand)
    wide, tall = uniform(1 - 0.3 * hand, 1 + 0.2 * hand), uniform(0.9, 1.1)
    right, down = uniform(-1.5, 1.5), uniform(-1.5, 1.5)
    bend_y, bend_x = _elastic(rng, n) * uniform(0, 1.5) * hand

    # Where each of the 28x28 output pixels looks in the glyph, in pixels from centre.
    y, x = np.mgrid[:28, :28].astype(np.float32) - 13.5
    x, y = x - right + bend_x, y - down + bend_y
    x = x + lean * y
    x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    fine = _FINE / 28
    where = np.broadcast_arrays(
        np.arange(n, dtype=np.float32)[:, None, None],
        (y / tall + 14) * fine - 0.5,
        (x / wide + 14) * fine - 0.5,
    )
    distance = ndimage.map_coordinates(
        fields, where, np.float32, order=1, mode="nearest"
    )
    distance = distance / _STEPS

    # Half the width of the glyph's boldest stroke, and its target. Thinning is limited:
    # a font with strong contrast would lose its thin strokes.
    bold = fields.max((1, 2), keepdims=True) / np.float32(_STEPS)
    target = uniform(0.7, 2.0)
    distance += np.maximum(target - bold, -0.5 * bold) * uniform(hand, 1)
    ink = 1 / (1 + np.exp(-2 * distance / uniform(0.3, 0.8)))
    ink = ink * uniform(0.85, 1) + rng.normal(0, 0.02, ink.shape) * uniform(0, 1)
    return np.round(255 * np.clip(ink, 0, 1)).astype(np.uint8)


def _elastic(rng, n):
    """Returns smooth random displacements, `[2, n, 28, 28]`, from a 5x5 grid."""
    grid = rng.normal(size=(2, n, 5, 5)).astype(np.float32)
    # Cosine interpolation between the grid's points.
    place = np.linspace(0, 4, 28)[:, None] - np.arange(5)
    spread = np.where(abs(place) < 1, 0.5 + 0.5 * np.cos(np.pi * place), 0)
    return np.einsum("pi,dnij,qj->dnpq", spread, grid, spread, optimize=True)
