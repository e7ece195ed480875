"""A trained tokenizer gives any text back unchanged, and keeps special tokens and isolated characters whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dmllm.checkpoints.tokenizer import SMALLEST, train_tokenizer
from dmllm.data.chat import SPECIAL_TOKENS

TEXT = "a red circle is left of a blue square. the code is AB12 AB12 AB12\n" * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT)
    turns = [{"from": "human", "value": "<image>\nhow many?"}, {"from": "gpt", "value": "seventeen seventeen"}]
    (folder / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 5))
    files = [folder / "text.txt", str(folder / "data.json")]
    return AutoTokenizer.from_pretrained(train_tokenizer(files, vocab_size=330, out=folder / "out", isolate="[A-Z0-9]"))


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_words_are_merged_and_isolated_characters_never_are(tokenizer):
    assert len(tokenizer.tokenize("circle square seventeen")) <= 5
    assert tokenizer.tokenize("AB12") == ["A", "B", "1", "2"]


def test_special_tokens_have_the_first_ids_and_are_one_token_each(tokenizer):
    for index, text in enumerate(SPECIAL_TOKENS.values()):
        assert tokenizer(f"a{text}b", add_special_tokens=False).input_ids[1] == index
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.mask_token) == ("<|pad|>", "<|end|>", "<|mask|>")


def test_the_chat_template_comes_along(tokenizer):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|user|><|image|>how many?<|end|><|assistant|>"


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"at least {SMALLEST}"):
        train_tokenizer([], vocab_size=100, out=tmp_path)
    with pytest.raises(ValueError, match="not a regular expression"):
        train_tokenizer([], vocab_size=300, out=tmp_path, isolate="[")
    with pytest.raises(ValueError, match="no file"):
        train_tokenizer([tmp_path / "nothing.txt"], vocab_size=300, out=tmp_path / "out")
