"""The pipeline on a tiny random model: what a batch, a cache, padding, a picture and a seed may change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import TextDiffusionStreamer

from dmllm.checkpoints import folder
from dmllm.config import to_dict
from dmllm.data.chat import SPECIAL_TOKENS
from dmllm.data.processor import Processor, ProcessorConfig
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.models.vision import VisionConfig, resolve_vision
from dmllm.pipeline import Generated, Pipeline, Reply, load
from dmllm.predictor import prepare
from dmllm.tiling import TilingConfig

TOKENS = {"max_new_tokens": 12, "block_length": 4}
KINDS = ["full", "prefix"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL_TOKENS["eos"], pad_token=SPECIAL_TOKENS["pad"]
    )


def make(visibility: str = "full", *, image_prefix: bool = False, spread: float = 0.3) -> Pipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[n]) for n in ("mask", "eos", "pad", "image")}
    vision = VisionConfig(
        name="timm:vit_tiny_patch16_224",
        pretrained=False,
        image_size=16,
        options={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    )
    config = DmllmConfig(
        backbone={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision=to_dict(resolve_vision(vision)),
        projector={"name": "linear"},
        visibility=visibility,
        **ids,
    )
    model = MultimodalModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=spread)
    tiling = TilingConfig(tile_size=(16, 16), grid=(2, 2))
    processor = Processor(tokenizer, ProcessorConfig(tiling=tiling, image_prefix=image_prefix), config.special)
    return Pipeline(model, processor, {"max_new_tokens": 8}, prompt_room=0)


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return make(request.param)


def picture(seed: int, size: tuple[int, int] = (20, 14)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


QUESTIONS = ["hi", "what is left of the red one?", "and now a question that is longer still", "a", "what?"]
PICTURES = [picture(0), None, [picture(1), picture(2)], None, picture(0)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remasking": "margin", "steps": 6},
        {"remasking": "random", "temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "threshold": 0.3},
        {"cfg_scale": 0.7, "remasking": "entropy"},
        {"schedule": "first_hitting", "remasking": "origin", "temperature": 1.0},
        {"schedule": "time", "remasking": "origin", "remdm": "psi", "eta": 0.5, "temperature": 1.0, "block_length": 3},
    ],
    ids=lambda o: "-".join(map(str, o)) or "greedy",
)
def test_a_row_of_a_batch_equals_the_same_request_alone(pipeline: Pipeline, options: dict) -> None:
    """Mixed lengths, image counts and text-only rows; the same tokens, calls and reason, drawn or not."""
    stops = list(range(0, 250, 3))  # a random model seldom says "end": let a third of the bytes end a reply
    options = {**TOKENS, **options, "eos_token_id": stops}
    seeds = [torch.Generator().manual_seed(i) for i in range(len(QUESTIONS))]
    together = pipeline.chat(QUESTIONS, PICTURES, generator=seeds, **options)
    assert len({r.num_forwards for r in together}) > 1
    for row, (question, pictures) in enumerate(zip(QUESTIONS, PICTURES, strict=True)):
        assert pipeline.chat(question, pictures, generator=row, **options) == together[row]


@pytest.mark.parametrize("image_prefix", [False, True])
def test_with_the_prompt_cached_the_logits_and_tokens_are_those_without(image_prefix: bool) -> None:
    pipeline = make("prefix", image_prefix=image_prefix)
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    replies = {}
    forward = pipeline.model.forward
    for use_cache in (True, False):

        def recording(*args, _seen=seen[use_cache], **kwargs):
            output = forward(*args, **kwargs)
            if output.logits.numel():
                _seen.append((kwargs["inputs_embeds"].shape[1], output.logits))
            return output

        pipeline.model.forward = recording
        replies[use_cache] = pipeline.chat(QUESTIONS, PICTURES, use_cache=use_cache, cfg_scale=0.5, **TOKENS)
    pipeline.model.forward = forward
    assert replies[True] == replies[False]
    assert len(seen[True]) == len(seen[False]) == 12
    for (fed, cached), (fed_all, plain) in zip(seen[True], seen[False], strict=True):
        assert fed == 12 < fed_all
        torch.testing.assert_close(cached, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cfg_scale": 1e-6}], ids=["cached", "fed", "guided"])
@pytest.mark.parametrize("kind", ["full", "prefix", "causal", "block:4"])
def test_a_picture_that_all_questions_share_sees_none_of_them(kind: str, options: dict) -> None:
    """The loop's logits are those of the plain forward, which are those of training."""
    pipeline = make(kind, image_prefix=True)
    questions, pictures, mask = ["what?", "and now?"], [picture(0), picture(1)], pipeline.special.mask
    examples = [pipeline.processor.prompt(*one) for one in zip(questions, [[p] for p in pictures], strict=True)]
    use_cache = options.get("use_cache")
    config = pipeline.decode_config(max_new_tokens=3, cfg_scale=options.get("cfg_scale", 0.0))
    predict, canvas, _ = prepare(pipeline.model, pipeline._collate(examples), config, mask, use_cache)
    found = predict(replace(canvas, block=torch.zeros_like(canvas.block)), torch.tensor([[0], [0]]))
    for row, example in enumerate(examples):
        end = 1 if kind == "causal" or ":" not in kind else 4 - len(example) % 4
        ids = torch.tensor([[*example.input_ids.tolist(), *[mask] * (3 if end == 1 else end)]])
        on_canvas = torch.arange(ids.shape[1])[None] >= len(example)
        plain = pipeline.logits(ids, images=[pictures[row]], canvas=on_canvas)[0, len(example)]
        torch.testing.assert_close(found[row, 0], plain, atol=1e-4, rtol=0)


def test_a_cache_that_would_change_the_result_is_refused() -> None:
    with pytest.raises(ValueError, match="the prompt sees the canvas"):
        make("full").chat("a", use_cache=True)


def test_the_same_picture_twice_in_a_batch_is_encoded_once(pipeline: Pipeline) -> None:
    sizes = []
    encode = pipeline.model.encode_images

    def counting(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return encode(pixels)

    pipeline.model.encode_images = counting
    pipeline.images.clear()
    try:
        pipeline.chat(["a", "b", "c"], [picture(0), [picture(1), picture(0)], picture(0)], **TOKENS)
    finally:
        del pipeline.model.encode_images
    assert sizes == [2]


def test_the_picture_matters_and_so_does_its_order(pipeline: Pipeline) -> None:
    def logits(*images: Image.Image) -> torch.Tensor:
        example = pipeline.processor.prompt("a", images)
        return pipeline.logits(example.input_ids[None], images=list(images))

    assert not torch.allclose(logits(picture(0), picture(1)), logits(picture(1), picture(0)))


def test_generate_on_the_ids_of_a_prompt_is_chat() -> None:
    for image_prefix in (False, True):
        pipeline = make("prefix", image_prefix=image_prefix)
        example = pipeline.processor.prompt("what?", [picture(3)])
        reply = pipeline.chat("what?", picture(3), **TOKENS)
        out = pipeline.generate(example.input_ids[None], images=[picture(3)], **TOKENS)
        assert out.sequences[0, len(example) :].tolist()[: len(reply.ids)] == reply.ids
        assert torch.equal(out.sequences[0, : len(example)], example.input_ids)
        assert out.num_forwards.tolist() == [reply.num_forwards]
        assert len(out.trajectory) == reply.num_forwards


def ids_of(pipeline: Pipeline, text: str) -> list[int]:
    return pipeline.processor.tokenizer.encode(text, add_special_tokens=False)


def test_padding_on_either_side_changes_nothing(pipeline: Pipeline) -> None:
    pad, image = pipeline.special.pad, pipeline.special.image
    rows = [[image, *ids_of(pipeline, "one")], ids_of(pipeline, "a longer one"), [image, 5, image]]
    images = [picture(0), picture(1), picture(2)]
    width = max(map(len, rows))
    right = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    left = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    lengths = torch.tensor([len(r) for r in rows])[:, None]
    of_right = (torch.arange(width) < lengths).long()
    of_left = of_right.flip(1)
    ends = [
        pipeline.generate(ids, mask, images, **TOKENS).sequences[:, width:]
        for ids, mask in ((right, of_right), (left, of_left))
    ]
    assert torch.equal(*ends)
    logits = [pipeline.logits(ids, mask, images) for ids, mask in ((right, of_right), (left, of_left))]
    assert logits[0].shape == (3, width, pipeline.model.config.backbone["vocab_size"])
    own = [[picture(0)], None, [picture(1), picture(2)]]
    for row, ids in enumerate(rows):
        alone = pipeline.generate([ids], images=own[row], **TOKENS)
        assert torch.equal(alone.sequences[0, len(ids) :], ends[0][row])
        torch.testing.assert_close(logits[0][row, : len(ids)], logits[1][row, width - len(ids) :], atol=1e-5, rtol=0)
        alone = pipeline.logits([ids], images=own[row])
        torch.testing.assert_close(logits[0][row, : len(ids)], alone[0], atol=1e-5, rtol=0)


def test_an_image_token_stands_for_its_image_or_for_one_of_its_rows(pipeline: Pipeline) -> None:
    image = pipeline.special.image
    once = torch.tensor([[7, image, 8, image, 9]])
    spread = torch.tensor([[7, *[image] * 4, 8, *[image] * 4, 9]])
    pictures = [picture(0), picture(1)]
    outs = [pipeline.generate(ids, images=pictures, **TOKENS) for ids in (once, spread)]
    assert torch.equal(outs[0].sequences[:, 5:], outs[1].sequences[:, 11:])
    few, many = pipeline.logits(once, images=pictures), pipeline.logits(spread, images=pictures)
    torch.testing.assert_close(few[0], many[0, [0, 1, 5, 6, 10]], atol=1e-5, rtol=0)
    flat = pipeline.logits(once.repeat(2, 1), images=pictures * 2)
    nested = pipeline.logits(once.repeat(2, 1), images=[pictures, tuple(pictures)])
    assert torch.equal(flat, nested)
    with pytest.raises(ValueError, match=r"2 image tokens for 1 images of \[4\] rows"):
        pipeline.generate(once, images=[picture(0)])
    with pytest.raises(ValueError, match=r"3 for 4 image tokens in 2 rows|2 image tokens for 1 images"):
        pipeline.generate(once.repeat(2, 1), images=[picture(0)] * 3)


def test_logits_are_those_of_the_model_and_score_the_token_at_their_place(pipeline: Pipeline) -> None:
    ids = torch.tensor([[1, 2, pipeline.special.mask, 4]])
    assert torch.equal(pipeline.logits(ids), pipeline.model(ids).logits)
    first = pipeline.generate(ids, max_new_tokens=1)
    with_canvas = torch.cat([ids, torch.tensor([[pipeline.special.mask]])], 1)
    on_canvas = torch.tensor([[False] * 4 + [True]])
    logits = pipeline.logits(with_canvas, canvas=on_canvas)[0, -1]
    logits[pipeline.special.mask] = -torch.inf
    assert int(logits.argmax()) == int(first.sequences[0, -1])


def test_a_checkpoint_without_a_tokenizer_generates_but_does_not_chat(pipeline: Pipeline) -> None:
    bare = Pipeline(pipeline.model)
    ids = torch.tensor([[3, pipeline.special.image, 4]])
    options = {"images": [picture(0, (16, 16))], "max_new_tokens": 4, "eos_token_id": []}
    assert torch.equal(bare.generate(ids, **options).sequences, pipeline.generate(ids, **options).sequences)
    assert bare.logits(ids, images=picture(0)).shape[:2] == (1, 3)
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.chat("hi")


def test_a_saved_checkpoint_is_loaded_with_its_decode_defaults(pipeline: Pipeline, tmp_path) -> None:
    asked = ("what?", picture(0))
    folder.save(tmp_path / "whole", pipeline.model, pipeline.processor, generation={"max_new_tokens": 6, "steps": 3})
    loaded = load(str(tmp_path / "whole"), device="cpu")
    assert loaded.model.dtype == torch.float32
    assert loaded.chat(*asked) == pipeline.chat(*asked, max_new_tokens=6, steps=3)
    assert load(tmp_path / "whole", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not a torch dtype"):
        load(tmp_path / "whole", dtype="float23")
    folder.save(tmp_path / "bare", pipeline.model)
    ids = pipeline.processor.prompt(*asked[:1], [asked[1]]).input_ids[None]
    bare = load(tmp_path / "bare", device="cpu")
    options = {"images": [picture(0)], "max_new_tokens": 4, "eos_token_id": []}
    assert torch.equal(bare.generate(ids, **options).sequences, pipeline.generate(ids, **options).sequences)


def test_seeds_decide_and_repeats_of_a_request_differ(pipeline: Pipeline) -> None:
    options = {**TOKENS, "temperature": 1.5, "eos_token_id": []}
    first = pipeline.chat(["a", "b", "a"], generator=5, **options)
    assert first == pipeline.chat(["a", "b", "a"], generator=5, **options)
    assert first != pipeline.chat(["a", "b", "a"], generator=6, **options)
    assert first[0] == pipeline.chat("a", generator=5, **options)
    assert first[1] == pipeline.chat("b", generator=5, **options)
    assert first[0].ids != first[2].ids
    torch.manual_seed(1)
    unseeded = pipeline.chat("a", **options)
    torch.manual_seed(1)
    assert unseeded == pipeline.chat("a", **options)
    with pytest.raises(ValueError, match="1 generators for 2 requests"):
        pipeline.chat(["a", "b"], generator=[torch.Generator()], **options)


def test_a_generator_is_used_up_and_a_list_of_them_gives_each_row_its_own(pipeline: Pipeline) -> None:
    options = {**TOKENS, "temperature": 1.5, "eos_token_id": []}

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    batch = pipeline.chat(["a", "b", "a"], generator=[seeded(3), seeded(4), seeded(5)], **options)
    alone = [pipeline.chat(text, generator=seeded(3 + i), **options) for i, text in enumerate(["a", "b", "a"])]
    assert batch == alone
    shared = seeded(3)
    assert pipeline.chat(["b", "a"], generator=shared, **options)[1] == alone[0]
    assert pipeline.chat(["b", "a"], generator=shared, **options)[1] != alone[0]


def test_every_form_of_a_request_is_the_same_request(pipeline: Pipeline) -> None:
    image = picture(4)
    forms = [
        ("what?", image),
        ("what?", [image]),
        ([{"role": "user", "content": "what?"}], image),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], [image]),
        ([{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}], None),
    ]
    replies = [pipeline.chat(messages, images, **TOKENS) for messages, images in forms]
    assert all(reply == replies[0] and isinstance(reply, Reply) for reply in replies)
    batch = pipeline.chat([m for m, _ in forms], [i for _, i in forms], **TOKENS)
    assert batch == replies
    assert pipeline.chat([]) == []
    assert pipeline.chat(["what?"], [image], **TOKENS) == [replies[0]]


def test_stream_shows_what_chat_says(pipeline: Pipeline) -> None:
    steps = list(pipeline.stream("what?", **TOKENS, eos_token_id=[]))
    reply = pipeline.chat("what?", **TOKENS, eos_token_id=[])
    assert pipeline.replies(steps[-1], eos_token_id=[]) == [reply]
    assert [int(s.committed.sum()) for s in steps] == list(range(1, 13))
    assert reply.finish_reason == "length"
    assert reply.num_forwards == len(reply.ids) == 12
    assert pipeline.special.mask not in reply.ids


def test_a_reply_is_cut_at_the_end_of_sequence_and_sequences_are_padded_after_it(pipeline: Pipeline) -> None:
    plain = pipeline.chat("what?", **TOKENS, eos_token_id=[])
    end = plain.ids[5]
    at = plain.ids.index(end)
    reply = pipeline.chat("what?", **TOKENS, eos_token_id=end)
    assert reply.ids == plain.ids[:at]
    assert reply.finish_reason == "stop"
    assert reply.num_forwards < plain.num_forwards or at > 8
    example = pipeline.processor.prompt("what?")
    out = pipeline.generate(example.input_ids[None], **TOKENS, eos_token_id=end).sequences[0, len(example) :]
    assert out.tolist() == [*plain.ids[: at + 1], *[pipeline.special.pad] * (11 - at)]


def test_prompts_are_left_alone_even_where_they_hold_the_mask_token(pipeline: Pipeline) -> None:
    ids = torch.tensor([[1, pipeline.special.mask, 2]])
    before = ids.clone()
    out = pipeline.generate(ids, **TOKENS)
    assert isinstance(out, Generated)
    assert torch.equal(out.sequences[:, :3], before)
    assert torch.equal(ids, before)
    assert not (out.sequences[:, 3:] == pipeline.special.mask).any()


def test_guidance_follows_its_formula() -> None:
    """un + (s + 1)(cond - un), where un sees every prompt row, image rows included, as a mask token."""
    pipeline = make("full")
    mask, image = pipeline.special.mask, pipeline.special.image
    ids = torch.tensor([[3, image, 4, mask]])
    cond = pipeline.logits(ids, images=[picture(0)])[0, -1]
    un = pipeline.logits(torch.full((1, 7), mask))[0, -1]
    guided = un + 2.5 * (cond - un)
    guided[mask] = -torch.inf
    out = pipeline.generate(ids[:, :3], images=[picture(0)], max_new_tokens=1, cfg_scale=1.5)
    assert int(guided.argmax()) == int(out.sequences[0, -1])
    assert int(out.num_forwards) == 1


def test_transformers_diffusion_streamer_prints_drafts_and_the_answer(pipeline: Pipeline, capsys) -> None:
    ids = torch.tensor([ids_of(pipeline, "what?")])
    streamer = TextDiffusionStreamer(pipeline.processor.tokenizer, skip_prompt=True)
    out = pipeline.generate(ids, streamer=streamer, **TOKENS, eos_token_id=[])
    printed = capsys.readouterr().out
    assert printed.count("\033[33m") == 12
    text = pipeline.processor.tokenizer.decode(out.sequences[0, ids.shape[1] :])
    assert text.strip() in printed.replace("\0338\033[J", "")
    with pytest.raises(ValueError, match="one row"):
        pipeline.generate(ids.repeat(2, 1), streamer=streamer)


def test_an_empty_prompt_can_be_continued(pipeline: Pipeline) -> None:
    out = pipeline.generate(torch.zeros(2, 0, dtype=torch.int64), **TOKENS)
    assert out.sequences.shape == (2, 12)


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda p: p.chat("a", max_tokens=3), "Unknown decode option 'max_tokens'; did you mean max_new_tokens"),
        (lambda p: p.chat("a", max_new_tokens=96, block_length=32, steps=100), "try 99 or 102."),
        (lambda p: p.chat(3), "A request is a text or a list of messages"),
        (lambda p: p.chat(["a", 3]), "Request 1 of the batch"),
        (lambda p: p.chat(["a", "b"], [picture(0)]), "images: 1 for 2 requests"),
        (lambda p: p.chat([{"role": "assistant", "content": "b"}]), "ends with a user"),
        (lambda p: p.chat(["a", "b"], [None, "none.png"]), "request 1: none.png: there is no such file"),
        (lambda p: p.generate(torch.zeros(3)), "input_ids must be whole numbers"),
        (lambda p: p.generate([[1, 2]], attention_mask=[[1]]), "attention_mask is (1, 1) for input_ids (1, 2)"),
        (lambda p: p.generate([[1, 2, 3]], attention_mask=[[1, 0, 1]]), "zeros inside a row"),
        (lambda p: p.generate([[1], [2]], images=[[picture(0)]]), "1 lists for 2 rows"),
    ],
)  # fmt: skip
def test_errors_say_what_to_type(pipeline: Pipeline, call, advice: str) -> None:
    with pytest.raises(ValueError) as error:
        call(pipeline)
    assert advice in str(error.value)


def test_checkpoint_defaults_are_the_settings_of_a_call(pipeline: Pipeline) -> None:
    assert pipeline.decode_config().max_new_tokens == 8
    assert pipeline.decode_config().stop_ids == pipeline.processor.stop_ids
    stored = Pipeline(pipeline.model, pipeline.processor, {"eos_token_id": 9, "temperature": 0.5, "top_k": 3})
    assert stored.decode_config(temperature=0.0).stop_ids == (9,)
    assert stored.decode_config(eos_token_id=[]).stop_ids == ()


def test_token_texts_and_description_name_everything(pipeline: Pipeline) -> None:
    ids = [*ids_of(pipeline, "a b"), pipeline.special.mask]
    assert pipeline.token_texts(ids) == ["a", " ", "b", "<|mask|>"]
    described = pipeline.describe()
    assert described["visibility"] == pipeline.model.config.visibility
    assert all(isinstance(v, str) for v in described.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "remasking": "random"}, {"cfg_scale": 0.7}])
def test_a_gpu_gives_the_tokens_of_a_cpu(kind: str, options: dict) -> None:
    """Also drawn ones: generators stay on the CPU."""
    options = {**TOKENS, **options, "generator": 1, "eos_token_id": list(range(0, 250, 3))}
    on_cpu = make(kind)
    on_gpu = Pipeline(make(kind).model.to("cuda"), on_cpu.processor)
    assert on_gpu.chat(QUESTIONS, PICTURES, **options) == on_cpu.chat(QUESTIONS, PICTURES, **options)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(on_gpu.logits(ids).cpu(), on_cpu.logits(ids), atol=1e-3, rtol=0)


def test_bfloat16_answers_too() -> None:
    pipeline = make("prefix")
    pipeline.model.to(torch.bfloat16)
    assert len(pipeline.chat("what?", picture(0), **TOKENS, cfg_scale=1.0, eos_token_id=[]).ids) == 12


def test_a_picture_in_several_tiles_with_row_breaks_goes_through_ids_as_through_chat() -> None:
    pipeline = make("full")
    pipeline.model.row_break = torch.nn.Parameter(torch.randn(32))
    tiling = TilingConfig(
        mode="anyres", tile_size=(16, 16), grid=(2, 2), pinpoints=((16, 32), (32, 16)), row_break=True
    )
    pipeline.processor.config = replace(pipeline.processor.config, tiling=tiling)
    images = [picture(0, (40, 20)), picture(1, (10, 30))]
    example = pipeline.processor.prompt("what?", images)
    assert (example.image_slots == -2).any()
    reply = pipeline.chat("what?", images, **TOKENS)
    out = pipeline.generate(example.input_ids[None], images=images, **TOKENS)
    assert out.sequences[0, len(example) :].tolist()[: len(reply.ids)] == reply.ids
    del pipeline.model.row_break


def test_the_visibility_of_logits_can_be_chosen(pipeline: Pipeline) -> None:
    """As a row sees less, its logits are those of a shorter text; in one block of all they are those of "full"."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    full = pipeline.logits(ids, visibility="full")
    torch.testing.assert_close(pipeline.logits(ids, visibility="block:7"), full, atol=1e-5, rtol=0)
    blocks = pipeline.logits(ids, visibility="block:2")
    torch.testing.assert_close(blocks[:, :4], pipeline.logits(ids[:, :4], visibility="block:2"), atol=1e-5, rtol=0)
    causal = pipeline.logits(ids, visibility="causal")
    torch.testing.assert_close(causal[:, :1], pipeline.logits(ids[:, :1], visibility="full"), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="or block:N such as block:4"):
        pipeline.logits(ids, visibility="blocks")


def test_the_likelihood_of_an_answer_sees_the_picture_and_a_cache_does_not_change_it(pipeline: Pipeline) -> None:
    image = pipeline.special.image
    ids, answers = [[3, image, 4], [3, 4, 5]], [[5, 6, 7, 8], [9, 10]]
    found = pipeline.score(ids, answers, images=[[picture(0)], None], num_samples=8, generator=0)
    assert found.shape == (2,)
    assert (found < 0).all()
    other = pipeline.score(ids, answers, images=[[picture(1)], None], num_samples=8, generator=0)
    assert other[0] != found[0]
    assert other[1] == found[1]
    plain = pipeline.score(ids, answers, images=[[picture(0)], None], num_samples=8, generator=0, use_cache=False)
    torch.testing.assert_close(plain, found, atol=1e-4, rtol=0)
    for wrong in ({"answer_ids": [[5]]}, {"hidden": [[True]]}):
        with pytest.raises(ValueError, match=r"answer_ids: 1 for 2|hidden is \(1, 1\) for 2 answers"):
            pipeline.score(**{"input_ids": [[3, 4], [5, 6]], "answer_ids": answers, **wrong})
