"""What holds for every published family, on tiny random models: no row of a batch knows of the others, and more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import dmllm
from dmllm.checkpoints.example import write_example
from dmllm.cli import main
from dmllm.families import FAMILIES
from dmllm.training.command import main as train

NAMES = list(FAMILIES)
NATIVE = [name for name in NAMES if FAMILIES.load(name).native is not None]
SHARP = 0.15  # of the weights, so that another's rows would be felt


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


PICTURES = [picture(0, (60, 40)), picture(1, (40, 50)), picture(2, (90, 30))]


@pytest.fixture(scope="module", params=NAMES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory) -> Any:
    path = write_example(request.param, tmp_path_factory.mktemp(request.param) / "model")
    pipeline = dmllm.load(str(path), device="cpu")
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in pipeline.model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.empty(weight.shape).normal_(std=SHARP, generator=draws))
    return pipeline


def requests(pipeline: Any) -> tuple[list[list[int]], list[list[Image.Image] | None]]:
    """Four prompts of other lengths; the first with one picture, the last with two, where the model sees any."""
    rows = [torch.randint(1, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 11, 3, 8)]
    if pipeline.tiling is None:
        return rows, [None] * 4
    image = pipeline.special.image
    rows[0] = [7, image, *rows[0]]
    rows[3] = [*rows[3][:2], image, 9, image, *rows[3][2:]]
    return rows, [PICTURES[:1], None, None, PICTURES[1:]]


def padded(rows: list[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask."""
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [
        [0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g) for r, g in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("left", [False, True], ids=["padded on the right", "padded on the left"])
def test_a_row_of_a_batch_is_answered_as_it_is_alone(pipeline, left):
    """Mixed lengths and numbers of pictures: the same tokens and calls, drawn ones too, and the same logits."""
    rows, pictures = requests(pipeline)
    ids, mask = padded(rows, pipeline.special.pad, left=left)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": list(range(0, 320, 9))}  # so that some end early
    if "steps" in pipeline.generation:
        options["steps"] = 4
    seeds = [torch.Generator().manual_seed(number) for number in range(4)]
    together = pipeline.generate(ids, mask, pictures, generator=seeds, **options)
    logits = pipeline.logits(ids, mask, pictures)
    answers = together.sequences[:, ids.shape[1] :]
    assert len({tuple(answer.tolist()) for answer in answers}) == 4, "rows that agree would not tell"
    for number, (row, own) in enumerate(zip(rows, pictures, strict=True)):
        alone = pipeline.generate([row], images=own, generator=number, **options)
        assert torch.equal(alone.sequences[0, len(row) :], answers[number])
        assert int(alone.num_forwards) == int(together.num_forwards[number])
        of_row = logits[number][mask[number].bool()]
        torch.testing.assert_close(of_row, pipeline.logits([row], images=own)[0], atol=2e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("visibility", [None, "prefix", "block:4"])
def test_what_is_kept_where_that_is_exact_changes_no_token(pipeline, visibility):
    """Mixed lengths and numbers of pictures; with the family's own visibility and with others."""
    if hasattr(pipeline.model, "denoise"):
        pytest.skip("transformers' own class keeps what it keeps")
    if pipeline.model.config.backbone.get("time_conditioning"):
        pytest.skip("keys and values change with the time")
    rows, pictures = requests(pipeline)
    ids, mask = padded(rows, pipeline.special.pad, left=False)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": [], "visibility": visibility}
    if "steps" in pipeline.generation:
        options["steps"] = 6
    kept, plain = (
        pipeline.generate(ids, mask, pictures, generator=0, use_cache=use_cache, store_calls=False, **options)
        for use_cache in (None, False)
    )
    assert torch.equal(kept.sequences, plain.sequences)
    assert torch.equal(kept.num_forwards, plain.num_forwards)


def seen_from(pipeline: Any, changed: int, visibility: str) -> list[bool]:
    """Which of twelve positions' logits feel the token at one of them."""
    ids = torch.arange(10, 22)[None]
    other = ids.clone()
    other[0, changed] = 99
    before, after = (pipeline.logits(x, visibility=visibility, **times(pipeline)) for x in (ids, other))
    return ((before - after).abs().amax(-1)[0] > 1e-4).tolist()


def times(pipeline: Any) -> dict[str, Tensor]:
    timed = pipeline.model.config.backbone.get("time_conditioning")
    return {"time": torch.tensor([0.5])} if timed else {}


def test_full_causal_and_block_override_who_sees_whom(pipeline):
    """A token is scored by its own row, or by the one before it, where that has learned to predict the next."""
    if hasattr(pipeline.model, "denoise"):
        with pytest.raises(ValueError, match="visibility= is not for a model that transformers computes"):
            seen_from(pipeline, 6, "causal")
        return
    late = int(pipeline.model.config.shift)
    assert seen_from(pipeline, 6, "full") == [True] * 12
    assert seen_from(pipeline, 6, "causal") == [False] * (6 + late) + [True] * (6 - late)
    assert seen_from(pipeline, 6, "block:4") == [False] * (4 + late) + [True] * (8 - late)


def test_the_command_line_describes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    for name in NAMES:
        assert main(["init", "--family", name, "--out", str(tmp_path / name)]) == 0
        capsys.readouterr()
        assert main(["info", str(tmp_path / name)]) == 0
        text = capsys.readouterr().out
        assert f"{name}: {FAMILIES.load(name).title}" in text
        for line in ("parameters", "vision tower", "tokens per image", "cache", "decoding", "max_new_tokens="):
            assert line in text, (name, line)


def test_pictures_need_no_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    pipeline = dmllm.load(str(write_example("llada_v", tmp_path / "model")), device="cpu")
    assert len(pipeline.chat("What is it?", PICTURES[:1], max_new_tokens=4, eos_token_id=[]).ids) == 4


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """A data set of two conversations, with pictures and without."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("pictures", "text"):
        records = []
        for number in range(2):
            PICTURES[number].save(folder / f"{number}.png")
            start = "<image>\n" if kind == "pictures" else ""
            turns = [("human", f"{start}What is it?"), ("gpt", "A picture, I think.")]
            record: dict[str, Any] = {"id": f"{number}", "conversations": [{"from": f, "value": v} for f, v in turns]}
            records.append(record | ({"image": f"{number}.png"} if start else {}))
        (folder / f"{kind}.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NATIVE])
def test_a_training_step_on_it_moves_it_and_what_is_saved_goes_back_to_published(tmp_path, told, name):
    path = write_example(name, tmp_path / "model")
    pipeline = dmllm.load(str(path), device="cpu")
    sees, causal = pipeline.tiling is not None, pipeline.model.config.visibility == "causal"
    file = told / f"{'pictures' if sees else 'text'}.json"
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"checkpoint": str(path)} | ({"visibility": "full"} if causal else {}),  # it is a start
        "objective": {"name": None},  # the one by which such a model learns
        "data": {"datasets": [{"json_path": str(file), "image_folder": str(told)}]},
        "steps": 1,
        "batch_size": 2,
        "optimiser": {"lr": 0.01},
        "schedule": {"name": "constant", "warmup": 0},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert train([str(tmp_path / "recipe.yaml")]) == 0
    assert main(["convert", str(tmp_path / "run" / "model"), str(tmp_path / "back"), "--to", "published"]) == 0
    before, after = (dmllm.load(str(p), device="cpu").model.state_dict() for p in (path, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_model_that_transformers_computes_is_not_trained(tmp_path, told, capsys):
    path = write_example("diffusion_gemma", tmp_path / "model")
    recipe = {"output_dir": str(tmp_path / "run"), "model": {"checkpoint": str(path)}, "steps": 1, "batch_size": 2}
    recipe |= {"data": {"datasets": [{"json_path": str(told / "text.json"), "image_folder": str(told)}]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert train([str(tmp_path / "recipe.yaml")]) != 0
    assert "is run here, but not trained" in capsys.readouterr().err
