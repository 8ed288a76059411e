"""What MkDocs is told besides `mkdocs.yml`: pages that are made, and their links."""

import api
import formulas  # noqa: F401  (docstrings.py, which griffe loads by its path, finds it)
import links
import percent
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the tutorials and the pages of the API to the navigation."""
    tutorials = [page for page in sorted(links.PAGES.values()) if "tutorials/" in page]
    [start] = [part["Start here"] for part in config["nav"] if "Start here" in part]
    start.append({"Tutorials": tutorials})
    groups = [
        {group: [{f"jaxarith.{module}": f"api/{module}.md"} for module in modules]}
        for group, modules in api.PAGES.items()
    ]
    config["nav"].append({"API": ["api/index.md", *groups]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in the folder of this site."""
    made = {"api/index.md": api.index()}
    for modules in api.PAGES.values():
        made |= {f"api/{module}.md": api.page(module) for module in modules}
    for place, page in links.PAGES.items():
        if page not in made and not place.startswith("jaxarith/docs/"):
            text = (links.ROOT / place).read_text("utf-8")
            made[page] = percent.markdown(text) if place.endswith(".py") else text
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turns links between files into links between pages."""
    places = {page: place for place, page in links.PAGES.items()}
    place = places.get(page.file.src_uri, "")
    is_api = page.file.src_uri.startswith("api/")
    if is_api or not place:
        return markdown
    return api.linked(links.rewritten(markdown, place))
