"""Lumina-DiMOO here and in its authors' code (Alpha-VLLM/Lumina-DiMOO): tiny random weights, recorded logits and
answers. Recorded with transformers 4.50.3 in float32; the same code in float64 gives the same tokens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import dmllm
from dmllm.checkpoints.published import write_published
from dmllm.families import FAMILIES, family_of
from dmllm.families.lumina_dimoo import CHAT_TEMPLATE, IMAGES, LUMINA_DIMOO, SYSTEM, decode_of, image_vocabulary
from dmllm.image_vocabulary import ImageVocabulary
from dmllm.objectives import build_objective
from tests.families.recorded import corrupted, mean

GOLDEN = Path(__file__).parents[1] / "golden" / "lumina_dimoo"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CASES = json.loads((GOLDEN / "cases.json").read_text())
IDS, PROMPTS = CASES["special_ids"], CASES["prompts"]
# The recorded model's vocabulary is small, so its ids are too; the authors' are in the family's table.
SMALL = ImageVocabulary(
    offset=IDS["image_token_offset"],
    size=IDS["codebook_size"],
    begin=IDS["boi"],
    end=IDS["eoi"],
    mask=IDS["mask"],
    newline=IDS["newline"],
    answer=(IDS["answer_start"], IDS["answer_end"]),
)
STOPPED = [name for name, case in CASES["generate"].items() if "eos" in case]
WHOLE = [name for name in CASES["generate"] if name not in STOPPED]


@pytest.fixture(scope="module")
def pipeline() -> dmllm.Pipeline:
    return dmllm.load(str(GOLDEN), device="cpu")


def asked(case: dict) -> tuple[list[list[int]], dict]:
    """The prompts of a recorded answer, and its settings under our names."""
    params = case["params"]
    blocks = params["gen_length"] // params["block_length"]
    return [PROMPTS[name] for name in case["prompt"].split("+")], {
        "max_new_tokens": params["gen_length"],
        "block_length": params["block_length"],
        "block_steps": params["steps"] // blocks,
        "cfg_scale": params.get("cfg_scale", 0.0),
        "suffix_ids": [IDS["answer_end"]],
        "eos_token_id": [],
    }


@pytest.mark.parametrize("name", ["one", "two", "text", "batch"])
def test_logits_over_text_and_codes_are_the_authors(pipeline, name):
    ids = [PROMPTS["one"], PROMPTS["other"]] if name == "batch" else [PROMPTS[name]]
    torch.testing.assert_close(pipeline.logits(ids), EXPECTED[f"logits/{name}"], atol=1e-4, rtol=0)


def test_padding_is_hidden_which_in_the_authors_code_is_seen(pipeline):
    rows = [PROMPTS[name] for name in ("one", "text", "two")]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    torch.testing.assert_close(pipeline.logits(ids), EXPECTED["logits/ragged"], atol=1e-4, rtol=0)
    found = pipeline.logits(ids, mask)
    for row, name in zip(found, ("one", "text", "two"), strict=True):
        alone = EXPECTED[f"logits/{name}"][0]
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", WHOLE)
def test_answers_are_the_authors(pipeline, name):
    case = CASES["generate"][name]
    prompts, options = asked(case)
    made = pipeline.generate(prompts, **options)
    length = len(prompts[0])
    assert made.sequences[:, length:].tolist() == [row[:-1] for row in case["output"]]
    assert made.num_forwards.tolist() == [case["forwards"]] * len(prompts)


@pytest.mark.parametrize("name", ["semi", "cfg_semi"])
def test_an_ending_may_be_given_as_a_draft_too(pipeline, name):
    case = CASES["generate"][name]
    prompts, options = asked(case)
    length = options["max_new_tokens"]
    options |= {"suffix_ids": [], "max_new_tokens": length + 1}
    made = pipeline.generate(prompts, draft=[[IDS["mask"]] * length + [IDS["answer_end"]]], **options)
    assert made.sequences[:, len(prompts[0]) :].tolist() == case["output"]
    assert int(made.num_forwards) == case["forwards"]


def test_calls_are_shared_by_the_blocks_of_the_answer_whatever_stands_behind_it(pipeline):
    case = CASES["generate"]["semi"]
    prompts, options = asked(case)
    made = pipeline.generate(prompts, **{**options, "block_steps": None, "steps": case["params"]["steps"]})
    assert made.sequences[0, len(prompts[0]) :].tolist() == case["output"][0][:-1]
    with pytest.raises(ValueError, match=r"suffix_ids=\[105\] is not for visibility='block:4'"):
        pipeline.generate(prompts, **options, visibility="block:4")


def test_guidance_hides_the_ending_with_the_prompt(pipeline):
    case = CASES["generate"]["cfg"]
    prompts, options = asked(case)
    made = pipeline.generate(prompts, cfg_masks_draft=False, **options)
    assert made.sequences[:, len(prompts[0]) :].tolist() != [case["output"][0][:-1]]
    one = {**options, "block_length": 1, "block_steps": None}  # so that every call makes all that is cached anew
    kept, plain = (pipeline.generate(prompts, **one, **more) for more in ({"cache": "dual"}, {}))
    assert torch.equal(kept.sequences, plain.sequences)


@pytest.mark.parametrize("name", STOPPED)
def test_an_answer_ends_at_its_end_token_with_the_block_in_which_the_authors_meant_to_stop(pipeline, name):
    """Their code with the slice that was meant, which otherwise names variables that are not there."""
    case = CASES["generate"][name]
    prompts, options = asked(case)
    made = pipeline.generate(prompts, **{**options, "eos_token_id": case["eos"]}, eos_early_stop=False)
    assert made.trajectory[-1].ids[0, : len(case["output"][0])].tolist() == case["output"][0]
    assert int(made.num_forwards) == case["forwards"]
    early = pipeline.generate(prompts, **{**options, "eos_token_id": case["eos"]})
    assert torch.equal(early.sequences, made.sequences)
    assert int(early.num_forwards) <= case["forwards"]


def test_the_loss_is_the_mean_over_masked_tokens(pipeline):
    ids, labels = EXPECTED["train/ids"], EXPECTED["train/labels"]
    objective = build_objective("masked", {"reduction": "masked", "weight": "none"}, pipeline.special, "full")
    hidden = corrupted(objective, ids, labels, torch.ones(()), scored=labels != -100)
    assert torch.equal(hidden.batch.input_ids, ids)
    assert abs(mean(objective, pipeline.model, hidden) - float(EXPECTED["train/loss"])) < 1e-4


def test_a_question_about_pictures_is_the_authors_sequence_of_ids():
    codes = torch.tensor(CASES["codes"]["a"])
    assert IMAGES.picture(codes).tolist() == CASES["picture_ids_of_a"]
    ids = torch.tensor(PROMPTS["one"])
    begin, end = (PROMPTS["one"].index(token) for token in (IDS["boi"], IDS["eoi"]))
    assert SMALL.codes(ids).tolist() == codes.flatten().tolist()
    assert torch.equal(SMALL.understanding(codes, ids[end + 1 : -1].tolist(), ids[:begin].tolist()), ids)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    return tmp_path


def test_its_class_tells_it_from_llada_whose_model_type_it_has(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert family_of(config) is LUMINA_DIMOO
    assert family_of({**config, "architectures": ["LLaDAModelLM"]}) is FAMILIES.load("llada")
    assert family_of({**config, "model_type": "lumina_dimoo", "architectures": None}) is LUMINA_DIMOO


def test_the_checkpoint_comes_back_to_the_bit(checkpoint, tmp_path):
    out = tmp_path / "back"
    write_published(dmllm.load(str(checkpoint), device="cpu").model, out)
    there, back = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert json.loads((out / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())


def test_the_authors_mask_token_is_meant_where_none_is_said():
    config = json.loads((GOLDEN / "config.json").read_text())
    assert LUMINA_DIMOO.config(config)["mask_token_id"] == IDS["mask"]
    del config["mask_token_id"]
    assert LUMINA_DIMOO.config(config)["mask_token_id"] == 126336


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
    assert decode_of({}) == {"suffix_ids": [126355]}
    assert image_vocabulary({"mask_token_id": 120}) is None
    assert decode_of({"mask_token_id": 120}) == {}


def test_a_question_is_framed_by_tags_as_the_authors_frame_it():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    tokenizer.chat_template = CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"<system>{SYSTEM}</system><user>Why?</user><answer>" == CASES["prompt_text"] + "<answer>"
