"""The block objective: -log p(block | what is before it), bounded block by block, all blocks of an answer in one pass.

    corruption   each block draws a time t; each of its tokens becomes the mask with probability 1 - alpha(t)
    visibility   block:N; behind what is given stands a second copy of each scored block, at the same positions, noised,
                 which sees itself and what is given before it: as it will be decoded (`views.two_copies`)
    target       the hidden tokens
    weight       as masked: with blocks as long as the document it is that objective, with blocks of one token and
                 `min_noise: 1` next-token prediction (tests/objectives/test_block.py, test_bounds.py)
    sampler      block after block, the keys and values of those before stored, each as under masked
    paper        BD3-LM arXiv:2503.09573, equation 5 and section 3.2, clipped noise: section 5.2

    model: {backbone: Qwen/Qwen2.5-0.5B, shift: true}
    data: data_configs/scenes.yaml
    objective:
      name: block
      options: {block_schedule: [[0, 1], [0.05, 4], [0.1, 32], [0.2, null], [0.8, 32]], times: document}

The choice for long answers of any length, since all that is written is stored, and for causal models, which are near.
Pitfalls: a step costs the stream twice; nothing behind a block is seen, so that holes can be filled only from the left;
decode in the blocks that were learned. How long they are is the model's own affair, its visibility; one that has none
gets `block_length`, one with a schedule those of its end. Published settings:

    BD3-LM    {zero_masking: true}, with a noise range (min_noise, max_noise) tuned in training
    SDAR      {times: document}
    LLaDA2    {times: document, weight: none, reduction: masked, min_noise: 0.3, max_noise: 0.8}, from a causal model by
              a schedule like the one above: warm-up, stable, decay
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from dmllm.nn.rope import places
from dmllm.nn.visibility import check_layout
from dmllm.objectives.draws import Draws
from dmllm.objectives.masked import Masked, MaskedConfig, Noised
from dmllm.objectives.views import Laid, number_blocks, two_copies
from dmllm.types import Batch

TIMES = ("block", "document")
Stage = tuple[float, int | None]


@dataclass(frozen=True, kw_only=True)
class BlockConfig(MaskedConfig):
    """What is hidden, how often, and what it weighs."""

    times: str = "block"
    """block: each block draws its own time (BD3-LM), so that a long answer is seen at many. document: all of a
    document's blocks share one (SDAR, LLaDA2)."""

    block_length: int = 32
    """Tokens of a block, for a model whose visibility is not block:N yet."""
    block_schedule: tuple[Stage, ...] = ()
    """Blocks that change while training (LLaDA2's warm-up, stable, decay): pairs of a step (or all below 1, shares of
    all steps) and the length from then on, null for whole documents as under masked. The last one is validated, and is
    the visibility of the model that is saved. []: one length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "block_schedule", tuple((start, length) for start, length in self.block_schedule))
        check_schedule(self.block_schedule)
        if self.block_length < 1:
            raise ValueError(f"block_length={self.block_length} must be at least 1; 4 to 32 are usual.")
        if self.noise_block:
            raise ValueError("noise_block is for the objective masked; under block every block is learned in that way.")
        if self.times not in TIMES:
            raise ValueError(f"times={self.times!r} is not one of {', '.join(TIMES)}.")
        if self.padding != "hidden":
            raise ValueError(f"padding={self.padding!r} is for the objective masked; under block it is hidden.")
        if self.weight == "cart":
            raise ValueError("weight='cart' is for the objective masked; under block choose elbo, clipped or none.")


class Block(Masked):
    """Block diffusion as two steps: corrupt a copy of the scored blocks, then score a model on it."""

    block_length: int
    config: BlockConfig

    @staticmethod
    def requires(config: MaskedConfig, visibility: str) -> dict[str, Any]:
        """A model that does not denoise in blocks yet gets them; one with a schedule, those of its end."""
        assert isinstance(config, BlockConfig)
        own = visibility if check_layout(visibility) else visibility_of(config.block_length)
        last = [visibility_of(length) for _, length in config.block_schedule[-1:]]
        return {"process": "absorbing", "visibility": (last or [own])[0]}

    def prepare(self, batch: Batch, draws: Draws) -> Noised:
        """As `Masked.prepare`, in blocks as long as they now are."""
        stage = [length for start, length in self.config.block_schedule if draws.passed(start)][-1:]
        if not stage:
            return super().prepare(batch, draws)
        if stage == [None]:
            common = {f.name: getattr(self.config, f.name) for f in fields(MaskedConfig)}
            return Masked(MaskedConfig(**common), self.special, "full").prepare(batch, draws)
        config = replace(self.config, block_schedule=())
        return Block(config, self.special, visibility_of(stage[0])).prepare(batch, draws)

    def _check_visibility(self) -> None:
        if self.config.block_schedule:
            return
        length = check_layout(self.visibility)
        if length is None:
            raise ValueError(
                f"The objective block learns under visibility block:N, and this model's is {self.visibility}; set "
                "model.visibility=block:32, or objective.name=masked."
            )
        self.block_length = length

    def _lay_out(self, batch: Batch, views: int, canvas: Tensor) -> Laid:
        return two_copies(batch, self.block_length, views)

    def _alike(self, batch: Batch) -> Tensor:
        if self.config.times == "document":
            return super()._alike(batch)
        return number_blocks(batch.documents, places(batch.positions) // self.block_length)


def visibility_of(length: int | None) -> str:
    """That of a model with blocks of this length; None: of one that sees all."""
    return "full" if length is None else f"block:{length}"


def check_schedule(stages: Sequence[Stage]) -> None:
    """Raise ValueError unless the stages begin at 0, one after the other, with blocks of at least one token."""
    starts, lengths = [s for s, _ in stages], [n for _, n in stages]
    later = starts[1:]
    if starts and (starts[0] != 0 or starts != sorted(set(starts)) or (later and later[0] < 1 <= later[-1])):
        raise ValueError(
            f"block_schedule begins at {starts}; the first stage begins at 0, later ones at later steps, or all of "
            "them at fractions below 1."
        )
    for length in lengths:
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ValueError(f"block_schedule has blocks of {length!r}; give whole numbers, or null for no blocks.")


BLOCK = (Block, BlockConfig)
