"""Texts with holes, filled jointly: what is fixed stands on the canvas from the beginning, the loop does the rest.

The text is an answer: to messages, to pictures alone, or by itself. Behind it stands what training puts behind an
answer. Where holes may have several lengths, each choice is filled by itself, from the same random numbers, and that
text is taken whose probability as a whole answer is the highest, by its bound (`samplers.likelihood`, hidden by common
random numbers). The whole text is compared, since what fills holes of different lengths is not of one kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dmllm.data.chat import as_messages
from dmllm.data.holes import Gapped, Laid, gapped
from dmllm.growing import grow, places
from dmllm.nn.visibility import ORDERED
from dmllm.predictor import prepare
from dmllm.requests import Seeds, row_generators, split_requests
from dmllm.samplers import check_masks, process_of
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.samplers.likelihood import Noise
from dmllm.samplers.process import Predict
from dmllm.scoring import Question
from dmllm.types import IGNORE, TEXT, Batch, Example

MAX_CHOICES = 64  # choices of lengths that are tried for one text
NEVER = -1e4  # the logit of what cannot stand in a hole
NOTHING = torch.zeros(0, dtype=torch.int64)
EMPTY = Example(
    input_ids=NOTHING, labels=NOTHING + IGNORE, image_slots=NOTHING + TEXT, documents=NOTHING, positions=NOTHING
)
Collate = Callable[[list[Example]], Batch]


@dataclass(frozen=True)
class Infilled:
    """A text whose holes are filled."""

    text: str  # what was fixed is in it character by character
    filled: list[str]  # what stands in each hole
    ids: list[int]  # of the whole text
    hole_ids: list[list[int]]
    num_forwards: int  # model calls until this text was filled
    log_probs: dict[tuple[int, ...], float]  # in nats, by the lengths of the holes; empty where these were given


@dataclass
class _Try:
    """One choice of lengths for the holes of one text."""

    row: int
    lengths: tuple[int, ...]
    laid: Laid
    ids: list[int]
    num_forwards: int = 0
    log_prob: float = 0.0


def infill(
    pipeline: Any,
    texts: list[str],
    conversations: list[list[Any] | None],
    decode: dict[str, Any],
    generator: Seeds,
    *,
    collate: Collate,
    use_cache: bool | None,
    num_samples: int,
    batch_size: int,
) -> list[Infilled]:
    """Each text filled; `Pipeline.infill` says how. `conversations` are those of `conversations_of`."""
    if getattr(process_of(pipeline.model), "grows", False):
        return _grown(pipeline, texts, conversations, decode, generator, collate, use_cache, batch_size)
    processor, config = pipeline.processor, _settings(pipeline, decode)
    gaps = [gapped(processor, text, own) for text, own in zip(texts, conversations, strict=True)]
    if config.suffix_ids:  # what stands behind an answer of this model
        ends = [{} if talk is None else {"end": list(config.suffix_ids), "size": 0} for talk in conversations]
        gaps = [replace(own, **end) for own, end in zip(gaps, ends, strict=True)]
    for text, own in zip(texts, gaps, strict=True):
        if any(hole.grows for hole in own.holes):
            raise ValueError(
                f"{text!r:.80} has a hole of any length, for which a model must insert tokens (objective insertion); "
                "say [MASK:1..3] for one to three."
            )
        if own.choices > MAX_CHOICES:
            raise ValueError(
                f"{text!r:.80} leaves {own.choices} choices of lengths, more than the {MAX_CHOICES} that are tried "
                "(MAX_CHOICES); narrow its ranges, or fill its holes in turn."
            )
    examples = [EMPTY if own is None else processor.prompt(own) for own in conversations]
    seeds = row_generators(generator, [_with_text(one, own) for one, own in zip(examples, gaps, strict=True)])
    tries = [_Try(row, n, own.lay(n), []) for row, own in enumerate(gaps) for n in own.lengths()]
    for group in _alike(tries, batch_size):
        prompts = collate([examples[one.row] for one in group])
        draws = [seeds[one.row].clone_state() if gaps[one.row].choices > 1 else seeds[one.row] for one in group]
        _fill(pipeline, prompts, group, config, "steps" in decode, draws, use_cache)
    found = []
    for row, own in enumerate(gaps):
        mine = [one for one in tries if one.row == row]
        if len(mine) > 1:
            number = torch.randint(2**62, (), generator=seeds[row], device=seeds[row].device)
            columns = 1 + max(one.laid.columns[-1] for one in mine)
            noise = Noise.draw(num_samples, columns, Generator().manual_seed(int(number)))
            _compare(pipeline, collate([examples[row]]), mine, config.visibility, noise, use_cache, batch_size)
        best = max(mine, key=lambda one: one.log_prob)
        text, filled, ids = own.read(best.laid, best.ids, processor.decode)
        known = {one.lengths: one.log_prob for one in mine} if len(mine) > 1 else {}
        whole = best.ids[len(own.before) : best.laid.cuts[-1]]
        found.append(Infilled(text, filled, whole, ids, best.num_forwards, known))
    return found


def _grown(
    pipeline: Any,
    texts: list[str],
    conversations: list[list[Any] | None],
    decode: dict[str, Any],
    generator: Seeds,
    collate: Collate,
    use_cache: bool | None,
    batch_size: int,
) -> list[Infilled]:
    """Each text filled by a model that inserts tokens."""
    processor, config = pipeline.processor, pipeline.decode_config(**decode)
    gaps = [gapped(processor, text, own) for text, own in zip(texts, conversations, strict=True)]
    gaps = [replace(own, size=0) for own in gaps]  # no end tokens that fill up
    examples = [EMPTY if own is None else processor.prompt(own) for own in conversations]
    seeds = row_generators(generator, [_with_text(one, own) for one, own in zip(examples, gaps, strict=True)])
    found: dict[int, Infilled] = {}
    ordered = sorted(range(len(gaps)), key=lambda row: places(gaps[row]))
    for _, group in itertools.groupby(ordered, key=lambda row: places(gaps[row])):
        alike = list(group)
        for rows in (alike[at : at + batch_size] for at in range(0, len(alike), batch_size)):
            prompts = collate([examples[row] for row in rows])
            own = [gaps[row] for row in rows], config, [seeds[row] for row in rows]
            for row, (laid, ids, calls) in zip(rows, grow(pipeline, prompts, *own, use_cache), strict=True):
                text, said, holes = gaps[row].read(laid, ids, processor.decode)
                whole = ids[len(gaps[row].before) : laid.cuts[-1]]
                found[row] = Infilled(text, said, whole, holes, calls, {})
    return [found[row] for row in range(len(gaps))]


def conversations_of(text: Any, messages: Any, images: Any) -> tuple[list[str], list[list[Any] | None], bool]:
    """The texts, what each answers, and whether there was a single one, not a list.

    Raises:
        ValueError: no text; or other numbers of conversations or images than of texts.
    """
    single = isinstance(text, str)
    texts = list(text) if isinstance(text, list | tuple) else [text]
    if not all(isinstance(one, str) for one in texts):
        raise ValueError("A text with holes is a string, or a list of them for a batch.")
    given = [messages] if single else [None] * len(texts) if messages is None else list(messages)
    nobody: list[Any] = [{"role": "user", "content": []}]
    asked, _ = split_requests([nobody if one is None else one for one in given], [images] if single else images)
    if len(asked) != len(texts):
        raise ValueError(f"messages: {len(asked)} conversations for {len(texts)} texts; give one (or None) for each.")
    alone = [own is None and not shown for own, (_, shown) in zip(given, asked, strict=True)]
    return texts, [None if no else as_messages(*one) for no, one in zip(alone, asked, strict=True)], single


def _settings(pipeline: Any, decode: dict[str, Any]) -> DecodeConfig:
    """The settings of a text of which nothing is open but its holes. Raises ValueError where there can be none."""
    if hasattr(pipeline.model, "denoise"):
        raise ValueError("infill is not for a model that denoises in its own way: it takes no text with holes.")
    check_masks(pipeline.model, "infill()")
    for name in ("max_new_tokens", "constraint", "choices"):
        if decode.get(name) is not None:
            raise ValueError(f"{name}={decode[name]!r:.80}: a text with holes says so itself; leave {name} out.")
    if "steps" in decode and "block_steps" not in decode:  # of the text, whose blocks are counted later
        decode = {**{k: v for k, v in decode.items() if k != "steps"}, "block_steps": decode["steps"]}
    config = pipeline.decode_config(**decode)
    kind = config.visibility or pipeline.model.config.visibility
    if kind not in ("full", "prefix", ORDERED):
        raise ValueError(
            f"A hole is filled from what stands on both sides, and with visibility={kind!r} the text behind it is not "
            "seen; use a model with full, prefix or permutation attention, or rank() on texts that are whole."
        )
    steps = None
    if config.steps is not None:
        steps = config.steps_per_block(config.max_new_tokens)
    own = {"stop_sequences": [], "eos_token_id": [], "choose_mask": False, "prompt_first": False}
    return replace(config, steps=None, block_steps=steps or config.block_steps, fill_behind_eos=True, **own)


def _with_text(example: Example, own: Gapped) -> Example:
    """A prompt and the text behind it, as what a request is recognised by."""
    ends = [n for hole in own.holes for n in (hole.least, hole.most)]
    return replace(example, input_ids=torch.tensor([*example.input_ids.tolist(), *itertools.chain(*own.parts), *ends]))


def _alike(tries: list[_Try], size: int) -> list[list[_Try]]:
    """Groups of one length, of at most `size`."""
    ordered = sorted(tries, key=lambda one: len(one.laid.ids))
    groups = [list(group) for _, group in itertools.groupby(ordered, key=lambda one: len(one.laid.ids))]
    return [group[at : at + size] for group in groups for at in range(0, len(group), size)]


def _fill(
    pipeline: Any,
    prompts: Batch,
    group: list[_Try],
    config: DecodeConfig,
    shared: bool,
    draws: list[Generator],
    use_cache: bool | None,
) -> None:
    """Fills texts of one length; `shared`: the blocks of a text share its calls."""
    model, mask_id = pipeline.model, pipeline.special.mask
    length = len(group[0].laid.ids)
    if shared and config.block_steps is not None:
        blocks = -(-length // config.block_of(length))
        config = replace(config, block_steps=max(config.block_steps // blocks, 1))
    config = replace(config, max_new_tokens=length, suffix_ids=[])  # they are on the canvas
    draft = torch.tensor([one.laid.ids for one in group])
    kinds = torch.tensor([one.laid.kinds for one in group], device=model.device)
    predict, canvas, config = prepare(model, prompts, config, mask_id, use_cache, draft, kept=pipeline.kept)
    table = pipeline.processor.tokens.kinds.to(model.device)
    *_, last = denoise(_only(predict, table, kinds, mask_id), canvas, config, draws)
    for one, ids, calls in zip(group, last.ids.tolist(), last.num_forwards.tolist(), strict=True):
        one.ids, one.num_forwards = ids, calls


def _only(predict: Predict, table: Tensor, kinds: Tensor, mask_id: int) -> Predict:
    """The model, saying what may stand in a hole: of kinds [B, N] at each place the tokens of `table` [3, tokens]."""

    def within(canvas: Canvas, rows: Tensor) -> Tensor:
        logits = predict(canvas, rows)
        allowed = table.new_zeros(len(table), logits.shape[-1])
        allowed[:, : table.shape[1]] = table[:, : logits.shape[-1]]
        allowed[:, mask_id] = True  # what it says of that is for the rules to judge
        return logits.masked_fill(~allowed[kinds[canvas.requests].gather(1, rows)], NEVER)

    return within


def _compare(
    pipeline: Any,
    prompt: Batch,
    mine: list[_Try],
    visibility: str | None,
    noise: Noise,
    use_cache: bool | None,
    batch_size: int,
) -> None:
    """What the model says of each filled text as a whole."""
    longest, mask_id = max(len(one.ids) for one in mine), pipeline.special.mask
    question = Question(
        pipeline.model,
        prompt,
        longest,
        mask_id,
        use_cache=use_cache,
        visibility=visibility,
        kept=pipeline.kept,
    )
    for one in mine:
        answer = torch.tensor(one.ids, device=pipeline.model.device)
        values = question.values(answer, torch.tensor(one.laid.columns), noise, batch_size)
        one.log_prob = float(values.sum(1).mean())
