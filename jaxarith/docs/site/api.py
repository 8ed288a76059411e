"""Makes the API pages from the sources; no module is imported, so none has to load.

`PAGES` lists the modules that have a page. A page has the names that its module defines
and the names that it re-exports as `X as X`.
"""

import ast
import functools
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
_NAME = re.compile(r"(?<![`\[\w])`(\w+\.\w+)`(?!`)")
_CODE = re.compile(r"(^ *```.*?^ *```$|^#[^\n]*$)", re.MULTILINE | re.DOTALL)

# For each title of a group, its modules below `jaxarith`.
PAGES = {
    "Trees and task vectors": ["tree", "task_vectors", "typing"],
    "Tangent space and interference": ["tangent", "tau_jp", "curvature", "precision"],
    "Merges": ["merge", "merge.mergekit", "merge.capture"],
    "Training": ["train", "train.checkpoint", "losses"],
    "Evaluation": [
        "evaluate",
        "evaluate.bounds",
        "evaluate.landscape",
        "evaluate.perplexity",
        "evaluate.rank",
        "evaluate.smoothness",
        "evaluate.toxicity",
        "metrics",
        "report",
        "plots",
    ],
    "Models": [
        "models.clip",
        "models.t5",
        "models.gpt2",
        "models.bert",
        "models.lora",
        "models.heads",
        "models.generate",
        "models.layers",
        "models.activations",
        "models.blocked_attention",
    ],
    "Data": [
        "data.images",
        "data.vision",
        "data.sources",
        "data.splits",
        "data.task_info",
        "data.text",
        "data.glue",
        "data.prompts",
        "data.prompt_sources",
        "data.language",
        "data.pipeline",
    ],
    "Files and streams": [
        "hub",
        "hub.layouts",
        "hub.lora",
        "hub.lycoris",
        "hub.open_clip",
        "hub.quantised",
        "hub.quantised.gguf",
        "stream",
    ],
    "Devices": ["sharding", "sharding.processes", "resources"],
}
# Modules that scripts import but that are not part of the interface: they may change.
INTERNAL = {
    "cli",
    "commands",
    "commands.signals",
    "curvature.collect",
    "curvature.layers",
    "curvature.matrices",
    "curvature.passes",
    "files",
    "fingerprint",
    "hub.safetensors",
    "merge.awd",
    "merge.bases",
    "merge.bases_arithmetic",
    "merge.linear_bases",
    "merge.stitch_twice",
    "plots.style",
    "train.config",
    "train.manifest",
}


def source(module: str) -> Path:
    """Returns the file of a module; `module` is its name below `jaxarith`."""
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def names(module: str) -> dict[str, str]:
    """Returns a module's public names and where they are defined, `jaxarith.a.name`."""
    found = {}
    for node in ast.parse(source(module).read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.asname == alias.name:
                    found[alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = f"jaxarith.{module}.{node.name}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                target.id: f"jaxarith.{module}.{target.id}"
                for target in targets
                if isinstance(target, ast.Name)
            }
    return {name: place for name, place in found.items() if not name.startswith("_")}


def is_module(place: str) -> bool:
    """Whether a place, `jaxarith.a.b`, is a module and not a name in a module."""
    return place.startswith("jaxarith.") and source(place[9:]).exists()


def owner(place: str) -> str:
    """Returns the module whose page has a name's entry: the first that offers it."""
    modules = (module for group in PAGES.values() for module in group)
    return next(module for module in modules if place in names(module).values())


@functools.cache
def _places() -> dict[str, str]:
    """Returns where names are defined, by the form in docstrings: `merge.ties`."""
    modules = [module for group in PAGES.values() for module in group]
    found: dict[str, set[str]] = {}
    for module in modules:
        for name, place in names(module).items():
            if not is_module(place):
                short = f"{module.rsplit('.', 1)[-1]}.{name}"
                found.setdefault(short, set()).add(place)
    return {short: places.pop() for short, places in found.items() if len(places) == 1}


def linked(text: str) -> str:
    """Turns every `module.name` of the API in Markdown into a link to its entry."""

    def link(match: re.Match) -> str:
        place = _places().get(match[1])
        return match[0] if place is None else f"[`{match[1]}`][{place}]"

    parts = _CODE.split(text)
    parts[::2] = [_NAME.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def page(module: str) -> str:
    """Returns a page as Markdown: the module's docstring and an entry for each name."""
    whole = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
    lines = [
        f"# jaxarith.{module}",
        f"::: jaxarith.{module}\n    options: {whole}",
    ]
    short = module.rsplit(".", 1)[-1]
    for name, place in sorted(names(module).items(), key=lambda item: item[0].lower()):
        if is_module(place):
            lines.append(f"## {short}.{name}\n\nA module: [its page]({place[9:]}.md).")
        elif (first := owner(place)) != module:
            lines.append(
                f"## {short}.{name}\n\nThe same as [`{first}.{name}`][{place}]."
            )
        else:
            if place != f"jaxarith.{module}.{name}":
                lines.append(f"[](){{#jaxarith.{module}.{name}}}")
            lines.append(f"::: {place}\n    options: {{heading: {short}.{name}}}")
    return "\n\n".join(lines) + "\n"


def index() -> str:
    """Returns the page that lists all pages, as Markdown."""
    lines = ["# API\n\nOne page for each public module, made from its docstrings."]
    for group, modules in PAGES.items():
        lines.append(f"\n## {group}\n\n| module | contents |\n|:--|:--|")
        for module in modules:
            text = ast.get_docstring(ast.parse(source(module).read_text("utf-8")))
            first = (text or "").split("\n\n")[0].replace("\n", " ")
            lines.append(f"| [`jaxarith.{module}`]({module}.md) | {first} |")
    return "\n".join(lines) + "\n"
