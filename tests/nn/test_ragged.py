"""Document by document or under one dense mask: the same hidden rows and the same gradients."""

from dataclasses import replace

import pytest
import torch

from dmllm.models.backbones.transformer import Transformer, TransformerConfig
from dmllm.nn.visibility import Visibility, layout
from dmllm.types import PADDING, PREFIX


def backbone(attention: str) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(TransformerConfig(**shape, num_key_value_heads=2, attention=attention))
    model.initialise()
    return model


def streams() -> dict[str, Visibility]:
    packed = torch.tensor(
        [
            [PREFIX, PREFIX, 0, 0, 0, 1, 1, 0, 0, PADDING],
            [0, 0, 0, 1, 2, 2, 2, PADDING, PADDING, PADDING],
            [PREFIX, 0, 0, 0, PADDING, PADDING, PADDING, 0, 0, 0],
        ]
    )
    canvas = torch.tensor(
        [[0, 0, 0, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0, 1]]
    )
    prefix = layout("prefix", documents=packed, canvas=canvas.bool())
    second_view = torch.zeros_like(packed)
    second_view[0, 7:9] = 1
    narrowed = {"place": torch.arange(10).expand(3, 10), "extra": torch.rand(10, 10) < 0.5}
    return {
        "narrowed": replace(prefix, **narrowed),
        "prefix": prefix,
        "views": Visibility(prefix.rank + second_view, prefix.canvas, prefix.document),
        "full": layout(
            "full", documents=packed.clamp(min=PADDING).masked_fill(packed == PREFIX, 0), canvas=canvas.bool()
        ),
        "causal": layout("causal", documents=packed.masked_fill(packed == PREFIX, 3), canvas=canvas.bool()),
    }


@pytest.mark.parametrize("name", ["prefix", "views", "full", "causal", "narrowed"])
def test_ragged_and_dense_forms_agree(name):
    look = streams()[name]
    real = look.document != PADDING
    positions = torch.arange(10).expand(3, 10)
    results = []
    for attention in ("dense", "ragged"):
        model = backbone(attention)
        torch.manual_seed(1)
        embeds = torch.randn(3, 10, 32, requires_grad=True)
        hidden = model(embeds, positions, look).hidden[real]
        hidden.square().sum().backward()
        results.append((hidden, embeds.grad, model.layers[0].self_attn.k_proj.weight.grad))
    for dense, ragged in zip(*results):
        assert torch.allclose(dense, ragged, atol=1e-4, rtol=1e-4)
