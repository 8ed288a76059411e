"""Patterns of foreign files: those of `re`, and never endless."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxarith.hub import patterns

NAMES = ["a", "a.b", "b.a0", "aa.ab", "layers.10.a", "layers.1.b0", "", "."]
LETTERS = st.sampled_from(["a", "b", "0", "1", r"\.", ".", r"\d", r"\w", r"\S", "[^a]"])
TREES = st.recursive(
    LETTERS | st.sampled_from(["[0-9]", "[ab]", "layers", "^", "$"]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format)
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}"])).map(
            "({0[0]}){0[1]}".format
        )
    ),
    max_leaves=6,
)


@given(TREES)
def test_patterns_fit_what_they_fit_in_peft(pattern):
    for name in NAMES:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert patterns.fits_end(pattern, name) == expected, (pattern, name)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a|aa)+b", ".*.*.*.*.*.*.*.*b", "(a?){900}a{900}b"],
)
def test_no_pattern_hangs(pattern):
    begin = time.perf_counter()
    assert not patterns.fits_end(pattern, "layers.0." + "a" * 60)
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "groupref, which is not supported"),
        ("(?=a)b", "assert, which is not supported"),
        ("(?i)a", "has flags"),
        ("(?i:a)", "not supported"),
        ("(" * 490 + "a" + ")" * 490, "is not a regular expression: maximum"),
        ("(a", "is not a regular expression: missing"),
        ("a" * 1001, "more than 1000 characters"),
    ],
)
def test_other_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        patterns.fits_end(pattern, "a.a")
