"""Denoising random words: a canvas of noise, on which every token may still change until the last call.

    ancestral       a draw from q(x_s | x_t, prediction) for each place, t going from 1 to 0 in `steps` calls
    commit          noise in place of masks, and otherwise what is done there: the surest are committed and stay
    entropy_bound   drawn everywhere, kept where entropies are low, new noise elsewhere, until nothing changes

Each call undoes as large a share of the noise, whatever the schedule. A place keeps what stands there with some
probability; else it becomes what is predicted, or noise of the next time. What stands there is evidence of what it was,
but for noise that the sampler itself has put there: then the prediction is the one that leaves its own place out. At
the end the most probable tokens remain.

Sources: D3PM, arXiv:2107.03006, and UDLM, arXiv:2412.10193, the posterior; Psi-samplers, code s-sahoo/duo; GIDD,
arXiv:2503.04482, hybrid noise and self-correction (code dvruette/gidd); entropy bound, DiffusionGemma (transformers,
models/diffusion_gemma) after Ben-Hamu et al., arXiv:2505.24857. A model of scores is sampled by Tweedie's formula,
which is the same step (SEDD, arXiv:2310.16834).

Time: t = 0 is clean, t = 1 is noise. Shapes: B rows, N canvas tokens, K places of the block, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dmllm.diffusion.bounds import continuous
from dmllm.diffusion.uniform import (
    Level,
    Noise,
    NoiseConfig,
    build_noise,
    corrupt,
    fresh,
    leave_one_out,
    of_words,
    posterior,
    reverse,
)
from dmllm.registry import nearest
from dmllm.samplers import absorbing
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.constraint import Constraint
from dmllm.samplers.draws import numbers
from dmllm.samplers.estimate import draw
from dmllm.samplers.hearing import for_hearing, put, remembered
from dmllm.samplers.process import Predict, Process
from dmllm.types import Vocabulary

SAMPLERS = ["ancestral", "commit", "entropy_bound"]
USED = (
    *("max_new_tokens", "steps", "block_steps", "temperature", "suppress_ids", "visibility", "cfg_scale", "uniform"),
    *("cfg_masks_draft", "suffix_ids", "eos_token_id", "stop_sequences"),
)


@dataclass(frozen=True, kw_only=True)
class UniformDecoding:
    """How random words are undone, beside `steps` (one a token where nothing is said), the number of calls."""

    sampler: str | None = None
    """ancestral, commit, entropy_bound; None is commit at temperature 0, or where a setting says what is committed when
    (threshold, remasking, ...), else ancestral."""
    kappa: float = 1.0
    """Of ancestral: how much of a step is the posterior's; the rest draws x_0 and noise on it anew, which corrects what
    went wrong before (predictor and corrector in one). 1 is ancestral, 0 all anew; the marginals are the same."""
    last: str = "argmax"
    """Of ancestral: whether the last call takes the most probable tokens, or draws them too (draw)."""
    corrections: int = 0
    """Calls after the last, at most, each of which replaces the one token that is the most probable to be another, as
    long as there is one (GIDD's self-correction)."""
    correction_time: float = 0.01
    """The time that a model is told in these."""
    correction_temperature: float = 0.1
    """At which other tokens are drawn in these; 0 takes the most probable ones."""
    bound: float = 0.1
    """Of entropy_bound: tokens of least entropy are kept while those before the last sum to at most this (nats)."""
    confidence_threshold: float = 0.005
    """Of entropy_bound: it ends once the most probable tokens do not change and their mean entropy (nats) is below."""

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"uniform.sampler={self.sampler!r} is not known; {nearest(str(self.sampler), SAMPLERS)}")
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"uniform.kappa={self.kappa} must lie between 0 (all anew) and 1 (ancestral).")
        if self.last not in ("argmax", "draw"):
            raise ValueError(f"uniform.last={self.last!r} is not one of argmax, draw.")
        if type(self.corrections) is not int or self.corrections < 0:
            raise ValueError(f"uniform.corrections={self.corrections!r} must be a whole number of calls; 0 is none.")
        if not 0 < self.correction_time < 1 or min(self.correction_temperature, self.bound) < 0:
            raise ValueError(
                f"uniform.correction_time={self.correction_time} must lie between 0 and 1; correction_temperature="
                f"{self.correction_temperature} and bound={self.bound} must not be negative."
            )

    @staticmethod
    def of(config: DecodeConfig) -> UniformDecoding:
        """From the decode option `uniform`. Raises ValueError for an unknown key or a wrong value."""
        known = [f.name for f in fields(UniformDecoding)]
        for name in config.uniform or {}:
            if name not in known:
                raise ValueError(f"uniform has no option {name!r}; {nearest(name, known)}")
        own = UniformDecoding(**(config.uniform or {}))
        commits = config.temperature == 0 or any(name not in (*USED, "block_length") for name in config.chosen)
        return replace(own, sampler=own.sampler or ("commit" if commits else "ancestral"))


@dataclass(frozen=True)
class Undo:
    """The verbs of a process, for a model that undoes this noise over this vocabulary."""

    vocabulary: Vocabulary
    noise: Noise
    parameterisation: str

    def begin(self, canvas: Canvas, config: DecodeConfig, draws: list[Generator]) -> Canvas:
        """The canvas as it is: noise is put in when a block is begun.

        Raises:
            ValueError: a setting means nothing here.
        """
        how = UniformDecoding.of(config)
        if how.sampler == "commit":
            return canvas
        for name, value in config.chosen.items():
            if name not in USED and not (name == "block_length" and canvas.block_length is not None):
                raise ValueError(
                    f"{name}={value!r} is for tokens that are committed one after the other; with uniform.sampler="
                    f"{how.sampler!r} all may change to the end. Leave it out, or say uniform={{'sampler': 'commit'}}."
                )
        if how.corrections and canvas.block_length is not None:
            raise ValueError("uniform.corrections are for models that denoise one canvas, not blocks; leave them out.")
        return canvas

    def finished(self, canvas: Canvas, config: DecodeConfig) -> Tensor:
        """[B] bool: all calls are spent, or nothing is left to correct."""
        if UniformDecoding.of(config).sampler == "commit":
            return absorbing.finished(canvas, config)
        return canvas.committed.all(1) & (canvas.post == 0)

    @torch.no_grad()
    def advance(
        self,
        predict: Predict,
        canvas: Canvas,
        config: DecodeConfig,
        draws: list[Generator],
        constraint: Constraint | None = None,
    ) -> Canvas:
        """One model call, and the step that it allows.

        Raises:
            ValueError: a constraint, where tokens are not known one after the other.
        """
        how = UniformDecoding.of(config)
        if how.sampler == "commit":
            return self._commit(predict, canvas, config, draws, constraint)
        if constraint is not None:
            raise ValueError("A constraint needs tokens that are committed; say uniform={'sampler': 'commit'}.")
        canvas, rows, open_ = _enter(canvas)
        size, steps = rows.shape[1], config.steps_per_block(canvas.ids.shape[1])
        *number, which, word = numbers(draws, 5 * size, rows.device).unflatten(-1, (5, size)).unbind(1)
        begun = open_ & (canvas.calls == 0)[:, None]
        noise = fresh(self.noise.at(torch.ones_like(which)), which, word, self.vocabulary)
        canvas = replace(
            canvas,
            ids=put(canvas.ids, rows, noise, begun),
            confidence=put(canvas.confidence, rows, torch.zeros_like(which), begun),
        )
        correcting, last = canvas.committed.all(1), canvas.calls + 1 >= steps
        share = 1 - torch.stack([canvas.calls, canvas.calls + 1]).double() / steps
        t, s = self.noise.time(share.clamp(min=0))
        if how.sampler == "entropy_bound":
            t = self.noise.time(((canvas.confidence.gather(1, rows) == 0) & open_).double().mean(1))
        t = torch.where(correcting, how.correction_time, t)
        level, now = _wide(self.noise.at(t)), canvas.ids.gather(1, rows)
        logits, canvas = self._ask(predict, replace(canvas, time=t.float()), rows, now, level, config)
        if how.sampler == "ancestral":
            tokens = self._step(logits, now, level, _wide(self.noise.at(s)), how.kappa, config.temperature, number)
            if how.last == "argmax":
                best = posterior(logits, now, level, self.vocabulary.mask).argmax(-1)
                tokens = torch.where(last[:, None], best, tokens)
        else:
            tokens, last, canvas = self._bounded(
                canvas, logits, rows, open_, level, how, config.temperature, number, last
            )
        if how.corrections:
            open_ = torch.where(correcting[:, None], canvas.editable.gather(1, rows), open_)
            other = _corrected(logits, now, open_, how.correction_temperature, number[2])
            tokens = torch.where(correcting[:, None], other, tokens)
        return _written(canvas, rows, tokens, open_, last, correcting, how.corrections)

    def _ask(
        self, predict: Predict, canvas: Canvas, rows: Tensor, now: Tensor, level: Level, config: DecodeConfig
    ) -> tuple[Tensor, Canvas]:
        """Logits [B, K, V] of the words that leave their own place out, `now` [B, K] standing there; and the canvas
        with what was said, for a model that hears it."""
        said = of_words(predict(for_hearing(canvas), rows).float(), self.vocabulary)
        for token in config.suppress_ids:
            said[..., token] = -torch.inf
        open_ = (canvas.editable & ~canvas.committed).gather(1, rows)
        return self._beside(said, now, level), remembered(predict, canvas, rows, said, open_)

    def _beside(self, said: Tensor, now: Tensor, level: Level) -> Tensor:
        """Logits of the prediction that leaves its own place out, whatever the model's own are."""
        if self.parameterisation == "posterior":
            return leave_one_out(said, now, level, self.vocabulary.mask)
        if self.parameterisation == "score":  # log p_t(y) / p_t(x_t), where p_t is alpha x_0 + uniform
            mass = said.scatter(-1, now[..., None], 0.0).softmax(-1) - level.uniform[..., None].float()
            return of_words(mass.clamp(min=1e-30).log(), self.vocabulary)
        return said

    def _step(
        self,
        logits: Tensor,
        now: Tensor,
        t: Level,
        s: Level,
        kappa: float,
        temperature: float,
        number: Sequence[Tensor],
    ) -> Tensor:
        """A draw from q(x_s | x_t, prediction), [B, K]: what stands there, the predicted token, or new noise."""
        if temperature == 0:
            tokens = logits.argmax(-1)
            chance = (tokens == now).double()
        else:
            tokens = draw(logits, number[1], temperature, 1.0)
            chance = (logits / temperature).softmax(-1, dtype=torch.float64).gather(-1, now[..., None]).squeeze(-1)
        remains, predicted = reverse(chance, now, t, s, kappa, self.vocabulary.mask)
        noise = fresh(s, number[2], number[1], self.vocabulary)
        tokens = torch.where(number[0] < remains + predicted, tokens, noise)
        return torch.where(number[0] < remains, now, tokens)

    def _bounded(
        self,
        canvas: Canvas,
        logits: Tensor,
        rows: Tensor,
        open_: Tensor,
        level: Level,
        how: UniformDecoding,
        temperature: float,
        number: Sequence[Tensor],
        last: Tensor,
    ) -> tuple[Tensor, Tensor, Canvas]:
        """What is kept of a draw, and noise elsewhere, [B, K]; whether that is all, [B], and then the most probable
        tokens; and the canvas that remembers what was kept."""
        now, kept = canvas.ids.gather(1, rows), canvas.confidence.gather(1, rows) > 0
        evident = posterior(logits, now, level, self.vocabulary.mask)
        logits = torch.where(kept[..., None], evident, logits)
        entropy = torch.special.entr((logits / (temperature or 1.0)).softmax(-1)).sum(-1)
        best = logits.argmax(-1)
        tokens = best if temperature == 0 else draw(logits, number[1], temperature, 1.0)
        order = entropy.masked_fill(~open_, torch.inf).argsort(dim=-1, stable=True)
        sums = entropy.masked_fill(~open_, 0.0).gather(-1, order)
        within = torch.empty_like(open_).scatter_(-1, order, sums.cumsum(-1) - sums <= how.bound) & open_
        mean = (entropy * open_).sum(1) / open_.sum(1).clamp(min=1)
        same = ((best == canvas.stable.gather(1, rows)) | ~open_).all(1) & (canvas.calls > 0)
        last = last | same & (mean < how.confidence_threshold)
        noise = fresh(_wide(self.noise.at(torch.ones_like(mean))), number[0], number[2], self.vocabulary)
        canvas = replace(
            canvas,
            confidence=put(canvas.confidence, rows, within.float(), open_),
            stable=put(canvas.stable, rows, best, open_),
        )
        return torch.where(last[:, None], best, torch.where(within, tokens, noise)), last, canvas

    def _commit(
        self,
        predict: Predict,
        canvas: Canvas,
        config: DecodeConfig,
        draws: list[Generator],
        constraint: Constraint | None,
    ) -> Canvas:
        """What a call commits where masks stand for what is open; the model is shown new noise in their place."""
        size = canvas.block_length or canvas.ids.shape[1]
        which, word = numbers(draws, 2 * size, canvas.ids.device).chunk(2, -1)
        said = []

        def shown(masked: Canvas, rows: Tensor) -> Tensor:
            t = self.noise.time(masked.time.double())  # as much noise as there are masks
            level, (block, there) = _wide(self.noise.at(t)), _block(masked, size)
            noise = fresh(level, which, word, self.vocabulary)
            ids = put(masked.ids, block, noise, there & ~masked.committed.gather(1, block))
            canvas = replace(masked, ids=ids, time=t.float())
            logits = of_words(predict(for_hearing(canvas), rows).float(), self.vocabulary)
            said.append(remembered(predict, canvas, rows, logits, ~masked.committed.gather(1, rows)).heard)
            return self._beside(logits, ids.gather(1, rows), level)

        after = absorbing.advance(shown, canvas, config, draws, constraint)
        return replace(after, heard=said[0]) if getattr(predict, "hears", False) else after

    @torch.no_grad()
    def log_likelihood(
        self, predict: Predict, answer: Tensor, draws: Generator, num_samples: int, batch_size: int
    ) -> Tensor:
        """A lower bound on log p(answer [n]) in nats, a float64 scalar: the mean over times and what noise makes of it.

        Times are drawn closer together at both ends, where the bound is steep, and weigh as much less.
        """
        device, length = answer.device, len(answer)
        offset = torch.rand((), generator=draws, dtype=torch.float64, device=draws.device).cpu()
        even = torch.arange(num_samples, dtype=torch.float64) / num_samples
        place = ((offset + even) % 1).clamp(1e-3, 1 - 1e-3)
        number = torch.rand(2, num_samples, length, generator=draws, dtype=torch.float64, device=draws.device)
        t, weight = (x.to(device) for x in (place**2 * (3 - 2 * place), 6 * place * (1 - place)))
        answers, mask = answer.expand(num_samples, -1), self.vocabulary.mask
        which, word = number.to(device)
        noised = corrupt(answers, _wide(self.noise.at(t)), which, word, self.vocabulary)
        total, rows = torch.zeros((), dtype=torch.float64, device=device), torch.arange(length, device=device)
        for part in torch.arange(num_samples, device=device).split(batch_size):
            canvas = Canvas.of(noised[part], torch.ones_like(noised[part], dtype=torch.bool), mask)
            canvas = replace(canvas, requests=torch.zeros_like(part), time=t[part].float())
            times = t[part, None].expand(-1, length)
            said = of_words(predict(canvas, rows.expand(len(part), -1)).float(), self.vocabulary)
            log_x = self._beside(said, noised[part], self.noise.at(times)).log_softmax(-1).flatten(0, 1)
            own = (answers[part].flatten(), noised[part].flatten(), self.noise, times.flatten(), mask)
            total -= (continuous(log_x, *own).view_as(times).sum(1) * weight[part]).sum()
        return total / num_samples


def _enter(canvas: Canvas) -> tuple[Canvas, Tensor, Tensor]:
    """Each row at its first open block: its places [B, K], and which of them are open. The only one is the canvas."""
    length = canvas.block_length or canvas.ids.shape[1]
    block = (canvas.committed.long().argmin(1) + canvas.offset) // length
    block = torch.where(canvas.committed.all(1), canvas.block, block)
    canvas = replace(canvas, block=block, calls=torch.where(block == canvas.block, canvas.calls, 0))
    rows, there = _block(canvas, length)
    return canvas, rows, there & ~canvas.committed.gather(1, rows)


def _block(canvas: Canvas, length: int) -> tuple[Tensor, Tensor]:
    """The places of each row's active block, [B, K], and which of them are on the canvas."""
    first = canvas.block * length - canvas.offset if canvas.block_length is not None else torch.zeros_like(canvas.block)
    places = first[:, None] + torch.arange(length, device=first.device)
    rows = places.clamp(0, canvas.ids.shape[1] - 1)
    return rows, rows == places


def _corrected(logits: Tensor, now: Tensor, open_: Tensor, temperature: float, number: Tensor) -> Tensor:
    """What stands there, [B, K], but for the one place that is the most probable to be another token."""
    mass = (logits / temperature).softmax(-1) if temperature else logits.softmax(-1)
    other = draw(logits, number, temperature, 1.0) if temperature else logits.argmax(-1)
    score = mass.gather(-1, other[..., None]).squeeze(-1) * (other != now) * open_
    first = torch.arange(now.shape[1], device=now.device) == score.argmax(1, keepdim=True)
    return torch.where(first & (score > 0), other, now)


def _written(
    canvas: Canvas, rows: Tensor, tokens: Tensor, open_: Tensor, last: Tensor, correcting: Tensor, corrections: int
) -> Canvas:
    """The canvas with `tokens` [B, K] where `open_`, known for good after the `last` call [B]."""
    ids = put(canvas.ids, rows, tokens, open_)
    known = canvas.committed | put(torch.zeros_like(canvas.committed), rows, open_ & last[:, None], open_)
    left = torch.where((ids != canvas.ids).any(1), canvas.post - 1, 0)  # none where nothing has changed
    return replace(
        canvas,
        ids=ids,
        committed=known,
        post=torch.where(correcting, left, torch.where(known.all(1), corrections, 0)),
        calls=canvas.calls + 1,
        forwards=canvas.forwards + 1,
        accepted=(known & ~canvas.committed).sum(1),
    )


def _wide(level: Level) -> Level:
    """Levels of rows [B] for all their places, [B, 1]."""
    return Level(*(getattr(level, own.name)[:, None] for own in fields(Level)))


def uniform(vocabulary: Vocabulary, **options: Any) -> Process:
    """The process by which a model of these `process_options` (`diffusion.uniform.NoiseConfig`) is decoded."""
    config = NoiseConfig(**options)
    undo = Undo(vocabulary, build_noise(config, vocabulary.words), config.parameterisation)
    return Process(undo.advance, undo.finished, undo.begin, log_likelihood=undo.log_likelihood)
