"""Prints the plan of a merge, and writes the files beside the weights."""

import collections
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxarith import hub, tree
from jaxarith.commands.merge import model_card, sides
from jaxarith.commands.merge.model_card import Input
from jaxarith.commands.merge.new_tokenizer import Planned
from jaxarith.commands.merge.recipe import MergeRecipe
from jaxarith.commands.merge.slices import SlicedRecipe
from jaxarith.hub import config as config_of
from jaxarith.hub import packed
from jaxarith.stream import Opened, Plan, Report, tying
from jaxarith.stream.inputs import adapted

_GENERATION = "generation_config.json"
_DTYPE_KEYS = {"dtype", "torch_dtype"}


def planned(
    recipe: MergeRecipe | SlicedRecipe,
    plan: Plan,
    dtype: str | None,
    notes: Sequence[str],
) -> str:
    """Returns the plan of a merge as a text."""
    passes = tree.counted(recipe.function.passes, "pass", "passes")
    files = tree.counted(len(plan.files), "file")
    first = "base" if recipe.base else "first model"
    if isinstance(recipe, SlicedRecipe) and recipe.base is None:
        first = "first model of each slice"
    rows = [
        ("method", recipe.request.method),
        ("base", recipe.base or "none"),
        *(("model", model) for model in recipe.models),
        ("tensors", f"{plan.tensors}, the largest of {_bytes(plan.largest)}"),
        ("dtype", dtype or f"that of the {first}"),
        ("reads", f"{_bytes(plan.bytes_in)} in each of about {passes}"),
        ("writes", f"{_bytes(plan.bytes_out)} in {files}"),
        ("memory", f"about {_bytes(plan.peak_bytes)}"),
        *(("note", note) for note in notes),
    ]
    return "\n".join(f"{label:<8} {text}" for label, text in rows)


def _bytes(count: int) -> str:
    power = min(int(math.log(max(count, 1), 1000)), 4)
    digits = 2 if power else 0
    return f"{count / 1000**power:.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


@dataclasses.dataclass(frozen=True)
class Beside:
    """The files that belong beside the weights.

    Attributes:
      config: the content of `config.json`; None if the base is a single file.
      files: files to copy, for example of the tokenizer, by their new names.
      made: the content of files that are not copies, by name.
      notes: notes for the user about these files.
    """

    config: dict[str, Any] | None
    files: Mapping[str, Path]
    made: Mapping[str, str]
    notes: tuple[str, ...]


def beside(opened: Opened, dtype: str | None, tokenizer: Planned) -> Beside:
    """Finds the files that belong beside the weights of a merge.

    Args:
      opened: the models.
      dtype: dtype of the new weights; None means the base's.
      tokenizer: the tokenizer of the merge.

    Raises:
      FileNotFoundError: the base has no configuration.
      ValueError: the configuration is not JSON, `tokenizer` has no files, or tokens
        have ids beyond the rows of the merge.
    """
    folder, rows = opened.folders[0], opened.resized
    if folder.is_file() and opened.config is None:
        note = f"{folder} is a single file, so the merge has weights and no config.json"
        return Beside(None, {}, {}, (note,))
    config, notes = _config(opened, dtype)
    folders = [x for x in opened.folders if x.is_dir()]
    new = {*tokenizer.made, *tokenizer.left}
    files, more = sides.choose(folders, tokenizer.folder, new)
    notes += more
    files, made, more = _replaced(files, tokenizer)
    notes += more
    if tokenizer.renumber is not None:
        config, more = tokenizer.renumber(config, hub.CONFIG)
        notes += more
    if rows:
        _check_tokens(config, files, min(rows.values()))
    elif lines := sides.beyond({}, files, tying.rows(opened.base)):
        few = "; ".join(tree.first_few(lines, most=3))
        tokens = tree.counted(len(lines), "token")
        notes.append(f"the embeddings have no rows for {tokens}: {few}")
    return Beside(config, files, made, tuple(notes))


def _config(opened: Opened, dtype: str | None) -> tuple[dict[str, Any], list[str]]:
    """Returns the new `config.json` before ids of tokens change, and notes."""
    found = opened.config
    config = hub.read_json(opened.folders[0]) if found is None else dict(found)
    notes = []
    if dtype is None and packed.stated_format(config) is not None:
        dtype = _most(opened)  # a packed model's config states its compute dtype
    if dtype is not None:
        config = config_of.replaced(config, lambda key, _: key in _DTYPE_KEYS, dtype)
        if not _DTYPE_KEYS & config.keys():
            config["torch_dtype"] = dtype
    if opened.untied and tying.states(config) is not False:
        config = config_of.replaced(config, lambda key, _: key == tying.KEY, False)
        config[tying.KEY] = False
        notes.append(f"config.json: {tying.KEY} is now false")
    for old, new in opened.resized.items():
        vocabulary = ("vocab_size", old)
        before = config
        config = config_of.replaced(
            config, lambda *item, of=vocabulary: item == of, new
        )
        if config == before:
            notes.append(
                f"config.json states no vocab_size of {old} and is kept, but the merge "
                f"has {new} rows"
            )
    if (said := packed.stated_format(config)) is not None:
        config = config_of.without(config, packed.KEYS)
        notes.append(
            f"config.json says that the weights are quantised ({said}), but the merged "
            "weights are not; quantization_config is left out"
        )
    return config, notes


def _most(opened: Opened) -> str:
    """Returns the dtype of most of the new weights."""
    sizes = collections.Counter()
    for tensor in opened.base.values():
        sizes[tensor.dtype.name] += tensor.size * tensor.is_floating
    return sizes.most_common(1)[0][0]


def _replaced(
    files: Mapping[str, Path], tokenizer: Planned
) -> tuple[dict[str, Path], dict[str, str], list[str]]:
    """Returns the files that are copied, the files that are written, and notes."""
    made, notes = dict(tokenizer.made), []
    file = files.get(_GENERATION)
    if file is not None and tokenizer.renumber is not None:
        before = hub.read_json(file.parent, file.name)
        after, notes = tokenizer.renumber(before, _GENERATION)
        if after != before:
            made[_GENERATION] = json.dumps(after, indent=2, ensure_ascii=False) + "\n"
    left = [name for name in tokenizer.left if name in files and name not in made]
    if left:
        notes.append(
            f"not copied, because of another vocabulary or template: {', '.join(left)}"
        )
    kept = {n: file for n, file in files.items() if n not in made and n not in left}
    return kept, made, notes


def write(folder: Path, found: Beside, name: str, facts: Mapping[str, Any]) -> None:
    """Writes all files except the weights.

    Args:
      folder: the new folder.
      found: the files that belong beside the weights.
      name: name of the new model.
      facts: the facts about the merge, as `model_card.data` returns them.
    """
    for relative, file in found.files.items():
        place = folder / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    for relative, text in found.made.items():
        (folder / relative).write_text(text, encoding="utf-8")
    if found.config is not None:
        _write_json(folder / hub.CONFIG, found.config)
    names = sorted([*found.files, *found.made])
    _write_json(folder / hub.RECORD, {**facts, "files": names})
    card = model_card.render(name, facts)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path, content):
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def inputs(
    recipe: MergeRecipe | SlicedRecipe, opened: Opened, report: Report
) -> list[Input]:
    """Returns the models with the hashes of their weights and of their adapters'."""
    folders = iter(opened.folders if recipe.base is not None else opened.folders[1:])

    def of_model(model: str, role: Literal["base", "model"]) -> Input:
        parts = adapted(model)
        local = any(Path(part).expanduser().exists() for part in parts)
        hashes: dict[str, str] = {}
        for _ in parts:
            hashes |= report.sha256.get(str(next(folders)), {})
        return Input(model, role, local, hashes)

    base = [] if recipe.base is None else [of_model(recipe.base, "base")]
    return [*base, *(of_model(model, "model") for model in recipe.models)]


def _check_tokens(config, files, rows):
    """Raises a ValueError if tokens have ids beyond the rows that a merge keeps."""
    if lines := sides.beyond(config, files, rows):
        what = "special or added token"
        lie = tree.counted(len(lines), f"{what} lies", f"{what}s lie")
        raise ValueError(
            f"the merge would keep {tree.counted(rows, 'row')}, and {lie} beyond: "
            f"{'; '.join(tree.first_few(lines, most=4))}. "
            'Choose vocabulary="base-rows" or "skip" (--vocabulary).'
        )
