"""`jaxarith convert`: safetensors <-> the msgpack files of Flax."""

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxarith import hub, lazy, tree
from jaxarith.hub import Stored, folders, layouts, packed
from jaxarith.hub import config as config_of
from jaxarith.report import printable

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# The model that knows Flax's names, by `model_type` in config.json.
_PORTS = {"bert": "bert", "clip": "clip", "gpt2": "gpt2", "roberta": "bert", "t5": "t5"}

_DESCRIPTION = f"""\
Converts a checkpoint between PyTorch's format and Flax's: a folder with
{hub.WEIGHTS} (or shards of it) becomes one with {hub.MSGPACK}, and the other
way round. config.json, tokenizer and preprocessing files are copied. Values keep their
bits, unless --dtype rounds them; the whole model is held in memory.

Names and orientations become those of Hugging Face's models in the other framework,
such as a/kernel, [in, out], for a.weight, [out, in]. To Flax, this works for the
architectures {", ".join(_PORTS)}; from Flax, for all. With --names keep,
names are only cut at their dots into nested dicts, or joined again, and nothing is
transposed: for all architectures, and for readers that expect that."""

_EXAMPLES = """\
examples:
  jaxarith convert ./bert ./bert-flax
  jaxarith convert google-t5/t5-small ./t5-flax --dtype bfloat16
  jaxarith convert ./llama ./llama-msgpack --names keep"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    command = commands.add_parser(
        "convert",
        help="convert checkpoints between safetensors and Flax's msgpack",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="IN", help="a folder or a hub id")
    command.add_argument("out", metavar="OUT", type=Path, help="the new folder")
    command.add_argument(
        "--names",
        choices=("convert", "keep"),
        default="convert",
        help="whether names and orientations are converted (the default) or kept",
    )
    command.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the new floating-point tensors (default: that of IN)",
    )


def _run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise ValueError(f"{args.out} exists; name a new folder, or remove it first.")
    folder = hub.find(args.model)
    file, stored = hub.open_tensors(folder)
    if args.dtype is not None:  # packed numbers would be rounded
        packed.check(folder, stored, hub.read_json(folder))
    keep = args.names == "keep"
    to_flax = file.name != hub.MSGPACK
    left_out: list[str] = []
    if to_flax:
        stored, left_out = (_nested(stored), []) if keep else _flax(folder, stored)
    leaves = {path: _array(path, leaf, args.dtype) for path, leaf in stored.items()}
    if keep and not to_flax:
        leaves = {path.replace("/", "."): leaf for path, leaf in leaves.items()}
    elif not to_flax:
        leaves = layouts.to_torch(leaves)
    _write(folder, args.out.absolute(), leaves, to_flax, args.dtype)
    size = sum(leaf.nbytes for leaf in leaves.values())
    print(f"{args.out}: {len(leaves)} tensors, {size:,} bytes")
    if left := folders.left_behind(folder):
        print(f"not copied: {', '.join(tree.first_few(left, most=12))}")
    if left_out:
        print(
            "left out, since jaxarith's model has no place for it: "
            f"{printable(', '.join(tree.first_few(left_out)))}. --names keep keeps all."
        )


def _nested(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    if strange := [name for name in stored if "/" in name]:
        raise ValueError(
            f"the name {strange[0]!r} has a slash, so that it would not come back from "
            "nested dicts. Rename it."
        )
    return {name.replace(".", "/"): leaf for name, leaf in stored.items()}


def _flax(
    folder: Path, stored: Mapping[str, Stored]
) -> tuple[dict[str, Stored], list[str]]:
    """Tensors under Flax's names, and the names of those that have none."""
    kind = hub.read_json(folder).get("model_type")
    port = _PORTS.get(str(kind))
    if port is None:
        raise ValueError(
            f"{folder} is of model_type {kind!r}; jaxarith knows Flax's names and "
            f"orientations for {', '.join(_PORTS)}. With --names keep, names stay "
            "PyTorch's, and nothing is transposed."
        )
    module = importlib.import_module(f"jaxarith.models.{port}")
    try:
        params = tree.flatten(module.load(folder).params)
    except ValueError as error:
        raise ValueError(f"{error}\nOr convert it with --names keep.") from error
    # What was loaded is right, but has become float32.
    found = layouts.to_flax(stored, set(params))
    leaves = {
        path: found[path] if path in found else _loaded(np.asarray(leaf))
        for path, leaf in params.items()
    }
    return leaves, sorted(found.keys() - params.keys())


def _loaded(array: np.ndarray) -> Stored:
    return Stored.made(array.dtype, array.shape, lambda: array)


def _array(path: str, leaf: Stored, dtype: str | None) -> np.ndarray:
    array = leaf.read()
    if dtype is not None and leaf.is_floating:
        with np.errstate(over="ignore"):  # reported below
            array = array.astype(_DTYPES[dtype])
    if not np.isfinite(array).all():
        reason = f" in {dtype}" if dtype else ""
        raise ValueError(lazy.not_finite(f"{path}{reason}"))
    return array


def _write(
    folder: Path, out: Path, leaves: dict[str, Any], to_flax: bool, dtype: str | None
) -> None:
    config = hub.read_json(folder)
    if dtype is not None:
        keys = ("dtype", "torch_dtype")
        config = config_of.replaced(config, lambda key, _: key in keys, dtype)
    with hub.staging(out.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        folders.copy_side_files(hub.side_files(folder), folder, new)
        text = json.dumps(config, indent=2) + "\n"
        (new / "config.json").write_text(text, encoding="utf-8")
        if to_flax:
            from flax import serialization  # here: no other command needs it

            content = serialization.msgpack_serialize(tree.unflatten(leaves))
            (new / hub.MSGPACK).write_bytes(content)
        else:
            hub.save_tree(new / hub.WEIGHTS, leaves, {"format": "pt"})
        hub.publish(new, out, None, temporary / "old")
