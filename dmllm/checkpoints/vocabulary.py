"""What a vocabulary lacks is added: the special tokens, and rows of the embedding and of the vocabulary projection.

A new row is the mean of the rows in use plus a tenth of their deviation in noise: its logit starts where an average
token's is, new tokens differ from each other, and the model's distribution over the old ones hardly moves (Hewitt,
"Initializing new word embeddings", 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from dmllm.data.chat import SPECIAL_TOKENS
from dmllm.models.multimodal import MultimodalModel
from dmllm.types import SpecialTokens

NOISE = 0.1  # of the deviation of the rows in use, per dimension
ALIASES = {
    "mask": ("<|mask|>", "<|mdm_mask|>", "<mask>", "[MASK]"),
    "image": ("<|image|>", "<image>", "<|image_pad|>"),
    "eos": ("<|end|>", "<|endoftext|>", "</s>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
}


def complete_tokenizer(tokenizer: Any, known: Mapping[str, int | None], *, wants_image: bool) -> SpecialTokens:
    """The special ids, from `known`, the tokenizer's own or their usual names; those missing are added to `tokenizer`.

    A tokenizer without a chat template will use `data.chat`'s, and gets all the tokens of that.
    """
    templated = bool(tokenizer.chat_template)
    if not templated:
        for text in SPECIAL_TOKENS.values():
            _add(tokenizer, text)
    ids: dict[str, int | None] = {"image": None}
    for name in ("eos", "pad", "mask", *(["image"] if wants_image else [])):
        found = known.get(name) if templated else _id(tokenizer, SPECIAL_TOKENS[name])
        found = _named(tokenizer, name) if found is None else found
        ids[name] = _add(tokenizer, SPECIAL_TOKENS[name]) if found is None else int(found)
        if name != "image":
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(ids[name]))
    return SpecialTokens(**ids)  # type: ignore[arg-type]


def find_mask(tokenizer: Any, said: int | None) -> tuple[int, bool]:
    """The mask token for a model that was trained without one, and whether it had to be added to `tokenizer`.

    It is the token that the model's configuration says, else the tokenizer's own, by its role or a usual name.
    """
    known = tokenizer.get_vocab().values()
    mask = said if said in known else _named(tokenizer, "mask")
    new = mask is None
    mask = _add(tokenizer, SPECIAL_TOKENS["mask"]) if mask is None else mask
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask)
    return mask, new


def widen(model: MultimodalModel, *, used: Sequence[int], fresh: Sequence[int], multiple: int) -> None:
    """`grow` of a model's two matrices, in place; one that lacks rows for `fresh` gets a multiple of `multiple`."""
    backbone, config = model.backbone, model.config
    matrices = {"embed_tokens.weight": backbone.embed_tokens.weight, "lm_head.weight": backbone.lm_head.weight}
    size = len(matrices["embed_tokens.weight"])
    if max(fresh) >= size:
        size = -(-(max(fresh) + 1) // multiple) * multiple
        config.family = config.published = None  # its authors' config.json no longer describes it
    with torch.no_grad():
        grown = grow(matrices, used=used, fresh=fresh, size=size)
    parameters = {id(matrix): nn.Parameter(matrix.detach()) for matrix in grown.values()}  # one, where they are tied
    for name, matrix in grown.items():
        backbone.get_submodule(name.removesuffix(".weight")).weight = parameters[id(matrix)]
    backbone.embed_tokens.num_embeddings = backbone.lm_head.out_features = size
    backbone.config = replace(backbone.config, vocab_size=size)
    config.backbone = {**config.backbone, "vocab_size": size}


def grow(weights: Mapping[str, Tensor], *, used: Sequence[int], fresh: Sequence[int], size: int) -> dict[str, Tensor]:
    """`weights` with `size` rows of vocabulary; rows beyond the old ones, and those of `fresh`, are new.

    Args:
        weights: a backbone's, by our names.
        used: ids of the tokens that the rows were trained for.
        fresh: ids that are new though the matrix may have had a row for them.
        size: rows afterwards, at least as many as before.
    """
    grown = dict(weights)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        old = weights[name]
        rows = [i for i in fresh if i < len(old)]
        if size == len(old) and not rows:
            continue
        trained = old[[i for i in used if i < len(old)]]
        mean, deviation = trained.mean(0), trained.std(0)
        extended = torch.cat([old, old.new_empty(size - len(old), old.shape[1])])
        rows += range(len(old), size)
        extended[rows] = mean + NOISE * deviation * torch.randn(len(rows), old.shape[1], dtype=old.dtype)
        grown[name] = extended
    if weights["lm_head.weight"] is weights["embed_tokens.weight"]:
        grown["lm_head.weight"] = grown["embed_tokens.weight"]
    return grown


def _named(tokenizer: Any, name: str) -> int | None:
    """The id of a special token by its role in the tokenizer, or by one of its usual names."""
    own = getattr(tokenizer, f"{name}_token_id", None) if name != "image" else None
    named = (i for text in ALIASES[name] if (i := _id(tokenizer, text)) is not None)
    return next((i for i in (own, *named) if i is not None), None)


def _id(tokenizer: Any, text: str) -> int | None:
    return tokenizer.get_vocab().get(text)


def _add(tokenizer: Any, text: str) -> int:
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(text)
