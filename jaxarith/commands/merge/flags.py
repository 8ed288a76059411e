"""The flags of `jaxarith merge`, and the merge that they ask for."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from jaxarith.commands import arguments
from jaxarith.commands.merge import gradients, methods, recipe, wrappers
from jaxarith.commands.merge.gradients import Setting, Value
from jaxarith.commands.merge.request import DTYPES, PRESETS, MergeRequest, Model
from jaxarith.hub.quantised import READERS
from jaxarith.merge import METHODS
from jaxarith.stream import SHARD_BYTES, policies

_DESCRIPTION = """
Merges fine-tuned checkpoints of one model into a new folder that transformers loads.
Models are folders or hub ids with safetensors weights, of any architecture. A PEFT
adapter (alone, or as MODEL+ADAPTER) counts as the base or MODEL plus the adapter. The
file of a task vector, as in the bank of the experiments, counts as the base plus the
vector. Weights are streamed: memory holds only a few tensors of every model, whatever
its size.

Describe the merge in a YAML file of mergekit's form, or by flags. A file may have
several documents with names. Documents can use each other's results as models; they
run in the order that this needs. The document that no other uses goes to the new
folder. All are checked from headers before the first one runs. --dtype applies to the
last document only.
"""
_USAGE = """jaxarith merge CONFIG.yaml OUT [flags of every merge]
       jaxarith merge --method METHOD [--base BASE] --model MODEL [--model MODEL ...]
                      --out OUT [--preset PRESET] [options of the method] [flags]"""
_EXAMPLES = """
examples:
  jaxarith merge config.yaml merged
  jaxarith merge --method average --model run1 --model run2 --out soup
  jaxarith merge --method ties --base B --model math --model code --density 0.2 --out M
  jaxarith merge --method task_arithmetic --base B --model M1 --model M2 \\
    --coef 0.3 0.5 --dtype bfloat16 --out M --dry-run
  jaxarith merge --preset mergekit --method ties --base B --model M1 --model M2 \\
    --weight 0.3 0.5 --density 0.5 --out M
  jaxarith merge --method task_arithmetic --coef 0.3 --base ./clip --out M \\
    --model bank/clip/nonlinear/dtd.safetensors --model ./clip-svhn
  jaxarith merge --method ties --base B --model M1 --model M2 --after svc --out M
  jaxarith merge --to-adapter --adapter-rank 32 --method task_arithmetic --coef 0.5 \\
    --model lora1 --model lora2 --out lora

methods and their options:
"""


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """Adds the subcommand to what `add_subparsers` returned, and returns it."""
    command = commands.add_parser(
        "merge",
        help="merge fine-tuned checkpoints into a new checkpoint",
        usage=_USAGE,
        allow_abbrev=False,
        description=_DESCRIPTION,
        epilog=_EXAMPLES + _table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.take_exponents(command)
    command.add_argument("config", nargs="?", help="a YAML file of mergekit's form")
    command.add_argument("folder", nargs="?", type=Path, help="the new folder")
    command.add_argument("--out", type=Path, help="the new folder")
    command.add_argument(
        "--method", choices=recipe.names(), metavar="METHOD", help="see below"
    )
    command.add_argument("--base", help="the pre-trained checkpoint")
    command.add_argument(
        "--model",
        action="append",
        dest="models",
        metavar="MODEL",
        help="a fine-tuned checkpoint, or the file of a task vector; repeat the flag "
        "for each",
    )
    command.add_argument(
        "--preset",
        choices=PRESETS,
        help="which method to use if both have one of this name (default: paper)",
    )
    command.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="WRAPPER",
        help="change the merged vector before it is written, for example svc or "
        "lines:beta=0.5 (see below); may be repeated",
    )
    command.add_argument(
        "--to-adapter",
        action="store_true",
        help="merge PEFT adapters of one base to one adapter, by the method in the "
        "small space that they span; the base's weights are not needed; the result is "
        "in float32 unless --dtype is given",
    )
    command.add_argument(
        "--adapter-rank",
        type=arguments.count,
        metavar="R",
        help="the largest rank of a layer in the new adapter; each layer is the best "
        "one of that rank (default: the sum of the ranks)",
    )
    common = command.add_argument_group("flags of every merge")
    add_outcome(common)
    common.add_argument(
        "--device",
        choices=("cpu", "gpu", "tpu"),
        help="compute on all devices of this kind; tensors are spread over them, with "
        "the same bits as on one device (default: one device, the best that JAX finds)",
    )
    common.add_argument(
        "--threads",
        type=arguments.count,
        metavar="N",
        help="use at most N threads to compute (in XLA on CPUs, in BLAS, and for "
        "matrices in parallel) and at most N, up to 2, to read; one more thread hashes "
        "and one writes (default: a thread for each core, and 2 to read). With another "
        "N, products of matrices may differ in their last bits",
    )
    common.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing folder once the new one is complete",
    )
    common.add_argument(
        "--intermediate-dir",
        type=Path,
        metavar="DIR",
        help="keep the results of the other documents of a file in DIR, by their "
        "names; a result of an earlier run is used again if recipe, flags and models "
        "(by SHA-256) are the same (default: a temporary folder)",
    )
    common.add_argument(
        "--dry-run", action="store_true", help="print the plan, and write nothing"
    )
    common.add_argument(
        "--no-hashes",
        action="store_false",
        dest="hashes",
        help="do not hash the weights for the model card (on two cores, hashing takes "
        "as long as averaging a few models)",
    )
    common.add_argument("--quiet", action="store_true", help="print nothing but errors")
    group = command.add_argument_group(
        "options of methods (defaults: those of the method)"
    )
    for option, owners in _owners().items():
        group.add_argument(
            _flag(option),
            nargs="+",
            dest=f"option {option}",
            metavar="X",
            help="; ".join(f"{kind}: {', '.join(of)}" for kind, of in owners.items()),
        )
    return command


def add_outcome(group: "argparse._ArgumentGroup") -> None:
    """Adds the flags that change the result of a merge besides the recipe."""
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the new weights (default: the base's); sums are in float32",
    )
    add_policies(group)
    add_dequantize(group, "in bfloat16 or, with another --dtype, in float32")
    group.add_argument(
        "--shard-size",
        type=_size,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="the largest size of a file, for example 500MB (default: 5GB)",
    )
    group.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="SEED",
        help="seed of random methods, from 0 (the default) to 2^32 - 1",
    )


def add_dequantize(
    parser: "argparse._ActionsContainer", dtype: str = "in float32"
) -> None:
    """Adds the flag that reads packed models; `dtype` names the dtype in its help."""
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help=f"read quantised models as numbers, {dtype}: {', '.join(READERS)}, and "
        "files in GGUF (with jaxarith[gguf]); without this flag they are refused",
    )


def add_policies(group: "argparse._ArgumentGroup") -> None:
    """Adds the flags for models that do not fit their base in every tensor."""
    group.add_argument(
        "--vocabulary",
        choices=policies.VOCABULARIES,
        default="error",
        help="what to do if numbers of tokens differ: refuse (the default), keep the "
        "rows that all models have, keep the base's rows, or keep the base's tensors "
        "unmerged",
    )
    group.add_argument(
        "--missing",
        choices=policies.MISSING,
        default="error",
        help="what to do if a model lacks tensors of the base, or has others: refuse "
        "(the default), or keep the base's",
    )


def _owners() -> dict[str, dict[str, list[str]]]:
    """Returns the methods that have each option, by option and kind of values."""
    owners: dict[str, dict[str, list[str]]] = {}
    for table in recipe.PRESETS.values():
        for name, method in table.items():
            for key, option in method.options.items():
                of_kind = owners.setdefault(key, {}).setdefault(_values(option), [])
                of_kind += [name] * (name not in of_kind)
    return owners


def _values(option: methods.Option) -> str:
    if isinstance(option.kind, tuple):
        return "|".join(option.kind)
    each = ", or one for each model" if option.each else ""
    return "|".join([methods.KINDS[option.kind], *option.words]) + each


def _table() -> str:
    lines = []
    for preset, table in recipe.PRESETS.items():
        lines += [f"  --preset {preset}"]
        for name, method in table.items():
            lines.append(f"    {name:<18}{' '.join(_flags(method.options))}".rstrip())
            if preset == "paper" and name in METHODS:
                lines.append(f"    {'':<18}({METHODS[name].paper})")
    lines += ["", "wrappers for --after, and their options:", *wrappers.table()]
    return "\n".join(lines)


def _seed(text: str) -> int:
    if text.isdecimal() and int(text) < 2**32:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a whole number from 0 to 2^32 - 1."
    )


def _size(text: str) -> int:
    number = r"(\d+\.?\d*|\.\d+)"
    found = re.fullmatch(rf"{number}\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if found:
        size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))
    if size <= 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write for example 5GB or 500MB."
        )
    return size


def check_alone(args: argparse.Namespace) -> None:
    """Raises a ValueError if flags are given that belong in the YAML file."""
    flags = [
        name
        for name in ("method", "base", "models", "preset", "after")
        if getattr(args, name)
    ]
    flags += _given(args)
    if flags:
        name = flags[0].removesuffix("s") if flags[0] == "models" else flags[0]
        raise ValueError(
            f"{_flag(name)} cannot be given with {args.config}, which describes the "
            "merge. Put it in the file."
        )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _flags(options: Iterable[str]) -> list[str]:
    return [_flag(option) for option in options]


def _given(args: argparse.Namespace) -> dict[str, list[str]]:
    prefix = "option "
    return {
        name.removeprefix(prefix): words
        for name, words in vars(args).items()
        if name.startswith(prefix) and words is not None
    }


def request(args: argparse.Namespace) -> MergeRequest:
    """Returns the merge that the flags ask for.

    Raises:
      ValueError: a flag is missing, is not an option of the method, or has a wrong
        value.
    """
    if args.method is None:
        raise ValueError("nothing to merge. Name a YAML file, or --method and --model.")
    if not args.models:
        raise ValueError(f"{args.method} needs models. Give each one with --model.")
    method = recipe.find(args.method, args.preset)
    shared: dict[str, Setting] = {}
    own: list[dict[str, Setting]] = [{} for _ in args.models]
    for name, words in _given(args).items():
        flag = _flag(name)
        if (option := method.options.get(name)) is None:
            known = ", ".join(_flags(method.options))
            raise ValueError(
                f"{args.method} has no option {flag}; it has {known or 'none'}."
            )
        values = [_value(word, option, f"{flag} of {args.method}") for word in words]
        if len(values) == 1:
            shared[name] = gradients.constant(values[0])
        elif not option.each:
            raise ValueError(f"{flag} of {args.method} takes one value; found {words}.")
        elif len(values) != len(own):
            raise ValueError(
                f"{flag} has {len(values)} values, but --model is given {len(own)} "
                "times. Give one value, or one for each model."
            )
        else:
            for parameters, value in zip(own, values, strict=True):
                parameters[name] = gradients.constant(value)
    return MergeRequest(
        method=args.method,
        models=tuple(map(Model, args.models, own)),
        base=args.base,
        parameters=shared,
        preset=args.preset or "paper",
        dtype=args.dtype,
        after=tuple(map(wrappers.of_text, args.after)),
    )


def _value(word: str, option: methods.Option, label: str) -> Value:
    try:
        return methods.converted(word, option)
    except ValueError as error:
        raise ValueError(f"{label} {error}") from error
