"""`jaxarith convert`: safetensors <-> the msgpack files of Flax."""

import argparse
import importlib
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxarith import hub, lazy, tree
from jaxarith.hub import layouts

_MSGPACK = "flax_model.msgpack"
_SAFETENSORS = "model.safetensors"
_SHOWN = 8
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# The model that knows Flax's names, by `model_type` in config.json.
_PORTS = {"bert": "bert", "clip": "clip", "gpt2": "gpt2", "roberta": "bert", "t5": "t5"}

_DESCRIPTION = f"""\
Converts a checkpoint between PyTorch's format and Flax's: a folder with
{_SAFETENSORS} (or shards of it) becomes one with {_MSGPACK}, and the other
way round. config.json, tokenizer and preprocessing files go along. Values keep their
bits, unless --dtype rounds them; the whole model is held in memory.

Names and orientations become those of Hugging Face's models in the other framework,
such as a/kernel, [in, out], for a.weight, [out, in]. To Flax, this is known for the
architectures {", ".join(_PORTS)}; from Flax, for all. With --names keep,
names are only cut at their dots into nested dicts, or joined again, and nothing is
transposed: for all architectures, and for readers that expect that."""

_EXAMPLES = """\
examples:
  jaxarith convert ./bert ./bert-flax
  jaxarith convert google-t5/t5-small ./t5-flax --dtype bfloat16
  jaxarith convert ./llama ./llama-msgpack --names keep"""


def add(commands):
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
        "--dtype", choices=_DTYPES, help="of floating-point tensors; by default, IN's"
    )


def _run(args: argparse.Namespace):
    if args.out.exists():
        raise ValueError(f"{args.out} exists; name a new folder, or remove it first.")
    folder = hub.find(args.model)
    file, stored = hub.open_tensors(folder)
    keep = args.names == "keep"
    to_flax = file.name != _MSGPACK
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
    if left_out:
        more = [f"and {len(left_out) - _SHOWN} more"] * (len(left_out) > _SHOWN)
        print(
            "left out, since jaxarith's model has no place for it: "
            f"{', '.join([*left_out[:_SHOWN], *more])}. --names keep keeps all."
        )


def _nested(stored):
    if strange := [name for name in stored if "/" in name]:
        raise ValueError(
            f"the name {strange[0]!r} has a slash, so that it would not come back from "
            "nested dicts. Rename it."
        )
    return {name.replace(".", "/"): leaf for name, leaf in stored.items()}


def _flax(folder, stored):
    """Tensors under Flax's names, and the names of those that have none."""
    config = hub.read_json(folder)
    port = _PORTS.get(kind := config.get("model_type"))
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
        path: found.get(path)
        or layouts.Stored("f32", leaf.shape, lambda leaf=leaf: leaf)
        for path, leaf in params.items()
    }
    return leaves, sorted(found.keys() - params.keys())


def _array(path, leaf, dtype):
    array = leaf.read()
    if dtype is not None and "f" in leaf.dtype:
        with np.errstate(over="ignore"):  # reported below
            array = array.astype(_DTYPES[dtype])
    if not np.isfinite(array).all():
        reason = f" in {dtype}" if dtype else ""
        raise ValueError(lazy.not_finite(f"{path}{reason}"))
    return array


def _write(folder, out, leaves, to_flax, dtype):
    config = hub.read_json(folder)
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in config:
            config[key] = dtype
    with hub.staging(out.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        for file in hub.side_files(folder):
            shutil.copyfile(file, new / file.name)
        text = json.dumps(config, indent=2) + "\n"
        (new / "config.json").write_text(text, encoding="utf-8")
        if to_flax:
            from flax import serialization  # here: no other command needs it

            content = serialization.msgpack_serialize(tree.unflatten(leaves))
            (new / _MSGPACK).write_bytes(content)
        else:
            hub.save_tree(new / _SAFETENSORS, leaves, {"format": "pt"})
        os.replace(new, out)
