"""Training on a GPU at the shapes of LLaDA 8B and of a 1B model: tokens a second, share of the machine, memory.

A step is forward, backward and AdamW on conversations of one picture and an answer, random weights in bfloat16. Its
operations are counted from the shape: two for each weight and row forward, as many backward for what a gradient passes
through, as many again for weights that learn; attention likewise; the vocabulary only where it is asked for. What
gradient checkpointing computes again is not counted. `--every-position` asks for logits everywhere, for comparison.

    python -m benchmarks.training [--shapes 1b 8b-projector 8b-part] [--lengths 2048 8192] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.gpu import build, rates, seconds
from benchmarks.output import conclude, tell
from dmllm.objectives import build_objective
from dmllm.objectives.draws import Draws
from dmllm.training.distributed import to_device
from dmllm.types import IGNORE, TEXT, Batch

PATCH = 1152  # numbers of a patch, as SigLIP so400m has them
IMAGE_ROWS = {2048: 729, 8192: 3645}  # rows of a picture in a stream of so many: one tile, and four with their overview


@dataclass(frozen=True)
class Kind:
    """A model, and what of it learns beside the projector."""

    layers: int
    width: int
    inner: int
    heads: int
    learning: int  # of the last layers; with all of them the embedding and the vocabulary projection learn too


KINDS = {
    "1b": Kind(16, 2048, 5632, 16, 16),
    "8b-projector": Kind(32, 4096, 12288, 32, 0),
    "8b-part": Kind(32, 4096, 12288, 32, 16),
    "tiny": Kind(2, 64, 128, 4, 2),
}


class Step:
    """A training step on random conversations of `length` rows, `images` of them a picture's."""

    def __init__(self, kind: Kind, vocabulary: int, rows: int, length: int, images: int, device: str, attention: str):
        self.kind, self.rows, self.length = kind, rows, length
        pipeline = build(kind.layers, kind.width, kind.inner, kind.heads, vocabulary, device, attention=attention)
        self.model, special = pipeline.model, pipeline.special
        self.model.train().set_gradient_checkpointing(True)
        layers = self.model.backbone.layers
        chosen: list[nn.Module] = [*layers[len(layers) - kind.learning :]]
        chosen = [self.model] if kind.learning == kind.layers else chosen
        for part in chosen:
            part.requires_grad_(True)
        self.projector = nn.Sequential(
            nn.Linear(PATCH, kind.width), nn.GELU(), nn.Linear(kind.width, kind.width)
        ).to(device, torch.bfloat16)  # fmt: skip
        self.patches = torch.randn(rows * images, PATCH, device=device, dtype=torch.bfloat16)
        learning = [p for p in [*self.model.parameters(), *self.projector.parameters()] if p.requires_grad]
        self.optimiser = torch.optim.AdamW(learning, lr=1e-6, fused=True)
        self.objective = build_objective("masked", {}, special, "full")
        batch = conversations(rows, length, images, vocabulary)
        draws = Draws(seed=0, step=0, num_examples=rows, indices=batch.indices)
        self.noised = to_device(self.objective.prepare(batch, draws), torch.device(device))

    def __call__(self, every_position: bool = False) -> None:
        """Moves the weights once."""
        features = self.projector(self.patches)

        def model(**inputs: Any) -> Any:
            rows = None if every_position else inputs.pop("rows")
            asked = inputs.pop("rows") if every_position else None
            found = self.model(image_features=features, **{**inputs, "rows": rows})
            if asked is not None:
                found.logits = F.embedding(asked, found.logits.flatten(0, 1))
            return found

        losses = self.objective.loss(model, self.noised)
        sum(loss.total for loss in losses.values()).backward()  # type: ignore[union-attr]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def operations(self) -> float:
        """Of one step."""
        kind, tokens = self.kind, self.rows * self.length
        layer = 4 * kind.width**2 + 3 * kind.width * kind.inner
        attention = 2 * 2 * self.length * kind.width  # scores and mixing, for each row
        vocabulary = 2 * kind.width * len(self.noised.rows) * self.model.backbone.config.vocab_size
        forward = kind.layers * (2 * layer + attention) * tokens + vocabulary
        passing = forward + kind.layers * attention * tokens  # attention has two products to differentiate by
        learning = kind.learning * 2 * layer * tokens + (vocabulary if kind.learning == kind.layers else 0)
        return float(forward + passing + learning)


def conversations(rows: int, length: int, images: int, vocabulary: int) -> Batch:
    """A picture, a question of 64 tokens, and an answer, in each row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary - 10, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : images + 64] = IGNORE
    slots = torch.full_like(ids, TEXT)
    slots[:, :images] = torch.arange(rows * images).view(rows, images)
    return Batch(
        input_ids=ids,
        labels=labels,
        image_slots=slots,
        documents=torch.zeros_like(ids),
        positions=torch.arange(length).expand_as(ids),
        indices=torch.arange(rows),
    )


def measure(name: str, length: int, given: argparse.Namespace, multiplying: float) -> list[dict[str, Any]]:
    """One or two rows of the table: as it is, and with logits at every position."""
    images, rows = IMAGE_ROWS.get(length, length // 4), given.tokens // length
    step = Step(KINDS[name], given.vocabulary, rows, length, images, given.device, given.attention)
    found = []
    for every in (False, True) if given.every_position else (False,):
        step(every)
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = seconds(lambda every=every: step(every), given.device)
        peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else 0
        row = {
            "shape": name,
            "length": length,
            "rows": step.rows,
            "logits": "everywhere" if every else "where asked",
            "tokens_per_second": step.rows * length / taken,
            "utilisation": step.operations() / taken / multiplying,
            "peak_gib": peak / 2**30,
        }
        tell(f"{name}, {length} rows: {row['tokens_per_second']:.0f} tokens/s, {row['utilisation']:.0%} of the product")
        found.append(row)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The table in words."""
    said = [
        machine.in_words(found["about"]),
        f"a square product: {found['flops_per_second'] / 1e12:.0f} TFLOP/s; peak of the maker {found['peak']:.0f}",
        "",
        f"{'shape':<13} {'length':>6} {'rows':>4}  {'logits':<11} {'tokens/s':>9} {'of square':>9} "
        f"{'MFU':>5} {'GiB':>6}",
    ]
    for row in found["rows"]:
        of_peak = row["utilisation"] * found["flops_per_second"] / 1e12 / found["peak"]
        said.append(
            f"{row['shape']:<13} {row['length']:>6} {row['rows']:>4}  {row['logits']:<11} "
            f"{row['tokens_per_second']:>9.0f} {row['utilisation']:>9.0%} {of_peak:>5.0%} {row['peak_gib']:>6.1f}"
        )
    return [*said, ""]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(KINDS), default=["1b", "8b-projector", "8b-part"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=16384, help="rows of the stream in one step")
    parser.add_argument("--vocabulary", type=int, default=126464)
    parser.add_argument("--attention", default="flex", help="auto, dense, flex, as of TransformerConfig")
    parser.add_argument("--every-position", action="store_true")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s that the maker states, for MFU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="runs/bench/training.json")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no GPU is here; --device cpu --shapes tiny --lengths 64 --tokens 128 --vocabulary 512 tries the script out"
        )
    _, multiplying = rates(given.device, 8192 if given.device == "cuda" else 256)
    rows: list[dict[str, Any]] = []
    for name in given.shapes:
        for length in given.lengths:
            rows += measure(name, length, given, multiplying)
            if given.device == "cuda":
                torch.cuda.empty_cache()
    about = machine.about()
    if given.device == "cuda":
        about["processor"] = torch.cuda.get_device_name()
    found = {"about": about, "flops_per_second": multiplying, "peak": given.peak, "rows": rows}
    conclude(found, lines(found), given.out, "benchmarks.training", argv)


if __name__ == "__main__":
    main()
