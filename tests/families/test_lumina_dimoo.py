"""Lumina-DiMOO: its configuration, keys and picture ids, as its authors' code has them (Alpha-VLLM/Lumina-DiMOO)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import dmllm
from dmllm.checkpoints.published import write_published
from dmllm.families import FAMILIES, family_of
from dmllm.families.lumina_dimoo import CHAT_TEMPLATE, IMAGES, LUMINA_DIMOO, SYSTEM, image_vocabulary

MMADA = Path(__file__).parents[1] / "golden" / "mmada"  # the same transformer under the same names


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    config = json.loads((MMADA / "config.json").read_text())
    config |= {"model_type": "llada", "architectures": ["LLaDAForMultiModalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(MMADA / "model.safetensors"), tmp_path / "model.safetensors")
    return tmp_path


def test_its_class_tells_it_from_llada_whose_model_type_it_has(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert family_of(config) is LUMINA_DIMOO
    assert family_of({**config, "architectures": ["LLaDAModelLM"]}) is FAMILIES.load("llada")
    assert family_of({**config, "model_type": "lumina_dimoo", "architectures": None}) is LUMINA_DIMOO


def test_it_computes_what_lladas_transformer_computes(checkpoint):
    expected = load_file(MMADA / "expected.safetensors")
    logits = dmllm.load(str(checkpoint), device="cpu").logits(expected["mmu/idx2"])
    torch.testing.assert_close(logits, expected["logits/mmu"], atol=1e-4, rtol=0)


def test_the_checkpoint_comes_back_to_the_bit(checkpoint, tmp_path):
    out = tmp_path / "back"
    write_published(dmllm.load(str(checkpoint), device="cpu").model, out)
    there, back = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert json.loads((out / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())


def test_a_vocabulary_that_the_configuration_does_not_have_is_refused_by_name(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "embedding_size": 134548}))
    with pytest.raises(ValueError, match=r"model\.transformer\.(wte|ff_out)\.weight is \[192, 32\].*\[134548, 32\]"):
        dmllm.load(str(checkpoint), device="cpu")


def test_rows_of_a_picture_end_with_a_newline_and_a_question_with_the_opening_of_its_answer():
    codes = torch.tensor([[0, 1], [2, 8191]])
    picture = [126349, 126356, 126357, 126084, 126358, 134547, 126084, 126350]
    assert IMAGES.picture(codes).tolist() == picture
    assert IMAGES.codes(IMAGES.picture(codes)).tolist() == codes.flatten().tolist()
    assert IMAGES.understanding(codes, [9], before=[5, 6]).tolist() == [5, 6, *picture, 9, 126354]
    with pytest.raises(ValueError, match=r"codes are \[4\]; this vocabulary takes \[rows, columns\]"):
        IMAGES.picture(codes.flatten())
    assert image_vocabulary({"mask_token_id": 126336}) is IMAGES
    assert image_vocabulary({"mask_token_id": 120}) is None


def test_a_question_is_framed_by_tags_as_the_authors_frame_it():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    tokenizer.chat_template = CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"<system>{SYSTEM}</system><user>Why?</user><answer>"
