"""A byte-level tokenizer with the names that Qwen gives its special tokens, and weights with rows for it."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZE = 320
IDS = {"pad_token_id": 300, "eos_token_id": 300, "bos_token_id": 300, "mask_token_id": 302, "image_token_id": 305}
NAMES = {
    "<|endoftext|>": 300,
    "<|mask|>": 302,
    "<|image_pad|>": 305,
    "<|im_start|>": 306,
    "<|im_end|>": 307,
    "<|vision_start|>": 308,
    "<|vision_end|>": 309,
}


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, and the names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = {f"<unused{i}>": i for i in range(256, SIZE) if i not in NAMES.values()}
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | NAMES | unused
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        extra_special_tokens=[*NAMES][2:],
    )


def with_rows(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with SIZE rows of vocabulary."""
    grown = dict(weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = torch.cat([grown[name]] * 4)[:SIZE]
    return grown
