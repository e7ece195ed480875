"""A vision encoder gives exactly its library's patch features from uint8 pixels; resolved, it needs no files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
)

from dmllm.config import to_dict
from dmllm.models.vision import VisionConfig, VisionEncoder, build_vision, resolve_vision

TIMM = {"img_size": [32, 32], "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
OPEN_CLIP = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def pictures(encoder: VisionEncoder, tiles: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (tiles, 3, *encoder.image_size), dtype=torch.uint8, generator=generator)


def build(name: str, *, load_weights: bool = False, **fields) -> VisionEncoder:
    torch.manual_seed(0)
    return build_vision(VisionConfig(name=name, **fields), load_weights=load_weights).eval()


def features(encoder: VisionEncoder) -> Tensor:
    """Of the test pictures, as in inference: with gradients timm's attention takes its other, unfused form on a CPU."""
    with torch.no_grad():
        return encoder(pictures(encoder))


def saved(path, kind: str):
    """A tiny tower in a folder: the library's model, its vision tower and the folder."""
    torch.manual_seed(0)
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SHAPE | {"image_size": 36}))
    elif kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SHAPE | {"image_size": 32}, projection_dim=16))
    elif kind == "siglip2":
        model = Siglip2VisionModel(Siglip2VisionConfig(**SHAPE, num_patches=16))
    else:
        model = Dinov2Model(Dinov2Config(**{k: v for k, v in SHAPE.items() if k != "intermediate_size"}, image_size=32))
    model.eval().save_pretrained(path)
    prepared = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}
    (path / "preprocessor_config.json").write_text(json.dumps(prepared))
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_timm_features_are_the_librarys_without_prefix_tokens(layer):
    encoder = build("timm:vit_tiny_patch16_224", layer=layer, options=TIMM)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM).eval()
    x = encoder.normalise(pictures(encoder))
    if layer == -1:
        expected = model.forward_features(x)[:, 1:]
    else:
        expected = model.forward_intermediates(x, intermediates_only=True)[layer].flatten(2).transpose(1, 2)
    assert (encoder.grid, encoder.hidden_size) == ((4, 4), 24)
    torch.testing.assert_close(features(encoder), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "layer", "grid"), [("resnet18", -1, (2, 3)), ("resnet18", -2, (4, 6))])
def test_a_convolutional_tower_gives_its_map_row_by_row(name, layer, grid):
    encoder = build(f"timm:{name}", layer=layer, image_size=(64, 96))
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    level = model.forward_intermediates(encoder.normalise(pictures(encoder)), intermediates_only=True)[layer]
    assert encoder.grid == grid
    torch.testing.assert_close(encoder(pictures(encoder)), level.flatten(2).transpose(1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [-1, -2])
def test_open_clip_features_are_the_librarys(layer):
    encoder = build("open_clip:ViT-B-32", layer=layer, options=OPEN_CLIP)
    torch.manual_seed(0)
    tower = open_clip.model._build_vision_tower(512, OPEN_CLIP | {"output_tokens": True}).eval()
    x = encoder.normalise(pictures(encoder))
    if layer == -1:
        expected = tower(x)[1]
    else:
        expected = tower.forward_intermediates(x, output_fmt="NLC")["image_intermediates"][layer]
    torch.testing.assert_close(encoder(pictures(encoder)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("kind", ["siglip", "clip", "siglip2", "dinov2"])
def test_hugging_face_features_are_the_librarys_hidden_states(tmp_path, kind, layer):
    tower = saved(tmp_path, kind)
    encoder = build(f"hf:{tmp_path}", layer=layer, load_weights=True)
    x = encoder.normalise(pictures(encoder))
    arguments = {"pixel_values": x}
    if kind == "siglip2":  # transformers' own order: image_processing_siglip2.convert_image_to_patches
        patches = x.permute(0, 2, 3, 1).reshape(2, 4, 8, 4, 8, 3).transpose(2, 3).reshape(2, 16, -1)
        arguments = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(2, 16),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        }
    output = tower(**arguments, output_hidden_states=True)
    expected = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    prefix = kind in ("clip", "dinov2")
    torch.testing.assert_close(encoder(pictures(encoder)), expected[:, prefix:], rtol=0, atol=0)
    assert (encoder.mean, encoder.interpolation) == ((0.1, 0.2, 0.3), "bilinear")


@pytest.mark.parametrize("kind", ["siglip", "clip", "siglip2"])
def test_a_resolved_encoder_needs_no_files_and_has_the_same_weights_by_name(tmp_path, kind):
    saved(tmp_path / "tower", kind)
    trained = build(f"hf:{tmp_path / 'tower'}", layer=-2, load_weights=True)
    resolved = resolve_vision(VisionConfig(name=f"hf:{tmp_path / 'tower'}", layer=-2))
    (tmp_path / "tower").rename(tmp_path / "gone")
    read_back = VisionConfig(**json.loads(json.dumps(to_dict(resolved))))
    assert read_back == resolved == resolve_vision(resolved)
    rebuilt = build_vision(read_back, load_weights=False).eval()
    rebuilt.load_state_dict(trained.state_dict())
    assert torch.equal(rebuilt(pictures(rebuilt)), trained(pictures(trained)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:vit_tiny_patch16_224", TIMM),
        ("timm:vit_base_patch16_siglip_224", TIMM),
        ("open_clip:ViT-B-32", OPEN_CLIP),
    ],
)
@pytest.mark.parametrize("layer", [-1, -2])
def test_every_parameter_has_a_gradient_and_checkpointing_changes_none(name, options, layer):
    encoder = build(name, layer=layer, options=options).train()
    resolved = resolve_vision(VisionConfig(name=name, layer=layer, options=options))
    assert VisionConfig(**json.loads(json.dumps(to_dict(resolved)))) == resolved == resolve_vision(resolved)
    gradients = []
    for enabled in (False, True):
        encoder.zero_grad()
        encoder.set_gradient_checkpointing(enabled)
        encoder(pictures(encoder)).square().mean().backward()
        assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["siglip", "clip", "siglip2"])
def test_a_hugging_face_tower_learns_with_every_parameter(tmp_path, kind):
    saved(tmp_path, kind)
    encoder = build(f"hf:{tmp_path}", layer=-2, load_weights=True).train()
    encoder.set_gradient_checkpointing(True)
    encoder(pictures(encoder)).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_normalisation_is_the_encoders_own_and_happens_inside():
    encoder = build("timm:resnet18", image_size=64)
    black, white = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(encoder.normalise(black)[0, :, 0, 0], -mean / std)
    torch.testing.assert_close(encoder.normalise(white)[0, :, 0, 0], (1 - mean) / std)
    assert encoder.to(torch.bfloat16)(white).dtype == torch.bfloat16


def test_another_size_than_the_towers_own_moves_its_positions_along(tmp_path):
    saved(tmp_path, "siglip")
    encoder = build(f"hf:{tmp_path}", image_size=(48, 64), load_weights=True)
    assert encoder.grid == (6, 8)
    assert encoder(pictures(encoder)).shape == (2, 48, 32)


def test_a_side_that_the_patch_does_not_divide_loses_its_rest(tmp_path):
    saved(tmp_path, "siglip")  # 36 pixels, patches of 8
    assert build(f"hf:{tmp_path}").grid == (4, 4)


def test_pixels_of_the_wrong_type_or_size_are_refused():
    encoder = build("timm:vit_tiny_patch16_224", options=TIMM)
    for wrong in (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 40, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"takes uint8 \[T, 3, 32, 32\]"):
            encoder(wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "vit_tiny_patch16_224"}, "write 'timm:vit_tiny_patch16_224'"),
        ({"name": "tim:resnet18"}, "did you mean timm"),
        ({"name": "timm:resnet1"}, "resnet18|resnet10"),
        ({"name": "timm:resnet18.nothing"}, "a1_in1k"),
        ({"name": "timm:vit_tiny_patch16_224", "options": {"dept": 2}}, "dept"),
        ({"name": "timm:vit_tiny_patch16_224", "options": TIMM, "layer": -4}, "use -3 .. -1"),
        ({"name": "timm:vit_tiny_patch16_224", "options": TIMM, "image_size": 64}, "differ"),
        ({"name": "timm:resnet18", "layer": 0}, "must be negative"),
        ({"name": "open_clip:ViT-B-33"}, "ViT-B-32"),
        ({"name": "open_clip:ViT-B-32/laion"}, "laion"),
        ({"name": "open_clip:ViT-B-32", "options": {"layer": 2}}, "did you mean layers"),
        ({"name": "hf:x", "options": {"model_type": "siglip_vision"}}, "did you mean siglip_vision_model"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_the_nearest_ones(fields, message):
    with pytest.raises(ValueError, match=message):
        build_vision(VisionConfig(**fields), load_weights=False)


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("timm:vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("hf:google/siglip2-so400m-patch14-384", "google/siglip2-so400m-patch14-384"),
    ],
)
def test_weights_that_are_not_to_be_had_are_named_with_the_command_that_gets_them(
    name, repository, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"Wanted: .*hf download {repository}"):
        build_vision(VisionConfig(name=name), load_weights=True)


def test_weights_in_the_cache_are_used_without_a_network(monkeypatch, tmp_path):
    torch.manual_seed(7)
    published = timm.create_model("test_vit.r160_in1k")
    snapshot = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    timm.models.save_for_hf(published, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = build("timm:test_vit.r160_in1k", load_weights=True)
    expected = published.eval().forward_features(encoder.normalise(pictures(encoder)))[:, published.num_prefix_tokens :]
    torch.testing.assert_close(features(encoder), expected, rtol=0, atol=0)


def test_a_library_is_imported_when_it_is_used_and_not_before():
    code = """
import sys, dmllm.models.vision
assert not {"timm", "open_clip", "torchvision"} & set(sys.modules)
sys.modules["timm"] = None
try:
    dmllm.models.vision.build_vision(dmllm.models.vision.VisionConfig(name="timm:resnet18"), load_weights=False)
except ImportError as error:
    assert "pip install timm torchvision" in str(error), error
else:
    raise SystemExit("built without timm")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VisionConfig(name="timm:resnet18").layer = -2
