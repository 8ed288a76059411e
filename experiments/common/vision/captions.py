"""Captions of digits and letters, used to train the tiny CLIP."""

import string

DIGIT_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip

# Captions of an image. They include the templates that CLIP is tested with on MNIST
# ("number: ") and EMNIST ("character: "). CLIP lower-cases its text, so words must
# distinguish capital from small letters.
DIGITS = (
    'a photo of the number: "{}".',
    "a photo of the number {}.",
    "a photo of the digit {}.",
    'a photo of the digit character: "{}".',
    "a handwritten digit {}.",
    "a handwritten number {}.",
    "the number {}.",
    "the digit {}.",
    "a drawing of the number {}.",
    "{}",
)
LETTERS_WITH_CASE = (
    "a photo of the {case} letter {}.",
    'a photo of the {case} letter: "{}".',
    'a photo of the {case} letter character: "{}".',
    "a handwritten {case} letter {}.",
    "the {case} letter {}.",
    "a drawing of the {case} letter {}.",
    "{case} {}",
)
LETTERS = (
    "a photo of the letter {}.",
    'a photo of the letter: "{}".',
    'a photo of the digit character: "{}".',
    "a handwritten letter {}.",
    "the letter {}.",
    "{}",
)
CASES = {"capital": string.ascii_uppercase, "small": string.ascii_lowercase}
SYNONYMS = {"capital": ("capital", "uppercase"), "small": ("small", "lowercase")}


def all_kinds() -> dict[str, tuple[str, ...]]:
    """Returns captions by kind of image: "7", "capital k", "small k", "letter k"."""
    kinds = {}
    for digit, word in zip(string.digits, DIGIT_WORDS, strict=True):
        kinds[digit] = tuple(t.format(n) for t in DIGITS for n in (digit, word))
    for letter in string.ascii_lowercase:
        for case, names in SYNONYMS.items():
            kinds[f"{case} {letter}"] = tuple(
                t.format(letter, case=name) for t in LETTERS_WITH_CASE for name in names
            )
        kinds[f"letter {letter}"] = tuple(t.format(letter) for t in LETTERS)
    return kinds


def kinds_of(character: str) -> tuple[str, ...]:
    """Returns the keys of `all_kinds` that describe an image of this character."""
    if character in string.digits:
        return (character,)
    case = next(case for case, letters in CASES.items() if character in letters)
    return f"{case} {character.lower()}", f"letter {character.lower()}"
