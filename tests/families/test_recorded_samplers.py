"""Samplers that draw, as their authors' code ran them: their random numbers, our network, our law of a step.

MDLM, BD3-LM and DiffuLLaMA here; the samplers of SDAR, Dream, LLaDA and those with a cache, which have arg-max runs
recorded, are token for token in tests/families/test_{sdar,dream,llada}.py and tests/samplers/test_approximate.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dmllm.samplers.absorbing as process
import dmllm.samplers.estimate as reading
from dmllm.samplers.config import decode_config
from dmllm.samplers.quota import rates
from tests.families.recorded import Recorded


def race(mass: Tensor, uniform: Tensor) -> Tensor:
    """The authors' categorical draw: the largest mass over an exponential number."""
    return (mass / (1e-10 - (uniform + 1e-10).log())).argmax(-1)


def probabilities(pipe: Any, ids: Tensor) -> Tensor:
    logits = pipe.logits(ids)
    return logits.index_fill(-1, torch.tensor(pipe.special.mask), -torch.inf).softmax(-1)


def test_mdlms_ancestral_sampler_takes_the_recorded_steps() -> None:
    """A masked token becomes v with p(v) (alpha_s - alpha_t) / (1 - alpha_t); what is left goes to the mask."""
    recorded = Recorded("mdlm")
    pipe, mask = recorded.load(), recorded.config["mask_index"]
    config = decode_config({"max_new_tokens": 16, "steps": 8}, pipe.generation)
    canvases = recorded.expected["sample_ddpm_s8.call_inputs"]
    torch.manual_seed(5)
    ids = torch.full((2, 16), mask)
    for call in range(8):
        assert torch.equal(ids, canvases[call])
        _, share = rates(config, 8, torch.tensor([call]))
        mass = probabilities(pipe, ids) * share
        mass[..., mask] = 1 - share
        ids = torch.where(ids == mask, race(mass, torch.rand_like(mass)), ids)
    assert torch.equal(ids, canvases[8])
    left = probabilities(pipe, ids).argmax(-1)  # their last call, at time eps: nothing is left for it here
    assert torch.equal(torch.where(ids == mask, left, ids), recorded.expected["sample_ddpm_s8.tokens"])


def test_bd3lms_first_hitting_sampler_is_the_loop_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place drawn among the masked ones, at a time t u^(1/n): the recorded tokens, call by call."""
    recorded = Recorded("bd3lm")
    pipe, tokens = recorded.load(), recorded.expected["sample_first_hitting.tokens"]
    torch.manual_seed(7)
    numbers, times, expected = np.random.RandomState(7), [], []
    unknown, noise = [1, 2, 3], torch.empty(0)

    def their_order(config: Any, draws: Any, length: int, device: Any) -> tuple[Tensor, Tensor]:
        nonlocal noise, unknown
        begins = not unknown or not times
        unknown = unknown or [0, 1, 2, 3]
        passed = numbers.rand() ** (1 / len(unknown))
        expected.append(passed * (1.0 if begins else expected[-1]))
        everywhere = torch.rand(4, 100, dtype=torch.float64)
        place = unknown.pop(int(torch.randint(0, len(unknown), (1,))))
        noise = everywhere[[place]]
        order = torch.full((1, 4), 0.999999, dtype=torch.float64)
        order[0, place] = 1 - passed
        return torch.zeros_like(order), order

    forward = pipe.model.forward
    monkeypatch.setattr(process, "_draw", their_order)
    monkeypatch.setattr(reading, "draw", lambda scores, *_: race(scores.double().softmax(-1), noise))
    monkeypatch.setattr(pipe.model, "forward", lambda **given: times.append(given["time"][:, -1]) or forward(**given))
    options = {"schedule": "first_hitting", "max_new_tokens": 15, "top_p": 1.0, "eos_token_id": [], "use_cache": False}
    found = pipe.generate(tokens[:, :1], generator=0, **options)
    assert torch.equal(found.sequences, tokens)
    assert int(found.num_forwards) == 15
    for call, step in enumerate(found.trajectory[:-1], 1):
        ids = recorded.expected[f"sample_first_hitting.call_input.{call:02d}"][:, 1:]
        assert torch.equal(step.ids[:, : ids.shape[1]], ids)
    torch.testing.assert_close(torch.cat(times).double(), torch.tensor(expected).double(), atol=1e-6, rtol=1e-5)


def test_diffullamas_sampler_takes_the_recorded_steps() -> None:
    """Of T calls the one with t to come shows each masked token with probability 1 / (t + 1)."""
    recorded = Recorded("diffullama")
    pipe, mask = recorded.load(), recorded.config["mask_token_id"]
    config = decode_config({"max_new_tokens": 12, "steps": 8}, pipe.generation)
    canvases = recorded.expected["sample_T8_topp0.9.call_inputs"]
    ids, open_rows = canvases[0], canvases[0] == mask
    torch.manual_seed(4)
    torch.bernoulli(torch.ones(18, 18))  # their mask of attention draws too, though all is seen
    for call in range(8):
        assert torch.equal(ids, canvases[call])
        _, share = rates(config, 8, torch.tensor([call]))
        kept = nucleus(probabilities(pipe, ids).log() / config.temperature, config.top_p)
        rows = torch.cat([kept[:, 1:], kept[:, :1]], 1)  # theirs stand one to the left
        drawn = torch.distributions.Categorical(probs=rows).sample().roll(1, 1)
        shown = torch.rand(ids.shape) < share if call < 7 else torch.ones_like(open_rows)
        ids, open_rows = torch.where(open_rows & shown, drawn, ids), open_rows & ~shown
    assert torch.equal(ids[:, 1:], recorded.expected["sample_T8_topp0.9.tokens"])


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens that reaches top_p, as in `samplers.estimate.draw`."""
    mass = scores.softmax(-1)
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
    return torch.zeros_like(mass).scatter_(-1, index, kept)
