"""Types of arguments that several subcommands have."""

import argparse
import re

_NEGATIVE = re.compile(r"-((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|nan)$", re.IGNORECASE)


def count(text: str) -> int:
    """Parses a whole number above 0.

    Raises:
      argparse.ArgumentTypeError: the text is not such a number.

    Example:
      >>> count("12")
      12
    """
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0.")


def take_exponents(parser: argparse.ArgumentParser) -> None:
    """Allows negative numbers with exponents, such as -1e-1, as values of flags.

    By itself, argparse reads -0.1 as a number but -1e-1 as a flag.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> _ = parser.add_argument("--coef", type=float, nargs="+")
      >>> take_exponents(parser)
      >>> parser.parse_args(["--coef", "-1e-1", "2"])
      Namespace(coef=[-0.1, 2.0])
    """
    parser._negative_number_matcher = _NEGATIVE
