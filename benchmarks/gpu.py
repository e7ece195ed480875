"""Decoding on a GPU at the shape of LLaDA 8B: milliseconds a cached call and a request, against what must be read.

Weights are random and made on the device, in bfloat16. A call's time is the difference between two requests that differ
in their number of calls alone, so that neither the prompt nor what is done once is in it. The limit is the weights and
the keys and values once through the memory, at the rate of a sum, or the multiplications at the rate of a square
product, whichever is longer.

    python -m benchmarks.gpu [--layers 32] [--prompts 793 3709] [--batches 1 8] [--blocks 32] [--out FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import machine
from benchmarks.output import conclude, tell
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.pipeline import Pipeline

TOKENS, BLOCK = 128, 32
FEW, MANY = 32, 128  # calls for an answer


def ways(block: int) -> dict[str, dict[str, Any]]:
    """What is kept from call to call, by name."""
    return {
        "block-causal": {"visibility": f"block:{block}", "block_length": block},
        "dual cache": {"visibility": "full", "cache": "dual", "block_length": block},
        "prompt once": {"visibility": "prefix", "block_length": block},
    }


def build(
    layers: int, width: int, inner: int, heads: int, vocabulary: int, device: str, attention: str = "auto"
) -> Pipeline:
    """A pipeline with random weights."""
    config = DmllmConfig(
        backbone={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "attention": attention,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        },
        mask_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 2,
        pad_token_id=vocabulary - 3,
        visibility="full",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = MultimodalModel(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02)
    return Pipeline(model.requires_grad_(False), None, {"eos_token_id": [], "block_length": BLOCK}, prompt_room=0)


def seconds(work: Callable[[], Any], device: str, times: int = 3) -> float:
    """The least of several runs."""
    taken = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def rates(device: str, size: int) -> tuple[float, float]:
    """Bytes read and operations a second: in a sum of 16 size^2 numbers, in a product of two squares of `size`."""
    read = torch.zeros(16 * size * size, device=device)
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    by_sum = seconds(lambda: [read.sum() for _ in range(8)], device)
    by_product = seconds(lambda: [square @ square for _ in range(8)], device)
    return 8 * read.nbytes / by_sum, 8 * 2 * size**3 / by_product


def measure(pipeline: Pipeline, prompt: int, batch: int, way: dict[str, Any], device: str) -> dict[str, Any]:
    """One row of the table, times in milliseconds."""
    vocabulary = pipeline.model.backbone.config.vocab_size
    ids = torch.randint(0, vocabulary - 10, (batch, prompt), generator=torch.Generator().manual_seed(0))
    calls: dict[int, int] = {}

    def run(steps: int) -> None:
        out = pipeline.generate(ids, max_new_tokens=TOKENS, steps=steps, **way)
        calls[steps] = int(out.num_forwards.max())

    run(FEW)
    few, many = (seconds(lambda steps=steps: run(steps), device, times=2) for steps in (FEW, MANY))
    return {
        "call": 1e3 * (many - few) / (calls[MANY] - calls[FEW]),
        "request": 1e3 * few,
        "tokens_per_second": batch * TOKENS / few,
    }


def limit(pipeline: Pipeline, prompt: int, batch: int, fed: int, reading: float, multiplying: float) -> float:
    """Milliseconds that a call on `fed` rows of each request takes at least."""
    shape, model = pipeline.model.backbone.config, pipeline.model
    weights = sum(w.numel() for name, w in model.named_parameters() if "embed_tokens" not in name)
    kept = 2 * shape.num_hidden_layers * shape.hidden_size * batch * (prompt + TOKENS)
    return 1e3 * max(2 * (weights + kept) / reading, 2 * weights * batch * fed / multiplying)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_all(given: argparse.Namespace) -> dict[str, Any]:
    """The machine and the table."""
    reading, multiplying = rates(given.device, 8192 if given.device == "cuda" else 256)
    pipeline = build(given.layers, given.width, given.inner, given.heads, given.vocabulary, given.device)
    rows = []
    for prompt in given.prompts:
        for batch in given.batches:
            for block, (name, way) in [(size, way) for size in given.blocks for way in ways(size).items()]:
                row = measure(pipeline, prompt, batch, way, given.device)
                fed = TOKENS if name == "prompt once" else block
                least = limit(pipeline, prompt, batch, fed, reading, multiplying)
                rows.append({"prompt": prompt, "batch": batch, "block": block, "way": name, **row, "limit": least})
                tell(f"prompt {prompt}, batch {batch}, blocks of {block}, {name}: {row['call']:.2f} ms a call")
    about = machine.about()
    if given.device == "cuda":
        about["processor"] = torch.cuda.get_device_name()
    return {"about": about, "read_per_second": reading, "flops_per_second": multiplying, "rows": rows}


def lines(found: dict[str, Any]) -> list[str]:
    """The table in words."""
    said = [
        machine.in_words(found["about"]),
        f"reads {found['read_per_second'] / 1e9:.0f} GB/s, multiplies {found['flops_per_second'] / 1e12:.0f} TFLOP/s",
        "",
        f"{'prompt':>6} {'batch':>5} {'block':>5}  {'way':<12} {'ms a call':>9} {'limit':>6} {'reached':>7} "
        f"{'ms, 32 calls':>12} {'tokens/s':>8}",
    ]
    for row in found["rows"]:
        said.append(
            f"{row['prompt']:>6} {row['batch']:>5} {row['block']:>5}  {row['way']:<12} {row['call']:>9.2f} "
            f"{row['limit']:>6.2f} {row['limit'] / row['call']:>7.0%} {row['request']:>12.0f} "
            f"{row['tokens_per_second']:>8.0f}"
        )
    return [*said, ""]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    for name, value in (("layers", 32), ("width", 4096), ("inner", 12288), ("heads", 32), ("vocabulary", 126464)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--prompts", type=int, nargs="+", default=[793, 3709])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--blocks", type=int, nargs="+", default=[BLOCK], help="tokens of a block")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="runs/bench/gpu.json")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is here; --device cpu --layers 2 --width 64 --heads 4 --inner 128 tries the script out")
    found = measure_all(given)
    conclude(found, lines(found), given.out, "benchmarks.gpu", argv)


if __name__ == "__main__":
    main()
