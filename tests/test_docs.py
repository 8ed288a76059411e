"""The README and the guides: their links, their commands, and a page for every name."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "jaxarith" / "docs"
# The scripts that make the site. They are no part of the package.
sys.path.append(str(DOCS / "site"))
api, formulas, links, percent = map(
    importlib.import_module, ("api", "formulas", "links", "percent")
)

GUIDES = [ROOT / "README.md", *sorted(DOCS.glob("[a-z]*.md"))]
MODULES = [module for group in api.PAGES.values() for module in group]


def blocks(file: Path, language: str) -> list[str]:
    text = file.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readme_is_short_and_sets_everything_up_in_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"^python3 -m venv .*", text, re.MULTILINE)) == 2
    # .ci/run takes the first line that names pytest.
    first = next(line for line in text.splitlines() if "pytest" in line)
    assert first.startswith("python3 -m venv .venv && ")


def test_every_guide_is_in_the_navigation():
    text = (DOCS / "site" / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", text, re.MULTILINE)
    assert {file.name for file in GUIDES[1:]} <= set(listed)
    assert set(listed) <= set(links.PAGES.values())


@pytest.mark.parametrize("place", [p for p in links.PAGES if p.endswith(".md")])
def test_links_and_anchors_lead_somewhere(place):
    text = (ROOT / place).read_text(encoding="utf-8")
    broken = []
    for _, _, link, anchor in links.LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        file = ROOT / links.target(place, link)
        if not file.exists():
            broken.append(link)
        elif anchor and anchor[1:] not in links.anchors(file.read_text("utf-8")):
            broken.append(link + anchor)
    assert not broken


def test_links_between_files_become_links_between_pages():
    rewritten = links.rewritten(
        "[a](../../experiments/README.md#x) ![b](images/b.png) [c](../cli.py) [d](#e)",
        "jaxarith/docs/methods.md",
    )
    assert rewritten == (
        "[a](experiments/README.md#x) ![b](images/b.png) c [d](methods.md#e)"
    )
    assert links.rewritten("[m](jaxarith/merge/__init__.py)", "README.md") == (
        "[m](api/merge.md)"
    )
    assert links.anchors("# `a_b` — c, d\n```\n# no\n```\n## A\n## A\n") == {
        *("a_b--c-d", "a", "a-1")
    }


def test_what_packages_offer_has_a_page():
    for file in sorted((ROOT / "jaxarith").rglob("__init__.py")):
        module = ".".join(file.parent.relative_to(ROOT / "jaxarith").parts)
        hidden = not module or module.startswith("commands")
        if not hidden and api.names(module):
            assert module in MODULES, f"give jaxarith.{module} a page in api.PAGES"


def test_what_experiments_import_has_a_page_or_is_internal():
    imports = re.compile(r"^ *from jaxarith((?:\.\w+)*) import (.*?)$", re.MULTILINE)
    found = set()
    for file in (ROOT / "experiments").rglob("*.py"):
        for package, imported in imports.findall(file.read_text("utf-8")):
            package = package[1:]
            if package:
                found.add(package)
            for name in re.findall(r"(\w+)(?: as \w+)?", imported):
                module = f"{package}.{name}".lstrip(".")
                offered = package and name in api.names(package)
                if not offered and api.source(module).exists():
                    found.add(module)
    found -= {"models", "data", "hub.places"}
    assert len(found) > 30
    assert found <= {*MODULES, *api.INTERNAL}


@pytest.mark.parametrize("module", MODULES)
def test_every_name_of_a_page_exists_and_has_an_entry(module):
    loaded = importlib.import_module(f"jaxarith.{module}")
    text = api.page(module)
    assert api.names(module)
    for name, place in api.names(module).items():
        assert hasattr(loaded, name)
        short = f"{module.rsplit('.', 1)[-1]}.{name}"
        assert f"heading: {short}}}" in text or f"## {short}\n" in text, place


def test_formulas_and_examples_of_docstrings():
    text = r"""A sum.

    .. math:: a
        + b

    with :math:`a >
    0`.

    Example:
      >>> 1
    """
    assert (
        formulas.as_markdown(text)
        == r"""A sum.

    \[
    a
    + b
    \]

    with \(a > 0\).

    Examples:
      >>> 1
    """
    )


def test_a_colon_in_what_a_function_returns_ends_no_type():
    text = "Sums.\n\nReturns:\n  A pair: `(a, b)`.\n"
    expected = text.replace("A pair", "tuple[int, int]: A pair")
    assert formulas.as_markdown(text, "tuple[int, int]") == expected
    assert formulas.as_markdown(text) == text


def test_cells_of_a_script_become_markdown():
    script = '"""Doc."""\n\n# %% [markdown]\n# # Title\n# text\n\n# %%\nx = 1\n\n# %%\n'
    assert percent.markdown(script) == "# Title\ntext\n\n```python\nx = 1\n```\n"


def commands(program: str) -> list[list[str]]:
    """The words after `program` of every such command in the README and guides."""
    found = []
    for file in GUIDES:
        for block in blocks(file, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split(" && "):
                    words = shlex.split(part.removeprefix(".venv/bin/"), comments=True)
                    if words and " ".join(words).startswith(program):
                        found.append(words[len(program.split()) :])
    return found


def test_commands_of_scripts_have_options_that_exist():
    tyro = pytest.importorskip("tyro", reason="pip install 'jaxarith[demo]'")
    scripts = commands("python -m")
    assert len(scripts) >= 8
    for name, *words in scripts:
        if name.startswith("experiments."):
            script = importlib.import_module(name)
            tyro.cli(script.Config, args=words)


def test_names_of_the_api_become_links_to_their_entries():
    text = "## `merge.ties`\n\nSee `merge.ties`, `x.y`.\n\n```\n`merge.ties`\n```\n"
    link = "[`merge.ties`][jaxarith.merge.ties.ties]"
    assert api.linked(text) == text.replace("See `merge.ties`", f"See {link}")
