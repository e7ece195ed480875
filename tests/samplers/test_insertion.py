"""Truths of the canvas that grows, against exact posteriors of texts of several lengths."""

from dataclasses import replace

import pytest
import torch

from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.samplers.insertion import INSERTION, begin, insert, log_likelihood
from tests.exact import Strings, generators, quantile

M = 9  # the mask token of canvases that are written down here
EOS = 7


class Noise:
    """Logits and counts that depend on a row's own canvas alone: a stand-in for a random transformer."""

    def __init__(self, vocab=10, missing=2.0):
        self.vocab, self.missing, self.heard = vocab, missing, []

    def with_head(self, canvas, rows, name, others):
        self.heard.append(canvas)
        logits = torch.empty(*rows.shape, self.vocab)
        gaps = torch.empty(others.shape)
        states = zip(canvas.ids.tolist(), canvas.extent.tolist(), canvas.requests.tolist(), strict=True)
        for b, (ids, extent, request) in enumerate(states):
            draws = torch.Generator().manual_seed(hash((tuple(ids[:extent]), request)) % 2**60)
            own = torch.randn(50, self.vocab + 1, generator=draws)
            logits[b], gaps[b] = own[rows[b], :-1], own[others[b] + 1, -1] + torch.tensor(self.missing).log()
        return 2 * logits, gaps


def run(model, canvas, *, draws=None, **options):
    config = DecodeConfig(**{"max_new_tokens": canvas.ids.shape[1], "eos_token_id": [], **options})
    draws = generators(*range(len(canvas))) if draws is None else draws
    return list(denoise(model, canvas, config, draws, process=INSERTION))


def texts(step):
    return [
        tuple(ids[:n])
        for ids, n in zip(step.ids.tolist(), step.committed.long().cumprod(1).sum(1).tolist(), strict=True)
    ]


def chi_square(strings, drawn):
    """Of texts against the distribution; every one must be possible."""
    seen = torch.zeros(len(strings.texts), dtype=torch.float64)
    for text in drawn:
        seen[strings.texts.index(text)] += 1
    expected = strings.probs * len(drawn)
    return float(((seen - expected) ** 2 / expected).sum())


@pytest.fixture(scope="module")
def strings():
    return Strings(vocab=2, longest=3, shortest=0, seed=1)


@pytest.mark.parametrize("remasking", ["origin", "random"])
def test_in_many_calls_exact_posteriors_give_the_distribution_of_texts_and_of_their_lengths(strings, remasking):
    options = {"steps": 48, "temperature": 1.0, "remasking": remasking}
    drawn = texts(run(strings, Canvas.blank(1200, 5, strings.mask), **options)[-1])
    assert chi_square(strings, drawn) < quantile(len(strings.texts) - 1)


def test_in_few_calls_they_do_not(strings):
    options = {"steps": 4, "temperature": 1.0, "remasking": "origin"}
    drawn = texts(run(strings, Canvas.blank(1200, 8, strings.mask), **options)[-1])
    seen = torch.bincount(torch.tensor([len(text) for text in drawn]), minlength=9) / len(drawn)
    truth = torch.stack([strings.probs[[len(t) == n for t in strings.texts]].sum() for n in range(4)])
    assert float((seen[:4] - truth).abs().sum()) > 0.1


def test_the_likelihood_is_on_average_that_of_the_texts():
    strings = Strings(vocab=2, longest=2)
    said = [
        log_likelihood(strings, torch.tensor(t), *generators(n), 600, 200, mask_id=2)
        for n, t in enumerate(strings.texts)
    ]
    assert float((strings.probs * torch.stack(said)).sum()) == pytest.approx(-strings.entropy, abs=0.1)


def test_a_text_with_holes_is_completed_as_its_texts_are(strings):
    """Given its first and its last token, and that something or nothing is between."""
    strings = Strings(vocab=2, longest=4, seed=2)
    given = torch.tensor([[0, 1, M, M, M, M]]).repeat(1200, 1).masked_fill(torch.tensor([False] * 2 + [True] * 4), 2)
    canvas = Canvas.of(given, given != strings.mask, strings.mask)
    closed = torch.ones(1200, 7, dtype=torch.bool)
    closed[:, 1] = False
    canvas = replace(canvas, closed=closed)

    class Between(Strings):
        """Of texts 0 ... 1: only what is between them is ever gone."""

        def said(self, state, gone):
            inner = Strings(vocab=2, longest=2, shortest=0)
            fits = [t for t in self.texts if len(t) >= 2 and t[0] == 0 and t[-1] == 1]
            inner.texts, inner.probs = [t[1:-1] for t in fits], self.probs[[t in fits for t in self.texts]]
            tokens, gaps = inner.said(state[1:-1], gone)
            ends = torch.zeros(1, 2)
            return torch.cat([ends, tokens, ends]), torch.cat([torch.zeros(1), gaps, torch.zeros(1)])

    model = Between(vocab=2, longest=4, seed=2)
    drawn = texts(run(model, canvas, steps=32, temperature=1.0, remasking="origin")[-1])
    fits = [t for t in strings.texts if len(t) >= 2 and t[0] == 0 and t[-1] == 1]
    expected = strings.probs[[t in fits for t in strings.texts]]
    expected = expected / expected.sum() * len(drawn)
    seen = torch.zeros(len(fits), dtype=torch.float64)
    for text in drawn:
        seen[fits.index(text)] += 1
    assert float(((seen - expected) ** 2 / expected).sum()) < quantile(len(fits) - 1)


def test_inserting_moves_what_is_behind_and_stops_where_there_is_no_room():
    ids = torch.tensor([[1, 2, 3, M, M, M]])
    canvas = begin(Canvas.of(ids, ids != M, M), DecodeConfig(max_new_tokens=6, steps=4), [])
    assert canvas.extent.tolist() == [3]
    assert canvas.closed.tolist() == [[True, True, True, False, False, False, False]]
    grown = insert(canvas, torch.tensor([[1, 0, 2, 0, 0, 0, 0]]))
    assert grown.ids.tolist() == [[M, 1, 2, M, M, 3]]
    assert grown.committed.tolist() == [[False, True, True, False, False, True]]
    assert grown.closed.tolist() == [[False, True, True, False, False, True, False]]
    full = insert(canvas, torch.tensor([[0, 2, 0, 9, 0, 0, 0]]))
    assert full.ids.tolist() == [[1, M, M, 2, 3, M]]
    assert full.extent.tolist() == [6]


@pytest.mark.parametrize("steps", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_mask_is_left_and_no_more_is_said_than_there_is_room(steps, temperature):
    model = Noise(missing=0.5)
    *_, last = run(model, Canvas.blank(20, 9, M), steps=steps, temperature=temperature)
    assert last.num_forwards.tolist() == [steps] * 20
    for ids, known in zip(last.ids, last.committed, strict=True):
        length = int(known.sum())
        assert bool(known[:length].all())
        assert bool((ids[:length] != M).all())
    assert len({len(t) for t in texts(last)}) > 1


def test_a_count_that_is_certain_is_met_in_any_number_of_calls():
    class Counting(Noise):
        """Answers of as many tokens as its request says."""

        def with_head(self, canvas, rows, name, others):
            missing = (canvas.requests + 1 - canvas.extent).clamp(min=0)[:, None] * (
                others == canvas.extent[:, None] - 1
            )
            return torch.zeros(*rows.shape, 10), missing.float().log().clamp(min=-1e9)

    for steps in (2, 3, 7, 20):
        for temperature in (0.0, 1.0):
            *_, last = run(Counting(), Canvas.blank(6, 8, M), steps=steps, temperature=temperature)
            assert [len(text) for text in texts(last)] == [1, 2, 3, 4, 5, 6]


def test_a_known_token_stays_and_only_gaps_beside_masks_and_behind_the_last_grow():
    ids = torch.tensor([[1, 2, M, 3, 4, M, M, M, M, M, M, M]])
    for seed in range(20):
        model = Noise(missing=6.0)
        *_, last = run(model, Canvas.of(ids, ids != M, M), steps=6, temperature=1.0, draws=generators(seed))
        text = texts(last)[0]
        assert text[:2] == (1, 2)
        assert any(text[at : at + 2] == (3, 4) for at in range(3, len(text) - 1)), text
        for canvas in model.heard[1:]:
            assert canvas.closed[0, :2].tolist() == [True, True]


def test_a_row_is_drawn_as_it_would_be_alone():
    for temperature in (0.0, 0.7):
        options = {"steps": 9, "temperature": temperature, "remasking": "low_confidence"}
        whole = run(Noise(), Canvas.blank(5, 12, M), **options)[-1]
        for row in range(5):
            alone = replace(Canvas.blank(1, 12, M), requests=torch.tensor([row]))
            model = Noise()
            config = DecodeConfig(max_new_tokens=12, eos_token_id=[], **options)
            state, draws = begin(alone, config, generators(row)), generators(row)
            while not bool(INSERTION.finished(state, config).all()):
                state = INSERTION.advance(model, state, config, draws, None)
            assert torch.equal(whole.ids[row], state.ids[0])


def test_the_time_told_goes_evenly_from_one_to_zero():
    model = Noise()
    run(model, Canvas.blank(1, 8, M), steps=5)
    assert [float(canvas.time) for canvas in model.heard] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_complete_answer_ends_with_an_end_of_sequence_where_there_is_room():
    *_, last = run(Noise(), Canvas.blank(8, 9, M), steps=4, eos_token_id=[EOS], suppress_ids=[EOS])
    for ids, known in zip(last.ids.tolist(), last.committed.tolist(), strict=True):
        length = sum(known)
        assert length == 9 or ids[length - 1] == EOS
        assert EOS not in ids[: length - 1]


def test_what_is_known_from_the_beginning_needs_no_call():
    ids = torch.tensor([[1, 2, 3]])
    steps = run(Noise(), Canvas.of(ids, ids != M, M), steps=4)
    assert len(steps) == 1
    assert steps[0].num_forwards.tolist() == [0]


@pytest.mark.parametrize(
    "options", [{"block_length": 4}, {"remdm": "cap", "schedule": "time", "remasking": "origin"}, {"cache": "dual"}]
)
def test_settings_of_canvases_that_do_not_grow_are_refused(options):
    with pytest.raises(ValueError, match="inserts tokens"):
        run(Noise(), Canvas.blank(1, 8, M), steps=4, **options)


def test_a_single_call_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        run(Noise(), Canvas.blank(1, 8, M), steps=1)
