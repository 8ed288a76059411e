"""`jaxarith convert`: converts between safetensors and the msgpack files of Flax."""

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxarith import hub, lazy, tree
from jaxarith.hub import Stored, folders, layouts, open_clip, packed
from jaxarith.hub import config as config_of
from jaxarith.report import printable

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_PREPROCESSOR = "preprocessor_config.json"
# The module with Flax's names, for each `model_type` in config.json.
_PORTS = {"bert": "bert", "clip": "clip", "gpt2": "gpt2", "roberta": "bert", "t5": "t5"}

_DESCRIPTION = f"""\
Converts a checkpoint between PyTorch's format and Flax's: a folder with
{hub.WEIGHTS} (or shards of it) becomes one with {hub.MSGPACK}, and the other
way round. config.json, tokenizer and preprocessing files are copied. Values keep their
bits, unless --dtype rounds them; the whole model is held in memory.

Names and orientations become those of Hugging Face's models in the other framework: for
example, a.weight, [out, in], becomes a/kernel, [in, out]. To Flax, this works for the
architectures {", ".join(_PORTS)}; from Flax, it works for all. With
--names keep, names are only split at their dots into nested dicts, or joined again, and
nothing is transposed. This works for all architectures.

A CLIP in OpenCLIP's format becomes a folder of transformers with {hub.WEIGHTS}.
Such a CLIP is a folder with {open_clip.WEIGHTS[0]} or
{open_clip.WEIGHTS[1]}, or one file of safetensors or PyTorch (.pt, .bin).
PyTorch's files are read as data (weights_only), if PyTorch is installed."""

_EXAMPLES = """\
examples:
  jaxarith convert ./bert ./bert-flax
  jaxarith convert google-t5/t5-small ./t5-flax --dtype bfloat16
  jaxarith convert ./llama ./llama-msgpack --names keep
  jaxarith convert timm/vit_base_patch32_clip_224.laion2b_e16 ./laion2b_e16
  jaxarith convert ./ViT-B-32.pt ./clip --hidden-act quick_gelu"""


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
    command.add_argument(
        "model", metavar="IN", help="a folder, a hub id, or a file of OpenCLIP"
    )
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
    command.add_argument(
        "--hidden-act",
        choices=open_clip.HIDDEN_ACTS,
        help=f"activation of a model of OpenCLIP whose {open_clip.CONFIG} is missing",
    )


def _run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise ValueError(f"{args.out} exists. Name a new folder, or remove it first.")
    path = Path(args.model).expanduser()
    place = path if path.is_file() else hub.find(args.model)
    if (file := open_clip.weights_of(place)) is not None:
        if args.names == "keep":
            raise ValueError(
                f"{file} is OpenCLIP's, and its names are always converted. Leave out "
                "--names keep."
            )
        _from_open_clip(file, place, args.out, args.dtype, args.hidden_act)
        return
    if args.hidden_act is not None:
        raise ValueError(
            f"--hidden-act is for models of OpenCLIP, but {place} is not one. Leave it "
            "out."
        )
    _between(place, args.out, args.dtype, keep=args.names == "keep")


def _between(folder: Path, out: Path, dtype: str | None, *, keep: bool) -> None:
    """Converts from safetensors to msgpack, or the other way round."""
    file, stored = hub.open_tensors(folder)
    config = hub.read_json(folder)
    if dtype is not None:  # packed numbers would be rounded
        packed.check(folder, stored, config)
    dotted = {name.replace("/", "."): leaf for name, leaf in stored.items()}
    is_packed = packed.found(dotted, config) is not None
    stale = None if is_packed else packed.stated_format(config)
    if stale is not None:
        config = config_of.without(config, packed.KEYS)
    to_flax = file.name != hub.MSGPACK
    left_out: list[str] = []
    if to_flax:
        stored, left_out = (_nested(stored), []) if keep else _flax(folder, stored)
    leaves = {path: _array(path, leaf, dtype) for path, leaf in stored.items()}
    if keep and not to_flax:
        leaves = {path.replace("/", "."): leaf for path, leaf in leaves.items()}
    elif not to_flax:
        leaves = layouts.to_torch(leaves)
    contents = {hub.CONFIG: _config(config, dtype)}
    _write(out.absolute(), leaves, to_flax, contents, folder, hub.side_files(folder))
    _report(out, leaves, folders.left_behind(folder))
    if stale is not None:
        print(
            f"config.json said that the weights are quantised ({printable(stale)}), "
            "but they are not: quantization_config is left out"
        )
    if left_out:
        print(
            "left out, since jaxarith's model has no place for it: "
            f"{printable(', '.join(tree.first_few(left_out)))}. --names keep keeps all."
        )


def _from_open_clip(
    file: Path, place: Path, out: Path, dtype: str | None, hidden_act: Any
) -> None:
    """Converts a CLIP of OpenCLIP to a folder of transformers."""
    from jaxarith.models import clip  # here: flax is slow to import

    opened = open_clip.open_file(file)
    config, stored = open_clip.read_config(opened, hidden_act), opened.tensors
    layout = clip.layout(clip.CLIPConfig.from_json(config))
    expected = tree.flatten(layout)
    layouts.check(file, expected, layouts.to_flax(stored, set(expected)))
    leaves = {name: _array(name, leaf, dtype) for name, leaf in stored.items()}
    image_size = config["vision_config"]["image_size"]
    contents = {
        hub.CONFIG: _config(config, dtype),
        _PREPROCESSOR: open_clip.preprocessing(file.parent, image_size),
    }
    # Files beside a single file may belong to other models.
    sides = hub.side_files(place) if place.is_dir() else []
    sides = [x for x in sides if x.name not in (open_clip.CONFIG, _PREPROCESSOR)]
    _write(out.absolute(), leaves, False, contents, place, sides)
    left = folders.left_behind(place) if place.is_dir() else []
    left = [name for name in left if name != file.name]
    _report(out, leaves, left)
    if not any((out / name).exists() for name in ("tokenizer.json", "vocab.json")):
        print(
            "no tokenizer: copy the files of one into the new folder, such as that of "
            "openai/clip-vit-base-patch32"
        )


def _config(config: Mapping[str, Any], dtype: str | None) -> Mapping[str, Any]:
    if dtype is None:
        return config
    keys = ("dtype", "torch_dtype")
    return config_of.replaced(config, lambda key, _: key in keys, dtype)


def _report(out: Path, leaves: Mapping[str, np.ndarray], left: list[str]) -> None:
    size = sum(leaf.nbytes for leaf in leaves.values())
    print(f"{out}: {tree.counted(len(leaves), 'tensor')}, {size:,} bytes")
    if left:
        print(f"not copied: {', '.join(tree.first_few(left, most=12))}")


def _nested(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    if strange := [name for name in stored if "/" in name]:
        raise ValueError(
            f"the name {strange[0]!r} has a slash, so nested dicts would not return it "
            "unchanged. Rename it."
        )
    return {name.replace(".", "/"): leaf for name, leaf in stored.items()}


def _flax(
    folder: Path, stored: Mapping[str, Stored]
) -> tuple[dict[str, Stored], list[str]]:
    """Returns tensors under Flax's names, and the names of those without a name."""
    kind = hub.read_json(folder).get("model_type")
    port = _PORTS.get(str(kind))
    if port is None:
        raise ValueError(
            f"{folder} has the model_type {kind!r}, but jaxarith has Flax's names "
            f"and orientations for {', '.join(_PORTS)}. With --names keep, names stay "
            "PyTorch's, and nothing is transposed."
        )
    module = importlib.import_module(f"jaxarith.models.{port}")
    try:
        params = tree.flatten(module.load(folder).params)
    except ValueError as error:
        raise ValueError(f"{error}\nOr convert it with --names keep.") from error
    # The names were loaded correctly, but the dtype became float32.
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
    out: Path,
    leaves: dict[str, Any],
    to_flax: bool,
    contents: Mapping[str, Any],
    folder: Path,
    sides: Sequence[Path],
) -> None:
    """Writes the new folder.

    Args:
      out: path of the new folder.
      leaves: arrays by name.
      to_flax: whether to write msgpack.
      contents: the content of the JSON files, by name.
      folder: the old folder.
      sides: files of the old folder to copy.
    """
    with hub.staging(out.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        folders.copy_side_files(sides, folder, new)
        for name, content in contents.items():
            text = json.dumps(content, indent=2) + "\n"
            (new / name).write_text(text, encoding="utf-8")
        if to_flax:
            from flax import serialization  # here: no other command needs it

            content = serialization.msgpack_serialize(tree.unflatten(leaves))
            (new / hub.MSGPACK).write_bytes(content)
        else:
            hub.save_tree(new / hub.WEIGHTS, leaves, {"format": "pt"})
        hub.publish(new, out, None, temporary / "old")
