"""Signatures: complete, and options' names where the table of them stands."""

import ast
from pathlib import Path
from typing import get_args

import jaxarith
from jaxarith.merge.mergekit import arithmetic
from jaxarith.merge.ties import PRESETS, PresetName

PACKAGE = Path(jaxarith.__file__).parent


def functions(body, of_class=False):
    """The public functions and methods in the body of a module or class."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, of_class=True)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
            decorators = map(ast.unparse, node.decorator_list)
            yield node, of_class and "staticmethod" not in decorators


def lacking(function, bound):
    """The parameters without an annotation, and `return` if it has none."""
    args = function.args
    named = [*args.posonlyargs, *args.args][bound:] + args.kwonlyargs
    named += [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    found = [arg.arg for arg in named if arg.annotation is None]
    if function.returns is None and function.name != "__init__":
        found.append("return")
    return found


def test_every_public_function_is_annotated_completely():
    seen, incomplete = 0, []
    for file in sorted(PACKAGE.rglob("*.py")):
        for function, bound in functions(ast.parse(file.read_text()).body):
            seen += 1
            if names := lacking(function, bound):
                place = f"{file.relative_to(PACKAGE)}:{function.lineno}"
                incomplete.append(f"{place} {function.name}: {', '.join(names)}")
    assert seen > 500
    assert not incomplete, "\n".join(incomplete)


def test_every_name_of_an_option_has_its_row():
    assert PRESETS.keys() == set(get_args(PresetName))
    assert arithmetic.METHODS.keys() == set(get_args(arithmetic.MethodName))
