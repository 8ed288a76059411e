"""`jaxarith extract`: the difference of two models as a LoRA adapter."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxarith
from jaxarith import files, hub, report, resources, stream, tree
from jaxarith.commands import arguments
from jaxarith.commands.adapters import classes, differences, kept
from jaxarith.commands.adapters.low_rank import low_rank
from jaxarith.commands.merge import flags
from jaxarith.commands.merge.request import DTYPES
from jaxarith.hub import Stored, adapter_writing, safetensors
from jaxarith.report import printable, shown
from jaxarith.stream.inputs import read_config

_DESCRIPTION = """\
Finds the LoRA adapter that is closest to the difference of two checkpoints, and writes
it as a folder that PEFT loads on the base. For each linear layer it is the best product
of the given rank, or of the rank that keeps a share of the squared norm.

Tensors are read one after another, so models may be larger than memory. Layers that
did not change are left out. Changed tensors outside linear layers, such as embeddings,
norms and biases, are listed; --keep-rest keeps them whole in the adapter. Names and
kinds of layers come from the model's class in transformers if it is installed, and
otherwise from the names in the file.

MODEL may itself be an adapter of any kind, for example a DoRA, or MODEL+ADAPTER."""

_EXAMPLES = """\
examples:
  jaxarith extract ./base ./tuned --rank 32 --out ./lora
  jaxarith extract ./base ./tuned --energy 0.9 --rank 128 --keep-rest --out ./lora"""

_MOST_ROWS = 40  # the most rows of the printed table


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    command = commands.add_parser(
        "extract",
        help="extract a LoRA adapter from the difference of two models",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_run)
    arguments.take_exponents(command)
    command.add_argument("base", metavar="BASE", help="a folder or hub id")
    command.add_argument(
        "model", metavar="MODEL", help="the fine-tuned model: a folder or hub id"
    )
    command.add_argument("--out", type=Path, required=True, help="the new folder")
    command.add_argument(
        "--rank", type=arguments.count, metavar="R", help="the largest rank of a layer"
    )
    command.add_argument(
        "--energy",
        type=_share,
        metavar="E",
        help="the share of each layer's squared norm to keep, above 0 and up to 1; "
        "each layer gets the rank that it needs, up to --rank",
    )
    command.add_argument(
        "--keep-rest",
        action="store_true",
        help="keep changed tensors outside linear layers whole: in modules_to_save, or "
        "as biases",
    )
    command.add_argument(
        "--exclude",
        metavar="REGEX",
        help="regular expression for whole names in BASE of modules without factors",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of the factors (default: float32)",
    )
    flags.add_dequantize(command)
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing folder once the new one is complete",
    )
    command.add_argument(
        "--quiet", action="store_true", help="print nothing but errors"
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if 0 < share <= 1:
        return share
    raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and up to 1.")


class Row(NamedTuple):
    """Facts about an extracted layer.

    Attributes:
      module: name of the layer.
      rank: the rank of its factors.
      energy: the share of the change's squared norm that the factors keep.
      squared_norm: squared norm of the layer's change.
    """

    module: str
    rank: int
    energy: float
    squared_norm: float


def _run(args: argparse.Namespace) -> None:
    if args.rank is None and args.energy is None:
        raise ValueError("the size of the adapter is missing. Give --rank or --energy.")
    if args.exclude is not None:
        _check_pattern(args.exclude)
    opened = stream.open_models(
        args.base,
        [args.model],
        dequantize="float32" if args.dequantize else None,
    )
    folders = opened.folders
    out = hub.check_out(args.out.expanduser(), args.overwrite, folders)
    before = hub.state(out)
    stamps = {x: files.stamp(x) for folder in folders for x in hub.weight_files(folder)}
    config = read_config(folders[0])
    layout, notes = classes.layout(folders[0], config, opened.base)
    linear = _linear(layout, args.exclude)
    if not args.quiet:
        for note in (*opened.notes, *notes):
            print(shown(f"note: {note}"), file=sys.stderr)
    with hub.staging(out.parent) as temporary:
        new = temporary / "new"
        new.mkdir()
        sources = [x for leaf in opened.taus[0].values() for x in leaf.sources]
        with (
            adapter_writing.Spill(temporary / "factors") as spill,
            resources.one_blas_thread(),
            opened.progress.shown(sum(x.nbytes for x in sources), args.quiet),
        ):
            tensors, rows, rest = _extracted(args, opened, layout, linear, spill)
        if not rows:
            some = tree.counted(len(rest), "other tensor does", "other tensors do")
            others = f"; {some}" if rest else ""
            raise ValueError(
                f"no linear layer of {args.model} differs from {args.base}{others}."
            )
        more, left = {}, [*rest]
        if args.keep_rest:
            adapted = {row.module for row in rows}
            saved = kept.rest(opened.base, layout, rest, adapted)
            tensors |= saved.tensors()
            more = {"modules_to_save": saved.modules, "bias": saved.bias}
            left = saved.left
        name, revision = _named(args.base)
        modules = {f"{row.module}.weight" for row in rows}
        turned = [x for name, x in linear.items() if layout.names[name] in modules]
        content = adapter_writing.config(
            {row.module: row.rank for row in rows},
            name,
            task_type=kept.task_type(config),
            fan_in_fan_out=any(turned),
            more={"revision": revision},
            **more,
        )
        size = adapter_writing.write(new, tensors, content)
        _beside(new, args, out.name, rows, left)
        safetensors.check_unchanged(stamps)
        hub.publish(new, out, before, temporary / "old")
    if not args.quiet:
        whole = [name for name in rest if name not in left]
        print(_told(args, out, rows, whole, left, size))


def _named(base: str) -> tuple[str, str | None]:
    """Returns the name of a base in PEFT's form, and its revision on the Hub."""
    if "@" not in base or Path(base).expanduser().exists():
        return base, None
    name, _, revision = base.partition("@")
    return name, revision


def _linear(layout: classes.Layout, exclude: str | None) -> dict[str, bool]:
    """Returns the weights that get factors: untied weights of linear layers."""
    return {
        name: in_out
        for name, in_out in layout.linear.items()
        if layout.names[name] not in layout.tied
        and not re.fullmatch(exclude or "", name.removesuffix(".weight"))
    }


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"--exclude {pattern!r} is not a regular expression: {error}."
        ) from error


def _extracted(
    args: argparse.Namespace,
    opened: stream.Opened,
    layout: classes.Layout,
    linear: Mapping[str, bool],
    spill: adapter_writing.Spill,
) -> tuple[dict[str, Stored], list[Row], dict[str, Stored]]:
    """Returns the factors by their names in the file, the layers, and other changes."""
    tensors: dict[str, Stored] = {}
    rows: list[Row] = []
    rest: dict[str, Stored] = {}
    for name, delta, whole in differences.changes(opened):
        if name not in linear:
            rest[name] = spill.put(name, whole)
            continue
        matrix = jnp.asarray(delta.T if linear[name] else delta, jnp.float32)
        found = low_rank(matrix, rank=args.rank, energy=args.energy)
        module = layout.names[name].removesuffix(".weight")
        factors = (found.right, found.left)
        names = adapter_writing.factor_names(module)
        for key, factor in zip(names, factors, strict=True):
            tensors[key] = spill.put(module, factor.astype(jnp.dtype(args.dtype)))
        row = Row(module, len(found.right), found.energy, found.squared_norm)
        rows.append(row)
    return tensors, rows, rest


def _total(rows: Sequence[Row]) -> float:
    """Returns the kept share of the squared norm of all changes."""
    kept_norm = sum(row.energy * row.squared_norm for row in rows)
    return kept_norm / sum(row.squared_norm for row in rows)


def _table(rows: Sequence[Row]) -> str:
    header = ["module", "rank", "energy kept", "norm of the change"]
    cells = [
        [row.module, row.rank, f"{row.energy:.2%}", f"{np.sqrt(row.squared_norm):.4g}"]
        for row in rows
    ]
    return report.markdown_table(header, cells, right=[False, True, True, True])


def _listed(names: Sequence[str]) -> str:
    return f"{tree.counted(len(names), 'changed tensor')}: {report.listed(names, 6)}"


def _told(
    args: argparse.Namespace,
    out: Path,
    rows: Sequence[Row],
    whole: Sequence[str],
    left: Sequence[str],
    size: int,
) -> str:
    worst = sorted(rows, key=lambda row: row.energy)
    few = rows if len(rows) <= _MOST_ROWS else worst[:_MOST_ROWS]
    lines = [printable(_table(few))]
    if len(few) < len(rows):
        least = tree.counted(len(few), "layer that keeps", "layers that keep")
        lines.append(f"(the {least} least; all layers are in README.md)")
    lines.append(
        f"{out}: {tree.counted(len(rows), 'layer')}, rank "
        f"{max(row.rank for row in rows)}, energy kept {_total(rows):.2%}, least "
        f"{worst[0].energy:.2%} in {printable(worst[0].module)} ({size / 1e6:.2f} MB)"
    )
    if whole:
        lines.append(f"kept whole: {printable(_listed(whole))}")
    if left:
        hint = (
            "no adapter can keep them" if args.keep_rest else "--keep-rest keeps them"
        )
        lines.append(f"not in the adapter ({hint}): {printable(_listed(left))}")
    return "\n".join(lines)


def _beside(
    folder: Path,
    args: argparse.Namespace,
    name: str,
    rows: Sequence[Row],
    left: Sequence[str],
) -> None:
    """Writes the model card, and the same facts as data."""
    command = shlex.join(["jaxarith", *args.arguments])
    facts = {
        "jaxarith": jaxarith.__version__,
        "base": args.base,
        "model": args.model,
        "command": command,
        "energy": _total(rows),
        "layers": [row._asdict() for row in rows],
        "left": [*left],
        "files": [],
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (folder / hub.RECORD).write_text(text, encoding="utf-8")
    lines = [
        "---\nlibrary_name: peft\ntags:\n- jaxarith\n- lora\n---\n",
        f"# {name}\n",
        f"A LoRA adapter extracted from `{args.model}` on `{args.base}` with jaxarith "
        f"{jaxarith.__version__}. It keeps {_total(rows):.2%} of the squared norm of "
        "the changes of linear layers.\n",
        f"```sh\n{command}\n```\n",
        printable(_table(rows)) + "\n",
    ]
    if left:
        lines.append(f"Not in the adapter: {_listed(left)}.\n")
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
