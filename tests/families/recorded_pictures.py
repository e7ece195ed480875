"""Checkpoints with pictures, recorded from the authors' code: what came out at every stage from pixels to logits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dmllm.checkpoints.published import write_published
from dmllm.data.images import cut_tiles, load_image
from dmllm.encoded import EncodedImages
from dmllm.pipeline import load
from dmllm.tiling import plan
from dmllm.types import PADDING

GOLDEN = Path(__file__).parent.parent / "golden"


class Recorded:
    """One family's folder, which is met with one thread or two (`nn.gelu`); tests take the number that the recording
    had not. Three or more multiply small matrices otherwise, which these sharp models make 1e-3 of; against exact
    arithmetic (float64) the recordings themselves are off by up to 3.6e-3."""

    def __init__(self, family: str, threads: int):
        self.folder, self.threads = GOLDEN / family, threads
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.cases: dict[str, Any] = json.loads((self.folder / "cases.json").read_text())
        self.weights = load_file(self.folder / "model.safetensors")
        self.expected = load_file(self.folder / "expected.safetensors")
        self._pipes: dict[str, Any] = {}

    def pipe(self, **config: Any) -> Any:
        """The checkpoint with these fields over its config.json, and the recorded mask token."""
        key = json.dumps(config, sort_keys=True)
        if key not in self._pipes:
            mask = {"mask_token_id": self.cases["special_ids"]["mask"]}
            self._pipes[key] = load(str(self.folder), device="cpu", config=mask | config)
        return self._pipes[key]

    def pipe_of(self, case: dict[str, Any]) -> Any:
        """The checkpoint cutting pictures as a case did."""
        return self.pipe(image_aspect_ratio=case["image_aspect_ratio"])

    def images(self, case: dict[str, Any]) -> list[str]:
        return [str(self.folder / f"image_{name}.png") for name in case["images"]]

    def distance(self, name: str, found: Tensor) -> float:
        """The largest difference to what was recorded: a whole tensor, or some of its rows."""
        if name in self.expected:
            return float((found - self.expected[name]).abs().max())
        rows, index = self.expected[f"{name}@rows"], self.expected[f"{name}@idx"]
        dim, *shape = self.expected[f"{name}@stat"][2:].long().tolist()
        assert list(found.shape) == shape, (name, found.shape, shape)
        return float((found.index_select(dim, index) - rows).abs().max())

    def tiles(self, pipe: Any, case: dict[str, Any]) -> Tensor:
        """All tiles of a case's pictures, in order: uint8 [T, 3, H, W]."""
        cut = []
        for path in self.images(case):
            image = load_image(path)
            cut.append(cut_tiles(image, plan(image.width, image.height, pipe.tiling), pipe.tiling))
        return torch.cat(cut)

    @torch.no_grad()
    def stream(self, pipe: Any, case: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The stream [1, L, D] that ids and pictures become, and its logits [1, L, V]."""
        _, asked = pipe._asked(torch.tensor([case["input_ids"]]), None, self.images(case))
        batch = pipe._collate([asked[0].example])
        stream = pipe.model.embed(batch.input_ids, batch.image_slots, EncodedImages(0)(pipe.model, batch))
        assert not bool((batch.documents == PADDING).any())
        return stream, pipe.model(inputs_embeds=stream).logits


def digests(tiles: Tensor) -> list[str]:
    """The recorded fingerprint of each tile."""
    return [hashlib.sha256(tile.numpy().tobytes()).hexdigest() for tile in tiles]


def assert_written_back(pipe: Any, recorded: Recorded, out: Path) -> None:
    """Loaded and written, a checkpoint is the same: names, bits, both configurations."""
    written = load_file(write_published(pipe.model, out) / "model.safetensors")
    assert set(written) == set(recorded.weights)
    assert all(torch.equal(written[name], tensor) for name, tensor in recorded.weights.items())
    for name in ("config.json", "vision_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((recorded.folder / name).read_text()), name


@pytest.fixture
def threads(request: pytest.FixtureRequest):
    """As many threads as the recording had not."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
