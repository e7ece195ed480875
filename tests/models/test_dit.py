"""Truths of the diffusion transformer, beside its parity with MDLM and BD3-LM (tests/families)."""

from typing import Any

import pytest
import torch

from dmllm.models.backbones.dit import DiT, DiTConfig
from dmllm.nn.visibility import layout
from dmllm.types import PADDING

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "cond_dim": 8,
}


def random_dit(**changes) -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**SHAPE, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model: DiT, ids: torch.Tensor, documents: torch.Tensor, time=None) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    look = layout("full", documents=documents, canvas=documents >= 0)
    return model.unembed(model(model.embed(ids), positions, look, time=time).hidden)


IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, PADDING, PADDING]])


@pytest.mark.parametrize("conditioned", [False, True])
def test_all_forms_of_the_mask_give_the_same(conditioned):
    time = torch.rand(2, 9, generator=torch.Generator().manual_seed(2))
    real = DOCUMENTS >= 0
    logits = [
        run(random_dit(attention=form, time_conditioning=conditioned), IDS, DOCUMENTS, time)[real]
        for form in ("dense", "ragged")
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_one_time_for_a_row_is_that_time_at_each_of_its_tokens():
    model, time = random_dit(time_conditioning=True), torch.tensor([0.1, 0.8])
    each = run(model, IDS, DOCUMENTS, time[:, None].expand(2, 9))
    assert (run(model, IDS, DOCUMENTS, time) - each).abs().max() < 1e-5
    assert (run(model, IDS, DOCUMENTS, torch.tensor([0.1, 0.7]))[1] - each[1]).abs().max() > 1e-3


def test_at_first_every_block_does_nothing_and_every_token_is_equally_likely():
    model = random_dit()
    model.initialise()
    positions = torch.arange(9).expand_as(IDS)
    look = layout("full", documents=torch.zeros_like(IDS), canvas=IDS >= 0)
    hidden = model(model.embed(IDS), positions, look).hidden
    assert torch.allclose(hidden, model.norm(model.embed(IDS)), atol=1e-6)
    assert (model.unembed(hidden) == 0).all()


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = random_dit(time_conditioning=True)
        model.gradient_checkpointing = recompute
        run(model, IDS, DOCUMENTS, torch.tensor([0.3, 0.6])).square().mean().backward()
        gradients.append(model.noise_embedding.up_proj.weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size=32 is not divisible by num_attention_heads=5"):
        DiT(DiTConfig(**{**SHAPE, "num_attention_heads": 5}))
