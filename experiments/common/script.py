"""Starts a script, and reports its errors.

A script is a module with a docstring, a frozen dataclass `Config` of its options, and a
function `main(config)`:

    @script.full_precision
    def main(config: Config) -> dict: ...

    if __name__ == "__main__":
        script.run(Config, main)
"""

import contextlib
import functools
import importlib.util
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import tyro
from tqdm import tqdm

from experiments.common import compiled, planning
from jaxarith import report
from jaxarith.commands import signals

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
C = TypeVar("C")

_TRACEBACK = "--traceback"
_FLAGS = f"""
On a mistake in the options or the data a script prints one line and exits with status
2; {_TRACEBACK} shows where in the program the mistake was found."""
# A user's options, files and machine can cause these. Any other error is a fault of the
# program and shows its traceback.
_MISTAKES = (ValueError, OSError, ImportError)
# `datasets` raises errors of several kinds for a data set that is not available.
OF_DATASETS = (*_MISTAKES, RuntimeError)


def full_precision(main: Callable[P, R]) -> Callable[P, R]:
    """Makes a function use float32 matrix products on accelerators too.

    A task vector is a small difference of large numbers. The default products of TPUs
    and recent GPUs keep 8 to 11 bits, and lose it.
    """

    @functools.wraps(main)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("float32"):
            return main(*args, **kwargs)

    return precise


def needs(extra: str, *modules: str) -> None:
    """Raises an ImportError with the command that installs the missing packages.

    Args:
      extra: the extra of this project that has the packages.
      modules: names of the modules that are needed.

    Example:
      >>> needs("demo", "json", "no_such_module")
      Traceback (most recent call last):
      ImportError: no_such_module is missing: pip install 'jaxarith[demo]'.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        be = "is" if len(missing) == 1 else "are"
        raise ImportError(f"{names} {be} missing: pip install 'jaxarith[{extra}]'.")


def collected(
    items: Iterable[T],
    read: Callable[[T], R],
    *,
    errors: tuple[type[Exception], ...] = (ValueError,),
    named: bool = False,
    desc: str = "tasks",
) -> list[R]:
    """Reads every item; all errors come together in one.

    Args:
      items: the tasks of a script.
      read: function of one item.
      errors: the errors that it raises for a wrong item.
      named: name the item in front of its error.
      desc: label of the progress bar.

    Raises:
      ValueError: at least one item is wrong; the message has all errors.
    """
    found, problems = [], []
    # Not in logs, where a mistake is one line.
    for item in tqdm(items, desc=desc, unit="task", leave=False, disable=None):
        try:
            found.append(read(item))
        except errors as error:
            problems.append(f"{item}: {error}" if named else str(error))
    if problems:  # all at once: repairing one may take hours
        raise ValueError("\n\n".join(problems))
    return found


def run(config_type: Callable[..., C], main: Callable[[C], Any]) -> None:
    """Parses the command line, runs the script, and exits with its status.

    Args:
      config_type: dataclass of the options; its fields' docstrings are their help.
      main: the script, a function of the options. `--help` prints the docstring of its
        module above the options.

    Raises:
      SystemExit: status 2 after a mistake in options or data, which is printed in one
        line; 130 after Ctrl-C, 143 and 129 after SIGTERM and SIGHUP; the status that
        `main` exits with otherwise.
    """
    arguments = [word for word in sys.argv[1:] if word != _TRACEBACK]
    shown = len(arguments) < len(sys.argv) - 1
    try:
        # Inside, so that a wrong value found by `__post_init__` is one line too.
        config = _parse(config_type, _description(main), arguments)
        compiled.keep()
        with signals.raised():
            if getattr(config, "plan", 0):
                planning.run(main, config)
            else:
                main(config)
    except _MISTAKES as error:
        if shown:
            raise
        _exit(one_line(error))
    except KeyboardInterrupt:
        print(f"{_name()}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except signals.Stopped as stopped:
        print(f"{_name()}: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.status) from None


def one_line(error: BaseException) -> str:
    """What an error says, in one line.

    Example:
      >>> one_line(ValueError("two tasks are missing:\\n  dtd\\n  cars"))
      'two tasks are missing: dtd cars'
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text


def _description(main) -> str:
    module = sys.modules[main.__module__]
    return textwrap.dedent(module.__doc__ or "") + _FLAGS


def _parse(config_type, description, arguments):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config_type, args=arguments, prog=_name(), description=description
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        _exit(_unboxed(said.getvalue()))


def _unboxed(message: str) -> str:
    """An error of tyro, which draws a box around several lines, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", message)
    # The last part says where the help is; it follows in our own words.
    text = re.sub(r"For full helptext.*", "", text, flags=re.DOTALL)
    text = re.sub(r"╭─+ (.*?) ─+╮", r"\1: ", text)
    text = re.sub(r"│ ─+ │", "; ", text)
    text = " ".join(re.sub(r"[─-╿]", " ", text).split()).replace(" ;", ";").strip("; .")
    text = re.sub(r"^Value error: (Error parsing Config: )?", "", text)
    return f"{text}. `python -m {_name()} --help` lists the options."


def _exit(message: str) -> NoReturn:
    print(report.shown(f"{_name()}: {message}"), file=sys.stderr)
    raise SystemExit(2) from None


def _name() -> str:
    """The script as `python -m` knows it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else os.path.basename(sys.argv[0])
