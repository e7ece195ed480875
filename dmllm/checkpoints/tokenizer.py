"""Tokenizers for models from scratch: byte-level BPE with the special tokens and chat template of `data.chat`.

All 256 bytes are in the alphabet, so any text has ids and comes back unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dmllm.data.chat import CHAT_TEMPLATE, SPECIAL_TOKENS
from dmllm.data.sources import DataSource, open_source
from dmllm.types import SpecialTokens

SMALLEST = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(
    files: Sequence[str | Path], *, vocab_size: int, out: str | Path, isolate: str | None = None
) -> Path:
    """Learn merges from texts and write the tokenizer's folder.

    Args:
        files: text files, and .json or .jsonl data sets, of which questions and answers are read.
        vocab_size: ids, special tokens and the 256 bytes included; fewer where the texts have nothing left to merge.
        out: the folder: tokenizer.json, tokenizer_config.json, chat_template.jinja.
        isolate: regular expression of characters that are never merged, e.g. "[A-Z0-9]" for one token a digit.

    Raises:
        ValueError: `vocab_size` is too small, `isolate` is no regular expression, or a file cannot be read.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size={vocab_size} must be at least {SMALLEST}: 256 bytes and the special tokens.")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = split if isolate is None else pre_tokenizers.Sequence([_isolating(isolate), split])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files), trainer)
    folder = Path(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS["pad"],
        eos_token=SPECIAL_TOKENS["eos"],
        mask_token=SPECIAL_TOKENS["mask"],
        extra_special_tokens=[SPECIAL_TOKENS[name] for name in ("image", "user", "assistant", "system")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder


def read_tokenizer(folder: Path, kind: str | None = None) -> Any:
    """The tokenizer of a published folder. A class that the folder brings as code is not run.

    Args:
        kind: the class of transformers to read it with, where the folder names one of its own; None: its
            tokenizer.json says all.

    Raises:
        ValueError: the folder's tokenizer cannot be had without running its code.
    """
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = settings.get("auto_map")
    if kind and not hasattr(transformers, settings.get("tokenizer_class") or kind):
        own = True  # a class that was never published
    if not own:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not (folder / "tokenizer.json").is_file() and kind is None:
        raise ValueError(
            f"{folder}: its tokenizer is code, which is never run, and there is no tokenizer.json; write one with "
            "transformers on a machine that trusts it (save_pretrained of a fast tokenizer)."
        )
    found = getattr(transformers, kind) if kind else PreTrainedTokenizerFast
    tokenizer = found.from_pretrained(folder)
    tokenizer.init_kwargs.pop("auto_map", None)  # it would be written with the tokenizer, and asked for again
    return tokenizer


def byte_tokenizer(special: SpecialTokens, size: int) -> PreTrainedTokenizerFast | None:
    """One id a byte around the special ids of a model with `size` rows of vocabulary; None where they are too few."""
    ids = {name: getattr(special, name) for name in ("pad", "eos", "mask", "image")}
    names = {number: SPECIAL_TOKENS[name] for name, number in ids.items() if number in range(size)}
    free = [number for number in range(size) if number not in names]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if len(free) < len(alphabet) or not {special.pad, special.eos, special.mask} <= names.keys():
        return None
    vocabulary = {f"<unused{number}>": number for number in free[len(alphabet) :]}
    vocabulary |= dict(zip(alphabet, free)) | {text: number for number, text in names.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=names[special.eos],
        pad_token=names[special.pad],
        mask_token=names[special.mask],
        extra_special_tokens=[names[special.image]] if special.image in names else [],
        clean_up_tokenization_spaces=False,
    )


def _isolating(pattern: str) -> pre_tokenizers.PreTokenizer:
    try:
        return pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"isolate={pattern!r} is not a regular expression: {error}") from None


def _texts(files: Sequence[str | Path]) -> Iterator[str]:
    for file in map(Path, files):
        if file.suffix in (".json", ".jsonl"):
            for record in open_source(DataSource(json_path=str(file))):
                yield from (p["text"] for m in record.messages for p in m["content"] if "text" in p)
        elif file.is_file():
            with file.open(encoding="utf-8") as lines:
                yield from lines
        else:
            raise ValueError(f"There is no file {file}; the working directory is {Path.cwd()}.")
