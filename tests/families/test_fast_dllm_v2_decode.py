"""Fast-dLLM v2's generate, against its loop written out on transformers' Qwen2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import dmllm.samplers.denoise as loop
from dmllm.pipeline import load
from tests.families.test_fast_dllm_v2 import ADDED, folder_of, make_qwen

MASK, BLOCK = ADDED["mask_token_id"], 8
PROMPTS = torch.randint(100, (40,), generator=torch.Generator().manual_seed(5))
SETTINGS = [
    {"threshold": 1.0},
    {"threshold": 0.3},
    {"threshold": 0.1},
    {"threshold": 0.3, "sub_block_length": 8},
    {"threshold": 0.2, "sub_block_length": 2},
    {"threshold": 1.0, "sub_block_cache": True},
    {"threshold": 0.3, "sub_block_cache": True},
    {"threshold": 0.1, "sub_block_length": 8, "sub_block_cache": True},
]
LENGTHS = [11, 5, 16, 13, 8, 15, 17]


@pytest.fixture(scope="module")
def qwen():
    model = make_qwen()
    with torch.no_grad():  # a mask that is predicted would stay, and the authors' loop never end
        model.lm_head.weight[MASK] = 0
        model.lm_head.weight *= 1.5
    return model


@pytest.fixture(scope="module")
def pipe(qwen, tmp_path_factory):
    return load(folder_of(qwen, tmp_path_factory.mktemp("decode") / "model", bd_size=BLOCK), device="cpu")


class Written:
    """generate for one row at temperature 0, a list of tokens at a time; `calls` counts the model's."""

    def __init__(self, qwen, sub: int, threshold: float, stop: int, sub_cache: bool):
        self.qwen, self.sub, self.threshold, self.stop, self.sub_cache = qwen, sub, threshold, stop, sub_cache
        self.calls = 0

    def look(self, ids: list[int], first: int = 0, kept: Any = ()) -> tuple[Tensor, list]:
        """Logits of the rows from `first` on, and the keys and values of all, of which `kept` gives the others'."""
        self.calls += 1
        n, total = len(ids), kept[0][0].shape[2] if kept else len(ids)
        cache: Any = DynamicCache()
        for layer, pair in enumerate(kept):
            keys, values = (torch.cat([old[:, :, :first], old[:, :, first + n :]], 2) for old in pair)
            cache.update(keys, values, layer)
        place = torch.arange(n) + first
        others = torch.cat([torch.arange(first), torch.arange(first + n, total)])
        unseen = place[:, None] // BLOCK < torch.cat([others, place]) // BLOCK
        mask = torch.zeros(unseen.shape).masked_fill(unseen, torch.finfo(torch.float32).min)[None, None]
        out = self.qwen(
            torch.tensor([ids]), position_ids=place[None], attention_mask=mask, past_key_values=cache, use_cache=True
        )
        new = [tuple(t[:, :, -n:] for t in (layer.keys, layer.values)) for layer in cache.layers]
        if kept:
            new = [
                tuple(torch.cat([a[:, :, :first], b, a[:, :, first + n :]], 2) for a, b in zip(old, now, strict=True))
                for old, now in zip(kept, new, strict=True)
            ]
        return out.logits[0], new

    def over(self, tokens: list[int]) -> bool:
        """Whether a stop token is there, and nothing before it unknown."""
        return self.stop in tokens and MASK not in tokens[: tokens.index(self.stop)]

    @torch.no_grad()
    def __call__(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        x, given = list(prompt), len(prompt)
        if given >= BLOCK:  # the authors say >, and then never read a prompt of one block
            logits, _ = self.look(x[: given // BLOCK * BLOCK])
            x += [int(logits[-1].argmax())] if given % BLOCK == 0 else []
        for _ in range(max_new_tokens // BLOCK):
            if self.stop in x[given:]:
                break
            x += [MASK] * (-len(x) % BLOCK)
            self.fill(x, given)
            if self.over(x[given:]):
                break
            x.append(int(self.look(x)[0][-1].argmax()))
        return x[: given + x[given:].index(self.stop) + 1] if self.stop in x[given:] else x

    def fill(self, x: list[int], given: int) -> None:
        """The last block of `x`, sub-block after sub-block."""
        kept, start = [], len(x) - BLOCK
        for first in range(start, start + BLOCK, self.sub):
            end = first + self.sub
            while MASK in x[first:end] and not self.over(x[given:]):
                if self.sub_cache and kept and x[first] != MASK:
                    logits, kept = self.look(x[first:end], first, kept)
                    logits = torch.cat([logits[:1], logits[:-1]])
                else:
                    logits, kept = self.look(x)
                    logits = torch.cat([logits[start : start + 1], logits[start:-1]])[first - start : end - start]
                confidence, tokens = logits.softmax(-1).max(-1)
                confidence = torch.where(torch.tensor(x[first:end]) == MASK, confidence, -torch.inf)
                accepted = confidence > self.threshold
                accepted[confidence.argmax()] = True
                for place in accepted.nonzero()[:, 0].tolist():
                    x[first + place] = int(tokens[place])


def options(settings: dict) -> dict:
    return {"sub_block_length": 4, "eos_token_id": [], **settings}


def written(qwen, settings: dict, prompt: list[int], max_new_tokens: int = 16, stop: int = -1) -> tuple[list[int], int]:
    chosen = options(settings)
    sub_cache = chosen.get("sub_block_cache", False)
    theirs = Written(qwen, chosen["sub_block_length"], chosen["threshold"], stop, sub_cache)
    return theirs(prompt, max_new_tokens), theirs.calls


@pytest.mark.parametrize("given", LENGTHS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_decoding_makes_the_authors_calls_and_finds_their_tokens(pipe, qwen, settings, given) -> None:
    """Its last call gives the token after the last block; asked for up to there or not, there are as many calls."""
    prompt = PROMPTS[:given].tolist()
    tokens, calls = written(qwen, settings, prompt)
    assert len(tokens) == given - given % BLOCK + 16 + 1
    out = pipe.generate([prompt], max_new_tokens=len(tokens) - given, **options(settings))
    assert out.sequences[0].tolist() == tokens
    assert int(out.num_forwards) == calls
    shorter = pipe.generate([prompt], max_new_tokens=len(tokens) - given - 1, **options(settings))
    assert shorter.sequences[0].tolist() == tokens[:-1]
    assert int(shorter.num_forwards) == calls


def test_one_token_a_call_takes_the_calls_of_its_tokens_and_of_its_blocks(pipe) -> None:
    out = pipe.generate([PROMPTS[:11].tolist()], max_new_tokens=14, **options({"threshold": 1.0}))
    assert int(out.num_forwards) == 1 + (5 + 1) + (7 + 1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_reply_ends_where_theirs_does(pipe, qwen, settings) -> None:
    for given in (11, 16):
        prompt = PROMPTS[:given].tolist()
        answer = written(qwen, settings, prompt)[0][given:]
        for stop in answer[1::2]:
            tokens, calls = written(qwen, settings, prompt, stop=stop)
            out = pipe.generate([prompt], max_new_tokens=len(answer), **{**options(settings), "eos_token_id": [stop]})
            assert out.sequences[0, : len(tokens)].tolist() == tokens
            assert (out.sequences[0, len(tokens) :] == pipe.special.pad).all()
            assert int(out.num_forwards) == calls


@pytest.mark.parametrize("settings", [*SETTINGS, {"threshold": 0.3, "temperature": 0.7}], ids=str)
def test_a_row_of_a_batch_equals_the_same_request_alone(pipe, settings) -> None:
    ids = PROMPTS[:20].repeat(len(LENGTHS), 1)
    mask = (torch.arange(20) < torch.tensor(LENGTHS)[:, None]).long()
    asked = {"max_new_tokens": 15, **options(settings)}
    seeds = [torch.Generator().manual_seed(row) for row in range(len(LENGTHS))]
    together = pipe.generate(ids, mask, generator=seeds, **asked)
    for row, given in enumerate(LENGTHS):
        alone = pipe.generate([PROMPTS[:given].tolist()], generator=[torch.Generator().manual_seed(row)], **asked)
        assert torch.equal(alone.sequences[0, given:], together.sequences[row, 20:])
        assert alone.num_forwards[0] == together.num_forwards[row]


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_what_is_stored_changes_neither_tokens_nor_calls(pipe, settings) -> None:
    for given in LENGTHS:
        prompt = [PROMPTS[:given].tolist()]
        stored, plain = (
            pipe.generate(prompt, max_new_tokens=15, use_cache=c, **options(settings)) for c in (None, False)
        )
        assert torch.equal(stored.sequences, plain.sequences)
        assert torch.equal(stored.num_forwards, plain.num_forwards)


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_asking_for_whole_sub_blocks_as_on_a_gpu_gives_the_same_tokens(pipe, settings, monkeypatch) -> None:
    ids, mask = PROMPTS[:20].repeat(3, 1), (torch.arange(20) < torch.tensor([[16], [11], [5]])).long()
    asked, open_rows = {"max_new_tokens": 18, **options(settings)}, loop._open_rows
    compact = pipe.generate(ids, mask, **asked)
    monkeypatch.setattr(loop, "_open_rows", lambda *given, compact: open_rows(*given, compact=False))
    static = pipe.generate(ids, mask, **asked)
    assert torch.equal(compact.sequences, static.sequences)
    assert torch.equal(compact.num_forwards, static.num_forwards)


def test_a_sub_block_is_fed_alone_once_its_first_token_is_known(pipe) -> None:
    fed, forward = [], pipe.model.forward

    def watching(*args, **kwargs):
        fed.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    pipe.model.forward = watching
    pipe.generate(
        [PROMPTS[:11].tolist()], max_new_tokens=14, sub_block_cache=True, eos_token_id=[], sub_block_length=4,
        remasking="sequential", threshold=None,
    )  # fmt: skip
    del pipe.model.forward
    block = [8, 4, 4, 4]  # its second sub-block; before it, what is left of the first
    assert fed == [8, 8, *block, 9, 8, 4, 4, *block, 9]  # a full block with the place behind it, which it predicts


def test_a_prompt_of_one_block_is_read(pipe) -> None:
    """The authors' calls see nothing of it, whatever it is."""
    first, second = PROMPTS[:8].tolist(), PROMPTS[8:16].tolist()
    ours = [pipe.generate([prompt], max_new_tokens=9, **options({"threshold": 0.3})) for prompt in (first, second)]
    assert not torch.equal(*(out.sequences[:, 8:] for out in ours))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sub_block_length": 3}, "sub_block_length=3 does not divide block_length=8; try 2 or 8"),
        ({"editing_threshold": 0.5}, "say sub_block_length=None, sub_block_cache=False and prompt_first=False"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pipe, given, said) -> None:
    with pytest.raises(ValueError, match=said):
        pipe.generate([[1, 2, 3]], **given)
