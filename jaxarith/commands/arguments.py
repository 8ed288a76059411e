"""Types of arguments that several subcommands have."""

import argparse
import re

_NEGATIVE = re.compile(r"-((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|nan)$", re.IGNORECASE)


def count(text: str) -> int:
    """A whole number above 0.

    Raises:
      argparse.ArgumentTypeError: the text is something else.

    Example:
      >>> count("12")
      12
    """
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0.")


def take_exponents(parser: argparse.ArgumentParser) -> None:
    """Lets the values of flags be negative numbers such as -1e-1.

    By itself, argparse takes -0.1 for a number and -1e-1 for a flag.

    Example:
      >>> parser = argparse.ArgumentParser()
      >>> _ = parser.add_argument("--coef", type=float, nargs="+")
      >>> take_exponents(parser)
      >>> parser.parse_args(["--coef", "-1e-1", "2"])
      Namespace(coef=[-0.1, 2.0])
    """
    parser._negative_number_matcher = _NEGATIVE
