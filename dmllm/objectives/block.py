"""The block objective: a bound on the sum over blocks of -log p(block | what is before it), all blocks in one pass.

Behind what is given stands a second copy of each block that is scored, at the same positions, and is noised; it sees
itself and what is given before it. So every block is learned as it will be decoded, at the cost of one pass over two
copies (`views.two_copies`). With blocks as long as the document this is the masked objective, with blocks of one token
and `min_noise: 1` next-token prediction (tests/objectives/test_block.py).

How long blocks are is the model's own affair: its visibility, block:N. Published settings:

    BD3-LM    {zero_masking: true}, with a noise range (min_noise, max_noise) tuned in training
    SDAR      {times: document}
    LLaDA2    {times: document, weight: none, reduction: masked, min_noise: 0.3, max_noise: 0.8}

Source: Arriola et al., BD3-LM, arXiv:2503.09573, equation 5 and section 3.2; clipped noise: section 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dmllm.nn.rope import places
from dmllm.nn.visibility import check_layout
from dmllm.objectives.masked import Masked, MaskedConfig
from dmllm.objectives.views import Laid, number_blocks, two_copies
from dmllm.types import Batch

TIMES = ("block", "document")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(MaskedConfig):
    """What is hidden, how often, and what it weighs."""

    times: str = "block"
    """block: each block draws its own time (BD3-LM), so that a long answer is seen at many. document: all of a
    document's blocks share one (SDAR, LLaDA2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def _check_visibility(self) -> None:
        length = check_layout(self.visibility)
        if length is None:
            raise ValueError(
                f"The objective block learns under visibility block:N, and this model's is {self.visibility}; set "
                "model.visibility=block:32, or objective.name=masked."
            )
        self.block_length = length

    def _lay_out(self, batch: Batch, views: int) -> Laid:
        return two_copies(batch, self.block_length, views)

    def _alike(self, batch: Batch) -> Tensor:
        if self.config.times == "document":
            return super()._alike(batch)
        return number_blocks(batch.documents, places(batch.positions) // self.block_length)


BLOCK = (Block, BlockConfig)
