"""A recipe of the smallest kind: a real LLaVA data set of 12 pictures, a tokenizer of bytes, a model of width 32."""

import json

import pytest
from accelerate import Accelerator
from PIL import Image

from dmllm.checkpoints.compose import ModelSpec
from dmllm.checkpoints.tokenizer import train_tokenizer
from dmllm.data.mixture import DataConfig
from dmllm.data.sources import DataSource
from dmllm.models.vision import VisionConfig
from dmllm.training.config import OptimiserConfig, TrainConfig, ValidationConfig

COLOURS = ("red", "green", "blue", "black")
VISION = VisionConfig(
    name="timm:vit_tiny_patch16_224",
    pretrained=False,
    image_size=(16, 16),
    options={"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
)


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """The folder with data.json, text.json, images/ and tokenizer/."""
    folder = tmp_path_factory.mktemp("ground")
    (folder / "images").mkdir()
    rows = []
    for number in range(12):
        colour = COLOURS[number % 4]
        Image.new("RGB", (16, 16), colour).save(folder / "images" / f"{number}.png")
        said = [("human", "<image>\ncolour?"), ("gpt", colour), ("human", "number?"), ("gpt", str(number))]
        turns = [{"from": who, "value": what} for who, what in said]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    turns = [{"from": "human", "value": "say it"}, {"from": "gpt", "value": "it is so"}]
    (folder / "text.json").write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(4)]))
    train_tokenizer([folder / "data.json"], vocab_size=300, out=folder / "tokenizer")
    return folder


@pytest.fixture
def recipe(ground, tmp_path):
    """A function of overrides that returns a TrainConfig writing into this test's folder."""

    def build(name="run", *, text_only_rows=False, with_vision=True, **overrides):
        entries = [DataSource(json_path=str(ground / "data.json"), image_folder=str(ground / "images"))]
        if text_only_rows:
            entries.append(DataSource(json_path=str(ground / "text.json")))
        data = DataConfig(datasets=tuple(entries))
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = ModelSpec(backbone=shape, vision=VISION if with_vision else None, tokenizer=str(ground / "tokenizer"))
        defaults = {
            "output_dir": str(tmp_path / name),
            "model": model,
            "data": data,
            "validation": ValidationConfig(data=data, num_examples=6, every=4),
            "steps": 8,
            "batch_size": 4,
            "optimiser": OptimiserConfig(lr=3e-3),
            "log_every": 2,
            "save_every": 4,
        }
        return TrainConfig(**{**defaults, **overrides})

    return build


@pytest.fixture
def accelerator():
    """One process on the CPU."""
    return Accelerator(cpu=True)
