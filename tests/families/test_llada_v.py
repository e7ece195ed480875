"""LLaDA-V against the authors' code: tiles, features, the merged stream, its logits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from dmllm.checkpoints import folder
from dmllm.checkpoints.example import write_example
from dmllm.checkpoints.tokenizer import train_tokenizer
from dmllm.families.llada_v import LLADA_V
from dmllm.families.llava import SO400M, SYSTEM, pinpoints
from dmllm.models.configuration import DmllmConfig
from dmllm.nn.visibility import Visibility
from dmllm.pipeline import load
from dmllm.samplers.canvas import reply_length
from dmllm.tiling import plan
from dmllm.types import TEXT
from tests.families.recorded_pictures import Recorded, assert_written_back, digests, threads  # noqa: F401

RECORDED = Recorded("llada_v", threads=1)  # recorded with 2
CASES = RECORDED.cases
MERGED = CASES["merge_cases"]
LLADA_TOKENS = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GREEDY = [name for name, case in CASES["generate"].items() if not {"temperature", "remasking"} & case["params"].keys()]
pytestmark = [pytest.mark.usefixtures("threads"), pytest.mark.parametrize("threads", [RECORDED.threads], indirect=True)]


def options_stop(case: dict) -> tuple[int, ...]:
    return tuple(case["tokens_of"]["STOP"]) if "stopping_criteria" in case["params"] else ()


def options(case: dict) -> dict:
    """generate's arguments under our names; an ending that is given is the canvas's last block."""
    params, special = case["params"], CASES["special_ids"]
    suffix = case["tokens_of"]["SUF"] if "generation_suffix" in params else []
    mask = [special["mask"]] * params["gen_length"]
    return {
        "max_new_tokens": params["gen_length"] + len(suffix),
        "block_length": params["block_length"],
        "block_steps": params["steps"] * params["block_length"] // params["gen_length"],
        "cfg_scale": params.get("cfg_scale", 0.0),
        "suppress_ids": [special[name] for name in ("eos", "bos", "start_header", "end_header")],
        "choose_mask": bool(suffix),
        "draft": [mask + suffix] if suffix else None,
        "eos_token_id": list(options_stop(case)),
        "fill_behind_eos": False,
    }


@pytest.mark.parametrize("name", CASES["pixel_cases"])
def test_tiles_are_the_authors_to_the_bit_in_their_order(name) -> None:
    case = CASES["pixel_cases"][name]
    assert digests(RECORDED.tiles(RECORDED.pipe_of(case), case)) == case["sha256_uint8_tiles"]


@torch.no_grad()
def test_tower_and_projector_give_the_authors_features() -> None:
    case = MERGED["two_pad"]
    pipe = RECORDED.pipe_of(case)
    tower = pipe.model.vision(RECORDED.tiles(pipe, case))
    assert RECORDED.distance("features/pad_ac/tower", tower) < 1e-5
    assert RECORDED.distance("features/pad_ac/projected", pipe.model.projector(tower)) < 1e-5


@pytest.mark.parametrize("name", MERGED)
def test_stream_and_logits_are_the_authors(name) -> None:
    case = MERGED[name]
    pipe = RECORDED.pipe_of(case)
    stream, logits = RECORDED.stream(pipe, case)
    assert stream.shape[1] == case["merged_len"]
    assert RECORDED.distance(f"merged/{name}/inputs_embeds", stream) < 1e-5
    assert RECORDED.distance(f"merged/{name}/logits", logits) < 1e-4


def test_logits_of_ids_stand_at_their_columns_alone_and_in_a_batch() -> None:
    case, text = MERGED["single_pad"], MERGED["text_only"]
    pipe = RECORDED.pipe_of(case)
    _, logits = RECORDED.stream(pipe, case)
    ids = torch.tensor([case["input_ids"]])
    alone = pipe.logits(ids, images=RECORDED.images(case))
    image = case["input_ids"].index(-200)
    kept = [*range(image + 1), *range(logits.shape[1] - (ids.shape[1] - image - 1), logits.shape[1])]
    assert torch.equal(alone, logits[:, kept])
    both = torch.full((2, ids.shape[1]), 151)
    both[0], both[1, : len(text["input_ids"])] = ids[0], torch.tensor(text["input_ids"])
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[ids.shape[1]], [len(text["input_ids"])]])).long()
    batched = pipe.logits(both, mask, images=[RECORDED.images(case), None])
    assert (batched[0] - alone[0]).abs().max() < 1e-3
    assert (batched[1, : len(text["input_ids"])] - pipe.logits([text["input_ids"]])[0]).abs().max() < 1e-3


def test_logits_beside_padding_are_the_authors() -> None:
    case, hidden = CASES["loss"]["text_batch_pad"], RECORDED.expected["loss/text_batch_pad/masked"].bool()
    mask = torch.tensor(case["attention_mask"])
    ids = torch.tensor(case["input_ids"]).masked_fill(hidden, CASES["special_ids"]["mask"])
    difference = RECORDED.pipe().logits(ids, mask) - RECORDED.expected["loss/text_batch_pad/logits"]
    assert difference[mask.bool()].abs().max() < 1e-4


@torch.no_grad()
def test_a_turn_that_sees_the_turns_before_it_gets_the_authors_logits() -> None:
    name, case = "loss/two_turn_conv_mask", CASES["loss"]["two_turn_conv_mask"] | MERGED["single_pad"]
    pipe, ids = RECORDED.pipe_of(case), torch.tensor(CASES["loss"]["two_turn_conv_mask"]["input_ids"])
    stream, _ = RECORDED.stream(pipe, case | {"input_ids": ids[0].tolist()})
    hidden = RECORDED.expected[f"{name}/masked"].bool()[..., None]
    stream = torch.where(hidden, pipe.model.embed(torch.tensor([CASES["special_ids"]["mask"]])), stream)
    turn = RECORDED.expected[f"{name}/conversation_ids"]
    rule = Visibility(turn, torch.zeros_like(turn, dtype=torch.bool), torch.zeros_like(turn))
    logits = pipe.model(inputs_embeds=stream, visibility=rule).logits
    assert RECORDED.distance(f"{name}/logits", logits) < 1e-4


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_decoding_takes_the_authors_tokens(name) -> None:
    case = CASES["generate"][name]
    asked = MERGED[case["merge_case"]]
    pipe = RECORDED.pipe_of(asked)
    out = pipe.generate([asked["input_ids"]], images=RECORDED.images(asked) or None, **options(case))
    length, _ = reply_length(out.trajectory[-1].ids, out.trajectory[-1].committed, options_stop(case))
    assert out.sequences[0, len(asked["input_ids"]) :].tolist()[: int(length)] == case["output"]
    assert int(out.num_forwards) <= case["params"]["steps"]
    assert int(out.num_forwards) == case["params"]["steps"] or options_stop(case)


def test_a_run_of_tokens_ends_a_reply_as_a_token_does() -> None:
    case = CASES["generate"]["g_pad_stop"]
    asked = MERGED[case["merge_case"]]
    pipe, given = RECORDED.pipe_of(asked), {"images": RECORDED.images(asked)}
    whole = pipe.generate([asked["input_ids"]], **given, **options(case) | {"eos_token_id": []})
    answer = whole.sequences[0, len(asked["input_ids"]) :].tolist()
    last = pipe.generate(
        [asked["input_ids"]], **given, **options(case) | {"eos_token_id": [], "stop_sequences": [answer[3:5]]}
    )
    length, stopped = reply_length(last.trajectory[-1].ids, last.trajectory[-1].committed, (tuple(answer[3:5]),))
    assert bool(stopped)
    assert last.trajectory[-1].ids[0, : int(length)].tolist() == answer[: int(length)]
    assert int(last.num_forwards) < int(whole.num_forwards)


def test_a_map_of_more_rows_than_anyres_max_is_resized_and_one_below_is_not() -> None:
    one_tile = [
        RECORDED.stream(RECORDED.pipe(image_aspect_ratio=name), MERGED["anyres_a"])[0].shape[1]
        for name in ("anyres_max_1", "anyres_max_4")
    ]
    assert one_tile == [MERGED["anyres_a"]["merged_len"]] * 2
    six = RECORDED.stream(RECORDED.pipe(image_aspect_ratio="anyres_max_1"), MERGED["anyres_b"])[0].shape[1]
    assert six < MERGED["anyres_b"]["merged_len"] - 2 * 729


def test_several_pictures_may_each_be_one_padded_tile() -> None:
    pipe = load(str(RECORDED.folder), device="cpu")
    pipe.model.config.tiling = {**pipe.model.config.tiling, "several": "pad"}
    assert RECORDED.stream(pipe, MERGED["two_anyres"])[0].shape[1] == MERGED["two_pad"]["merged_len"]
    assert RECORDED.stream(pipe, MERGED["anyres_a"])[0].shape[1] == MERGED["anyres_a"]["merged_len"]


def test_written_back_it_is_the_authors_checkpoint_to_the_bit(tmp_path) -> None:
    assert_written_back(load(str(RECORDED.folder), device="cpu"), RECORDED, tmp_path)


def test_a_published_tower_needs_no_file_and_an_unknown_one_is_refused() -> None:
    published = {**RECORDED.config, "mm_hidden_size": 1152}
    ours = DmllmConfig(**LLADA_V.config(published))
    assert ours.vision["options"] == {**SO400M, "attn_implementation": "eager", "gelu_parts": 2}
    with pytest.raises(ValueError, match=r"mm_vision_tower='google/other'.*vision_config\.json"):
        LLADA_V.config({**published, "mm_vision_tower": "google/other"})
    with pytest.raises(ValueError, match="mm_hidden_size=16, but the tower is 1152 wide"):
        LLADA_V.config(RECORDED.config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mm_projector_type", "mlp3x_gelu", "mm_projector_type='mlp3x_gelu'"),
        ("mm_patch_merge_type", "spatial_maxpool2x2", "mm_patch_merge_type"),
        ("image_aspect_ratio", "highres", "image_aspect_ratio='highres'"),
        ("image_grid_pinpoints", "many", "image_grid_pinpoints='many'"),
        ("attention_bias", True, "attention_bias=True"),
    ],
)
def test_what_our_parts_do_not_compute_is_refused_by_field(field, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        load(str(RECORDED.folder), device="cpu", config={field: value})


def test_a_weight_too_few_and_one_too_many_are_named(tmp_path) -> None:
    for name in ("config.json", "vision_config.json"):
        (tmp_path / name).write_text((RECORDED.folder / name).read_text())
    tower = "model.vision_tower.vision_tower.vision_model."
    weights = {name: tensor for name, tensor in RECORDED.weights.items() if name != "model.image_newline"}
    save_file({**weights, f"{tower}head.probe": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)model\.image_newline.*head\.probe"):
        load(str(tmp_path), device="cpu")


def test_pinpoints_are_read_in_every_published_form() -> None:
    assert pinpoints("(1x1),...,(2x3)", 384)[:4] == [(384, 384), (384, 768), (384, 1152), (768, 384)]
    assert pinpoints("[[384, 768], [768, 384]]", 384) == pinpoints([[384, 768], (768, 384)], 384)


def test_the_tokens_that_are_never_produced_are_the_authors_or_those_of_config_json() -> None:
    assert RECORDED.pipe().generation["suppress_ids"] == [151, 152]
    assert LLADA_V.decode_defaults({**RECORDED.config, "vocab_size": 126464})["suppress_ids"] == [
        *(126080, 126081, 126346, 126347)
    ]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """A random model with a byte-pair tokenizer that has LLaDA's special tokens, but none for pictures."""
    path = tmp_path_factory.mktemp("llada_v") / "model"
    write_example("llada_v", path)
    text = path.parent / "text.txt"
    text.write_text("What is on the picture? A red circle and a blue square.\n" * 4)
    learned = AutoTokenizer.from_pretrained(train_tokenizer([text], vocab_size=300, out=path.parent / "tokenizer"))
    learned.add_special_tokens({"extra_special_tokens": LLADA_TOKENS})
    learned.save_pretrained(path)
    special = {"mask_token_id": learned.mask_token_id, "eos_token_id": learned.eos_token_id}
    return load(str(path), device="cpu", config={**special, "bos_token_id": None})


def test_a_conversation_becomes_the_authors_prompt_with_the_picture_in_its_place(chatting) -> None:
    processor, image = chatting.processor, str(RECORDED.folder / "image_d.png")
    ids = processor.tokenizer.convert_tokens_to_ids
    prompt = processor.prompt("What is on the picture?", [image])
    rows = prompt.input_ids == -200
    assert int(rows.sum()) == len(plan(500, 380, chatting.tiling).slots)
    assert torch.equal(rows, prompt.image_slots != TEXT)
    before, behind = prompt.input_ids[: int(rows.long().argmax())], prompt.input_ids[int(rows.nonzero().max()) + 1 :]
    text = processor.tokenizer.decode(before) + "<image>" + processor.tokenizer.decode(behind)
    assert text == (
        f"<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is on the picture?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert before[0] == ids("<|startoftext|>")
    assert set(processor.stop_ids) == {ids("<|eot_id|>"), processor.special.eos}
    own = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
                                        tokenize=False)  # fmt: skip
    assert SYSTEM not in own
    assert "Be brief." in own


def test_it_chats_about_one_picture_and_about_several_each_padded(chatting) -> None:
    image = str(RECORDED.folder / "image_d.png")
    replies = chatting.chat(["What?", "Both?"], [image, [image, image]], max_new_tokens=8, block_length=8)
    assert [len(reply.ids) <= 8 for reply in replies] == [True, True]
    alone = chatting.chat("Both?", [image, image], max_new_tokens=8, block_length=8)
    assert alone.ids == replies[1].ids
    assert int((chatting.processor.prompt("Both?", [image, image]).image_slots >= 0).sum()) == 2 * 16


def test_a_mask_token_beyond_the_vocabulary_is_refused_when_it_is_needed() -> None:
    pipe = load(str(RECORDED.folder), device="cpu")  # the authors' code says it, this config.json does not
    with pytest.raises(ValueError, match=r"mask token 126336 is no row of the vocabulary of 160"):
        pipe.generate([[5, 6]], max_new_tokens=4)


def test_tiling_survives_our_own_format(tmp_path) -> None:
    pipe = RECORDED.pipe()
    saved = load(str(folder.save(tmp_path / "ours", pipe.model)), device="cpu")
    assert saved.tiling == pipe.tiling
    assert replace(saved.tiling, max_tiles=None) != pipe.tiling
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["unused"]
