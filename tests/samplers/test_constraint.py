"""Constrained decoding against brute force on small automata, and over random settings."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmllm.samplers.automaton import TokenAutomaton
from dmllm.samplers.blocks import whole_blocks
from dmllm.samplers.canvas import Canvas, reply_length
from dmllm.samplers.config import REMASKING, DecodeConfig
from dmllm.samplers.constraint import Constraint, Guided
from dmllm.samplers.denoise import denoise
from dmllm.samplers.language import choices, regex
from tests.exact import quantile
from tests.samplers.table import NoiseModel, generators

SMALL: list[bytes | None] = [b"a", b"b", b"ab", None, None]
END, MASK = 3, 4
PATTERNS = ["a*b", "(ab)*", "a{1,2}|b+", "[ab]{2,3}"]

CHARACTERS = 'abcdefg0123456789{}[]:,". -'
WORDS = ["ab", "bc", "abc", "cab", "10", "01", '":', '","', "a,", "}}", "0}", 'a"', "de fg", "1."]
VOCABULARY = [text.encode() for text in (*CHARACTERS, *WORDS)]
WIDE: list[bytes | None] = [*VOCABULARY, None, None, None]
WIDE_END, WIDE_FILL, WIDE_MASK = range(len(VOCABULARY), len(WIDE))


def text(ids: list[int], vocabulary: list[bytes | None]) -> str:
    return b"".join(vocabulary[i] or b"?" for i in ids).decode()


def small(pattern: str) -> TokenAutomaton:
    return TokenAutomaton.of(regex(pattern), SMALL, SMALL, [END])


def fits(pattern: str, tokens: tuple[int, ...]) -> bool:
    end = tokens.index(END) if END in tokens else len(tokens)
    tail = all(token == END for token in tokens[end:])
    return MASK not in tokens and tail and bool(re.fullmatch(pattern, text(list(tokens[:end]), SMALL)))


def weighed(pattern: str, logits: Tensor, known: dict[int, int], length: int) -> dict[tuple[int, ...], float]:
    """The weight of each way to fill the first places [K, V] for which known tokens and free places leave a match."""
    shares, found = logits.double().softmax(-1), {}
    for tokens in itertools.product(range(5), repeat=length):
        if fits(pattern, tokens) and all(tokens[at] == token for at, token in known.items()):
            opened = [at for at in range(len(logits)) if at not in known]
            found[tokens[: len(logits)]] = float(torch.stack([shares[at, tokens[at]] for at in opened]).prod())
    return found


def guide(pattern: str, logits: Tensor, known: dict[int, int], length: int, uniform: Tensor, **options) -> Guided:
    ids = torch.full((1, length), MASK)
    for at, token in known.items():
        ids[0, at] = token
    canvas = Canvas.of(ids, ids != MASK, MASK)
    opened = torch.tensor([[at for at in range(len(logits)) if at not in known]])
    batch = len(uniform)
    canvas = canvas.take(torch.zeros(batch, dtype=torch.int64))
    asked = torch.ones(batch, opened.shape[1], dtype=torch.bool)
    config = DecodeConfig(max_new_tokens=length, **options)
    rows = opened.expand(batch, -1)
    constraint = Constraint([small(pattern)], length)
    return constraint(canvas, config, logits[opened[0]].expand(batch, -1, -1), rows, asked, uniform)


CASES = [(p, known) for p in PATTERNS for known in ({}, {1: 1}, {4: 1}, {0: 0, 4: END})]
CASES = [(p, known) for p, known in CASES if weighed(p, torch.zeros(3, 5), known, 5)]


@pytest.mark.parametrize(("pattern", "known"), CASES)
def test_the_tokens_are_those_of_the_most_probable_text_and_the_logits_its_posterior(pattern, known) -> None:
    """Places 0 to 2 are asked for, some known; the two behind are free, or known too."""
    for seed in range(5):
        logits = 3 * torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
        ways = weighed(pattern, logits, known, 5)
        opened = [at for at in range(3) if at not in known]
        found = guide(pattern, logits, known, 5, torch.zeros(1, len(opened), dtype=torch.float64))
        best = max(ways, key=ways.__getitem__)
        assert found.tokens[0].tolist() == [best[at] for at in opened]
        posterior, whole = found.logits[0].double().exp(), sum(ways.values())
        for slot, at in enumerate(opened):
            for token in range(5):
                share = sum(weight for way, weight in ways.items() if way[at] == token) / whole
                assert float(posterior[slot, token]) == pytest.approx(share, abs=1e-6)
            assert bool(found.certain[0, slot]) == (len({way[at] for way in ways}) == 1)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.6}])
@pytest.mark.parametrize(("pattern", "known"), CASES[::3])
def test_drawn_texts_have_the_posteriors_distribution(pattern, known, options) -> None:
    logits = 1.5 * torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    ways = weighed(pattern, logits / options["temperature"], known, 5)
    opened, number = [at for at in range(3) if at not in known], 4000
    uniform = torch.rand(number, len(opened), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = guide(pattern, logits, known, 5, uniform, **options).tokens.tolist()
    whole = sum(ways.values())
    expected = {tuple(way[at] for at in opened): number * weight / whole for way, weight in ways.items()}
    counts = {way: sum(tuple(d) == way for d in drawn) for way in expected}
    assert sum(counts.values()) == number
    distance = sum((counts[way] - expected[way]) ** 2 / expected[way] for way in expected)
    assert distance < quantile(max(len(expected) - 1, 1))


def test_top_p_is_of_what_may_stand_there() -> None:
    """Of the tokens that match, the least probable are left out; what does not match counts for nothing."""
    logits = torch.tensor([[0.0, 2.0, -9.0, -9.0, 9.0]])
    uniform = torch.rand(300, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert set(guide("a|b", logits, {}, 1, uniform, temperature=1.0).tokens.flatten().tolist()) == {0, 1}
    assert set(guide("a|b", logits, {}, 1, uniform, temperature=1.0, top_p=0.8).tokens.flatten().tolist()) == {1}
    assert set(guide("a", logits, {}, 1, uniform, temperature=1.0, top_p=0.8).tokens.flatten().tolist()) == {0}


def test_what_the_model_or_the_settings_rule_out_is_taken_only_where_nothing_else_matches() -> None:
    uniform, logits = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]])
    assert guide("a|b", logits, {}, 1, uniform, suppress_ids=[0]).tokens.tolist() == [[1]]
    assert guide("a", logits, {}, 1, uniform, suppress_ids=[0]).tokens.tolist() == [[0]]
    none = torch.full((1, 5), -torch.inf)
    assert guide("b", none, {}, 1, uniform).tokens.tolist() == [[1]]


PATTERNS_WIDE = [
    "a*",
    "[ab]{3,9}",
    "(abc|[0-9]{2,4})+",
    r'\{"a":[0-9]+(,"b":"[a-g]*")?\}',
    ".{0,30}",
    "",
    "[a-g]+( [a-g]+){2}",
]
WIDE_AUTOMATA = {p: TokenAutomaton.of(regex(p), WIDE, WIDE, [WIDE_END], [WIDE_FILL]) for p in PATTERNS_WIDE}
SETTINGS = st.fixed_dictionaries(
    {
        "remasking": st.sampled_from(list(REMASKING)),
        "temperature": st.sampled_from([0.0, 0.0, 0.5, 2.0]),
        "block_length": st.sampled_from([None, 4, 5, 8]),
    },
    optional={
        "threshold": st.sampled_from([0.0, 0.1, 0.9]),
        "schedule": st.sampled_from(["fixed", "time", "confident", "shift"]),
        "suppress_ids": st.sampled_from([[WIDE_END], [0, 1, 2], list(range(24))]),
        "distrust_ids": st.just([WIDE_END]),
        "choose_mask": st.booleans(),
        "count_mask": st.booleans(),
        "fill_behind_eos": st.booleans(),
        "editing_threshold": st.just(0.6),
        "block_steps": st.sampled_from([1, 2, 3, 7]),
    },
)


def finished(model: NoiseModel, canvas: Canvas, config: DecodeConfig, constraint: Constraint) -> list[list[int]]:
    draws = generators(*range(len(canvas)))
    steps = list(itertools.islice(denoise(model, canvas, config, draws, constraint), 400))
    assert len(steps) < 400
    last = steps[-1]
    length, _ = reply_length(last.ids[:, : constraint.length], last.committed[:, : constraint.length], config.stops)
    return [row[:n] for row, n in zip(last.ids.tolist(), length.tolist(), strict=True)]


@settings(max_examples=120, deadline=None)
@given(
    SETTINGS,
    st.lists(st.sampled_from([*PATTERNS_WIDE, None]), min_size=1, max_size=3),
    st.sampled_from([14, 20]),
    st.sampled_from([0.1, 3.0, 200.0]),
    st.booleans(),
)
def test_every_text_matches_whatever_the_settings(options, patterns, length, scale, causal) -> None:
    config = DecodeConfig(max_new_tokens=length, eos_token_id=[WIDE_END], **options)
    if config.editing_threshold is not None and not config.fill_behind_eos:
        return  # never ends, constrained or not
    canvas = Canvas.blank(len(patterns), length, WIDE_MASK)
    if causal:
        config = DecodeConfig(**{**config.chosen, "block_length": None, "store_calls": scale < 1}).in_whole_blocks(4)
        lengths = torch.tensor([3, 8, 1])[: len(patterns)]
        canvas = whole_blocks(lengths, length, 4, WIDE_MASK, store_calls=config.store_calls)
    constraint = Constraint([None if p is None else WIDE_AUTOMATA[p] for p in patterns], length)
    constraint.check(canvas)
    for pattern, ids in zip(patterns, finished(NoiseModel(len(WIDE), scale), canvas, config, constraint), strict=True):
        assert pattern is None or re.fullmatch(pattern, text(ids, WIDE))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"block_length": 4, "threshold": 0.3}])
def test_a_row_is_answered_as_alone_whatever_its_neighbours_must_match(options) -> None:
    config = DecodeConfig(max_new_tokens=16, eos_token_id=[WIDE_END], **options)
    patterns = ["[ab]{3,9}", None, "(abc|[0-9]{2,4})+", None]
    automata = [None if p is None else WIDE_AUTOMATA[p] for p in patterns]

    def run(rows: list[int], constraint: Constraint | None) -> list[list[int]]:
        model = NoiseModel(len(WIDE), seeds=tuple(rows))
        draws = generators(*rows)
        *_, last = denoise(model, Canvas.blank(len(rows), 16, WIDE_MASK), config, draws, constraint)
        return [ids[:n] for ids, n in zip(last.ids.tolist(), reply(last), strict=True)]

    def reply(step) -> list[int]:
        return reply_length(step.ids, step.committed, config.stops)[0].tolist()

    together = run([0, 1, 2, 3], Constraint(automata, 16))
    for row in range(4):
        own = None if automata[row] is None else Constraint([automata[row]], 16)
        assert together[row] == run([row], own)[0]


def test_what_can_only_go_on_in_one_way_costs_no_call() -> None:
    form = r'\{"a":[01],"b":"abc"\}'
    single = [*WIDE[: len(CHARACTERS)], *[None] * (len(WIDE) - len(CHARACTERS))]
    automaton = TokenAutomaton.of(regex(form), single, single, [WIDE_END])
    config = DecodeConfig(max_new_tokens=32, eos_token_id=[WIDE_END])
    steps = list(
        denoise(
            NoiseModel(len(WIDE)), Canvas.blank(1, 32, WIDE_MASK), config, generators(0), Constraint([automaton], 32)
        )
    )
    assert len(steps) == 1
    assert int(steps[0].committed.sum()) == 32


def test_what_is_given_is_kept_and_completed() -> None:
    ids = torch.full((1, 12), WIDE_MASK)
    ids[0, 3], ids[0, 6] = VOCABULARY.index(b" "), VOCABULARY.index(b"g")
    canvas = Canvas.of(ids, ids != WIDE_MASK, WIDE_MASK)
    constraint = Constraint([WIDE_AUTOMATA["[a-g]+( [a-g]+){2}"]], 12)
    constraint.check(canvas)
    config = DecodeConfig(max_new_tokens=12, block_length=4, eos_token_id=[WIDE_END])
    answer = finished(NoiseModel(len(WIDE)), canvas, config, constraint)[0]
    assert answer[3] == ids[0, 3]
    assert answer[6] == ids[0, 6]
    assert re.fullmatch("[a-g]+( [a-g]+){2}", text(answer, WIDE))


def test_a_canvas_without_room_is_refused_before_decoding() -> None:
    yes = TokenAutomaton.of(choices(["aaa", "bbbb"]), SMALL, SMALL, [END])
    for length in (3, 4, 9):
        Constraint([yes], length).check(Canvas.blank(1, length, MASK))
    with pytest.raises(
        ValueError, match=re.escape("the shortest text that matches has 3 tokens, max_new_tokens=2; say")
    ):
        Constraint([yes], 2).check(Canvas.blank(1, 2, MASK))
    endless = TokenAutomaton.of(choices(["aaa"]), SMALL, SMALL, [])
    with pytest.raises(ValueError, match="no text that matches has exactly max_new_tokens=4 tokens, and no end token"):
        Constraint([endless], 4).check(Canvas.blank(1, 4, MASK))
    given = Canvas.of(torch.tensor([[0, 1, 4, 4]]), torch.tensor([[True, True, False, False]]), MASK)
    with pytest.raises(ValueError, match="what draft= gives cannot be completed"):
        Constraint([yes], 4).check(given)
