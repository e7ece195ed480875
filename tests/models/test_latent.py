"""The space of vectors: its chains of noise levels, its rows in the stream, and how a model is fed them."""

from __future__ import annotations

import math

import pytest
import torch

from dmllm.diffusion.gaussian import GAUSSIAN_SCHEDULES
from dmllm.models.heads import build_head
from dmllm.pipeline import Pipeline
from tests.test_as_on_a_gpu import act
from tests.test_pipeline import make, picture


def space(**options):
    head = build_head("latent", options, 32, 20)
    torch.manual_seed(0)
    head.initialise()
    return head


def test_vectors_have_one_length_whatever_the_table_holds():
    head = space(width=9)
    assert torch.allclose(head.vectors().norm(dim=-1), torch.tensor(3.0))
    torch.nn.init.normal_(head.table.weight, std=1e-3)
    assert torch.allclose(head.vectors().norm(dim=-1), torch.tensor(3.0))
    free = space(width=9, normalised=False)
    assert torch.equal(free.vectors(), free.table.weight)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_likeliest_token_of_a_vector_is_the_nearest(normalised):
    head = space(width=4, normalised=normalised, regresses=True)
    x = torch.randn(50, 4)
    vectors = head.vectors()
    assert torch.equal(head.scores(x, vectors).argmax(-1), torch.cdist(x, vectors).argmin(-1))
    assert torch.equal(head.scores(vectors, vectors).argmax(-1), torch.arange(20))
    found, logits = head.read(x, vectors)
    assert torch.equal(found, x)
    assert torch.allclose(logits, head.scores(x, vectors))


def test_what_logits_expect_lies_between_the_vectors():
    head = space(width=4)
    vectors = head.vectors()
    assert torch.allclose(head.x_hat(torch.zeros(20), vectors), vectors.mean(0), atol=1e-6)
    sure = torch.full((20,), -1e9).index_fill(0, torch.tensor([7]), 0.0)
    assert torch.allclose(head.x_hat(sure, vectors), vectors[7])


def test_an_x_hat_that_is_fed_back_enters_as_nothing_until_it_is_learned():
    head = space(width=4, self_conditioning=True)
    z, x_hat = torch.randn(2, 3, 4)
    assert head.features == 8
    plain = head.enter(torch.cat([z, torch.zeros_like(z)], -1))
    assert torch.equal(head.enter(torch.cat([z, x_hat], -1)), plain)
    torch.nn.init.normal_(head.condition_proj.weight)
    assert not torch.equal(head.enter(torch.cat([z, x_hat], -1)), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chains_begin_as_the_schedule_and_keep_what_is_nearly_clean_in_any_precision(dtype):
    head = space(schedule="sqrt", positions=3, steps=200, bins=10).to(dtype)
    t = torch.tensor([0.0, 1 / 200, 0.1, 0.5, 1.0])
    expected = GAUSSIAN_SCHEDULES.load("sqrt")().level(t)
    for place in (0, 2, 9):
        level = head.level(t, torch.full((5,), place))
        close = {"rtol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05}
        assert torch.allclose(level.signal, expected.signal, atol=1e-6, **close)
        assert torch.allclose(level.noise[1:], expected.noise[1:], **close)
        assert level.noise[0] == 0, "t = 0 is clean"


def test_between_the_times_of_a_chain_noise_grows():
    head = space(schedule="sqrt", positions=1, steps=50, bins=10)
    t = torch.linspace(0, 1, 501)
    level = head.level(t, torch.zeros_like(t, dtype=torch.int64))
    assert (level.noise.diff() >= 0).all()
    assert (level.signal**2 + level.noise**2 - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0}, "width=0"),
        ({"positions": -1}, "positions=-1"),
        ({"steps": 100, "bins": 7}, "bins=7 does not divide"),
        ({"schedule": "sqr"}, "did you mean sqrt"),
        ({"widht": 4}, "did you mean width"),
    ],
)
def test_a_space_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        space(**wrong)


def with_space(kind: str, *, timed: bool, regresses: bool) -> Pipeline:
    """The tiny model with a tower, and vectors in place of tokens."""
    pipe = make(kind)
    options = {"width": 6, "regresses": regresses, "self_conditioning": True}
    pipe.model.adapt(process="gaussian", time_conditioning=timed, heads={"latent": options})
    torch.manual_seed(1)
    for name, parameter in pipe.model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("vision"):
            torch.nn.init.normal_(parameter, std=0.03 if "time_embedding" in name else 0.3)
    return pipe


TEXTS, PICTURES = ["what is it?", "and now, after all?", "?"], [[picture(0)], [picture(1), picture(2)], None]


def said(pipe: Pipeline, rows=slice(None), seeds=(3, 4, 5), **options) -> list[list[int]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
    asked = TEXTS[rows], [own or [] for own in PICTURES[rows]]
    *_, last = pipe.stream(*asked, generator=generators, steps=3, eos_token_id=[], **options)
    return last.ids.tolist()


@pytest.mark.parametrize("regresses", [False, True], ids=["logits", "vectors"])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("kind", ["full", "prefix"])
def test_rows_in_place_of_tokens_are_fed_alike_in_every_way(kind, timed, regresses, monkeypatch):
    """Alone or in a batch, with the prompts' keys and values kept or not, and as on a GPU."""
    pipe = with_space(kind, timed=timed, regresses=regresses)
    together = said(pipe)
    assert together[0] != together[1]
    for row in range(3):
        assert said(pipe, slice(row, row + 1)) == [together[row]]
    assert said(pipe, use_cache=False) == together
    assert said(pipe, seeds=(3, 9, 5))[1] != together[1]
    guided = said(pipe, cfg_scale=0.7)
    act(monkeypatch)
    assert said(pipe) == together
    assert said(pipe, cfg_scale=0.7) == guided


def test_a_stream_of_vectors_sees_pictures_and_moves_with_them():
    pipe = with_space("full", timed=True, regresses=False)
    other = [torch.Generator().manual_seed(3)]
    options = {"steps": 3, "eos_token_id": []}
    *_, one = pipe.stream("what is it?", [picture(0)], generator=other, **options)
    *_, two = pipe.stream("what is it?", [picture(1)], generator=[torch.Generator().manual_seed(3)], **options)
    assert not torch.equal(one.ids, two.ids)


def test_rows_of_the_streams_own_width_go_in_as_they_are():
    """Without a space, for whoever makes rows of the stream: the embeddings of the ids say what the ids say."""
    pipe = make("full")
    ids = torch.tensor([[5, 6, 7, 8]])
    there = torch.tensor([[False, True, True, False]])
    with torch.no_grad():
        latents = pipe.model.embed(ids)
        hidden = ids.masked_fill(there, pipe.special.mask)
        plain = pipe.model(input_ids=ids).logits
        assert torch.equal(pipe.model(input_ids=hidden, latents=latents, latent_rows=there).logits, plain)
        assert not torch.equal(pipe.model(input_ids=hidden).logits, plain)
    assert math.isfinite(float(plain.sum()))
