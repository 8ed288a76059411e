"""Turns links between files of the repository into links between pages of the site.

In the repository, a link to the API points to the source; on the site, to its page.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import api

ROOT = Path(__file__).parents[3]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
_DOCS = "jaxarith/docs/"


def _pages() -> dict[str, str]:
    found = {
        f"{_DOCS}{file.name}": file.name for file in (ROOT / _DOCS).glob("[a-z]*.md")
    }
    found["README.md"] = "index.md"
    found["jaxarith/CHANGELOG.md"] = "changes.md"
    for place in ("experiments/README.md", "experiments/bench/README.md"):
        found[place] = place
    tutorials = ROOT / "experiments" / "tutorials"
    for file in [*tutorials.glob("README.md"), *tutorials.glob("[a-z]*_*.py")]:
        place = file.relative_to(ROOT)
        found[str(place)] = str(place.with_suffix(".md"))
    for module in (module for group in api.PAGES.values() for module in group):
        file = api.source(module).relative_to(ROOT)
        found[str(file)] = f"api/{module}.md"
    return found


# For each file of the repository, its page.
PAGES = _pages()


def target(place: str, link: str) -> str:
    """Returns the path from the root to which a link in the file `place` points."""
    return os.path.normpath(PurePosixPath(place).parent / link) if link else place


def rewritten(text: str, place: str) -> str:
    """Returns a file's text with links to pages; other links become their words."""

    def replace(match: re.Match) -> str:
        image, words, link, anchor = match.groups(default="")
        path = target(place, link)
        if image and path.startswith(_DOCS):
            page = path.removeprefix(_DOCS)
        elif path in PAGES:
            page = PAGES[path]
        else:
            return words
        start = PurePosixPath(PAGES[place]).parent
        return f"{image}[{words}]({os.path.relpath(page, start)}{anchor})"

    return LINK.sub(replace, text)


def anchors(text: str) -> set[str]:
    """Returns the anchors of a file's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(next(x for x in _numbered(words) if x not in found))
    return found


def _numbered(words: str) -> Iterator[str]:
    yield words
    for number in range(1, 1000):
        yield f"{words}-{number}"
