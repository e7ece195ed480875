"""Answering one request in every way, ours and others', with the same weights in one process.

    python -m benchmarks.decode --fast-dllm PATH --llada PATH --llada-v PATH

All ways commit the same number of tokens a call, so that what differs is the time of a call. That equal ways give equal
tokens in equally many calls is checked before anything is timed. Then all take their turns, A, B, C, A, B, C, ...; the
clock is this process's own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import machine, peers, watch
from benchmarks import shape as shapes
from benchmarks.output import conclude, tell
from benchmarks.peers import Way
from benchmarks.shape import Shape
from dmllm.evaluation.products import Products, count
from dmllm.evaluation.rounds import Spread, sheet, short
from dmllm.pipeline import Pipeline, load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCES = (
    "LLaDA generate",
    "Fast-dLLM no cache",
    "ours, no cache",
)  # a call's time is compared with the first there


@dataclass(frozen=True, kw_only=True)
class Step:
    """The calls of a way on the last block that see the rest in a cache."""

    calls: int
    rows: int  # fed by each
    flops: int  # of all these calls
    products: list[Products]  # of each
    bytes: int  # of the matrices and of what attention sees, read once by each


def ours(pipeline: Pipeline, dtype: str, shape: Shape) -> list[Way]:
    """Our ways: what differs is what is kept."""
    kept: dict[str, dict[str, Any]] = {
        "no cache": {},
        "prefix cache": {"cache": "prefix"},
        "dual cache": {"cache": "dual"},
        "prefix once": {"visibility": "prefix"},
        "block-causal": {"visibility": f"block:{shape.block}"},
    }
    return [
        Way(f"ours, {name}", dtype, partial(_answer, pipeline, shape, options), pipeline.model)
        for name, options in kept.items()
    ]


def _answer(pipeline: Pipeline, shape: Shape, options: dict[str, Any], ids: Tensor) -> Tensor:
    found = pipeline.generate(
        ids,
        max_new_tokens=shape.tokens,
        block_length=shape.block,
        steps=shape.steps,
        eos_token_id=[],
        temperature=0.0,
        **options,
    )
    return found.sequences[:, ids.shape[1] :]


def ways_of(arguments: argparse.Namespace, shape: Shape, folder: Path) -> tuple[list[Way], list[tuple[str, str]]]:
    """All rows, and which pairs of them must agree token by token."""
    checkpoint = shapes.write(shape, folder / "model")
    pipelines = {
        name: load(str(checkpoint), device="cpu", dtype=dtype, prompt_room=0) for name, dtype in DTYPES.items()
    }
    found, equal = [], []
    theirs: torch.nn.Module = peers.AsTheirs(pipelines["fp32"])
    if arguments.fast_dllm:
        weights = load_file(checkpoint / "model.safetensors")
        theirs = peers.fast_dllm_model(Path(arguments.fast_dllm), weights, shape)
    if arguments.llada:
        found.append(peers.llada(Path(arguments.llada), theirs, shape))
        equal.append(("LLaDA generate", "ours, no cache"))
    if arguments.fast_dllm:
        found += peers.fast_dllm(Path(arguments.fast_dllm), checkpoint, shape)
        equal += [(f"Fast-dLLM {kept}", f"ours, {kept}") for kept in ("no cache", "prefix cache", "dual cache")]
    found += ours(pipelines["fp32"], "fp32", shape)
    if arguments.llada_v:
        found += peers.llada_v(Path(arguments.llada_v), pipelines["fp32"], shape)
        never = {"suppress_ids": peers.suppressed(shape.vocabulary)}
        answer = partial(_answer, pipelines["fp32"], shape, never)
        found.append(Way("ours, no cache, LLaDA-V's tokens", "fp32", answer, pipelines["fp32"].model))
        equal.append(("LLaDA-V generate_with_embeds", "ours, no cache, LLaDA-V's tokens"))
    found += ours(pipelines["bf16"], "bf16", shape)
    return found, equal


@torch.no_grad()
def first_run(way: Way, ids: Tensor, shape: Shape) -> tuple[Tensor, int, int, Step | None]:
    """The answer of a way, its calls, its peak memory and its cached steps (None where there are none)."""
    answers = []
    with watch.Calls(way.module, keep=True) as calls:
        peak = watch.peak_bytes(lambda: answers.append(way.answer(ids)))
    rows, last = min(calls.fed), calls.given[1 - shape.calls_per_block :]
    step = None
    if rows <= shape.tokens < max(calls.fed) and last:
        counted = [count(partial(watch.repeat, way.module, [given])) for given in last]
        weights = sum(p.numel() * p.element_size() for p in way.module.parameters())
        embedding = shape.vocabulary * shape.width * DTYPES[way.dtype].itemsize
        seen = 2 * shape.layers * max(calls.fed) * shape.width * DTYPES[way.dtype].itemsize
        step = Step(
            calls=len(last),
            rows=rows,
            flops=sum(flops for flops, _ in counted),
            products=[products for _, products in counted],
            bytes=len(last) * (weights - embedding + seen),
        )
    return answers[0], len(calls), peak, step


def check(answers: dict[str, Tensor], forwards: dict[str, int], equal: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Which rows agree. Raises SystemExit where two that must do not: nothing is timed then."""
    found = []
    for theirs, own in equal:
        tokens = int((answers[theirs] == answers[own]).sum())
        calls = (forwards[theirs], forwards[own])
        found.append({"rows": [theirs, own], "equal_tokens": tokens, "of": answers[own].numel(), "calls": calls})
        if tokens < answers[own].numel() or calls[0] != calls[1]:
            raise SystemExit(f"{theirs} and {own} differ: {tokens} of {answers[own].numel()} tokens, calls {calls}.")
    return found


@torch.no_grad()
def measure(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Everything, as JSON has it."""
    about, loads = machine.about(), [machine.load_average()]
    with tempfile.TemporaryDirectory() as name:
        ways, equal = ways_of(arguments, shape, Path(name))
        ids = shape.ids()
        chosen = [way for way in ways if not arguments.only or any(part in way.name for part in arguments.only)]
        firsts = {}
        for way in chosen:
            tell(f"  {way.name}, {way.dtype} ...")
            firsts[_key(way)] = first_run(way, ids, shape)
        present = {way.name: firsts[_key(way)] for way in reversed(chosen)}  # the first of a name, in float32
        pairs = [pair for pair in equal if set(pair) <= set(present)]
        agreed = check({n: f[0] for n, f in present.items()}, {n: f[1] for n, f in present.items()}, pairs)
        taken: dict[str, list[tuple[float, list[float]]]] = {_key(way): [] for way in chosen}
        alone: dict[str, list[tuple[float, float]]] = {_key(way): [] for way in chosen}
        rates = {n: machine.cube_rate(dtype) for n, dtype in DTYPES.items()}
        copied = machine.copy_rate()
        for number in range(arguments.rounds):
            loads.append(machine.load_average())
            tell(f"round {number + 1} of {arguments.rounds}, load average {loads[-1]:.1f}")
            for way in chosen:
                with watch.Calls(way.module) as calls:
                    way.answer(ids)
                taken[_key(way)].append((calls.seconds, calls.steps))
                step = firsts[_key(way)][3]
                if step is not None:
                    matrices = machine.apart(step.products), machine.together(step.products)
                    apart, together = map(machine.seconds_of, matrices)
                    alone[_key(way)].append((apart, together))
    rows = [_row(way, firsts[_key(way)], taken[_key(way)], shape) for way in chosen]
    steps = [
        _step(way, step, taken[_key(way)], alone[_key(way)], rates[way.dtype], copied)
        for way in chosen
        if (step := firsts[_key(way)][3]) is not None
    ]
    return {
        "about": about,
        "load_averages": [round(x, 2) for x in loads],
        "shape": asdict(shape),
        "rounds": arguments.rounds,
        "gflops_of_a_cube": {n: rate / 1e9 for n, rate in rates.items()},
        "gbytes_copied": copied / 1e9,
        "agreement": agreed,
        "rows": rows,
        "steps": steps,
    }


def _key(way: Way) -> str:
    return f"{way.name} {way.dtype}"


def _row(way: Way, first: tuple[Any, ...], taken: list[tuple[float, list[float]]], shape: Shape) -> dict[str, Any]:
    calls = first[1]
    return {
        "name": way.name,
        "dtype": way.dtype,
        "peer": way.peer,
        "forwards": calls,
        "tokens_per_forward": shape.tokens / calls,
        "seconds": asdict(Spread.of([seconds for seconds, _ in taken])),
        "seconds_of_rounds": [seconds for seconds, _ in taken],
        "tokens_per_second": asdict(Spread.of([shape.tokens / seconds for seconds, _ in taken])),
        "peak_bytes": first[2],
    }


def _step(
    way: Way,
    step: Step,
    taken: list[tuple[float, list[float]]],
    alone: list[tuple[float, float]],
    cube: float,
    copied: float,
) -> dict[str, Any]:
    """The last block's cached calls: what they took, and what they must take at least."""
    measured = Spread.of([sum(steps[-step.calls :]) / step.calls for _, steps in taken])
    linear = sum(product.flops * times for products in step.products for product, times in products.items())
    rates = {
        "own_products": linear / statistics.median(apart for apart, _ in alone),
        "own_products_in_cache": linear / min(together for _, together in alone),
        "cube": cube,
    }
    limits = {name: max(step.flops / rate, step.bytes / copied) / step.calls for name, rate in rates.items()}
    block = step.calls + 1
    first = Spread.of([sum(steps[1:block]) / step.calls for _, steps in taken])
    return {
        "name": way.name,
        "dtype": way.dtype,
        "rows": step.rows,
        "gflop": step.flops / step.calls / 1e9,
        "mbytes": step.bytes / step.calls / 1e6,
        "seconds": asdict(measured),
        "seconds_on_first_block": asdict(first),
        "gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "limit_seconds": limits,
        "share": {name: limit / measured.median for name, limit in limits.items()},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What was measured, as tables."""
    shape, rows = Shape(**found["shape"]), found["rows"]
    names = [row["name"] for row in rows]
    base = next((rows[names.index(name)] for name in REFERENCES if name in names), rows[0])
    per_call = [[s / row["forwards"] for s in row["seconds_of_rounds"]] for row in rows]
    base_call = [s / base["forwards"] for s in base["seconds_of_rounds"]]
    table = []
    for row, own in zip(rows, per_call):
        faster = Spread.of([a / b for a, b in zip(base_call, own)])
        sooner = Spread.of([a / b for a, b in zip(base["seconds_of_rounds"], row["seconds_of_rounds"])])
        table.append(
            [
                row["name"],
                row["dtype"],
                str(row["forwards"]),
                short(row["tokens_per_forward"]),
                str(Spread(**row["seconds"])),
                short(1e3 * Spread.of(own).median),
                f"{short(faster.median)} x",
                short(row["tokens_per_second"]["median"]),
                f"{short(sooner.median)} x",
                short(row["peak_bytes"] / 1e6),
            ]
        )
    head = ["", "", "forwards", "tokens each", "s a request", "ms a forward", "faster", "tokens/s", "faster", "peak MB"]
    agreed = [
        f"  {a} = {b}: {pair['equal_tokens']} of {pair['of']} tokens, {pair['calls'][1]} forwards"
        for pair in found["agreement"]
        for a, b in [pair["rows"]]
    ]
    cubes = ", ".join(f"{n} {short(rate)} GFLOP/s" for n, rate in found["gflops_of_a_cube"].items())
    return [
        *shapes.about(shape),
        machine.in_words(found["about"]),
        f"a product of {machine.CUBE} x {machine.CUBE} x {machine.CUBE}: {cubes}; "
        f"copying {short(found['gbytes_copied'])} GB/s",
        "",
        *(["checked before timing:", *agreed, ""] if agreed else []),
        f"median [least, greatest] of {found['rounds']} rounds in turn, seconds of this process; faster: than "
        f"{base['name']}, {base['dtype']}",
        *sheet(head, table),
        "",
        *_step_lines(found["steps"]),
        *machine.warn(found["load_averages"]),
    ]


def _step_lines(steps: list[dict[str, Any]]) -> list[str]:
    if not steps:
        return []
    table = [
        [
            step["name"],
            step["dtype"],
            str(step["rows"]),
            short(step["gflop"]),
            short(step["mbytes"]),
            str(Spread(*(1e3 * step["seconds"][k] for k in ("median", "least", "greatest")))),
            short(1e3 * step["seconds_on_first_block"]["median"]),
            short(1e3 * step["limit_seconds"]["own_products"]),
            *(f"{100 * share:.0f} %" for share in step["share"].values()),
        ]
        for step in steps
    ]
    head = ["", "", "rows", "GFLOP", "MB read", "ms, last block", "first", "limit ms", "reached", "in cache", "cube"]
    return [
        "a step that sees the rest in a cache, from call to call, the choice of tokens included; limit: its operations",
        "at the rate of its own matrix products alone, each weight read from memory, or its bytes at that of copying;",
        "beside it the same with products whose weights lie in the processor's cache, and with a square product",
        *sheet(head, table),
        "",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.decode", description=(__doc__ or "").splitlines()[0])
    shapes.add_options(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names hold one of these words")
    parser.add_argument("--fast-dllm", help="a checkout of NVlabs/Fast-dLLM (it needs the package einops)")
    parser.add_argument("--llada", help="a checkout of ML-GSAI/LLaDA")
    parser.add_argument("--llada-v", help="a checkout of ML-GSAI/LLaDA-V")
    parser.add_argument("--out", default="runs/bench/decode.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    found = measure(arguments, shapes.of(arguments))
    conclude(found, lines(found), arguments.out, "benchmarks.decode", argv)


if __name__ == "__main__":
    main()
