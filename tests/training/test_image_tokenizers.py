"""Training image tokenizers: runs that learn, stop and go on; what is measured; what else they may be taught by."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmllm.checkpoints.image_tokenizer import load_image_tokenizer
from dmllm.cli import main
from dmllm.config import load_config
from dmllm.models.image_tokenizers import ImageTokenizer, Quantised, build_image_tokenizer
from dmllm.training.config import ScheduleConfig
from dmllm.training.image_tokenizers import ImageTokenizerConfig, loop, measure, train_image_tokenizer
from dmllm.training.image_tokenizers.config import LossesConfig, PicturesConfig, TokenizerSpec
from dmllm.training.image_tokenizers.losses import Discriminator, Perceptual
from dmllm.training.image_tokenizers.pictures import Examples, find_pictures
from dmllm.training.image_tokenizers.quality import draw_reconstructions, psnr, ssim
from dmllm.training.state import newest_checkpoint

SMALL = TokenizerSpec(options={"levels": [4, 4, 4], "channels": [16], "depth": 1, "num_groups": 4})
VQ = TokenizerSpec(
    name="vq",
    options={
        "block_out_channels": [8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "num_vq_embeddings": 16,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
)


@pytest.fixture(scope="session")
def patches(tmp_path_factory) -> Path:
    """40 pictures of 16 x 16 pixels: four quarters of one colour each."""
    folder = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    for index in range(40):
        colours = rng.choice([0, 128, 255], (2, 2, 3)).astype(np.uint8)
        where = folder / f"part{index % 2}"
        where.mkdir(exist_ok=True)
        Image.fromarray(colours.repeat(8, 0).repeat(8, 1)).save(where / f"{index:02d}.png")
    return folder


@pytest.fixture
def recipe(patches, tmp_path):
    def make(name: str, **settings: Any) -> ImageTokenizerConfig:
        data = PicturesConfig(path=str(patches), size=16, held_out=4, augment=True)
        common: dict[str, Any] = {"tokenizer": SMALL, "steps": 6, "batch_size": 4, "lr": 3e-3, "log_every": 1}
        return ImageTokenizerConfig(output_dir=str(tmp_path / name), data=data, **{**common, **settings})

    return make


def state(config: ImageTokenizerConfig) -> dict[str, Tensor]:
    newest = newest_checkpoint(Path(config.output_dir))
    assert newest is not None
    return load_file(newest / "state.safetensors")


# Runs


def test_a_short_run_learns_to_draw_what_it_saw_and_leaves_a_tokenizer(recipe):
    config = recipe("run", steps=150, batch_size=8, measure_every=150, log_every=50)
    torch.manual_seed(0)
    _, held_out = find_pictures(config.data, Path())
    pixels = torch.stack([Examples([file], replace(config.data, augment=False), 0)[0] for file in held_out])
    before = measure(build_image_tokenizer(SMALL.name, SMALL.options).eval(), [pixels])
    trained = train_image_tokenizer(config)
    assert trained.quality is not None
    assert trained.quality.psnr > before.psnr + 8
    assert trained.quality.num_pictures == 4
    assert trained.model is not None
    assert measure(load_image_tokenizer(trained.model), [pixels]) == trained.quality
    written = json.loads((trained.folder / "quality.json").read_text())
    assert written["step"] == 150
    assert written["psnr"] == trained.quality.psnr
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [50, 100, 150]
    drawn = Image.open(trained.folder / "reconstructions.png")
    assert drawn.size == (4 * 128, 2 * 128)


def test_a_stopped_run_ends_with_the_weights_of_one_never_stopped(recipe, monkeypatch, tmp_path):
    losses = LossesConfig(adversarial=0.1, adversarial_start=2, discriminator_channels=8, discriminator_layers=2)
    config = recipe("stopped", losses=losses, ema=0.9, save_every=100)
    batches = loop.training_batches

    def interrupted(*arguments: Any, **options: Any):
        for number, batch in enumerate(batches(*arguments, **options)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "training_batches", interrupted)
    stopped = train_image_tokenizer(config)
    assert (stopped.model, stopped.step) == (None, 4)
    monkeypatch.undo()
    assert train_image_tokenizer(config).step == 6
    whole = recipe("whole", losses=losses, ema=0.9, save_every=100)
    train_image_tokenizer(whole)
    left, right = state(config), state(whole)
    assert left.keys() == right.keys()
    assert any(name.startswith("discriminator/") for name in left)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_complete_is_measured_again_and_left_as_it_is(recipe):
    config = recipe("complete")
    first = train_image_tokenizer(config)
    weights = load_file(first.model / "model.safetensors")
    again = train_image_tokenizer(config)
    assert again.quality == first.quality
    assert all(torch.equal(t, weights[n]) for n, t in load_file(again.model / "model.safetensors").items())


def test_the_average_of_the_weights_is_what_is_saved(recipe):
    config = recipe("averaged", ema=0.9)
    trained = train_image_tokenizer(config)
    held, saved = state(config), load_file(trained.model / "model.safetensors")
    name = "decoder.0.weight"
    assert torch.equal(saved[name], held[f"ema/tokenizer.{name}"])
    assert not torch.equal(saved[name], held[f"model/tokenizer.{name}"])


def test_a_folder_of_another_run_is_refused(recipe):
    config = recipe("one")
    train_image_tokenizer(config)
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.003 there, 0.1 now\)"):
        train_image_tokenizer(replace(config, lr=0.1))


def test_a_run_may_go_on_from_a_tokenizer(recipe):
    first = train_image_tokenizer(recipe("first"))
    second = recipe("second", tokenizer=TokenizerSpec(start_from=str(first.model)), lr=0.0, ema=0.0)
    again = train_image_tokenizer(second)
    saved = load_file(again.model / "model.safetensors")
    assert all(
        torch.equal(tensor, saved[name]) for name, tensor in load_file(first.model / "model.safetensors").items()
    )


def test_table_rows_that_no_picture_chooses_are_moved_to_where_they_are_chosen(recipe):
    pytest.importorskip("diffusers")
    settings: dict[str, Any] = {"tokenizer": VQ, "steps": 40, "ema": 0.0, "lr": 1e-3}
    settings |= {"schedule": ScheduleConfig(name="constant", warmup=0), "log_every": 40}
    left = train_image_tokenizer(recipe("left", **settings)).quality
    moved = train_image_tokenizer(recipe("moved", revive_every=10, **settings)).quality
    assert moved.codes_used > left.codes_used
    with pytest.raises(ValueError, match="no table to revive rows of"):
        train_image_tokenizer(recipe("fsq", revive_every=10))


def test_the_command_makes_a_built_in_data_set_and_trains_on_it(tmp_path, capsys):
    words = f"tokenizer train-image --output_dir={tmp_path}/run --data.path=scenes --data.num=8 --data.held_out=4 "
    words += "--data.size=32 --steps=2 --batch_size=2 --tokenizer.options.channels=[8,8] --tokenizer.options.depth=0"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert "PSNR" in said
    assert "in 4 pictures of 64 codes together" in said
    tokenizer = load_image_tokenizer(tmp_path / "run" / "model")
    assert tokenizer.config.channels == (8, 8)


# Pictures


def test_every_picture_is_seen_once_an_epoch_in_an_order_of_its_own(patches):
    files, held_out = find_pictures(PicturesConfig(path=str(patches), size=16, held_out=4), Path())
    assert len(files) == 36
    assert len(held_out) == 4
    assert not set(files) & set(held_out)
    examples = Examples(files, PicturesConfig(path=str(patches), size=16), seed=0)
    first, second = ([examples._place(n) for n in range(e * 36, e * 36 + 36)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(36))
    assert first != second


def test_an_example_follows_from_its_number_alone(patches):
    config = PicturesConfig(path=str(patches), size=8, augment=True)
    files, _ = find_pictures(config, Path())
    forward, backward = Examples(files, config, 3), Examples(files, config, 3)
    late = backward[70]
    assert torch.equal(torch.stack([forward[n] for n in (1, 2, 70)]), torch.stack([backward[1], backward[2], late]))
    assert not torch.equal(Examples(files, config, 4)[70], late)


def test_a_picture_that_cannot_be_read_gives_way_to_another(patches, tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(b"nothing")
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "b.png")
    examples = Examples(sorted(tmp_path.glob("*.png")), PicturesConfig(path="x", size=16), 0)
    assert all((examples[n] == 9).all() for n in range(4))
    assert "a.png" in caplog.text


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds 0 pictures"):
        find_pictures(PicturesConfig(path=str(tmp_path)), tmp_path)
    with pytest.raises(ValueError, match=r"neither a folder.* nor a built-in data set: scenes"):
        find_pictures(PicturesConfig(path=str(tmp_path / "none")), tmp_path)


# Quality


class Brightness(ImageTokenizer):
    """Each pixel is a code: bright or dark, of four that there would be."""

    num_codes, stride, pixel_range = 4, 1, (0.0, 1.0)

    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(1))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Brightness:
        return cls()

    def fields(self) -> dict[str, Any]:
        return {}

    def to_latents(self, pixels: Tensor) -> Tensor:
        return pixels[:, :1]

    def quantise(self, latents: Tensor) -> Quantised:
        codes = (latents[:, 0] > 0.5).long()
        return Quantised(latents=self.from_codes(codes), codes=codes)

    def from_codes(self, codes: Tensor) -> Tensor:
        return codes[:, None].float()

    def to_pixels(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)


def test_quality_of_a_tokenizer_that_is_known_exactly():
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    pixels[:, :, :8] = 255  # half of the codes are 1; both pictures come back as they are
    found = measure(Brightness(), [pixels[:1], pixels[1:]])
    assert (found.psnr, found.ssim, found.num_pictures, found.num_counted) == (100.0, pytest.approx(1.0), 2, 512)
    assert found.codes_used == 0.5
    assert found.perplexity == pytest.approx(2.0)
    pixels[:, :, :8] = 254
    assert measure(Brightness(), [pixels]).psnr == pytest.approx(10 * np.log10(2 * 255**2))
    assert "50.0% of 4 codes used (perplexity 2)" in found.line()


def test_psnr_and_ssim_are_those_of_torchmetrics():
    """Recorded with torchmetrics 1.9; its SSIM at the places where the whole window is in the picture."""
    draws = torch.Generator().manual_seed(0)
    wanted = torch.randint(0, 256, (2, 3, 20, 24), generator=draws, dtype=torch.uint8)
    noise = torch.randint(-20, 21, (2, 3, 20, 24), generator=draws)
    found = (wanted.int() + noise).clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(psnr(found, wanted), torch.tensor([26.8339, 26.7261]).double(), rtol=0, atol=6e-5)
    torch.testing.assert_close(ssim(found, wanted), torch.tensor([0.9865, 0.9869]).double(), rtol=0, atol=6e-5)
    dark, light = (torch.full((1, 3, 12, 12), value, dtype=torch.uint8) for value in (50, 100))
    constant = (2 * 50 * 100 + 2.55**2) / (50**2 + 100**2 + 2.55**2)
    assert float(ssim(dark, light)) == pytest.approx(constant)
    with pytest.raises(ValueError, match="windows of 11 pixels"):
        ssim(dark[..., :8], light[..., :8])


def test_reconstructions_stand_below_their_pictures():
    pixels = torch.randint(0, 2, (3, 1, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 255
    sheet = np.asarray(draw_reconstructions(Brightness(), pixels.expand(-1, 3, -1, -1)))
    assert sheet.shape == (256, 384, 3)
    assert (sheet[:128] == sheet[128:]).all()
    assert (sheet[::2, ::2] == sheet[1::2, 1::2]).all()


# What else teaches


def test_the_discriminator_learns_to_tell_and_the_tokenizer_does_not_move_it(recipe):
    torch.manual_seed(0)
    judge = Discriminator(8, 2)
    real, drawn = torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32).round()
    optimiser = torch.optim.Adam(judge.parameters(), lr=2e-3)
    before = float(judge.loss(real, drawn).detach())
    for _ in range(30):
        optimiser.zero_grad()
        judge.loss(real, drawn).backward()
        optimiser.step()
    assert float(judge.loss(real, drawn).detach()) < before / 2
    losses = LossesConfig(adversarial=1.0, discriminator_channels=8, discriminator_layers=1, discriminator_lr=0.0)
    config = recipe("judged", losses=losses, steps=3)
    parts, _ = loop.assemble(config)
    assert parts.discriminator is not None
    weights = [p.detach().clone() for p in parts.discriminator.parameters()]
    found = loop.training_step(parts, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 0)
    assert {"adversarial", "discriminator"} <= found.keys()
    assert all(torch.equal(a, b) for a, b in zip(weights, parts.discriminator.parameters(), strict=True))


def test_lpips_takes_torchvisions_weights(tmp_path):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    weights = theirs.state_dict()
    vgg = {f"features.{name.split('.', 2)[2]}": t for name, t in weights.items() if name.startswith("net.")}
    save_file(vgg, tmp_path / "vgg16.safetensors")
    ours = Perceptual(str(tmp_path / "vgg16.safetensors"))
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    y.requires_grad_()
    distance = ours(x, y)
    torch.testing.assert_close(distance, theirs(x, y).mean())
    distance.backward()
    assert y.grad is not None
    assert not any(p.requires_grad for p in ours.parameters())
    torch.save({"features.0.weight": vgg["features.0.weight"]}, tmp_path / "little.pth")
    with pytest.raises(ValueError, match="neither torchvision's VGG-16 nor LPIPS"):
        Perceptual(str(tmp_path / "little.pth"))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Perceptual(str(tmp_path / "none.pth"))


def test_losses_that_lack_something_are_refused():
    with pytest.raises(ValueError, match="perceptual_weights=vgg16"):
        LossesConfig(perceptual=1.0)
    with pytest.raises(ValueError, match="nothing says what the picture is"):
        LossesConfig(l2=0)
    with pytest.raises(ValueError, match=r"did you mean losses\.l2"):
        load_config(ImageTokenizerConfig, None, ["--losses.l3=1"])
