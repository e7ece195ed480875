"""Image tokenizers: pictures to codes and back, as the authors' own code has it, and nothing lost between the two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmllm.checkpoints.image_tokenizer import load_image_tokenizer, save_image_tokenizer
from dmllm.data.crops import crop, squash
from dmllm.models.image_tokenizers import IMAGE_TOKENIZERS, ImageTokenizer, build_image_tokenizer
from dmllm.models.image_tokenizers.fsq import FiniteScalar
from dmllm.models.image_tokenizers.magvit_v2 import bit_entropy

GOLDEN = Path(__file__).parent.parent / "golden" / "magvitv2"
SMALL = {
    "fsq": {"levels": [5, 4, 3], "channels": [16, 16], "depth": 1, "patch": 2},
    "magvit_v2": {
        "encoder": {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 5},
        "decoder": {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 5},
        "quantize": {"codebook_dim": 5},
        "num_groups": 4,
    },
    "vq": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "num_vq_embeddings": 24,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(params=sorted(SMALL))
def tokenizer(request) -> ImageTokenizer:
    if request.param == "vq":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return build_image_tokenizer(request.param, SMALL[request.param]).eval()


@pytest.fixture(scope="module")
def magvit() -> ImageTokenizer:
    return load_image_tokenizer(GOLDEN)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


# MAGVIT-v2, recorded from MMaDA's code


@torch.no_grad()
def test_latents_codes_and_losses_are_the_authors(magvit, expected):
    latents = magvit.to_latents(expected["pixels"])
    torch.testing.assert_close(latents, expected["z"], rtol=1e-5, atol=1e-4)
    found = magvit.quantise(latents)
    assert torch.equal(found.codes.flatten(1), expected["codes"])
    torch.testing.assert_close(found.latents, expected["zq"])
    torch.testing.assert_close(found.losses["commitment"], expected["quantizer_loss"][0])
    torch.testing.assert_close(found.losses["entropy"], expected["entropy_loss"][0])


@torch.no_grad()
def test_pictures_drawn_from_codes_are_the_authors(magvit, expected):
    codes = expected["codes"].view(2, 16, 16)
    torch.testing.assert_close(magvit.to_pixels(magvit.from_codes(codes)), expected["decoded"], rtol=0, atol=1e-5)
    assert torch.equal(magvit.decode(codes).movedim(1, -1), expected["decoded_uint8"])
    for rows, cols, factor, name in ((4, 4, 3, "16codes"), (4, 8, 5, "4x8")):
        some = (torch.arange(rows * cols) * factor % 64).view(1, rows, cols)
        drawn = magvit.to_pixels(magvit.from_codes(some))
        torch.testing.assert_close(drawn, expected[f"decoded_{name}"], rtol=0, atol=1e-5)


def test_a_picture_is_prepared_as_the_authors_prepare_it(magvit, expected):
    image = Image.open(GOLDEN / "image.png").convert("RGB")
    pixels = torch.stack([crop(image, (32, 32)), squash(image, (32, 32))])
    torch.testing.assert_close(magvit.normalise(pixels), expected["pixels"], rtol=0, atol=1e-6)
    assert torch.equal(magvit.encode(pixels).flatten(1), expected["codes"])


def test_without_sizes_in_its_config_magvit_has_the_published_ones():
    with torch.device("meta"):
        published = build_image_tokenizer("magvit_v2", {"_class_name": "MAGVITv2", "_diffusers_version": "0.30.1"})
    assert (published.num_codes, published.stride) == (8192, 16)
    shapes = {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()}
    assert shapes["encoder.down.4.block.3.conv2.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.up.1.block.0.conv1.weight"] == (128, 256, 3, 3)
    assert shapes["decoder.up.0.block.3.conv1.weight"] == (128, 128, 3, 3)
    assert shapes["quantize.embedding"] == (8192, 13)
    assert not any(".attn." in name for name in shapes)


def test_attention_stands_behind_the_blocks_of_the_sides_asked_for():
    sizes = {"ch": 8, "ch_mult": [1, 1, 2], "num_res_blocks": 2, "resolution": 32, "attn_resolutions": [16]}
    fields = {**SMALL["magvit_v2"], **{part: {**sizes, "z_channels": 5} for part in ("encoder", "decoder")}}
    names = build_image_tokenizer("magvit_v2", fields).state_dict()
    found = {".".join(name.split(".")[:5]) for name in names if ".attn." in name}
    assert found == {f"{part}.1.attn.{i}" for part in ("encoder.down", "decoder.up") for i in (0, 1)}


def test_the_entropy_loss_is_that_of_two_classes_at_squared_distance():
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([-((latents - 1) ** 2), -((latents + 1) ** 2)], -1).movedim(1, -2).reshape(-1, 3, 2)
    each = torch.distributions.Categorical(logits=scores)
    overall = torch.distributions.Categorical(probs=each.probs.mean(0))
    torch.testing.assert_close(bit_entropy(latents), each.entropy().mean() - overall.entropy().mean())


# Finite scalars


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4), (2, 2, 2), (7,)])
def test_every_code_of_finite_scalars_is_a_vector_and_back(levels):
    scalars = FiniteScalar(levels)
    codes = torch.arange(scalars.num_codes).view(1, 1, -1)
    vectors = scalars.vectors(codes)
    assert torch.equal(scalars.codes(vectors), codes)
    assert vectors.min() >= -1
    assert vectors.max() <= 1
    for feature, number in enumerate(levels):
        assert len(vectors[:, feature].unique()) == number


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4), (2, 2, 2)])
def test_rounding_reaches_every_level_and_none_beside(levels):
    scalars = FiniteScalar(levels)
    line = torch.linspace(-9, 9, 4001).expand(1, len(levels), 1, -1)
    found = scalars(line)
    torch.testing.assert_close(found.latents, scalars.vectors(found.codes))
    for feature, number in enumerate(levels):
        values = found.latents[0, feature, 0]
        assert len(values.unique()) == number
        assert (values.diff() >= 0).all()


def test_zero_is_the_middle_level_and_the_first_feature_counts_fastest():
    scalars = FiniteScalar((8, 5, 5))
    assert int(scalars(torch.zeros(1, 3, 1, 1)).codes) == 4 + 2 * 8 + 2 * 40
    step = scalars.vectors(torch.tensor([[[0, 1, 8, 40]]]))[0, :, 0]
    assert torch.equal(step[:, 1] - step[:, 0] > 0, torch.tensor([True, False, False]))
    assert torch.equal(step[:, 3] - step[:, 0] > 0, torch.tensor([False, False, True]))


def test_gradients_pass_the_rounding_as_if_it_were_not_there():
    scalars, latents = FiniteScalar((8, 5)), torch.randn(1, 2, 3, 3, requires_grad=True)
    scalars(latents).latents.sum().backward()
    through, _ = latents.grad.clone(), latents.grad.zero_()
    (scalars.bound(latents) / (scalars.levels // 2)).sum().backward()
    torch.testing.assert_close(through, latents.grad)
    assert (through > 0).all()


# diffusers' VQModel


@torch.no_grad()
def test_vq_is_what_diffusers_pipelines_make_of_a_picture(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.VQModel(**SMALL["vq"], lookup_from_codebook=True).eval()
    theirs.quantize.embedding.weight.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "model" / "vqvae")
    ours = load_image_tokenizer(tmp_path / "model")
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=2, do_normalize=False)
    pixels = pictures(16, 24)
    given = processor.preprocess([Image.fromarray(p.movedim(0, -1).numpy()) for p in pixels])
    codes = theirs.quantize(theirs.encode(given).latents)[2][2].view(2, 8, 12)
    assert len(codes.unique()) > 3
    assert torch.equal(ours.encode(pixels), codes)
    drawn = theirs.decode(codes, force_not_quantize=True, shape=(2, 8, 12, 4)).sample.clip(0, 1)
    images = processor.postprocess(drawn, output_type="pil")
    for image, mine in zip(images, ours.decode(codes), strict=True):
        assert image.tobytes() == mine.movedim(0, -1).numpy().tobytes()


def test_revived_rows_of_the_table_lie_where_latents_are():
    pytest.importorskip("diffusers")
    vq = build_image_tokenizer("vq", SMALL["vq"])
    latents = torch.randn(1, 4, 3, 3)
    before = vq.quantize.embedding.weight.detach().clone()
    vq.revive(torch.tensor([2, 5]), latents, torch.Generator().manual_seed(0))
    after = vq.quantize.embedding.weight.detach()
    assert torch.equal((before != after).any(1).nonzero()[:, 0], torch.tensor([2, 5]))
    rows = latents[0].flatten(1).T
    assert all((rows == after[code]).all(1).any() for code in (2, 5))


# Every kind


@torch.no_grad()
def test_codes_have_rows_and_columns_and_draw_a_picture_of_the_first_size(tokenizer):
    codes = tokenizer.encode(pictures(16, 24))
    assert codes.shape == (2, 16 // tokenizer.stride, 24 // tokenizer.stride)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < tokenizer.num_codes
    drawn = tokenizer.decode(codes)
    assert (drawn.shape, drawn.dtype) == ((2, 3, 16, 24), torch.uint8)
    again, quantised = tokenizer(tokenizer.normalise(pictures(16, 24)))
    assert torch.equal(quantised.codes, codes)
    torch.testing.assert_close(tokenizer.from_codes(codes), quantised.latents)
    difference = tokenizer.denormalise(again).int() - drawn.int()
    assert difference.abs().max() <= 1  # the straight-through sum differs from the vector in its last bit


@torch.no_grad()
def test_each_picture_of_a_batch_has_the_codes_that_it_has_alone(tokenizer):
    pixels = pictures(16, 16)
    assert torch.equal(tokenizer.encode(pixels)[1:], tokenizer.encode(pixels[1:]))


def test_every_weight_learns_from_the_picture_and_the_losses(tokenizer):
    tokenizer.train()
    pixels = tokenizer.normalise(pictures(16, 16))
    drawn, quantised = tokenizer(pixels)
    ((drawn - pixels).square().mean() + sum(quantised.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()


def test_a_folder_gives_back_the_same_tokenizer(tokenizer, tmp_path):
    folder = save_image_tokenizer(tokenizer, tmp_path / "tokenizer")
    again = load_image_tokenizer(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] in IMAGE_TOKENIZERS
    assert again.fields() == tokenizer.fields()
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert torch.equal(again.encode(pictures(16, 16)), tokenizer.encode(pictures(16, 16)))
    save_image_tokenizer(tokenizer, folder)  # over the first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer"]


# Refusals


def test_what_is_no_picture_and_no_code_is_refused(tokenizer):
    with pytest.raises(ValueError, match="takes uint8"):
        tokenizer.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"resize or crop to \d+x16"):
        tokenizer.encode(pictures(17, 16))
    with pytest.raises(ValueError, match=r"view\(1"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"allowed are 0 .. {tokenizer.num_codes - 1}"):
        tokenizer.decode(torch.full((1, 2, 2), tokenizer.num_codes))


def test_unknown_fields_name_the_nearest(tokenizer):
    with pytest.raises(ValueError, match="no field"):
        tokenizer.from_fields({**tokenizer.fields(), "levelz": 1})


def test_weights_that_do_not_fit_are_named(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_on.bias"] = weights.pop("decoder.conv_in.bias")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"lacks decoder\.conv_in\.bias .* unexpected decoder\.conv_on\.bias"):
        load_image_tokenizer(tmp_path / "copy")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'llada', which is no image tokenizer"):
        load_image_tokenizer(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not replaced"):
        save_image_tokenizer(build_image_tokenizer("fsq", SMALL["fsq"]), tmp_path / "full")


def test_sizes_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="one number: the bits of a code"):
        build_image_tokenizer("magvit_v2", {"quantize": {"codebook_dim": 12}})
    with pytest.raises(ValueError, match="at least 2 values"):
        build_image_tokenizer("fsq", {"levels": [8, 1]})
    with pytest.raises(ValueError, match="multiple of num_groups=8"):
        build_image_tokenizer("fsq", {"channels": [12]})
