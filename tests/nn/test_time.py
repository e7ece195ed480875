"""The time on the stream."""

import pytest
import torch

from dmllm.models.backbones.transformer import Transformer, TransformerConfig
from dmllm.nn.visibility import layout

SHAPE = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def hidden(model: Transformer, time: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor:
    none = torch.zeros(embeds.shape[:2], dtype=torch.int64)
    look = layout("full", documents=none, canvas=none == 0)
    return model(embeds, torch.arange(5).expand_as(none), look, time=time).hidden


def test_a_model_that_begins_to_be_told_the_time_says_what_it_said_before() -> None:
    torch.manual_seed(0)
    model, embeds = Transformer(TransformerConfig(**SHAPE)), torch.randn(2, 5, 32)
    model.initialise()
    before = hidden(model, None, embeds)
    model.condition_on_time()
    assert torch.equal(hidden(model, torch.tensor([0.2, 0.9]), embeds), before)
    torch.nn.init.normal_(model.time_embedding.down_proj.weight)
    early, late = (hidden(model, torch.tensor([t, 0.9]), embeds) for t in (0.2, 0.21))
    assert not torch.allclose(early[0], late[0])
    assert torch.equal(early[1], late[1])
    rows = torch.tensor([0.2, 0.9])[:, None].expand(2, 5)
    assert torch.allclose(hidden(model, rows, embeds), early, atol=1e-5)


def test_a_model_that_is_told_the_time_wants_it() -> None:
    model = Transformer(TransformerConfig(**SHAPE, time_conditioning=True))
    model.initialise()
    with pytest.raises(ValueError, match="told the time"):
        hidden(model, None, torch.randn(2, 5, 32))
