"""What tokens add to a text, for the kinds of vocabularies that models have."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dmllm.data.pieces import pieces

TEXTS = ["yes", " yes", "no no", "Grüße, 日本 🙂!", "a  b", "\n- x", "1 2"]


def decode(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def joined(tokenizer, ids: list[int]) -> str:
    found = pieces(tokenizer, decode(tokenizer))
    assert all(found.within[i] is not None for i in ids)
    return b"".join((found.within if at else found.first)[i] or b"" for at, i in enumerate(ids)).decode()


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{letter: at for at, letter in enumerate([*alphabet, "no", "Ġno", "Ã¼"], 1)}}
    own = Tokenizer(models.BPE(vocab=vocabulary, merges=[("n", "o"), ("Ġ", "no"), ("Ã", "¼")]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>")


def sentencepiece() -> PreTrainedTokenizerFast:
    letters = ["▁", *"yesnoGr,!ab-x12", "▁no", "▁yes", "▁▁"]
    rest = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: at for at, token in enumerate(["<unk>", *rest, *letters])}
    merges = [("▁", "▁"), ("n", "o"), ("▁", "no"), ("y", "e"), ("ye", "s"), ("▁", "yes")]
    vocabulary |= {"no": len(vocabulary), "ye": len(vocabulary) + 1, "yes": len(vocabulary) + 2}
    own = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    own.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["bytes", "strip"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_are_its_bytes(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = decode(tokenizer)(ids)
    assert joined(tokenizer, ids) == shown
    assert shown.lstrip() == text.lstrip()  # sentencepiece does not tell whether a text opens with a space


def test_a_character_may_be_split_over_tokens() -> None:
    tokenizer = byte_level()
    found = pieces(tokenizer, decode(tokenizer)).within
    assert found[tokenizer.convert_tokens_to_ids("Ã¼")] == "ü".encode()
    assert {bytes([byte]) for byte in range(256)} <= set(found)


def test_the_space_that_opens_a_text_is_not_shown_and_special_tokens_are_no_text() -> None:
    tokenizer = sentencepiece()
    found = pieces(tokenizer, decode(tokenizer))
    number = tokenizer.convert_tokens_to_ids
    assert (found.within[number("▁no")], found.first[number("▁no")]) == (b" no", b"no")
    assert (found.within[number("▁")], found.first[number("▁")]) == (b" ", b"")
    assert (found.within[number("<0x20>")], found.first[number("<0x20>")]) == (b" ", b"")
    assert found.within[number("<0xE6>")] == b"\xe6"
    assert found.within[number("<unk>")] is None
    assert pieces(byte_level(), decode(byte_level())).within[0] is None


def test_a_tokenizer_that_joins_tokens_in_its_own_way_is_refused() -> None:
    own = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    own.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("bb", "c")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    with pytest.raises(ValueError, match="constraints take byte-level and sentencepiece vocabularies"):
        pieces(tokenizer, decode(tokenizer))
