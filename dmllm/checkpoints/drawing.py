"""A model that is to draw gets an image tokenizer, and where it has none, a place in its vocabulary for the codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import AddedToken

from dmllm.checkpoints.image_tokenizer import load_image_tokenizer
from dmllm.checkpoints.vocabulary import widen
from dmllm.config import keys_of, refuse_unknown
from dmllm.data.drawn import DrawingProcessor
from dmllm.data.processor import Processor
from dmllm.image_vocabulary import ImageVocabulary
from dmllm.models.multimodal import MultimodalModel

TOKENS = {"begin": "<|begin_of_image|>", "end": "<|end_of_image|>", "newline": "<|end_of_row|>", "draw": "<|draw|>"}


@dataclass(frozen=True, kw_only=True)
class DrawingSpec:
    """What makes pictures of codes, and how a model is taught to draw."""

    image_tokenizer: str
    """Its folder or hub name."""
    size: int | tuple[int, int] = 64
    """Pixels of a side of the pictures that are learned, or (width, height)."""
    caption_dropout: float = 0.1
    """How often a description is left out: without guidance 0 would do."""


def to_draw(
    model: MultimodalModel, processor: Processor, options: Mapping[str, Any], multiple: int = 64
) -> DrawingProcessor:
    """The processor of a model that draws; the model's vocabulary grows by codes where it has none.

    Args:
        options: fields of `DrawingSpec`.
        multiple: of which a vocabulary that grows gets so many rows.

    Raises:
        ValueError: an unknown field, or another number of codes than the model has.
    """
    refuse_unknown(list(options), keys_of(DrawingSpec), "model.drawing")
    spec = DrawingSpec(**options)
    image_tokenizer = load_image_tokenizer(spec.image_tokenizer)
    images = model.config.images or _grown(model, processor.tokenizer, image_tokenizer.num_codes, multiple)
    if images.size != image_tokenizer.num_codes:
        raise ValueError(
            f"model.drawing.image_tokenizer has {image_tokenizer.num_codes} codes, and the model {images.size}; "
            "take the one that it was trained with."
        )
    size = spec.size if isinstance(spec.size, int) else tuple(spec.size)
    return DrawingProcessor(
        processor.tokenizer,
        processor.config,
        processor.special,
        processor.chat_template,
        images=images,
        image_tokenizer=image_tokenizer,
        size=size,  # type: ignore[arg-type]
        caption_dropout=spec.caption_dropout,
    )


def _grown(model: MultimodalModel, tokenizer: Any, codes: int, multiple: int) -> ImageVocabulary:
    """The model with rows for codes behind all tokens, and `tokenizer` with what frames them."""
    used = sorted(tokenizer.get_vocab().values())
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(text, special=True, normalized=False) for text in TOKENS.values()]},
        replace_extra_special_tokens=False,
    )
    ids = {name: int(tokenizer.convert_tokens_to_ids(text)) for name, text in TOKENS.items()}
    offset = max(*used, *ids.values()) + 1
    images = ImageVocabulary(
        offset=offset,
        size=codes,
        begin=ids["begin"],
        end=ids["end"],
        newline=ids["newline"],
        draw=(ids["draw"],),
        mask=model.config.special.mask,
    )
    fresh = sorted({*ids.values()} - {*used}) + list(range(offset, offset + codes))
    widen(model, used=used, fresh=fresh, multiple=multiple)
    model.config.image_vocabulary = asdict(images)
    return images
