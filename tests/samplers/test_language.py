"""Choices and regular expressions as automata over bytes, against Python's own matching."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmllm.samplers.language import choices, regex

TEXTS = ["".join(letters) for n in range(5) for letters in itertools.product("abé\U0001f600", repeat=n)]
PARTS = ["a", "b", "é", ".", "[ab]", "[^a]", r"\w", r"\W", "(?i:A)", "[a-é]", "\U0001f600", r"(?a:\w)", "[^\\W\\d]"]
PATTERNS = st.recursive(
    st.sampled_from(PARTS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(
            inner.map("(?:{})".format), st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "*?", "{0,3}?"])
        ).map("".join),
        inner.map("({})".format),
        inner.map("^{}$".format),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(PATTERNS)
def test_a_language_is_what_fullmatch_finds(pattern: str) -> None:
    texts, expected = regex(pattern), re.compile(pattern)
    for text in TEXTS:
        assert (text in texts) == bool(expected.fullmatch(text)), (pattern, text)


def test_no_alternative_hides_a_longer_one() -> None:
    """A search prefers the first alternative; here all of them are texts."""
    for pattern in ("a|ab", "(a|ab)(c|bcd)?", "a??b?", "(|a|aa)"):
        for text in ("", "a", "aa", "ab", "abc", "abcd", "b"):
            assert (text in regex(pattern)) == bool(re.fullmatch(pattern, text))


def test_every_character_that_utf8_can_spell_is_told_apart_at_the_edges_of_its_lengths() -> None:
    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    anything, one = regex("(?s)."), {edge: regex(re.escape(chr(edge))) for edge in edges}
    below = regex("[\u0800-\U00010000]")
    for edge in edges:
        assert chr(edge) in anything
        assert [other for other in edges if chr(other) in one[edge]] == [edge]
        assert (chr(edge) in below) == (0x800 <= edge <= 0x10000)
    assert "ab" not in anything


def test_choices_are_just_these_texts_and_may_be_beginnings_of_each_other() -> None:
    texts = choices(["no", "none", "", "é"])
    assert [t for t in ("", "n", "no", "non", "none", "é", "nones") if t in texts] == ["", "no", "none", "é"]


def test_repeats_are_counted_and_cost_a_state_each() -> None:
    assert len(regex("[a-z ]{0,400}")) == 401
    assert len(regex("x{3,5}")) == 6


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "is not a regular expression: missing )"),
        ("(?=a)b", "uses assert"),
        (r"(a)\1", "uses groupref"),
        (r"\bab", "uses at"),
        ("a++b", "uses possessive_repeat"),
        ("(?m)^a", "uses at"),
        (".{0,9000}", "has more than 20,000 states; say shorter repeats"),
        ("(a|b)*a(a|b){30}", "has more than 20,000 states; say shorter repeats"),
        ("((a{200}){200}){200}", "has more than 20,000 states; say shorter repeats"),
    ],
)
def test_what_is_not_followed_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        regex(pattern)


def test_choices_must_be_texts() -> None:
    for wrong in ([], [1, 2]):
        with pytest.raises(ValueError, match="must be a list of texts, at least one"):
            choices(wrong)  # type: ignore[arg-type]
