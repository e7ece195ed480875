"""Truths of the GPT-2 backbone, beside its parity with DiffuGPT (tests/families) and GPT-2 (tests/checkpoints)."""

from typing import Any

import pytest
import torch

from dmllm.models.backbones.gpt2 import GPT2Config, GPT2Transformer
from dmllm.nn.visibility import layout
from dmllm.types import PADDING

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
}
IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [PADDING] * 3])
POSITIONS = torch.tensor([[*range(5), *range(7)], list(range(12))])  # of padding, some have no vector


def random_gpt2(**changes) -> GPT2Transformer:
    torch.manual_seed(0)
    model = GPT2Transformer(GPT2Config(**{**SHAPE, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model: GPT2Transformer, kind: str = "full") -> torch.Tensor:
    look = layout(kind, documents=DOCUMENTS, canvas=DOCUMENTS >= 0, positions=POSITIONS)
    return model.unembed(model(model.embed(IDS), POSITIONS, look).hidden)


@pytest.mark.parametrize("kind", ["full", "causal", "block:4"])
def test_all_forms_of_the_mask_give_the_same_with_several_documents_in_a_row_and_padding(kind):
    dense, ragged = (run(random_gpt2(attention=form), kind)[DOCUMENTS >= 0] for form in ("dense", "ragged"))
    assert (dense - ragged).abs().max() < 1e-5


def test_documents_of_a_row_are_as_alone_each_counted_from_its_own_start():
    model = random_gpt2()
    alone = layout("full", documents=torch.zeros(1, 7, dtype=torch.long), canvas=torch.ones(1, 7, dtype=torch.bool))
    second = model.unembed(model(model.embed(IDS[:1, 5:]), torch.arange(7)[None], alone).hidden)
    assert (run(model)[:1, 5:] - second).abs().max() < 1e-5


def test_the_order_of_tokens_matters_though_every_row_sees_every_other():
    model, look = random_gpt2(), layout("full", documents=DOCUMENTS[1:, :9], canvas=DOCUMENTS[1:, :9] >= 0)
    there, back = (
        model(model.embed(ids), torch.arange(9)[None], look).hidden for ids in (IDS[1:, :9], IDS[1:, :9].flip(1))
    )
    assert (there - back.flip(1)).abs().max() > 1e-2


def test_a_document_longer_than_the_positions_is_refused_though_a_row_of_several_may_be():
    model = random_gpt2()
    one = layout("full", documents=torch.zeros_like(DOCUMENTS), canvas=DOCUMENTS >= 0)
    with pytest.raises(ValueError, match="A document of 12 tokens is longer than the 9 positions"):
        model(model.embed(IDS), torch.arange(12).expand(2, -1), one)
    assert run(model)[DOCUMENTS >= 0].isfinite().all()


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = random_gpt2()
        model.gradient_checkpointing = recompute
        run(model)[DOCUMENTS >= 0].square().mean().backward()
        gradients.append(model.embed_positions.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_at_first_biases_are_zero_and_projections_back_into_the_stream_are_small():
    model = random_gpt2(hidden_size=128)
    model.initialise()
    block = model.layers[0]
    assert not block.self_attn.o_proj.bias.any()
    assert (block.input_layernorm.weight == 1).all()
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)  # / sqrt(2 * 2 layers)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size=32 is not divisible by num_attention_heads=5"):
        GPT2Config(**{**SHAPE, "num_attention_heads": 5})
