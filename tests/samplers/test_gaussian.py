"""Samplers of vectors with exact denoisers: the data come out, and what is given stays as it is."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dmllm.diffusion.gaussian import GAUSSIAN_SCHEDULES
from dmllm.samplers.canvas import Canvas
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.denoise import denoise
from dmllm.samplers.gaussian import GAUSSIAN, STEPS
from tests.exact import Joint, assert_drawn_from, chi_square, generators, quantile, total_variation


class Space:
    """A word is a point in the plane (or on a line); the model knows the joint, and so what is behind any z."""

    def __init__(self, joint: Joint, points, schedule="linear", regresses=False, feedback=False):
        self.joint, self.points = joint, torch.tensor(points)
        self.schedule, self.feedback = GAUSSIAN_SCHEDULES.load(schedule)(), feedback
        self.config = SimpleNamespace(schedule=schedule)
        self.width, self.head = self.points.shape[1], "latent" if regresses else None
        self.features = self.width * (2 if feedback else 1)
        self.seen = []

    def vectors(self):
        return F.pad(self.points, (0, 0, 0, 1))  # the mask token has one too

    def level(self, t, places):
        return self.schedule.level(t)

    def read(self, said, vectors):
        if self.head is not None:
            return said, -torch.cdist(said, vectors)
        return said.float().softmax(-1) @ vectors, said.float()

    def logits(self, canvas):
        """Of each place's token, given z everywhere and what is known: [B, N, V and the mask]."""
        self.seen.append(canvas)
        z, level = canvas.latents[..., : self.width].double(), self.schedule.level(canvas.time.double())
        x = self.points.double()
        far = (z[:, :, None] - level.signal[:, None, None, None] * x).square().sum(-1)  # [B, N, V]
        likely = (-far / (2 * level.noise.square()[:, None, None])).log_softmax(-1)
        known = F.one_hot(canvas.ids.clamp(max=len(x) - 1), len(x)).double().log()
        likely = torch.where(canvas.committed[..., None], known, likely)
        texts = F.one_hot(self.joint.texts, len(x)).double()  # [X, N, V]
        of_text = likely.nan_to_num(neginf=-1e4).flatten(1) @ texts.flatten(1).T + self.joint.probs.log()
        mass = torch.einsum("bx,xnv->bnv", of_text.softmax(-1), texts)
        return F.pad(mass.clamp(min=1e-30).log(), (0, 1), value=3.0)  # it would love to say the mask

    def __call__(self, canvas, rows):
        assert self.head is None
        return self.logits(canvas)

    def said_by(self, canvas, rows, name):
        assert name == self.head
        return (self.logits(canvas)[..., :-1].softmax(-1) @ self.points.double()).float()


SQUARE = [[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]]


def run(space, batch, *, given=None, seeds=None, **options):
    canvas = Canvas.blank(batch, space.joint.length, space.joint.mask)
    if given is not None:
        canvas = Canvas.of(given, given != space.joint.mask, space.joint.mask)
    config = DecodeConfig(max_new_tokens=space.joint.length, eos_token_id=[], **options)
    draws = generators(*(range(batch) if seeds is None else seeds))
    return list(denoise(space, replace(canvas, space=space), config, draws, process=GAUSSIAN))


@pytest.mark.parametrize("schedule", ["linear", "sqrt", "log_snr", "cosine"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_with_the_exact_denoiser_many_steps_draw_from_the_data(schedule, sampler):
    """Tokens that depend on each other, all of them denoised at once; times are many enough for each schedule."""
    joint = Joint(3, 2)
    steps = 200 if schedule == "sqrt" else 60
    last = run(Space(joint, SQUARE, schedule), 1000, steps=steps, gaussian={"sampler": sampler})[-1]
    assert_drawn_from(joint, last.ids)


def test_signs_come_out_as_often_as_they_are():
    """Two points on a line, 3 : 1."""
    joint = Joint(2, 1, probs=torch.tensor([0.75, 0.25], dtype=torch.float64))
    for regresses in (False, True):
        for sampler in ("ddpm", "euler"):
            space = Space(joint, [[-1.0], [1.0]], regresses=regresses)
            assert_drawn_from(joint, run(space, 1000, steps=60, gaussian={"sampler": sampler})[-1].ids)


def test_one_call_rounds_to_what_is_likeliest_alone():
    """The tests above can fail."""
    joint = Joint(3, 2)
    last = run(Space(joint, SQUARE), 500, steps=1)[-1]
    assert (last.ids == last.ids[0]).all()
    seen = joint.counts(last.ids) / len(last.ids)
    assert total_variation(seen, joint.probs) > 0.4
    assert chi_square(joint, last.ids) > 2 * quantile(len(joint.texts) - 1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler"])
@pytest.mark.parametrize("clamp", [False, True])
def test_a_point_mass_is_found_in_any_number_of_calls(sampler, clamp):
    only = torch.zeros(27, dtype=torch.float64)
    only[14] = 1.0
    joint = Joint(3, 3, probs=only)
    for steps in (1, 2, 7):
        for step in run(Space(joint, SQUARE), 4, steps=steps, gaussian={"sampler": sampler, "clamp": clamp}):
            assert (step.ids == joint.texts[14]).all()


def test_calls_are_the_steps_and_nothing_is_known_before_the_last():
    space = Space(Joint(3, 2), SQUARE)
    found = run(space, 3, steps=5)
    assert len(found) == len(space.seen) == 5
    for number, step in enumerate(found):
        assert (step.num_forwards == number + 1).all()
        assert bool(step.committed.all()) == bool(step.finished.all()) == (number == 4)
        assert (step.ids != space.joint.mask).all(), "what is shown is a draft, and no mask"
    times = [float(canvas.time[0]) for canvas in space.seen]
    assert times == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert len(run(space, 1)) == STEPS


def test_what_is_given_stays_and_the_rest_follows_from_it():
    """The draft's tokens are never touched, and what is drawn beside them is drawn given them."""
    joint = Joint(3, 2)
    space, given = Space(joint, SQUARE), torch.tensor([[1, joint.mask]]).expand(1000, -1)
    found = run(space, 1000, given=given, steps=60, gaussian={"sampler": "ddpm"})
    assert all((step.ids[:, 0] == 1).all() for step in found)
    assert all((canvas.ids[:, 0] == 1).all() and canvas.committed[:, 0].all() for canvas in space.seen)
    conditional = torch.where(joint.texts[:, 0] == 1, joint.probs, 0)
    assert_drawn_from(joint, found[-1].ids, conditional / conditional.sum())
    assert (run(space, 1, given=torch.tensor([[2, 0]]))[0].num_forwards == 0).all(), "nothing is open"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_row_of_a_batch_is_as_it_is_alone(sampler):
    space = Space(Joint(3, 2), SQUARE, feedback=True)
    options = {"steps": 6, "gaussian": {"sampler": sampler}}
    together = run(space, 3, given=torch.tensor([[3, 3], [0, 3], [1, 2]]), seeds=[5, 6, 7], **options)
    for row, given in enumerate([[3, 3], [0, 3], [1, 2]]):
        alone = run(space, 1, given=torch.tensor([given]), seeds=[5 + row], **options)
        assert torch.equal(alone[-1].ids[0], together[-1].ids[row])
        assert alone[-1].num_forwards[0] == together[-1].num_forwards[row]


def test_the_last_x_hat_is_fed_back_and_nothing_at_first():
    space = Space(Joint(3, 2), SQUARE, feedback=True)
    run(space, 2, steps=4)
    assert (space.seen[0].latents[..., 2:] == 0).all()
    for before, now in zip(space.seen, space.seen[1:], strict=False):
        logits = space.logits(before)[..., :-1].float()
        assert torch.allclose(now.latents[..., 2:], logits.softmax(-1) @ space.points, atol=1e-6)


def test_a_clamped_x_hat_is_a_word():
    space = Space(Joint(3, 2), SQUARE, feedback=True)
    run(space, 3, steps=4, gaussian={"clamp": True})
    for canvas in space.seen[1:]:
        distance = torch.cdist(canvas.latents[..., 2:], space.points).amin(-1)
        assert float(distance.max()) < 1e-5


def test_a_token_that_is_suppressed_is_never_said():
    last = run(Space(Joint(3, 2), SQUARE), 50, steps=8, suppress_ids=[1])[-1]
    assert (last.ids != 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.9}, "threshold=0.9"),
        ({"temperature": 1.0}, "temperature=1.0"),
        ({"block_length": 1}, "block_length=1"),
        ({"remasking": "random"}, "remasking='random'"),
        ({"gaussian": {"sampler": "dpm"}}, "did you mean"),
        ({"gaussian": {"clam": True}}, "did you mean clamp"),
        ({"gaussian": {"clamp": 1}}, "true or false"),
        ({"gaussian": {"sampler": "euler"}}, "linear path"),
    ],
)
def test_what_means_nothing_here_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(Space(Joint(3, 2), SQUARE, "sqrt"), 1, **options)


def test_a_model_without_vectors_is_refused():
    canvas = Canvas.blank(1, 2, 3)
    with pytest.raises(ValueError, match=r"heads\.latent"):
        list(denoise(lambda *_: None, canvas, DecodeConfig(max_new_tokens=2), generators(0), process=GAUSSIAN))


def test_the_noise_of_a_row_is_standard_normal():
    joint = Joint(3, 2)
    space = Space(joint, SQUARE)
    run(space, 4000, steps=1)
    z = space.seen[0].latents
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel())
    assert float(z.var()) == pytest.approx(1, abs=0.05)
