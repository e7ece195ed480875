"""Requests at the shape of LLaDA 8B on a GPU, ours beside other projects' code, on one set of random weights.

All make the same number of calls for an answer, in bfloat16. Checkouts are the user's (see benchmarks.peers); LLaDA's
loop runs on Fast-dLLM's model file, LLaDA-V's on our modules. How many of the new tokens agree is shown, and means
little: with random weights in bfloat16 two probabilities are often nearly the same.

    python -m benchmarks.gpu_peers --llada PATH --fast-dllm PATH --llada-v PATH [--prompts 793 3709] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.gpu import BLOCK, TOKENS, build, seconds
from benchmarks.output import conclude, tell
from benchmarks.peers import Way
from benchmarks.shape import Shape
from dmllm.families.family import to_theirs
from dmllm.families.llada import KEYS
from dmllm.pipeline import Pipeline

PER_CALL = 4  # tokens
OURS: dict[str, dict[str, Any]] = {
    "no cache": {},
    "dual cache": {"cache": "dual"},
    "prompt once": {"visibility": "prefix"},
    "block-causal": {"visibility": f"block:{BLOCK}"},
}
LIKE = {"LLaDA generate": "no cache", "LLaDA-V generate_with_embeds": "no cache", "Fast-dLLM dual cache": "dual cache"}


def ours(pipeline: Pipeline, shape: Shape) -> list[Way]:
    """Our ways."""

    def answer(options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        settings = {"max_new_tokens": shape.tokens, "block_length": shape.block, "steps": shape.steps, **options}
        return lambda ids: pipeline.generate(ids, **settings).sequences[:, ids.shape[1] :]

    return [Way(name, "bf16", answer(options), pipeline.model) for name, options in OURS.items()]


def theirs(given: argparse.Namespace, pipeline: Pipeline, shape: Shape) -> list[Way]:
    """Theirs, as far as their checkouts are named."""
    found: list[Way] = []
    weights = {name: w.detach() for name, w in to_theirs(KEYS, pipeline.model.state_dict())}
    if given.fast_dllm:
        checkout = Path(given.fast_dllm)
        room = {"max_sequence_length": shape.prompt + shape.tokens, "precision": "amp_bf16"}
        model = peers.fast_dllm_model(checkout, weights, shape, room)
        for loops, said in zip(peers.fast_dllm_loops(peers.folder_of(checkout)), ("", peers.SINGLE), strict=True):
            found.append(
                peers.loop(f"Fast-dLLM dual cache{said}", "bf16", loops.generate_with_dual_cache, model, shape)
            )
        if given.llada:
            found.append(peers.llada(Path(given.llada), model, shape))
    if given.llada_v:
        found += peers.llada_v(Path(given.llada_v), pipeline, shape)
    return found


def measure(given: argparse.Namespace, prompt: int, pipeline: Pipeline) -> list[dict[str, Any]]:
    """Rows of the table for one length of prompt."""
    shape = Shape(
        width=given.width, layers=given.layers, heads=given.heads, inner=given.inner, vocabulary=given.vocabulary,
        prompt=prompt, tokens=TOKENS, block=BLOCK, per_call=PER_CALL,
    )  # fmt: skip
    ids = shape.ids().to(given.device)
    rows: dict[str, dict[str, Any]] = {}
    answers: dict[str, Tensor] = {}
    for way in [*ours(pipeline, shape), *theirs(given, pipeline, shape)]:
        answers[way.name] = torch.as_tensor(way.answer(ids)).cpu()  # the first one also compiles and captures
        way.answer(ids)
        taken = seconds(lambda way=way: way.answer(ids), given.device, times=2)
        like = next((same for start, same in LIKE.items() if way.name.startswith(start)), None)
        row = {"prompt": prompt, "name": way.name, "peer": way.peer, "request": 1e3 * taken}
        if way.peer and like:
            alike = (answers[way.name] == answers[like]).float().mean().item()
            row |= {"like": like, "alike": alike, "times": taken / (rows[like]["request"] / 1e3)}
            row["times_exact"] = taken / (rows["block-causal"]["request"] / 1e3)
        rows[way.name] = row
        tell(f"prompt {prompt}, {way.name}: {row['request']:.0f} ms")
    return list(rows.values())


def lines(found: dict[str, Any]) -> list[str]:
    """The table in words."""
    head = f"{'prompt':>6}  {'way':<52} {'ms a request':>12} {'ours, same calls':>17} {'times':>6} {'alike':>6}"
    said = [machine.in_words(found["about"]), f"{TOKENS} new tokens, {TOKENS // PER_CALL} calls", "", head]
    for row in found["rows"]:
        beside = f" {row['like']:>17} {row['times']:>6.2f} {row['alike']:>6.0%}" if "like" in row else ""
        said.append(f"{row['prompt']:>6}  {row['name']:<52} {row['request']:>12.0f}{beside}")
    return [*said, ""]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_peers", description=(__doc__ or "").splitlines()[0])
    for name, value in (("layers", 32), ("width", 4096), ("inner", 12288), ("heads", 32), ("vocabulary", 126464)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("llada", "fast-dllm", "llada-v"):
        parser.add_argument(f"--{name}", metavar="PATH", help="its public checkout")
    parser.add_argument("--prompts", type=int, nargs="+", default=[793, 3709])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="runs/bench/gpu_peers.json")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is here; --device cpu --layers 2 --width 64 --heads 4 --inner 128 tries the script out")
    shape = given.layers, given.width, given.inner, given.heads, given.vocabulary
    pipeline = build(*shape, given.device)
    rows = [row for prompt in given.prompts for row in measure(given, prompt, pipeline)]
    about = machine.about()
    if given.device == "cuda":
        about["processor"] = torch.cuda.get_device_name()
    conclude({"about": about, "rows": rows}, lines({"about": about, "rows": rows}), given.out, "gpu_peers", argv)


if __name__ == "__main__":
    main()
