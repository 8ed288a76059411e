"""Writes the model card of a merged model, and the same facts as data."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import yaml

import jaxarith
from jaxarith.commands.merge.request import MergeRequest

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Input(NamedTuple):
    """A model that was merged.

    Attributes:
      model: name of the model, as the user gave it.
      role: "base" or "model".
      local: whether it is a folder, rather than on the Hub.
      sha256: the hash of every file of its weights, by name of the file.
    """

    model: str
    role: Literal["base", "model"]
    local: bool
    sha256: Mapping[str, str]


def data(
    request: MergeRequest,
    inputs: Sequence[Input],
    command: str,
    notes: Sequence[str],
    *,
    dtype: str | None,
    seed: int,
) -> dict[str, Any]:
    """Returns the facts about a merge, for `jaxarith_merge.json`.

    Args:
      request: the merge that was asked for.
      inputs: the models.
      command: the command line.
      notes: the notes that were printed.
      dtype: dtype of the new weights; None means the base's.
      seed: seed of random methods.
    """
    return {
        "jaxarith": jaxarith.__version__,
        "method": request.method,
        "recipe": request.as_file(),
        "inputs": [model._asdict() for model in inputs],
        "command": command,
        "notes": list(notes),
        "dtype": dtype,
        "seed": seed,
    }


def render(name: str, facts: Mapping[str, Any]) -> str:
    """Returns the text of `README.md`.

    Args:
      name: name of the merged model.
      facts: the result of `data`.

    Example:
      >>> request = MergeRequest("average", models=())
      >>> facts = data(request, [], "jaxarith merge", [], dtype=None, seed=0)
      >>> print(render("mean", facts).splitlines()[8])
      # mean
    """
    notes = [f"- {_inline(note)}" for note in facts["notes"]]
    rows = [_row(model) for model in _inputs(facts)]
    parts = [
        f"---\n{_front_matter(facts)}---\n",
        f"# {_inline(name)}\n",
        f"A merge of {_models(facts)} by `{facts['method']}`, made with jaxarith "
        f"{facts['jaxarith']}.\n",
        "## Recipe\n",
        _fenced(_recipe(facts), "yaml"),
        "## Models\n",
        "\n".join(["| model | role | weights (SHA-256) |", "|---|---|---|", *rows, ""]),
        "## Command\n",
        _fenced(facts["command"] + "\n", "sh"),
    ]
    if notes:
        parts += ["## Notes\n", "\n".join([*notes, ""])]
    return "\n".join(parts)


def dump(values: Any) -> str:
    """Returns plain data as YAML, in its order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _front_matter(facts):
    # The Hub accepts only ids of its own models and adapters here.
    is_adapter = facts.get("kind") == "adapter"
    ids = [
        part
        for model in _inputs(facts)
        if not model["local"] and (model["role"] == "base" or not is_adapter)
        for part in model["model"].split("+")
    ]
    known = [name for name in ids if _HUB_ID.fullmatch(name)]
    fields = {
        "base_model": list(dict.fromkeys(known)),
        "base_model_relation": "adapter" if is_adapter else "merge",
        "library_name": "peft" if is_adapter else "transformers",
        "tags": ["merge", "jaxarith", facts["method"].replace("_", "-")],
    }
    if not known:
        del fields["base_model"], fields["base_model_relation"]
    return dump(fields)


def _inputs(facts):
    """Returns the models, and those of earlier documents, each once."""
    found = [*facts["inputs"]]
    for document in facts.get("documents", ()):
        found += [model for model in document["inputs"] if model not in found]
    return found


def _recipe(facts):
    """Returns the recipe as a file, after those of earlier documents."""
    earlier = facts.get("documents", ())
    parts = [dump({"name": x["name"], **x["recipe"]}) for x in earlier]
    return "---\n".join([*parts, dump(facts["recipe"])])


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
    """Returns a text in one line that Markdown shows unchanged."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$!&])", r"\\\1", " ".join(str(text).split()))


def _fenced(text: str, language: str) -> str:
    """Returns a code block with a fence that does not occur in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}\n"
