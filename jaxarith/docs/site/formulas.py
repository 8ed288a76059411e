r"""Docstrings as Markdown: formulas between \( and \), examples as a section."""

import re

_ROLE = re.compile(r":math:`([^`]*)`")
_BLOCK = re.compile(r"^( *)\.\. math:: *(.*(?:\n\1 +\S.*)*)", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_RETURNS = re.compile(r"^( *Returns:\n +)(?=\S)", re.MULTILINE)


def as_markdown(text: str, returns: str = "") -> str:
    r"""The docstring for mkdocstrings, which knows neither `:math:` nor `Example:`.

    Args:
      text: the docstring.
      returns: the annotation of what the function returns. It goes before the
        description, in which a colon would be taken for the end of a type.

    Example:
      >>> print(as_markdown("Moves :math:`\\tau` by 1."))
      Moves \(\tau\) by 1.
    """

    def block(match: re.Match) -> str:
        lines = ["\\[", *(line.strip() for line in match[2].splitlines()), "\\]"]
        return "\n".join(match[1] + line for line in lines)

    if returns:
        text = _RETURNS.sub(lambda match: f"{match[1]}{returns}: ", text)
    text = _BLOCK.sub(block, text)
    text = _ROLE.sub(lambda match: rf"\({' '.join(match[1].split())}\)", text)
    return _EXAMPLE.sub(r"\1Examples:", text)
