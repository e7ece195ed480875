"""Rows with a cache, laid end to end where they are fed windows of different lengths: the same hidden rows."""

import pytest
import torch

from dmllm.models.backbones.transformer import Transformer, TransformerConfig
from dmllm.nn import ragged
from dmllm.nn.cache import KVCache
from dmllm.nn.visibility import layout
from dmllm.types import PADDING

WIDTHS = (3, 7, 5)


@pytest.mark.parametrize("extra", [{}, {"qk_norm": True, "num_key_value_heads": 2}, {"time_conditioning": True}])
def test_each_row_is_as_when_it_is_fed_alone(extra, monkeypatch):
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(TransformerConfig(**shape, **extra)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    first, second = torch.randn(3, 4, 32), torch.randn(3, max(WIDTHS), 32)
    time = torch.rand(3) if extra.get("time_conditioning") else None
    used = []
    compact = ragged.Compact.scatter
    monkeypatch.setattr(ragged.Compact, "scatter", lambda self, x: (used.append(1), compact(self, x))[1])

    def run(rows: list[int]) -> torch.Tensor:
        cache = KVCache(11)
        widths = torch.tensor([WIDTHS[row] for row in rows])
        for embeds, start, sizes in ((first, 0, torch.full_like(widths, 4)), (second, 4, widths)):
            embeds = embeds[rows][:, : int(sizes.max())]
            column = torch.arange(embeds.shape[1]).expand(len(rows), -1)
            real = column < sizes[:, None]
            cache.put(torch.where(real, start + column, cache.size))
            look = layout(
                "full", documents=torch.where(real, 0, PADDING), canvas=torch.ones_like(real), positions=start + column
            )
            told = None if time is None else time[rows]
            with torch.no_grad():
                hidden = model(embeds, start + column, look, cache, told).hidden
        return hidden

    together = run([0, 1, 2])
    assert used, "nothing was laid end to end"
    for row, width in enumerate(WIDTHS):
        assert torch.allclose(together[row, :width], run([row])[0, :width], atol=1e-5)
    assert (together[0, WIDTHS[0] :] == 0).all()
