"""MMaDA here and in its authors' code (Gen-Verse/MMaDA): tiny random weights, recorded logits and answers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmllm
from dmllm.checkpoints.published import write_published
from dmllm.families import FAMILIES, family_of
from dmllm.image_vocabulary import ImageVocabulary

GOLDEN = Path(__file__).parents[1] / "golden" / "mmada"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CASES = json.loads((GOLDEN / "cases.json").read_text())
IDS = CASES["special_ids"]
# The recorded model's vocabulary is small, so its ids are too; the authors' are in the family's table.
IMAGES = ImageVocabulary(
    offset=IDS["image_token_offset"],
    size=IDS["codebook_size"],
    begin=IDS["<|soi|>"],
    end=IDS["<|eoi|>"],
    mask=IDS["mask"],
    understand=(IDS["<|mmu|>"],),
)


@pytest.fixture(scope="module")
def pipeline() -> dmllm.Pipeline:
    return dmllm.load(str(GOLDEN), device="cpu")


def test_logits_over_text_and_codes_are_the_authors(pipeline):
    torch.testing.assert_close(pipeline.logits(EXPECTED["mmu/idx2"]), EXPECTED["logits/mmu"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["short", "long"])
def test_logits_of_a_padded_picture_prompt_are_the_authors(pipeline, case):
    ids = torch.tensor([CASES["t2i_prompt"][case]["input_ids"]])
    mask = torch.tensor([CASES["t2i_prompt"][case]["attention_mask"]])
    seen = EXPECTED[f"logits/t2i_{case}_nomask"]
    torch.testing.assert_close(pipeline.logits(ids), seen, atol=1e-4, rtol=0)
    real = mask.bool()
    masked = EXPECTED[f"logits/t2i_{case}_masked"]
    torch.testing.assert_close(pipeline.logits(ids, mask)[real], masked[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["full", "semi", "cfg", "odd", "padmask", "fast_nostop"])
def test_answers_about_pictures_are_the_authors(pipeline, case):
    recorded = CASES["mmu_generate"][case]
    options = {k: v for k, v in recorded["params"].items() if k not in ("attention_mask", "eot_token")}
    ids = EXPECTED[f"mmu/{recorded['idx']}"]
    mask = recorded["params"].get("attention_mask")
    mask = None if mask is None else torch.tensor(mask)[:, : ids.shape[1]]
    made = pipeline.generate(ids, mask, eos_token_id=[], **options)
    recorded = torch.tensor(recorded["output"])
    holes = recorded == IDS["mask"]  # in one place of "semi" the authors' code commits the mask token
    assert int(holes.sum()) == (case == "semi")
    assert torch.equal(made.sequences[~holes], recorded[~holes])
    assert made.num_forwards.tolist() == [options["steps"]] * len(ids)


def test_an_answer_ends_at_its_end_token_with_the_block_in_which_the_authors_stop(pipeline):
    recorded = CASES["mmu_generate"]["fast_stop"]
    options = {k: v for k, v in recorded["params"].items() if k != "eot_token"}
    made = pipeline.generate(EXPECTED["mmu/idx"], eos_token_id=recorded["params"]["eot_token"], **options)
    known = torch.tensor(recorded["output"]) != IDS["mask"]  # they leave what follows as it was
    assert torch.equal(made.sequences[known], torch.tensor(recorded["output"])[known])
    assert made.num_forwards.tolist() == [4]


def test_a_question_about_a_picture_is_the_authors_sequence_of_ids():
    for row in EXPECTED["mmu/idx2"]:
        codes = IMAGES.codes(row)
        place = row.tolist().index(IMAGES.end)
        assert torch.equal(IMAGES.understanding(codes, row[place + 1 :].tolist()), row)


def test_codes_begin_behind_the_tokenizer_and_not_behind_the_rows_of_the_language_model():
    published = {"model_type": "mmada", "mask_token_id": 126336, "llm_vocab_size": 126464, "codebook_size": 8192}
    images = FAMILIES.load("mmada").image_vocabulary(published)
    assert (images.offset, images.size, images.begin, images.end) == (126349, 8192, 126084, 126085)
    assert images.picture(torch.tensor([0, 8191])).tolist() == [126084, 126349, 134540, 126085]
    assert FAMILIES.load("mmada").image_vocabulary({**published, "mask_token_id": 120}) is None
    with pytest.raises(ValueError, match=r"codes lie in 0 .. 8192; allowed: 0 .. 8191"):
        images.picture(torch.tensor([0, 8192]))


def test_the_checkpoint_comes_back_to_the_bit(pipeline, tmp_path):
    write_published(pipeline.model, tmp_path)
    there, back = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((GOLDEN / "config.json").read_text())


def test_a_weight_too_few_or_too_many_and_a_field_that_is_not_computed_are_named(tmp_path):
    weights, config = load_file(GOLDEN / "model.safetensors"), json.loads((GOLDEN / "config.json").read_text())
    assert family_of(config) is FAMILIES.load("mmada")

    def folder(name, weights, **fields):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **fields}))
        return str(tmp_path / name)

    lost = {k: v for k, v in weights.items() if k != "model.transformer.ln_f.weight"}
    with pytest.raises(ValueError, match=r"lacks .*model\.transformer\.ln_f\.weight"):
        dmllm.load(folder("few", lost), device="cpu")
    with pytest.raises(ValueError, match=r"unexpected .*mm_projector\.weight"):
        dmllm.load(folder("many", {**weights, "mm_projector.weight": torch.zeros(2)}), device="cpu")
    with pytest.raises(ValueError, match=r"alibi=True is not supported"):
        dmllm.load(folder("field", weights, alibi=True), device="cpu")
