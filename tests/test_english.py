"""Rules of the project's English that a program can hold."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for part in ("jaxarith", "experiments", "tests")
    for suffix in ("*.py", "*.md")
    for path in (ROOT / part).rglob(suffix)
    if path != Path(__file__)
)
RULES = {
    "an entry names the thing: `dtype: dtype of the result`": r"^ +\w+(, \w+)*: of ",
    "papers have names, not numbers": r"\bS[0-4]\b(?!\])",
    "words that must be read twice": (
        r"\b(whither|at hand|what is there|as it comes out|such as they are)\b"
        r"|\bwhere nothing else is said\b"
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_no_line_breaks_a_rule(rule):
    pattern = re.compile(RULES[rule])
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*FILES, ROOT / "README.md"]
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"{rule}:\n" + "\n".join(found)


def test_the_rules_find_what_they_are_for():
    broken = ["      dtype: of the result.", "as in S2", "how far and whither"]
    for pattern, line in zip(RULES.values(), broken, strict=True):
        assert re.search(pattern, line)
