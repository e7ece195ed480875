"""What `config.json` of a dmllm checkpoint says: the parts of the model and the ids that carry meaning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from dmllm.image_vocabulary import ImageVocabulary
from dmllm.nn.visibility import check_layout
from dmllm.types import SpecialTokens


class DmllmConfig(PreTrainedConfig):
    """Parts as plain mappings, so that the file is complete and readable.

    backbone: the fields of `TransformerConfig`, and optionally `type`, a name of `BACKBONES`.
    vision, projector: the fields of `VisionConfig` and `ProjectorConfig`; null for a text-only model.
    visibility: how prompt and canvas see each other, a name of `nn.visibility.LAYOUTS`, or "block:N".
    row_break: whether a learned vector ends each row of a tiled image.
    tiling: fields of `TilingConfig` by which a model without a processor cuts images; null: one tile.
    unused: weights that the published checkpoint stores and the model does not read, name -> shape: kept as buffers, so
        that it can be written back.
    shift: whether a token is predicted by the row before it (Dream); logits are aligned all the same.
    process, process_options: what the model undoes, a name of `samplers.PROCESSES` and, where it has any, its options.
    heads: what it says beside the logits, name -> options (`models.heads`).
    image_vocabulary: where pictures stand as codes among the tokens, the fields of `ImageVocabulary`; null: nowhere.
    family, published: for a model that came from a published checkpoint, the name of its family and the config.json it
        had, so that it can be written back. published_names: where the family has several names for a weight, that
        checkpoint's.
    """

    model_type = "dmllm"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        projector: dict[str, Any] | None = None,
        mask_token_id: int = 0,
        eos_token_id: int = 1,
        pad_token_id: int = 1,
        image_token_id: int | None = None,
        visibility: str = "full",
        row_break: bool = False,
        tiling: dict[str, Any] | None = None,
        unused: dict[str, list[int]] | None = None,
        shift: bool = False,
        process: str = "absorbing",
        process_options: dict[str, Any] | None = None,
        heads: dict[str, dict[str, Any]] | None = None,
        image_vocabulary: ImageVocabulary | dict[str, Any] | None = None,
        family: str | None = None,
        published: dict[str, Any] | None = None,
        published_names: list[str] | None = None,
        **kwargs: Any,
    ):
        check_layout(visibility)
        self.backbone = backbone or {}
        self.vision = vision
        self.projector = projector
        self.mask_token_id = mask_token_id
        self.image_token_id = image_token_id
        self.visibility = visibility
        self.row_break = row_break
        self.tiling = tiling
        self.unused = unused
        self.shift = shift
        self.process = process
        self.process_options = process_options or {}
        self.heads = heads or {}
        self.image_vocabulary = None if image_vocabulary is None else asdict(ImageVocabulary.of(image_vocabulary))
        self.family = family
        self.published = published
        self.published_names = published_names or []
        kwargs.setdefault("tie_word_embeddings", bool(self.backbone.get("tie_word_embeddings", False)))
        kwargs |= {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**kwargs)

    @property
    def special(self) -> SpecialTokens:
        """The special ids as the data, objectives and samplers take them."""
        return SpecialTokens(
            mask=self.mask_token_id, eos=self.eos_token_id, pad=self.pad_token_id, image=self.image_token_id
        )

    @property
    def images(self) -> ImageVocabulary | None:
        """Where pictures stand as codes among the tokens; None: nowhere."""
        return None if self.image_vocabulary is None else ImageVocabulary.of(self.image_vocabulary)
