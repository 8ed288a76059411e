"""Opens the models of one merge and plans its files, to describe it or to do it."""

import argparse
import contextlib
import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxarith import hub, stream
from jaxarith.commands.merge import model_card, output, slices, vocabulary
from jaxarith.commands.merge.located import Located
from jaxarith.commands.merge.output import Beside
from jaxarith.commands.merge.recipe import MergeRecipe
from jaxarith.commands.merge.slices import SlicedRecipe
from jaxarith.hub import headers
from jaxarith.stream import tying
from jaxarith.stream.inputs import read_config


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A merge whose models are open.

    Attributes:
      recipe: the merge; its models may be folders instead of names.
      opened: the models.
      beside: the files beside the weights.
      tokenizer: the folder whose tokenizer is copied, if one is chosen.
      plan: the files of the weights.
      dtype: dtype of the new weights; None means the base's.
      notes: notes for the user.
      names: the folders of models by their names.
      args: the flags of the command.
    """

    recipe: MergeRecipe | SlicedRecipe
    opened: stream.Opened
    beside: Beside
    tokenizer: Path | None
    plan: stream.Plan
    dtype: str | None
    notes: tuple[str, ...]
    names: Located
    args: argparse.Namespace

    def described(self) -> str:
        """Returns a text that says what the merge would do.

        Raises:
          ValueError: the merge would fail because of its options.
        """
        self.recipe.check(self.opened.params_0, self.opened.taus)
        text = output.planned(self.recipe, self.plan, self.dtype, self.notes)
        return self.names.named(text)

    def facts(self, sha256: Mapping[str, dict[str, str]]) -> dict[str, Any]:
        """Returns the facts about the merge for its record.

        Args:
          sha256: the hashes of the weights, by folder and file.
        """
        report = stream.Report(0, 0, 0, dict(sha256))
        found = output.inputs(self.recipe, self.opened, report)
        return model_card.data(
            self.names.request(self.recipe.request),
            [one._replace(model=self.names.named(one.model)) for one in found],
            shlex.join(["jaxarith", *self.args.arguments]),
            self.notes,
            dtype=self.dtype,
            seed=self.args.seed,
        )

    def merge(
        self,
        out: Path,
        *,
        overwrite: bool,
        more: Callable[[Path], Mapping[str, Any]] | None = None,
    ) -> stream.Report:
        """Merges into a new folder.

        Args:
          out: the folder.
          overwrite: whether to replace an existing one.
          more: `more(folder)` returns further facts for the record, where `folder` has
            the complete weights.
        """

        def finish(folder: Path, report: stream.Report) -> None:
            facts = self.facts(report.sha256)
            facts |= {} if more is None else more(folder)
            output.write(folder, self.beside, out.resolve().name, facts)

        return stream.merge(
            self.recipe.merge,
            self.opened,
            out,
            dtype=self.dtype,
            shard_bytes=self.args.shard_size,
            hashes=self.args.hashes,
            overwrite=overwrite,
            quiet=self.args.quiet,
            finish=finish,
        )

    def check_apart(self, out: Path) -> None:
        """Raises a ValueError if a new folder is in a model or contains one."""
        for folder in map(Path.resolve, self.opened.folders):
            if folder.is_relative_to(out.resolve()):
                raise ValueError(f"{out} holds one of the models. Name another folder.")
            if out.resolve().is_relative_to(folder):
                raise ValueError(f"{out} is in one of the models. Name another folder.")

    def sketch(self, folder: Path) -> None:
        """Makes the folder of the merge with headers of weights but no weights."""
        folder.mkdir()
        tied = bool(tying.states(self.beside.config or {}))
        headers.sketch(folder, self.plan.files, tied=tied)
        output.write(folder, self.beside, folder.name, self.facts({}))


@contextlib.contextmanager
def prepared(
    recipe: MergeRecipe | SlicedRecipe,
    args: argparse.Namespace,
    names: Located | None = None,
) -> Iterator[Prepared]:
    """Opens the models of a merge, for the duration of a `with` block.

    Args:
      recipe: the merge.
      args: the flags of the command.
      names: the folders of models by their names.

    Raises:
      FileNotFoundError: a model or a part of one does not exist.
      ValueError: the models do not fit together, or do not fit the recipe.
    """
    names = names or Located()
    if isinstance(recipe, MergeRecipe):
        recipe = slices.settled(recipe, seed=args.seed)
    dtype = args.dtype or recipe.dtype
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = _places(recipe, temporary)
        tokenizer = vocabulary.plan(recipe.request, places)
        opened = _opened(recipe, args, places, tokenizer.rerowing)
        if opened.narrowed:
            stack.enter_context(_float64())
            opened = _opened(recipe, args, places, tokenizer.rerowing)
        config = read_config(opened.folders[0])
        if isinstance(recipe, SlicedRecipe):
            recipe = recipe.of(opened, config)
        else:
            recipe = dataclasses.replace(recipe, config=config)
        unused = [
            f"the filter {part!r} fits no tensor and has no effect"
            for part in recipe.unused_filters(opened.base)
        ]
        beside = output.beside(opened, dtype, tokenizer)
        notes = [*recipe.notes, *tokenizer.notes, *opened.notes]
        notes += [*unused, *beside.notes]
        yield Prepared(
            recipe=recipe,
            opened=opened,
            beside=beside,
            tokenizer=tokenizer.folder,
            plan=stream.plan(opened, dtype=dtype, shard_bytes=args.shard_size),
            dtype=dtype,
            notes=tuple(map(names.named, notes)),
            names=names,
            args=args,
        )


def _places(recipe: MergeRecipe | SlicedRecipe, temporary: Path) -> dict[str, str]:
    """Returns the places of all models by their names, the base first."""
    named = [name for name in (recipe.base, *recipe.models) if name is not None]
    if isinstance(recipe, SlicedRecipe):
        return {name: name for name in named}
    return {name: _in_safetensors(i, name, temporary) for i, name in enumerate(named)}


def _opened(
    recipe: MergeRecipe | SlicedRecipe,
    args: argparse.Namespace,
    places: Mapping[str, str],
    rerowing: stream.Rerowing | None,
) -> stream.Opened:
    dequantize = None
    if args.dequantize:
        in_bfloat16 = (args.dtype or recipe.dtype) in (None, "bfloat16")
        dequantize = "bfloat16" if in_bfloat16 else "float32"
    if isinstance(recipe, SlicedRecipe):
        return stream.open_slices(
            recipe.slices,
            recipe.models,
            base=recipe.base,
            vocabulary=args.vocabulary,
            missing=args.missing,
            rerowing=rerowing,
            dequantize=dequantize,
        )
    return stream.open_models(
        None if recipe.base is None else places[recipe.base],
        [places[name] for name in recipe.models],
        vocabulary=args.vocabulary,
        missing=args.missing,
        rerowing=rerowing,
        dequantize=dequantize,
    )


def _in_safetensors(number: int, model: str, temporary: Path) -> str:
    """Returns the model, or a converted copy of a folder with only Flax weights."""
    folder = Path(model).expanduser()
    kinds = (hub.WEIGHTS, hub.INDEX, hub.MSGPACK)
    found = [name for name in kinds if (folder / name).is_file()]
    if found != [hub.MSGPACK]:
        return model
    copy = temporary / f"{number}"
    if not copy.exists():
        hub.write(copy, hub.read(folder), hub.read_json(folder), copy_from=folder)
    return str(copy)


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Computes float64 tensors in float64, in all threads."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)
