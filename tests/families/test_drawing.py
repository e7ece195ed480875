"""Pictures drawn here and by the authors' samplers, from the same random numbers: MMaDA's and Lumina-DiMOO's.

MMaDA's first six are its whole code's; what was recorded besides is its sampler's and Lumina-DiMOO's on logits of this
model (which are the authors' own, see test_mmada.py and test_lumina_dimoo.py).
"""

import json
from pathlib import Path

import pytest
import torch

import dmllm
from dmllm.drawing import Guidance, draw
from dmllm.samplers.schedules import open_shares

GOLDEN = Path(__file__).parents[1] / "golden"
MMADA, LUMINA = (json.loads((GOLDEN / name / "drawing.json").read_text()) for name in ("mmada", "lumina_dimoo"))
IDS = MMADA["special_ids"]
NAMES = {"pow2": "square", "pow3": "cubic"}  # of schedules, here


@pytest.fixture(scope="module")
def mmada() -> dmllm.Pipeline:
    own = {"offset": 128, "size": 64, "begin": 100, "end": 101, "mask": 120, "draw": [104, 118], "draw_end": [119]}
    own = {**own, "draw_length": 13, "pad": 109}
    return dmllm.load(str(GOLDEN / "mmada"), device="cpu", config={"image_vocabulary": own})


@pytest.fixture(scope="module")
def lumina() -> dmllm.Pipeline:
    own = {"offset": 128, "size": 64, "begin": 101, "end": 102, "mask": 120, "newline": 100, "answer": [104, 105]}
    return dmllm.load(str(GOLDEN / "lumina_dimoo"), device="cpu", config={"image_vocabulary": {**own, "edit_end": 1}})


@pytest.mark.parametrize("name", MMADA["t2i_prompt"])
def test_mmadas_prompt_is_the_authors_sequence_of_ids_without_its_padding(mmada, name):
    recorded, images = MMADA["t2i_prompt"][name], mmada.model.config.images
    ids, slots = images.canvas(4, 4)
    made = [*images.drawing(recorded["text_ids"]), *ids.tolist()]
    assert made == [number for number in recorded["input_ids"] if number != IDS["[iPAD]"]]
    assert slots.tolist() == list(range(16))


@pytest.mark.parametrize("name", MMADA["t2i_generate"])
def test_mmada_draws_the_authors_codes(mmada, name):
    case, images = MMADA["t2i_generate"][name], mmada.model.config.images
    params, texts = case["params"], [MMADA["t2i_prompt"][prompt]["text_ids"] for prompt in case["prompts"]]
    prompts, scales = [[images.drawing(text) for text in texts]], ()
    if params["guidance_scale"]:
        prompts, scales = [*prompts, [images.drawing([]) for _ in texts]], (params["guidance_scale"],)
    shared = [torch.Generator().manual_seed(params["seed"])] * len(texts)
    *_, last = draw(
        mmada.model,
        prompts,
        (4, 4),
        codes=None if case["codes"] is None else torch.tensor(case["codes"]).view(-1, 4, 4),
        guidance=Guidance(scales=scales),
        generator=shared,
        steps=params["timesteps"],
        schedule="maskgit_fixed",
        noise_schedule=NAMES.get(params["schedule"], params["schedule"]),
        order_temperature=params["temperature"],
        order_cooling="compounding",
        sampling="multinomial",
    )
    assert last.codes.flatten(1).tolist() == case["output_codes"]
    assert last.num_forwards.tolist() == [params["timesteps"]] * len(texts)


@pytest.mark.parametrize("name", MMADA["schedules"])
def test_what_a_schedule_leaves_open_is_what_the_authors_leave(name):
    recorded = torch.tensor(MMADA["schedules"][name])[1:]
    torch.testing.assert_close(open_shares(NAMES.get(name, name), 8, torch.device("cpu")), recorded, atol=2e-6, rtol=0)


def drawn(pipeline, prompts, case, scales):
    params = case["params"]
    *_, last = draw(
        pipeline.model,
        [[prompt] for prompt in prompts],
        tuple(case["size"]),
        codes=torch.tensor([case["codes"]]) if case.get("codes") else None,
        guidance=Guidance(scales=scales),
        generator=case["seed"],
        steps=params["timesteps"],
        temperature=params["temperature"],
        order_temperature=params["temperature"],
        order_cooling="constant",
        sampling="gumbel",
    )
    return last.codes[0].tolist()


@pytest.mark.parametrize("name", LUMINA["t2i"])
def test_lumina_dimoo_draws_the_authors_codes(lumina, name):
    case, images = LUMINA["t2i"][name], lumina.model.config.images
    prompts, scale = [images.drawing(LUMINA["text"])], case["params"].get("cfg_scale", 0.0)
    prompts += [images.drawing(LUMINA["uncond"])] if scale else []
    assert drawn(lumina, prompts, case, (scale,) if scale else ()) == case["output_codes"]


@pytest.mark.parametrize("name", LUMINA["i2i"])
def test_lumina_dimoo_edits_to_the_authors_codes_guided_by_text_and_by_picture(lumina, name):
    case, images, source = LUMINA["i2i"][name], lumina.model.config.images, [torch.tensor(LUMINA["source"])]
    prompts, scales = [images.editing(source, LUMINA["text"])], ()
    if "cfg_scale" in case["params"]:
        prompts += [images.editing(source, LUMINA["uncond"]), images.drawing(LUMINA["text"])]
        scales = (case["params"]["cfg_scale"], case["params"]["cfg_img"])
    assert drawn(lumina, prompts, case, scales) == case["output_codes"]
