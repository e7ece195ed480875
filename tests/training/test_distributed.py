"""Splitting a step, global counts, and refusing processes that are not what was asked for."""

import pytest
import torch

from dmllm.training.distributed import build_accelerator, global_counts, split_step, to_device, with_blank_image
from dmllm.types import Batch


@pytest.mark.parametrize(
    ("given", "expected"), [((64, None, 1), (64, 1)), ((64, 8, 2), (8, 4)), ((6, None, 3), (2, 1))]
)
def test_a_step_is_split_evenly(given, expected):
    assert split_step(*given) == expected


def test_a_step_that_cannot_be_split_names_sizes_that_work():
    with pytest.raises(ValueError, match=r"--batch_size=60 or 72, or --micro_batch_size=4 or 8 or 16 or 32"):
        split_step(64, 6, 2)
    with pytest.raises(ValueError, match=r"--batch_size=3 or 6"):
        split_step(5, None, 3)


def test_counts_are_summed_and_nothing_is_divided_by_zero(accelerator):
    counts = [{"a": torch.tensor(2.0), "b": torch.tensor(0.0)}, {"a": torch.tensor(3.0), "b": torch.tensor(0.0)}]
    total = global_counts(accelerator, counts)
    assert total["a"] == 5
    assert torch.tensor(0.0) / total["b"] == 0


def test_several_processes_that_accelerate_would_run_as_one_are_refused(monkeypatch):
    monkeypatch.setattr("dmllm.training.distributed.environment", {"WORLD_SIZE": "2"}.get)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        build_accelerator("fp32", trackers=[], folder="unused")


def test_fsdp_that_accelerate_would_ignore_is_refused(monkeypatch):
    monkeypatch.setattr("dmllm.training.distributed.environment", {"ACCELERATE_USE_FSDP": "true"}.get)
    with pytest.raises(ValueError, match=r"accelerate_fsdp2\.yaml"):
        build_accelerator("fp32", trackers=[], folder="unused")


def test_a_blank_image_joins_text_only_batches_and_no_others():
    rows = torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(input_ids=rows, labels=rows, image_slots=rows - 1, documents=rows, positions=rows)
    assert with_blank_image(batch, (4, 6)).pixel_values.shape == (1, 3, 4, 6)
    with_image = with_blank_image(batch, (4, 6))
    assert with_blank_image(with_image, (4, 6)) is with_image


def test_everything_in_a_dataclass_is_moved():
    rows = torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(input_ids=rows, labels=rows, image_slots=rows, documents=rows, positions=rows)
    assert to_device(batch, torch.device("meta")).labels.device.type == "meta"
