"""Projectors turn the patches of a tile into rows of the stream, on a grid they state themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dmllm.models.projectors import PROJECTORS, ProjectorConfig, build_projector


def build(name: str, grid: tuple[int, int] = (4, 6), **options):
    torch.manual_seed(0)
    return build_projector(ProjectorConfig(name=name, options=options), in_features=8, out_features=16, grid=grid)


def patches(rows: int = 4, cols: int = 6) -> Tensor:
    return torch.randn(2, rows * cols, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name for name in PROJECTORS if name != "identity"])
def test_each_projector_fills_the_grid_it_states_and_learns_with_every_parameter(name):
    projector = build(name)
    rows = projector(patches())
    assert rows.shape == (2, projector.grid[0] * projector.grid[1], 16)
    rows.square().mean().backward()
    assert all(p.grad is not None for p in projector.parameters())


def test_identity_leaves_features_that_fit_the_stream_as_they_are():
    x = patches()
    same = build_projector(ProjectorConfig(name="identity"), in_features=8, out_features=8, grid=(4, 6))
    assert same(x) is x
    assert same.grid == (4, 6)
    with pytest.raises(ValueError, match="features of width 8 for a stream of 16"):
        build("identity")


@pytest.mark.parametrize(("name", "activation"), [("mlp2x_gelu", F.gelu), ("mlp2x_silu", F.silu)])
def test_mlp2x_is_linear_activation_linear_under_llavas_keys(name, activation):
    projector, x = build(name), patches()
    weights = projector.state_dict()
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    hidden = activation(x @ weights["0.weight"].T + weights["0.bias"])
    torch.testing.assert_close(projector(x), hidden @ weights["2.weight"].T + weights["2.bias"])


def test_average_pooling_is_the_mean_of_each_window():
    projector, x = build("pool", then="linear"), patches()
    assert projector.grid == (2, 3)
    window = torch.stack([x[:, 0], x[:, 1], x[:, 6], x[:, 7]]).mean(0)
    torch.testing.assert_close(projector(x)[:, 0], projector.project(window))


@pytest.mark.parametrize("mode", ["average", "bilinear"])
def test_pooling_rounds_an_odd_side_up_and_keeps_constants(mode):
    projector = build("pool", grid=(27, 27), mode=mode)
    assert projector.grid == (14, 14)
    constant = torch.full((1, 27 * 27, 8), 0.5)
    torch.testing.assert_close(projector(constant), projector.project(constant[:, :196]))


def test_pixel_shuffle_lays_neighbours_side_by_side():
    projector, x = build("pixel_shuffle", then="linear"), patches()
    square = torch.cat([x[:, 2], x[:, 3], x[:, 8], x[:, 9]], dim=1)  # second square of the first row
    torch.testing.assert_close(projector(x)[:, 1], projector.project(square))


def test_pixel_shuffle_refuses_a_grid_it_does_not_divide_and_says_what_to_use():
    with pytest.raises(ValueError, match=r"factor=2 does not divide the 27 x 27 patches.*'pool'"):
        build("pixel_shuffle", grid=(27, 27))


@pytest.mark.parametrize(("queries", "grid"), [(9, (3, 3)), (10, (1, 10))])
def test_resampler_rows_do_not_depend_on_the_patch_grid(queries, grid):
    assert build("resampler", num_queries=queries).grid == grid
    assert build("resampler", grid=(2, 2), num_queries=queries).grid == grid


def test_resampler_knows_where_a_patch_lies():
    projector, x = build("resampler", num_queries=4), patches()
    assert not torch.allclose(projector(x), projector(x.flip(1)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp2x", {}, "did you mean mlp2x_"),
        ("pool", {"mode": "median"}, "max, average, bilinear"),
        ("pool", {"size": 2}, "size"),
        ("pool", {"then": "conv"}, "linear, mlp2x_gelu"),
        ("pool", {"factor": 0}, "at least 1"),
        ("resampler", {"num_heads": 3}, "divide the width 16"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_the_allowed_ones(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)
