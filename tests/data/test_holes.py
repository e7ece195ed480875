"""Texts with holes: what is fixed reads back as it was written, whatever the vocabulary."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dmllm.data.chat import SPECIAL_TOKENS
from dmllm.data.holes import Hole, gapped, parse
from dmllm.data.processor import Processor, ProcessorConfig
from dmllm.data.tokens import SPACE, WORD
from dmllm.types import SpecialTokens

CORPUS = ["A cat is left of the small dog.", "the dog is right of a cat, and the cats are small", "a small cat"] * 20
QUESTION = [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]
TEXTS = [
    "A [MASK:1..3] is left of the [MASK:2].",
    "[MASK]s are small",
    " [MASK] cat",
    "the cat [MASK] [MASK:2] [MASK]",
    "cat[MASK][MASK:3]dog",
    "a  [MASK]\n[MASK]\n\n the d\u00f6g \u732b [MASK]\u00e9",
    "[MASK]",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a space is prepended to every text, bytes stand for what the vocabulary has not."""
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    learner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_of = [f"<0x{i:02X}>" for i in range(256)]
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *bytes_of]))
    whole = json.loads(learner.to_str())
    whole["added_tokens"] = whole["added_tokens"][:1]  # bytes are text
    return Tokenizer.from_str(json.dumps(whole))


def processor(backend: Tokenizer, **config) -> Processor:
    backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    ids = {name: tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[name]) for name in ("mask", "eos", "pad")}
    return Processor(tokenizer, ProcessorConfig(**config), SpecialTokens(**ids))


@pytest.fixture(scope="module", params=[byte_level, sentencepiece], ids=lambda make: make.__name__)
def spelled(request: pytest.FixtureRequest) -> Processor:
    return processor(request.param())


@pytest.mark.parametrize("messages", [None, QUESTION], ids=["alone", "answer"])
@pytest.mark.parametrize("text", TEXTS)
def test_whatever_fills_the_holes_the_rest_reads_as_written(spelled: Processor, text: str, messages) -> None:
    own = gapped(spelled, text, messages)
    assert own.texts == parse(text)[0]
    kinds, draws = spelled.tokens.kinds, torch.Generator().manual_seed(0)
    for lengths in own.lengths():
        laid = own.lay(lengths)
        assert laid.ids.count(spelled.special.mask) == sum(lengths)
        for _ in range(5):
            ids = list(laid.ids)
            for place, token in enumerate(ids):
                if token == spelled.special.mask:
                    fitting = kinds[laid.kinds[place]].nonzero().flatten()
                    # one byte of several is no character yet
                    whole = [t for t in fitting.tolist() if "\ufffd" not in spelled.decode([t])]
                    ids[place] = whole[int(torch.randint(len(whole), (), generator=draws))]
            said, filled, hole_ids = own.read(laid, ids, spelled.decode)
            assert said == "".join(part for pair in zip(own.texts, [*filled, ""], strict=True) for part in pair)
            assert [len(own) for own in hole_ids] == list(lengths)
            alone = spelled.decode(ids[: laid.cuts[-1]])
            assert alone == said or spelled.tokens.tokenizer.convert_ids_to_tokens(ids[0]).startswith("<0x")


def test_a_space_before_a_hole_goes_to_its_first_token() -> None:
    for make in (byte_level, sentencepiece):
        own = gapped(spelled := processor(make()), "the [MASK:2] is [MASK]", None)
        assert [hole.spaced for hole in own.holes] == [True, True]
        laid = own.lay((2, 1))
        assert [k for k, token in zip(laid.kinds, laid.ids, strict=True) if token == own.mask] == [SPACE, 0, WORD]
        assert spelled.decode([t for t in laid.ids if t != own.mask]) == "the is"
    single = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    single.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    single.decoder = decoders.ByteLevel()
    own = gapped(processor(single), "a [MASK]", None)
    assert not own.holes[0].spaced, "there are no words with their space"
    assert len(own.parts[0]) == 2


def test_behind_an_answer_stands_what_training_puts_there() -> None:
    padding = processor(byte_level(), answer_lengths=(8, 16))
    own = gapped(padding, "a [MASK:1..2] cat", QUESTION)
    end = padding.special.eos
    assert own.end == [end]
    for lengths in own.lengths():
        laid = own.lay(lengths)
        assert len(laid.ids) == 8
        assert laid.ids[laid.cuts[-1] :] == [end] * (8 - laid.cuts[-1])
    short, long = (own.lay((n,)) for n in (1, 2))
    assert set(short.columns[: short.cuts[-1]]) < set(long.columns), "a token has its column whatever the lengths"
    alone = gapped(padding, "a [MASK:1..2] cat", None)
    assert (alone.end, alone.size) == ([], 0)


def test_holes_are_read_or_refused_by_name() -> None:
    assert parse("a[MASK]b[MASK:12]c[MASK:2..3]") == (["a", "b", "c", ""], [Hole(1, 1), Hole(12, 12), Hole(2, 3)])
    for wrong in ("[MASK:0]", "[MASK:3..2]", "[MASK:x]", "[MASK:]", "[MASK-2]", "[MASK:1...3]"):
        with pytest.raises(ValueError, match="is no hole: say"):
            parse(f"a {wrong} b")
    with pytest.raises(ValueError, match="There is no hole in 'a b'"):
        parse("a b")
    with pytest.raises(ValueError, match="special token"):
        gapped(processor(byte_level()), "<|mask|> [MASK]", None)
    with pytest.raises(ValueError, match=r"does not give 'a<\|end\|>' back"):
        gapped(processor(byte_level()), "a<|end|>[MASK]", None)


def test_a_hole_of_any_length_begins_empty():
    texts, holes = parse("a [MASK:*] b[MASK:2][MASK:*]")
    assert texts == ["a ", " b", "", ""]
    assert [(hole.least, hole.most, hole.grows) for hole in holes] == [(0, 0, True), (2, 2, False), (0, 0, True)]
    for wrong in ("[MASK:**]", "[MASK:0]", "[MASK:*..3]", "[MASK;*]"):
        with pytest.raises(ValueError, match="is no hole"):
            parse(wrong)
