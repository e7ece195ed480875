"""Training rows are prompts followed by answers; images keep all their rows; what is labelled is the answers."""

import pickle

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from dmllm.data.processor import Processor, ProcessorConfig
from dmllm.tiling import TilingConfig
from dmllm.types import IGNORE, PREFIX, ROW_BREAK, TEXT, SpecialTokens

EOS, MASK, IMAGE = 1, 2, 3
RED = Image.new("RGB", (4, 4), (255, 0, 0))
BLUE = Image.new("RGB", (4, 4), (0, 0, 255))
FOUR = [("user", [("image", RED), "one?"]), ("assistant", "red"), ("user", "two?"), ("assistant", "blue and red")]


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def text(processor, ids):
    return processor.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def labelled(processor, example):
    return text(processor, example.labels[example.labels != IGNORE])


def test_all_answers_are_labelled_with_their_end_token(make_processor, record):
    processor = make_processor()
    example = processor.example(record(*FOUR), generator=draws())
    assert text(processor, example.input_ids) == (
        "<|user|><|image|><|image|><|image|><|image|>one?<|end|><|assistant|>red<|end|>"
        "<|user|>two?<|end|><|assistant|>blue and red<|end|>"
    )
    assert labelled(processor, example) == "red<|end|>blue and red<|end|>"
    assert example.image_slots[:6].tolist() == [TEXT, 0, 1, 2, 3, TEXT]
    assert set(example.documents.tolist()) == {0}
    assert example.positions.tolist() == list(range(len(example)))
    assert torch.equal(
        example.pixel_values, torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    )


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("template", [None, "chatml"])
def test_training_ids_are_the_prompts_ids_followed_by_the_answers(make_processor, record, prefix, template):
    chatml = (
        "{% for m in messages %}<|user|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ '<|image|>\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
    )
    processor = make_processor(**({"chat_template": chatml} if template else {}), image_prefix=prefix)
    one = record(("system", "be brief"), *FOUR, ("user", ["and ", ("image", BLUE)]), ("assistant", " 12 "))
    example = processor.example(one, generator=draws())
    ends = [2, 4, 6]
    for turn in ends:
        prompt = processor.prompt(one.messages[:turn])
        n = len(prompt)
        assert torch.equal(prompt.input_ids, example.input_ids[:n])
        assert torch.equal(prompt.image_slots, example.image_slots[:n])
        assert torch.equal(prompt.positions, example.positions[:n])
        assert torch.equal(prompt.documents, example.documents[:n])
        assert (prompt.labels == IGNORE).all()
        answer = example.labels[n:]
        length = int((answer == EOS).nonzero()[0]) + 1
        assert processor.decode(answer[:length]) == one.messages[turn]["content"][0]["text"]


def test_one_random_answer_is_labelled_after_its_history(make_processor, record):
    processor = make_processor(turns="one")
    found = set()
    for seed in range(12):
        example = processor.example(record(*FOUR), generator=draws(seed))
        whole = text(processor, example.input_ids)
        assert whole.endswith(labelled(processor, example))
        found.add(labelled(processor, example))
        again = processor.example(record(*FOUR), generator=draws(seed))
        assert torch.equal(example.input_ids, again.input_ids)
    assert found == {"red<|end|>", "blue and red<|end|>"}


def test_each_question_is_a_document_behind_one_image(make_processor, record):
    processor = make_processor(turns="each", image_prefix=True)
    example = processor.example(record(*FOUR), generator=draws())
    assert example.documents[:5].tolist() == [PREFIX] * 5  # <|user|> and four image rows
    assert example.positions[:5].tolist() == [0, 1, 2, 3, 4]
    assert example.pixel_values.shape[0] == 1
    for document, (question, answer) in enumerate((("one?", "red"), ("two?", "blue and red"))):
        rows = example.documents == document
        assert text(processor, example.input_ids[rows]) == f"{question}<|end|><|assistant|>{answer}<|end|>"
        assert example.positions[rows].tolist() == list(range(5, 5 + int(rows.sum())))
        assert text(processor, example.labels[rows][example.labels[rows] != IGNORE]) == f"{answer}<|end|>"


def test_a_packed_document_is_the_same_as_the_question_asked_alone(make_processor, record):
    processor = make_processor(turns="each", image_prefix=True)
    packed = processor.example(record(*FOUR), generator=draws())
    for document, question in enumerate(("one?", "two?")):
        alone = processor.prompt([{"role": "user", "content": question}], [RED])
        rows = (packed.documents == PREFIX) | (packed.documents == document)
        for name in ("input_ids", "positions", "image_slots"):
            assert torch.equal(getattr(packed, name)[rows][: len(alone)], getattr(alone, name))
        assert torch.equal(packed.documents[rows][: len(alone)].clamp(max=0), alone.documents)
        assert torch.equal(packed.pixel_values, alone.pixel_values)


def test_documents_of_text_alone_share_nothing(make_processor, record):
    processor = make_processor(turns="each", image_prefix=True)
    example = processor.example(
        record(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), generator=draws()
    )
    assert example.pixel_values is None
    for document, (question, answer) in enumerate(("ab", "cd")):
        rows = example.documents == document
        assert text(processor, example.input_ids[rows]) == (
            f"<|system|>s<|end|><|user|>{question}<|end|><|assistant|>{answer}<|end|>"
        )
        assert example.positions[rows].tolist() == list(range(int(rows.sum())))


def test_images_of_earlier_turns_come_along_and_later_ones_are_ordinary_rows(make_processor, record):
    processor = make_processor(turns="each", image_prefix=True)
    turns = [
        *FOUR[:2],
        ("user", ["and ", ("image", BLUE), "?"]),
        ("assistant", "b"),
        ("user", "now?"),
        ("assistant", "c"),
    ]
    example = processor.example(record(*turns), generator=draws())
    assert example.pixel_values.shape[0] == 2
    slots = [example.image_slots[(example.documents == d) & (example.image_slots >= 0)].tolist() for d in range(3)]
    assert slots == [[], [4, 5, 6, 7], [4, 5, 6, 7]]
    third = example.input_ids[example.documents == 2]
    assert text(processor, third) == "<|image|>" * 4 + "now?<|end|><|assistant|>c<|end|>"


def test_several_images_count_their_slots_over_all_tiles(make_processor):
    tiling = TilingConfig(
        mode="anyres", tile_size=(4, 4), grid=(1, 1), pinpoints=((4, 8),), row_break=True, unpad=False
    )
    processor = make_processor(tiling=tiling)
    example = processor.prompt("what?", [RED, BLUE])
    assert example.pixel_values.shape[0] == 6
    assert example.image_slots[1:9].tolist() == [0, 1, 2, ROW_BREAK, 3, 4, 5, ROW_BREAK]
    assert (example.input_ids[1:9] == IMAGE).all()


def test_answers_are_padded_to_the_smallest_canvas_that_fits(make_processor, record):
    processor = make_processor(turns="each", image_prefix=True, answer_lengths=(4, 16))
    plain = make_processor(turns="each", image_prefix=True)
    example = processor.example(record(*FOUR), generator=draws())
    without = plain.example(record(*FOUR), generator=draws())
    for document, canvas in ((0, 4), (1, 16)):
        labels = example.labels[example.documents == document]
        before = without.labels[without.documents == document]
        answer = before[before != IGNORE]
        assert labels[labels != IGNORE].tolist() == answer.tolist() + [EOS] * (canvas - len(answer))
        assert (example.input_ids[example.documents == document][-canvas:] == labels[-canvas:]).all()
    long = processor.example(record(("user", "q"), ("assistant", "x" * 40)), generator=draws())
    assert (long.labels != IGNORE).sum() == 41  # longer than the last canvas: as it is


def test_padding_may_be_left_unscored(make_processor, record):
    processor = make_processor(answer_lengths=(8,), score_padding=False)
    example = processor.example(record(("user", "q"), ("assistant", "red")), generator=draws())
    assert labelled(processor, example) == "red<|end|>"
    assert text(processor, example.input_ids).count("<|end|>") == 1 + 8 - int((example.labels != IGNORE).sum()) + 1


def test_longer_canvases_are_drawn_with_their_probability(make_processor, record):
    processor = make_processor(answer_lengths=(8, 16, 32), longer=0.5)
    one = record(("user", "q"), ("assistant", "red"))
    sizes = [int((processor.example(one, generator=draws(s)).labels != IGNORE).sum()) for s in range(300)]
    assert sorted(set(sizes)) == [8, 16, 32]
    assert abs(sizes.count(8) / 300 - 0.5) < 0.1
    assert abs(sizes.count(16) / 300 - 0.25) < 0.1


def test_later_turns_go_first_then_the_end_of_the_answer_and_images_stay_whole(make_processor, record):
    whole = make_processor().example(record(*FOUR), generator=draws())
    end = int((whole.labels == EOS).nonzero()[0]) + 1  # of the first answer
    for limit in range(end - 1, len(whole)):
        cut = make_processor(max_length=limit).example(record(*FOUR), generator=draws())
        kept = min(limit, end)
        assert torch.equal(cut.input_ids, whole.input_ids[:kept])
        assert torch.equal(cut.labels, whole.labels[:kept])
        assert (cut.image_slots >= 0).sum() == 4


def test_whole_later_documents_go_first(make_processor, record):
    options = {"turns": "each", "image_prefix": True, "answer_lengths": (16,)}
    whole = make_processor(**options).example(record(*FOUR), generator=draws())
    first = int((whole.documents < 1).sum())
    for limit in (first, len(whole) - 1):
        cut = make_processor(max_length=limit, **options).example(record(*FOUR), generator=draws())
        assert torch.equal(cut.input_ids, whole.input_ids[:first])
    less = make_processor(max_length=first - 3, **options).example(record(*FOUR), generator=draws())
    assert torch.equal(less.labels, whole.labels[: first - 3])


def test_images_of_dropped_turns_are_dropped_with_them(make_processor, record):
    turns = [*FOUR[:2], ("user", [("image", BLUE), "and?"]), ("assistant", "blue")]
    whole = make_processor().example(record(*turns), generator=draws())
    assert whole.pixel_values.shape[0] == 2
    cut = make_processor(max_length=len(whole) - 1).example(record(*turns), generator=draws())
    assert cut.pixel_values.shape[0] == 1
    assert cut.image_slots.max() == 3


def test_a_question_that_leaves_no_room_is_refused_with_the_sizes(make_processor, record):
    with pytest.raises(
        ValueError, match=r"set.json: record 7: .*4 of them image rows, and max_length=8 leaves no room"
    ):
        make_processor(max_length=8).example(record(*FOUR), generator=draws())
    with pytest.raises(ValueError, match="raise max_length"):
        make_processor(max_length=8).prompt("what?", [RED])


def test_special_tokens_in_a_text_are_refused_and_other_markup_is_not(make_processor, record):
    processor = make_processor()
    for word in ("<|mask|>", "<|image|>"):
        for turns in ([("user", f"a {word}"), ("assistant", "b")], [("user", "a"), ("assistant", f"b {word}")]):
            with pytest.raises(ValueError, match="a special token of the model"):
                processor.example(record(*turns), generator=draws())
        with pytest.raises(ValueError, match="a special token of the model"):
            processor.prompt(word)
    assert "<image>" in text(processor, processor.prompt("the <image> tag").input_ids)


def test_what_does_not_fit_is_refused_with_the_records_place(make_processor, record):
    processor = make_processor()
    for turns, said in (
        ([("user", "q")], "no assistant turn"),
        ([("user", "q"), ("assistant", [("image", RED)])], "an image in an assistant turn"),
        ([("user", [("image", b"no"), "q"]), ("assistant", "a")], "not a readable image"),
    ):
        with pytest.raises(ValueError, match=f"set.json: record 7: .*{said}"):
            processor.example(record(*turns), generator=draws())
    with pytest.raises(ValueError, match="takes ids alone"):
        make_processor(tiling=None).prompt("q", [RED])
    with pytest.raises(ValueError, match="ends with a user's message"):
        processor.prompt([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    with pytest.raises(ValueError, match="needs image_prefix: true"):
        processor.example(record(*FOUR), generator=draws(), turns="each")


def test_configurations_that_cannot_work_are_refused():
    for options, said in (
        ({"turns": "some"}, "use all, one or each"),
        ({"turns": "each"}, "needs image_prefix: true"),
        ({"eos_padding": "row"}, "use none or batch"),
        ({"max_length": 1}, "no room"),
        ({"longer": 0.5}, "a larger length"),
        ({"longer": 2.0, "answer_lengths": (1, 2)}, "probability"),
        ({"answer_lengths": (0, 2)}, "at least 1"),
        ({"further_ends": 0.6, "cut_answers": 0.5}, "of which one happens"),
        ({"further_ends": 0.1, "answer_lengths": (8,)}, "use longer instead"),
        ({"cut_answers": 0.1, "answer_lengths": (8,)}, "leave answer_lengths out"),
        ({"cut_answers": 0.1, "eos_padding": "batch"}, "an end behind half an answer"),
    ):
        with pytest.raises(ValueError, match=said):
            ProcessorConfig(**options)


def test_a_record_may_bring_its_own_turns(make_processor, record):
    processor = make_processor(image_prefix=True)
    assert processor.example(record(*FOUR), generator=draws()).documents.max() == 0
    assert processor.example(record(*FOUR), generator=draws(), turns="each").documents.max() == 1


def test_a_tokenizer_set_to_truncate_does_not_cut_rows(make_processor):
    processor = make_processor()
    before = len(processor.prompt("a long question of many words"))
    processor.tokenizer("some other text", truncation=True, max_length=2)
    processor.tokens._cache.clear()
    assert len(processor.prompt("a long question of many words")) == before


def test_stop_ids_are_the_end_token_and_the_end_of_a_turn(make_processor):
    assert make_processor().stop_ids == (EOS,)
    turns = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|system|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    processor = make_processor(chat_template=turns, tiling=None)
    assert processor.stop_ids == tuple(sorted((EOS, processor.tokenizer.convert_tokens_to_ids("<|system|>"))))


def test_a_processor_sent_to_another_process_is_the_same(make_processor):
    processor = make_processor(image_prefix=True)
    other = pickle.loads(pickle.dumps(processor))
    assert torch.equal(other.prompt("what?", [RED]).input_ids, processor.prompt("what?", [RED]).input_ids)


def test_saved_and_loaded_it_makes_the_same_rows(make_processor, record, tmp_path):
    tiling = TilingConfig(mode="anyres", tile_size=(4, 4), grid=(2, 2), pinpoints=((4, 8), (8, 4)), row_break=True)
    processor = make_processor(
        tiling=tiling, turns="each", image_prefix=True, answer_lengths=(8, 16), longer=0.5, eos_padding="batch"
    )
    written = processor.save_pretrained(tmp_path / "p")
    assert {p.rpartition("/")[2] for p in written} >= {"processor_config.json", "chat_template.jinja", "tokenizer.json"}
    loaded = Processor.from_pretrained(tmp_path / "p", trust_remote_code=False)
    assert loaded.config == processor.config
    assert loaded.special == processor.special
    assert loaded.chat_template == processor.chat_template
    for seed in range(3):
        a, b = (p.example(record(*FOUR), generator=draws(seed)) for p in (processor, loaded))
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.image_slots, b.image_slots)
        assert torch.equal(a.pixel_values, b.pixel_values)
    with pytest.raises(FileNotFoundError, match=r"processor_config\.json"):
        Processor.from_pretrained(tmp_path)


def test_a_processor_without_images_is_saved_too(tokenizer, tmp_path):
    processor = Processor(tokenizer, ProcessorConfig(), SpecialTokens(mask=2, eos=1, pad=0))
    processor.save_pretrained(tmp_path / "p")
    assert Processor.from_pretrained(tmp_path / "p").config.tiling is None
    with pytest.raises(ValueError, match=r"special\.image is None"):
        Processor(tokenizer, ProcessorConfig(tiling=TilingConfig()), SpecialTokens(mask=2, eos=1, pad=0))
    with pytest.raises(ValueError, match="no token 9999"):
        Processor(tokenizer, ProcessorConfig(), SpecialTokens(mask=9999, eos=1, pad=0))


def test_transformers_manner_gives_the_prompts_rows(make_processor):
    processor = make_processor(image_prefix=True)
    conversation = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "what?"}]}]
    prompt = processor.prompt(conversation)
    inputs = processor.apply_chat_template(conversation)
    assert set(inputs) == {"input_ids", "attention_mask", "image_slots", "documents", "positions", "pixel_values"}
    rendered = processor.apply_chat_template(conversation, tokenize=False)
    assert rendered == "<|user|><|image|>what?<|end|><|assistant|>"
    for found in (inputs, processor(text=rendered, images=RED), processor(text=[rendered], images=[[RED]])):
        for name in ("input_ids", "image_slots", "documents", "positions"):
            assert torch.equal(found[name], getattr(prompt, name)[None])
        assert torch.equal(found["pixel_values"], prompt.pixel_values)
        assert found["attention_mask"].all()
    assert torch.equal(processor.apply_chat_template(conversation, return_dict=False), prompt.input_ids[None])


def test_transformers_manner_pads_batches_on_the_left(make_processor):
    processor = make_processor()
    conversations = [
        [{"role": "user", "content": "a longer question?"}],
        [{"role": "user", "content": [{"type": "image", "image": BLUE}, "q"]}],
    ]
    inputs = processor.apply_chat_template(conversations)
    alone = [processor.prompt(c) for c in conversations]
    for row, example in enumerate(alone):
        kept = inputs["attention_mask"][row].bool()
        assert kept.tolist() == sorted(kept.tolist())
        assert torch.equal(inputs["input_ids"][row][kept], example.input_ids)
        assert torch.equal(inputs["positions"][row][kept], example.positions)
    assert processor.apply_chat_template(conversations, padding_side="right")["attention_mask"][0, 0] == 1
    complete = processor.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], add_generation_prompt=False
    )
    assert text(processor, complete["input_ids"][0]) == "<|user|>q<|end|><|assistant|>a<|end|>"


def test_transformers_manner_refuses_what_it_cannot_give(make_processor):
    processor = make_processor()
    with pytest.raises(ValueError, match="1 images for 0 image tokens"):
        processor(text="q", images=[RED])
    with pytest.raises(ValueError, match="0 images for 1 image tokens"):
        processor(text="<|image|>q")
    with pytest.raises(ValueError, match="1 lists of images for 2 texts"):
        processor(text=["a", "b"], images=[[]])
    with pytest.raises(ValueError, match="use 'pt'"):
        processor(text="q", return_tensors="np")
    with pytest.raises(ValueError, match="text is missing"):
        processor(images=RED)
    with pytest.raises(ValueError, match="padding=True"):
        processor(text=["a", "a longer one"], padding=False)


def test_templates_of_text_models_work_with_images(tokenizer):
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = ProcessorConfig(tiling=TilingConfig(tile_size=(4, 4), grid=(2, 2)), image_prefix=True)
    processor = Processor(tokenizer, config, SpecialTokens(pad=0, eos=EOS, mask=MASK, image=IMAGE), template)
    prompt = processor.prompt("what?", [RED])
    assert text(processor, prompt.input_ids) == "<|user|>" + "<|image|>" * 4 + "what?<|end|><|assistant|>"
    assert prompt.documents[:5].tolist() == [PREFIX] * 5
