"""`jaxarith recipe check`: reports what a merge would do, from headers only."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxarith.commands.merge import documents, flags, steps
from jaxarith.commands.merge.documents import Document
from jaxarith.commands.merge.located import Located
from jaxarith.commands.merge.yaml_lines import Node
from jaxarith.hub import headers

_DESCRIPTION = """\
Checks the YAML file of a merge without reading weights: its form, methods and options,
whether the models exist, and whether their tensors, configurations and vocabularies fit
together. Then it prints what `jaxarith merge FILE OUT --dry-run` prints: bytes, passes,
memory and notes.

For models on the Hub it downloads configurations, tokenizers and the headers of
safetensors, but no weights. It cannot check values: whether they are finite, whether
buffers of models differ, and whether a head that is stored beside its tied embedding is
equal to it.

The exit status is 0 if the merge can begin, and 1 with the reason if it cannot."""

_EXAMPLES = """\
examples:
  jaxarith recipe check config.yaml
  jaxarith recipe check config.yaml --dtype bfloat16 --vocabulary base-rows"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    command = commands.add_parser("recipe", help="check the YAML file of a merge")
    actions = command.add_subparsers(dest="action", required=True)
    check = actions.add_parser(
        "check",
        help="say what a merge would do, without reading or downloading weights",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("file", help="a YAML file of mergekit's form")
    flags.add_outcome(check.add_argument_group("flags of the merge"))
    # The merge itself would need these.
    check.set_defaults(run=_run, out=None, folder=None, intermediate_dir=None)


def _run(args: argparse.Namespace) -> None:
    found = documents.read(args.file)
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        names = _headers(found, temporary)
        print(steps.plans(found, args, temporary, names))


def _headers(found: Sequence[Document], temporary: Path) -> Located:
    """Downloads only the headers of the models that are on the Hub.

    Raises:
      FileNotFoundError: a model does not exist; the message has the line.
      ValueError: a model has no headers that can be read.
    """
    names = Located()
    results = {one.name for one in found}
    for part, node in _parts(found).items():
        if part in results or Path(part).expanduser().exists():
            continue
        # Named as the model is, for adapters name the model that they were trained on.
        name = Path(part.partition("@")[0]).name
        folder = temporary / "hub" / str(len(names.folders)) / name
        try:
            names = names.also(part, str(headers.fetch(part, folder)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{node.place}: {error}") from error
        except ValueError as error:
            raise node.error(str(error)) from error
    return names


def _parts(found: Sequence[Document]) -> dict[str, Node]:
    """Returns models and adapters with the first place where each is named."""
    parts: dict[str, Node] = {}
    for one in found:
        named = [*one.models.items(), *one.tokenizers.items()]
        for model, node in named:
            if model in ("base", "union") and node is one.tokenizers.get(model):
                continue
            for part in documents.adapted(model):
                parts.setdefault(part, node)
    return parts
