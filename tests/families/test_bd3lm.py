"""BD3-LM: the authors' logits in training and in decoding, and their losses, recorded from their code."""

import pytest
import torch

from dmllm.nn.visibility import Visibility
from dmllm.objectives import build_objective
from tests.families.recorded import Recorded, assert_written_back, corrupted, mean

RECORDED = Recorded("bd3lm")
LENGTH, BLOCK = 16, 4


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def two_copies(batch: int) -> tuple[torch.Tensor, Visibility]:
    """Positions and rule of a noisy copy on the canvas and a clean one in the context, both ranked by block."""
    positions = torch.arange(LENGTH).repeat(2).expand(batch, -1)
    canvas = (torch.arange(2 * LENGTH) < LENGTH).expand(batch, -1)
    return positions, Visibility(positions // BLOCK, canvas, torch.zeros_like(positions))


def test_in_decoding_every_block_sees_itself_and_those_before_it(pipe):
    logits = pipe.logits(RECORDED.inputs["sample_ids"])
    assert (logits - RECORDED.expected["fwd_sample_blockcausal.logits"]).abs().max() < 1e-4


def test_in_training_a_noisy_block_sees_itself_and_the_clean_blocks_before_it(pipe):
    positions, visibility = two_copies(3)
    ids = RECORDED.inputs["train_ids"]
    logits = pipe.model(ids, positions=positions, visibility=visibility).logits[:, :LENGTH]
    assert (logits - RECORDED.expected["fwd_train_2L.logits"]).abs().max() < 1e-4


def test_a_block_decoded_behind_a_cache_has_the_same_logits(pipe):
    ids = RECORDED.inputs["sample_ids"][:1]
    cached = pipe.generate(ids[:, :8], max_new_tokens=4, block_length=4, steps=4, generator=3)
    uncached = pipe.generate(ids[:, :8], max_new_tokens=4, block_length=4, steps=4, generator=3, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)


@pytest.mark.parametrize("case", ["loss_train", "loss_eval", "loss_clipped_resample"])
def test_losses_are_those_of_the_authors(pipe, case):
    """1/t on what is hidden, a t for each block; the first token is kept, and in evaluation not counted."""
    clean, scored = RECORDED.inputs["x0"], RECORDED.inputs["am"].bool()
    if case == "loss_eval":
        scored = scored & (torch.arange(LENGTH) > 0)
    objective = build_objective("block", {"zero_masking": True}, pipe.special, pipe.model.config.visibility)
    noisy, time = RECORDED.expected[f"{case}.xt"], RECORDED.expected[f"{case}.t"]
    recorded = corrupted(objective, torch.where(scored, noisy, clean), clean, time, scored=scored)
    assert torch.equal(recorded.batch.input_ids[:, :LENGTH], clean)
    assert torch.equal(recorded.batch.input_ids[:, LENGTH:][scored], noisy[scored])
    assert mean(objective, pipe.model, recorded) == pytest.approx(float(RECORDED.expected[f"{case}.loss"]), abs=1e-4)


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path):
    assert_written_back(pipe, RECORDED, tmp_path)


def test_the_noise_range_found_in_training_is_kept_and_not_trained(pipe, tmp_path):
    found = RECORDED.changed(tmp_path, {**RECORDED.weights, "sampling_eps_max": torch.tensor(0.45)})
    assert float(found.model.backbone.noise_max) == pytest.approx(0.45)
    assert "backbone.noise_max" not in dict(found.model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adaln": False}, "adaln=False is not supported; True is"),
        ({"causal": True}, "causal=True is not supported"),
        ({"time_conditioning": True}, "time_conditioning=True is not supported"),
        ({"block_size": None}, "lacks block_size"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_weights_are_read_strictly(tmp_path):
    weights = {name: tensor for name, tensor in RECORDED.weights.items() if name != "sampling_eps_min"}
    with pytest.raises(ValueError, match="lacks sampling_eps_min"):
        RECORDED.changed(tmp_path, weights)
    with pytest.raises(ValueError, match="unexpected sampling_eps_max, sampling_eps_min"):
        RECORDED.changed(tmp_path, var_min=False)
