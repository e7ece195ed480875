"""Pictures made so large that they cover a size, and cut to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dmllm.data.crops import crop, pixels_of, squash


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (33, 32), (20, 21), (64, 64), (32, 97), (7, 40)])
def test_a_square_is_what_torchvision_makes_of_it(width, height):
    theirs = transforms.Compose(
        [transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop((32, 32))]
    )
    assert torch.equal(crop(picture(width, height), (32, 32)), pixels_of(theirs(picture(width, height))))


@pytest.mark.parametrize("size", [(16, 48), (48, 16), (24, 24)])
def test_every_size_is_covered_and_the_cut_goes_from_edge_to_edge(size):
    image = picture(40, 30)
    first, last = crop(image, size, at=(0, 0)), crop(image, size, at=(1, 1))
    assert first.shape == last.shape == (3, *size)
    scale = max(size[0] / 30, size[1] / 40)
    whole = squash(image, (int(30 * scale), int(40 * scale)))
    assert torch.equal(first, whole[:, : size[0], : size[1]])
    assert torch.equal(last, whole[:, -size[0] :, -size[1] :])


def test_squashing_shows_the_whole_picture():
    halves = Image.fromarray(np.repeat(np.array([[[0] * 3, [255] * 3]], np.uint8), 4, 0).repeat(20, 1))
    pixels = squash(halves, (8, 8), interpolation="nearest")
    assert (pixels[:, :, :4] == 0).all()
    assert (pixels[:, :, 4:] == 255).all()
