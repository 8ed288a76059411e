"""Types of arguments that several subcommands have."""

import argparse


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
