"""DiffuLLaMA: the authors' logits, full and causal, and their loss, recorded from their code."""

import pytest
import torch
from safetensors.torch import load_file

from dmllm.checkpoints.published import write_published
from dmllm.objectives import build_objective
from tests.families.recorded import Recorded, assert_written_back, corrupted, mean

RECORDED = Recorded("diffullama")


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def aligned(logits: torch.Tensor) -> torch.Tensor:
    """The authors' logits, which score the token after a position, in the place of the token that they score."""
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


def test_logits_are_those_of_the_authors_one_to_the_right(pipe):
    expected = aligned(RECORDED.expected["fwd_bidirectional.logits"])
    assert (pipe.logits(RECORDED.inputs["ids"]) - expected).abs().max() < 1e-4


def test_before_its_attention_is_annealed_the_model_is_causal(pipe):
    ids = RECORDED.inputs["ids"]
    expected = aligned(RECORDED.expected["fwd_causal_ratio0.logits"])
    assert (pipe.logits(ids, visibility="causal") - expected).abs().max() < 1e-4


def test_padding_changes_nothing(pipe):
    ids = RECORDED.inputs["ids"]
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    assert (pipe.logits(padded, mask)[:, 3:] - pipe.logits(ids)).abs().max() < 1e-4


def test_the_loss_is_that_of_the_authors(pipe):
    """1/t, divided by the number of hidden tokens; nothing predicts the first one."""
    clean, noisy, time = RECORDED.inputs["train"], RECORDED.expected["loss_shift.xt"], RECORDED.expected["loss_shift.t"]
    logits = pipe.model(noisy).logits
    assert (logits - aligned(RECORDED.expected["loss_shift.logits"])).abs().max() < 1e-4
    scored = (torch.arange(clean.shape[1]) > 0).expand_as(clean)
    for weight, name in (("elbo", "loss"), ("none", "unweighted_loss")):
        objective = build_objective("masked", {"reduction": "masked", "weight": weight}, pipe.special, "full")
        recorded = corrupted(objective, noisy, clean, time[:, None], scored=scored)
        assert torch.equal(recorded.batch.input_ids, noisy)
        expected = float(RECORDED.expected[f"loss_shift.{name}"])
        assert mean(objective, pipe.model, recorded) == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path):
    assert_written_back(pipe, RECORDED, tmp_path)


def test_under_the_names_of_a_llama_it_is_the_same_model_and_keeps_them(pipe, tmp_path):
    names = {name: name.replace("denoise_model.", "model.") for name in RECORDED.weights}
    names["embed_tokens.weight"] = "model.embed_tokens.weight"
    weights = {names[name]: tensor for name, tensor in RECORDED.weights.items()}
    renamed = RECORDED.changed(tmp_path, weights)
    assert (renamed.logits(RECORDED.inputs["ids"]) - pipe.logits(RECORDED.inputs["ids"])).abs().max() < 1e-5
    written = load_file(write_published(renamed.model, tmp_path / "out") / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; 'silu' is"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(fields, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_a_llama_without_a_mask_token_is_not_this_family(tmp_path):
    with pytest.raises(ValueError, match="type 'llama'"):
        RECORDED.changed(tmp_path, mask_token_id=None)


def test_weights_are_read_strictly(tmp_path):
    weights = {name: tensor for name, tensor in RECORDED.weights.items() if name != "denoise_model.norm.weight"}
    with pytest.raises(ValueError, match=r"lacks denoise_model\.norm\.weight"):
        RECORDED.changed(tmp_path, weights)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is \[171, 64\], but config.json makes it \[172, 64\]"):
        RECORDED.changed(tmp_path, {**RECORDED.weights, "embed_tokens.weight": torch.zeros(171, 64)})
