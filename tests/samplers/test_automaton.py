"""Automata over tokens, against every sequence of a small vocabulary."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmllm.samplers.automaton import TokenAutomaton
from dmllm.samplers.language import choices, regex

BYTES = list("é".encode())
WITHIN = [b"a", b"b", b"ab", bytes(BYTES[:1]), bytes(BYTES[1:]), b" a", b"aba", None, None, None]
FIRST = [b"a", b"b", b"ab", bytes(BYTES[:1]), bytes(BYTES[1:]), b"a", b"aba", None, None, None]
END, FILL, MASK = 7, 8, 9
PATTERNS = ["", "a", "ab|ba", "a*", "(ab)+ ?", ".{0,3}", "é?a( a)*", "[^a]b", "(aba)?b|a a", "a{2}|b{3}"]


def written(tokens: tuple[int, ...]) -> bytes | None:
    """The text of tokens; None where its end is not followed by end and fill alone, or a special token is inside."""
    ends = [at for at, token in enumerate(tokens) if token == END]
    text = tokens[: ends[0]] if ends else tokens
    if any(WITHIN[t] is None for t in text) or any(t not in (END, FILL) for t in tokens[len(text) :]):
        return None
    return b"".join((WITHIN if at else FIRST)[t] or b"" for at, t in enumerate(text))


def matches(pattern: str, tokens: tuple[int, ...]) -> bool:
    text = written(tokens)
    try:
        return text is not None and bool(re.fullmatch(pattern, text.decode()))
    except UnicodeDecodeError:
        return False


def accepted(automaton: TokenAutomaton, tokens: tuple[int, ...]) -> bool:
    state = 0
    for token in tokens:
        state = int(automaton.table[state, automaton.classes[token]])
    return state < len(automaton) and bool(automaton.accepts[state])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_token_sequences_are_accepted_just_where_their_text_matches(pattern: str) -> None:
    automaton = TokenAutomaton.of(regex(pattern), WITHIN, FIRST, [END], [FILL])
    counts = []
    for length in range(5):
        good = [tokens for tokens in itertools.product(range(10), repeat=length) if matches(pattern, tokens)]
        assert all(accepted(automaton, tokens) for tokens in good)
        assert sum(accepted(automaton, t) for t in itertools.product(range(10), repeat=length)) == len(good)
        counts.append(len(good))
        assert bool(automaton.reach(length)[0]) == bool(good)
    assert automaton.least(4) == next((n for n, count in enumerate(counts) if count), None)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=30), st.sampled_from(["(?s).*", "[a-c]*d?"]))
def test_tokens_of_one_class_lead_everywhere_to_the_same_state(vocabulary: list[bytes], pattern: str) -> None:
    texts = regex(pattern)
    automaton = TokenAutomaton.of(texts, vocabulary, vocabulary, [])
    states = range(len(texts))

    def led(piece: bytes) -> list[int]:
        reached = []
        for state in states:
            for byte in piece:
                state = int(texts.table[state, byte]) if state < len(texts) else state
            reached.append(state)
        return reached

    for one, other in itertools.combinations(range(len(vocabulary)), 2):
        if led(vocabulary[one]) == led(vocabulary[other]):
            assert automaton.classes[one] == automaton.classes[other]


def test_without_end_tokens_a_text_ends_with_the_canvas() -> None:
    automaton = TokenAutomaton.of(choices(["ab", "abab"]), WITHIN, FIRST, [])
    assert [bool(automaton.reach(n)[0]) for n in range(6)] == [False, True, True, True, True, False]


def test_states_that_no_token_reaches_are_left_out_and_the_report_counts_what_is_kept() -> None:
    within: list[bytes | None] = [b"yes", b"no", None]
    automaton = TokenAutomaton.of(choices(["yes", "no", "maybe"]), within, within, [2])
    assert automaton.report["states"] == len(automaton) == 4  # the start, behind yes, behind no, END
    assert automaton.report["edges"] == len(automaton.source) == 5
    assert automaton.report["classes"] == automaton.table.shape[1] == 4


def test_texts_that_the_tokens_cannot_spell_are_refused() -> None:
    with pytest.raises(ValueError, match="no text that matches can be spelled with this model's tokens"):
        TokenAutomaton.of(choices(["c"]), WITHIN, FIRST, [END])
    with pytest.raises(ValueError, match="no text that matches can be spelled"):
        TokenAutomaton.of(regex("a"), [None], [None], [0])
