"""The unified objective: answers that are texts and answers that are pictures, each with noise and a loss of its own.

    corruption   codes of a picture: a share cos(pi/2 (1 - t)) of them is hidden, exactly; words: as by masked
    visibility   full, or prefix
    target       the hidden tokens, codes among codes alone and words among words alone
    weight       of codes 1, the mean over what is hidden (not a bound); of words 1/t, a bound
    sampler      `imagine`, `edit`, `complete` for pictures; for texts that of masked models
    paper        MMaDA, arXiv:2505.15809, section 3.1 (t2i, lm and mmu here: image, text, understanding); Lumina-DiMOO,
                 arXiv:2510.06308; MaskGIT, arXiv:2202.04200; one softmax for both: UniDisc, arXiv:2503.20853

    model: {checkpoint: MODEL, drawing: {image_tokenizer: FOLDER, size: 256}}
    data: {datasets: [{json_path: described.json, image_folder: images}, {json_path: asked.json}]}
    objective:
      name: unified
      options: {coefficients: {image: 1.0, text: 0.1, understanding: 1.0}}

The choice for a model that draws. Its losses are image (codes), understanding (words of a conversation with a picture)
and text (words of one without), each divided by its own count, so that coefficients say how they weigh, whatever the
mixture is. Pitfalls: descriptions have to be left out now and then, or there is nothing to guide away from; and codes
of one picture depend on each other more than words do, so that a call must not find too many.

Shapes: B rows, L tokens, N hidden tokens of a modality, C ids of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmllm.diffusion.absorbing import draw_exactly, draw_hidden, hide
from dmllm.nn.visibility import Visibility, layout
from dmllm.objectives.draws import Draws
from dmllm.objectives.forward import forward
from dmllm.objectives.loss import normalise, per_document, weighted_cross_entropy
from dmllm.objectives.masked import Masked, MaskedConfig
from dmllm.types import IGNORE, PADDING, PREFIX, TEXT, Batch, LossSum, SpecialTokens

KINDS = ("image", "text", "understanding")
OWN = ("schedule", "schedule_options", "weight", "weight_clip", "reduction", "min_noise", "max_noise")
PICTURES = {"schedule": "cosine", "weight": "none", "reduction": "masked"}
STREAM = 16  # of an example's random numbers, and one for each kind


@dataclass(frozen=True, kw_only=True)
class UnifiedConfig:
    """What is hidden of each kind of answer, and how much each loss weighs."""

    image: dict[str, Any] = field(default_factory=dict)
    """Of codes: schedule, weight, reduction and the other options of masked in OWN, over those of MMaDA."""
    text: dict[str, Any] = field(default_factory=dict)
    """Of words in conversations without pictures; the same options, over those of masked."""
    understanding: dict[str, Any] = field(default_factory=dict)
    """Of words in conversations with pictures."""
    coefficients: dict[str, float] = field(default_factory=dict)
    """Of the losses image, text and understanding; 1 where it is not said. MMaDA: 1, 0.1, 1 at first."""
    exact: bool = True
    """Hide exactly the share of a picture's codes that its time says, one at least (MaskGIT); False: each by itself."""
    restrict: bool = True
    """Score codes among codes and words among words, as they are drawn; False: among all ids (MMaDA)."""

    def __post_init__(self) -> None:
        for name in self.coefficients:
            if name not in KINDS:
                raise ValueError(f"coefficients: {name!r} is no loss of this objective; they are {', '.join(KINDS)}.")
        for kind in KINDS:
            for name in getattr(self, kind):
                if name not in OWN:
                    raise ValueError(f"{kind}: {name!r} is no option of it; allowed are {', '.join(OWN)}.")


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A corrupted batch and what is to be predicted of each kind."""

    batch: Batch
    visibility: Visibility
    time: Tensor  # [B, L]
    rows: dict[str, Tensor]  # [N] int64 into B * L, by kind
    targets: dict[str, Tensor]  # [N] int64, counted from the kind's first id
    weights: dict[str, Tensor]  # [N] float32
    counts: dict[str, Tensor]


class Unified:
    """Masked diffusion of texts and pictures as two steps: corrupt a batch, then score a model on it."""

    def __init__(self, config: UnifiedConfig, special: SpecialTokens, visibility: str):
        codes = getattr(special, "codes", None)
        if codes is None:
            raise ValueError(
                "The objective unified learns codes of pictures, and this model has none: its config.json needs an "
                "image_vocabulary. For texts alone say objective.name=masked."
            )
        self.config, self.special, self.visibility, self.codes = config, special, visibility, codes
        options = {kind: getattr(config, kind) for kind in KINDS}
        options["image"] = {**PICTURES, **config.image}
        self.parts = {kind: Masked(MaskedConfig(**own), special, visibility) for kind, own in options.items()}
        self.coefficients = {kind: float(config.coefficients.get(kind, 1.0)) for kind in KINDS}

    @staticmethod
    def requires(config: UnifiedConfig, visibility: str) -> dict[str, Any]:
        """As the objective masked."""
        return Masked.requires(MaskedConfig(), visibility)

    def prepare(self, batch: Batch, draws: Draws) -> Noised:
        """Hide codes and words. Deterministic in (batch, draws); the batch is left as it is."""
        device, length = batch.labels.device, batch.labels.shape[1]
        hidden, time = torch.zeros_like(batch.labels, dtype=torch.bool), torch.zeros(batch.labels.shape, device=device)
        for number, (kind, mine) in enumerate(self._kinds(batch).items()):
            own = self.parts[kind]
            t = own.times(batch, replace(draws, seed=draws.seed + number)).to(device)
            uniform = draws.uniform(length, STREAM + number).to(device)
            noise = 1 - own.schedule.alpha(t)
            if kind == "image" and self.config.exact:
                hidden |= draw_exactly(noise, uniform, mine, batch.documents)
            else:
                hidden |= draw_hidden(noise, uniform, mine)
            time = torch.where(mine, t.float(), time)
        return self.corrupt(batch, hidden, time)

    def corrupt(self, batch: Batch, hidden: Tensor, time: Tensor) -> Noised:
        """The batch with given tokens hidden: what `prepare` has drawn, or what was recorded from published code.

        Args:
            hidden: [B, L] bool, among what has a label.
            time: [B, L], from which follow the weights.
        """
        scorable, look = batch.labels != IGNORE, None
        look = layout(self.visibility, documents=batch.documents, canvas=scorable)
        rows, targets, weights, counts = {}, {}, {}, {}
        for kind, mine in self._kinds(batch).items():
            own, here = self.parts[kind], hidden & mine
            belongs = per_document(mine.float(), batch.documents).gather(1, batch.documents.clamp(min=0)) > 0
            documents = batch.documents.masked_fill(~belongs, PADDING)
            found = normalise(own.config.reduction, own.weights(batch, here, time, time), mine.float(), here, documents)
            rows[kind] = here.flatten().nonzero().squeeze(1)
            targets[kind] = batch.labels.flatten()[rows[kind]] - self._words(kind)[0]
            weights[kind], counts[kind] = found[0].flatten()[rows[kind]], found[1].cpu()
        return Noised(
            batch=replace(batch, input_ids=hide(batch.input_ids, hidden, self.special.mask)),
            visibility=look,
            time=time,
            rows=rows,
            targets=targets,
            weights=weights,
            counts=counts,
        )

    def loss(self, model: Callable[..., Any], noised: Noised) -> dict[str, LossSum]:
        """The losses before division; each one's count, of all micro-batches together, is its divisor."""
        parts = [(noised.rows[kind], self._words(kind)) for kind in KINDS]
        none = noised.rows["image"][:0]
        logits = forward(model, noised.batch, noised.visibility, none, noised.time, parts=parts).logits
        return {
            kind: weighted_cross_entropy(said, noised.targets[kind], noised.weights[kind], noised.counts[kind])
            for kind, said in zip(KINDS, logits, strict=True)
        }

    def _words(self, kind: str) -> tuple[int, int]:
        """The ids among which a kind is scored."""
        if not self.config.restrict:
            return 0, self.special.size  # type: ignore[attr-defined]
        return self.codes if kind == "image" else (0, self.codes[0])

    def _kinds(self, batch: Batch) -> dict[str, Tensor]:
        """Which labels [B, L] are of which kind. A picture that all documents of a row see counts for each of them."""
        first, end = self.codes
        labels, documents = batch.labels, batch.documents
        code = (labels >= first) & (labels < end)
        shown = (batch.image_slots != TEXT) | ((batch.input_ids >= first) & (batch.input_ids < end))
        seen = per_document((shown & (documents >= 0)).float(), documents).gather(1, documents.clamp(min=0)) > 0
        seen = seen | (shown & (documents == PREFIX)).any(1, keepdim=True)
        word = (labels != IGNORE) & ~code
        return {"image": code, "text": word & ~seen, "understanding": word & seen}


UNIFIED = (Unified, UnifiedConfig)
