"""What `jaxarith merge` prints before a merge, and writes beside the weights."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxarith import hub
from jaxarith.commands.merge import model_card
from jaxarith.commands.merge.recipe import MergeRecipe
from jaxarith.stream import Plan, Report, policies
from jaxarith.stream.opened import Opened, adapted, open_checkpoint

FACTS = "jaxarith_merge.json"
_DTYPE_KEYS = {"dtype", "torch_dtype"}
_TOKENIZER = re.compile(
    r"tokenizer|tekken|special_tokens|added_tokens|vocab|merges|chat_template|spiece|bpe|"
    r".*\.model"
)


def planned(recipe: MergeRecipe, opened: Opened, plan: Plan, dtype: str | None) -> str:
    """The plan of a merge, for people to read."""
    rows = [
        ("method", recipe.method),
        ("base", recipe.base or "none"),
        *(("model", model) for model in recipe.models),
        ("tensors", f"{plan.tensors}, the largest of {_bytes(plan.largest)}"),
        ("dtype", dtype or "that of the base"),
        ("reads", f"{_bytes(plan.bytes_in)} in each of about {recipe.passes} passes"),
        ("writes", f"{_bytes(plan.bytes_out)} in {len(plan.files)} files"),
        ("memory", f"about {_bytes(plan.peak_bytes)}"),
        *(("note", note) for note in (*recipe.notes, *opened.notes)),
    ]
    return "\n".join(f"{label:<8} {text}" for label, text in rows)


def _bytes(count: int) -> str:
    power = min(int(math.log(max(count, 1), 1000)), 4)
    digits = 2 if power else 0
    return f"{count / 1000**power:.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def finisher(
    recipe: MergeRecipe,
    opened: Opened,
    *,
    name: str,
    dtype: str | None,
    tokenizer: Path | None,
    seed: int,
    command: str,
) -> Callable[[Path, Report], None]:
    """A function that writes all but the weights, for `stream.merge`.

    Args:
      recipe, opened: the merge.
      name: of the new model.
      dtype: of the new weights, or None for the base's.
      tokenizer: the folder whose tokenizer goes along; None is the base's.
      seed: of the random draws.
      command: the command line.

    Raises:
      FileNotFoundError: the base has no configuration.
      ValueError: it is no JSON.
    """
    folder = opened.folders[0]
    config = hub.read_json(folder)
    if dtype is not None:
        config = _replaced(config, lambda key, _: key in _DTYPE_KEYS, dtype)
        if not _DTYPE_KEYS & config.keys():
            config["torch_dtype"] = dtype
    for old, new in _changed_rows(opened).items():
        vocabulary = ("vocab_size", old)
        before = config
        config = _replaced(config, lambda *item, of=vocabulary: item == of, new)
        if config == before:
            opened.notes.append(
                f"config.json gives no vocab_size of {old} and is kept; the merge has "
                f"{new} rows"
            )
    if all(map(policies.is_floating, opened.base.values())):
        config.pop("quantization_config", None)  # what is merged is not quantised
    extras = hub.side_files(folder)
    if tokenizer is not None:
        found = [f for f in hub.side_files(tokenizer) if _TOKENIZER.match(f.name)]
        if not found:
            raise ValueError(
                f"tokenizer_source: {tokenizer} has no files of a tokenizer."
            )
        own = [file for file in extras if not _TOKENIZER.match(file.name)]
        extras = own + found

    def finish(new: Path, report: Report):
        for file in extras:
            shutil.copyfile(file, new / file.name)
        _write_json(new / "config.json", config)
        facts = model_card.data(
            recipe.method,
            recipe.settings,
            _inputs(recipe, opened, report),
            command,
            [*recipe.notes, *opened.notes],
            dtype=dtype,
            seed=seed,
        )
        _write_json(new / FACTS, facts)
        card = model_card.render(name, facts)
        (new / "README.md").write_text(card, encoding="utf-8")

    return finish


def _write_json(path, content):
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _inputs(recipe, opened, report) -> list[dict[str, Any]]:
    """The models with the hashes of their weights, those of an adapter among them."""
    folders = iter(opened.folders if recipe.base is not None else opened.folders[1:])
    inputs = []
    named = [(recipe.base, "base")] if recipe.base is not None else []
    for model, role in [*named, *((model, "model") for model in recipe.models)]:
        parts = adapted(model)
        local = any(Path(part).expanduser().is_dir() for part in parts)
        hashes: dict[str, str] = {}
        for _ in parts:
            hashes |= report.sha256.get(str(next(folders)), {})
        inputs.append({"model": model, "role": role, "local": local, "sha256": hashes})
    return inputs


def _replaced(config, chosen, new):
    """The configuration, and those in it, with another value of the chosen entries."""
    return {
        key: new
        if chosen(key, value)
        else _replaced(value, chosen, new)
        if key.endswith("_config") and isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def _changed_rows(opened) -> dict[int, int]:
    """The number of tokens of the base and of the merge, where they differ."""
    before = open_checkpoint(opened.folders[0])[0]
    return {
        before[name].shape[0]: tensor.shape[0]
        for name, tensor in opened.base.items()
        if tensor.shape and before[name].shape[0] != tensor.shape[0]
    }
