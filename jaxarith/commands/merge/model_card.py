"""The model card of a merged model, and the same as data."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

import jaxarith

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def data(
    method: str,
    settings: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    command: str,
    notes: Sequence[str],
    **facts: Any,
) -> dict[str, Any]:
    """What is known of a merge, as it is written to `jaxarith_merge.json`.

    Args:
      method: its name.
      settings: what was asked for, in the form of a YAML file.
      inputs: of each model `model`; `role`, such as "base"; `local`, whether it is a
        folder; and `sha256`, the hash of every file of weights by its name.
      command: the command line.
      notes: what the user was told.
      **facts: what else is worth knowing, such as `seed` and `dtype`.
    """
    return {
        "jaxarith": jaxarith.__version__,
        "method": method,
        "recipe": dict(settings),
        "inputs": [dict(model) for model in inputs],
        "command": command,
        "notes": list(notes),
        **facts,
    }


def render(name: str, facts: Mapping[str, Any]) -> str:
    """The text of `README.md`, of what `data` returned.

    Args:
      name: of the merged model.
      facts: see `data`.

    Example:
      >>> facts = data("average", {"models": []}, [], "jaxarith merge", ["a | b"])
      >>> print(render("mean", facts).splitlines()[8])
      # mean
    """
    notes = [f"- {_inline(note)}" for note in facts["notes"]]
    rows = [_row(model) for model in facts["inputs"]]
    parts = [
        f"---\n{_front_matter(facts)}---\n",
        f"# {_inline(name)}\n",
        f"A merge of {_models(facts)} by `{facts['method']}`, made with jaxarith "
        f"{facts['jaxarith']}.\n",
        "## Recipe\n",
        _fenced(dump(facts["recipe"]), "yaml"),
        "## Models\n",
        "\n".join(["| model | role | weights (SHA-256) |", "|---|---|---|", *rows, ""]),
        "## Command\n",
        _fenced(facts["command"] + "\n", "sh"),
    ]
    if notes:
        parts += ["## Notes\n", "\n".join([*notes, ""])]
    return "\n".join(parts)


def dump(values) -> str:
    """Plain data as YAML, in the order that it has."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _front_matter(facts):
    # The Hub accepts only ids of its models here, those of adapters among them.
    ids = [
        part
        for model in facts["inputs"]
        if not model["local"]
        for part in model["model"].split("+")
    ]
    known = [name for name in ids if _HUB_ID.fullmatch(name)]
    fields = {
        "base_model": list(dict.fromkeys(known)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "jaxarith", facts["method"].replace("_", "-")],
    }
    if not known:
        del fields["base_model"], fields["base_model_relation"]
    return dump(fields)


def _models(facts):
    count = sum(model["role"] != "base" for model in facts["inputs"])
    return f"{count} model" + "s" * (count != 1)


def _row(model):
    hashes = [
        f"{_inline(file)}: `{digest}`" for file, digest in model["sha256"].items()
    ]
    cells = [_inline(model["model"]), _inline(model["role"]), "<br>".join(hashes)]
    return f"| {' | '.join(cells)} |"


def _inline(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$!&])", r"\\\1", " ".join(str(text).split()))


def _fenced(text: str, language: str) -> str:
    """A block that the text cannot end, whatever it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}\n"
