"""Several processes: data-parallel through torchrun, and sharded with FSDP2's own wrapping."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmllm.config import save_config
from dmllm.training import train

ROOT = Path(__file__).parents[2]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_two_processes_equal_one(recipe, tmp_path):
    """Also where a process has only text, so that its vision encoder sees nothing of its own."""
    config = recipe("two", text_only_rows=True, micro_batch_size=1, ema=0.9)
    save_config(config, tmp_path / "recipe.yaml")
    done = torchrun("train.py", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    one = train(recipe("one", text_only_rows=True, ema=0.9))
    a, b = (load_file(Path(folder) / "model" / "model.safetensors") for folder in (config.output_dir, one.folder))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["masked", "continuous"])
def test_sharded_equals_unsharded(tmp_path, objective):
    """Weights, gathered model, checkpoints and their resumption, wrapped by the code that accelerate runs on GPUs."""
    done = torchrun(str(Path(__file__).parent / "sharded.py"), str(tmp_path), objective)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sharded: 2 blocks" in done.stdout
