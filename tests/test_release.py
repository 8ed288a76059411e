"""What a release says about itself, in files that no other test reads."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import jaxarith

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def workflow(name):
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text())


def test_the_version_is_that_of_the_installed_package():
    assert jaxarith.__version__ == importlib.metadata.version("jaxarith")


def test_sources_that_are_not_installed_say_that_their_version_is_unknown(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", missing)
        assert importlib.reload(jaxarith).__version__ == "0+unknown"
    assert importlib.reload(jaxarith).__version__ != "0+unknown"


def test_builds_without_a_tag_are_of_the_version_that_the_changes_are_listed_under():
    changes = (ROOT / "jaxarith/CHANGELOG.md").read_text()
    newest, state = re.search(
        r"^## (\S+)(?: \((.+)\))?$", changes, re.MULTILINE
    ).groups()
    fallback = PROJECT["tool"]["hatch"]["version"]["raw-options"]["fallback_version"]
    if state == "not released":
        assert fallback == f"{newest}.dev0"
    else:
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", state or "2026-01-01")


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / ".github/CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    urls = {work["url"] for work in citation["references"]}
    assert urls == set(PROJECT["project"]["urls"].values())
    assert "version" not in citation  # a tag has it


def test_a_release_publishes_what_the_check_built():
    jobs = workflow("release.yml")["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    steps = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert any("check_release.py --dist dist --tag" in step for step in steps)
    package = workflow("tests.yml")["jobs"]["package"]["steps"]
    assert any("check_release.py" in step.get("run", "") for step in package)


@pytest.mark.parametrize("job", ["build", "package"])
def test_what_takes_its_version_from_tags_fetches_them(job):
    file = "release.yml" if job == "build" else "tests.yml"
    steps = workflow(file)["jobs"][job]["steps"]
    (checkout,) = [x for x in steps if x.get("uses", "").startswith("actions/checkout")]
    assert checkout["with"] == {"fetch-depth": 0}
