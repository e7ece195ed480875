"""Losses and steps recorded from the authors' code: SEDD (graph_lib.py), GIDD (loss.py, sampling.py), Duo (algo.py)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dmllm.diffusion.bounds import continuous, score_entropy
from dmllm.diffusion.schedules import Linear
from dmllm.diffusion.uniform import HybridNoise, MaskNoise, Noise, UniformNoise, is_word, of_words, reverse
from dmllm.types import Vocabulary

SIZE, MASK, WORDS = 12, 11, 11
VOCABULARY = Vocabulary(mask=MASK, eos=0, pad=0, size=SIZE)
EPS = 1e-3  # of the log-linear schedule, alpha = 1 - (1 - EPS) t: its times are ours, and so much closer together


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "golden" / "words" / "expected.safetensors")


def log_x(recorded: dict[str, Tensor]) -> Tensor:
    return of_words(recorded["logits"].double(), VOCABULARY).log_softmax(-1)


@pytest.mark.parametrize("kind", ["masks", "words"])
def test_score_entropy_is_sedds(recorded, kind) -> None:
    t = (1 - EPS) * recorded["times"].double()
    noised = torch.full_like(recorded["targets"], MASK) if kind == "masks" else recorded["words"]
    scores = recorded["logits"].double()
    if kind == "masks":
        scores = scores + ((1 - t).log() - t.log() - math.log(WORDS))[:, None]
    noise: Noise = (MaskNoise if kind == "masks" else UniformNoise)(WORDS, Linear())
    words = is_word(VOCABULARY, torch.device("cpu"))
    found = (1 - EPS) * score_entropy(scores, recorded["targets"], noised, noise, t, MASK, words)
    if kind == "words":  # their score of what stands there is 0, and a part of the mean
        found = (1 - EPS) * score_entropy(
            scores.scatter(1, noised[:, None], 0.0), recorded["targets"], noised, noise, t, MASK, words
        )
    assert torch.allclose(found, recorded[f"sedd_{kind}"].double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [1, 2])
def test_the_bound_of_hybrid_noise_is_gidds(recorded, share) -> None:
    noise = HybridNoise(WORDS, share / 10)
    asked = recorded["targets"], recorded["hybrid"], noise, recorded["times"].double(), MASK
    assert torch.allclose(continuous(log_x(recorded), *asked), recorded[f"gidd_{share}"], rtol=1e-5, atol=1e-6)


def test_the_bound_of_uniform_noise_is_duos(recorded) -> None:
    asked = recorded["targets"], recorded["words"], UniformNoise(WORDS, Linear()), recorded["times"].double(), MASK
    assert torch.allclose(continuous(log_x(recorded), *asked), recorded["udlm"], rtol=1e-9)


def step(recorded: dict[str, Tensor], noise: Noise, noised: Tensor, kappa: float) -> Tensor:
    """The distribution of x_s, [N, V]."""
    prediction = log_x(recorded).exp()
    t, s = noise.at(recorded["times"].double()), noise.at(recorded["earlier"].double())
    chance = prediction.gather(1, noised[:, None]).squeeze(1)
    remains, predicted = reverse(chance, noised, t, s, kappa, MASK)
    kinds = (
        s.uniform[:, None] * is_word(VOCABULARY, torch.device("cpu"))
        + F.one_hot(torch.tensor(MASK), SIZE) * s.masked[:, None]
    )
    new = (1 - remains - predicted)[:, None] * kinds / (1 - s.alpha)[:, None]
    return remains[:, None] * F.one_hot(noised, SIZE) + predicted[:, None] * prediction + new


@pytest.mark.parametrize(("name", "kappa"), [("duo_step", 1.0), ("psi_step", 0.3)])
def test_a_step_is_duos_and_its_psi_samplers(recorded, name, kappa) -> None:
    found = step(recorded, UniformNoise(WORDS, Linear()), recorded["words"], kappa)
    assert torch.allclose(found[:, :WORDS], recorded[name], atol=1e-12)
    assert not found[:, MASK].any()


@pytest.mark.parametrize("share", [1, 2])
def test_a_step_is_gidds(recorded, share) -> None:
    found = step(recorded, HybridNoise(WORDS, share / 10), recorded["hybrid"], 1.0)
    assert torch.allclose(found, recorded[f"gidd_step_{share}"], atol=1e-7)
