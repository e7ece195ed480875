"""Layers packed into one product are the layers: the same numbers, the same weights, the same file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmllm.nn.fused import Packed, project


@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_follow_their_weights_and_are_saved_as_before(bias: bool, tmp_path) -> None:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(6, width, bias=bias) for width in (4, 3, 5))
    x = torch.randn(2, 7, 6)
    packed = Packed(*layers)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(torch.randn_like(parameter))  # in place, as an optimiser does
        for one, other in zip(project(packed, x, *layers), [layer(x) for layer in layers], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    state = {name: value.clone() for name, value in layers.state_dict().items()}
    save_file(layers.state_dict(), tmp_path / "layers.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in load_file(tmp_path / "layers.safetensors").items())
    layers.double()
    assert not packed.holds
    assert project(packed, x.double(), *layers)[0].dtype == torch.float64
