"""Pictures from texts and from pictures: rows of a batch, what is kept, what is drawn anew, and saved checkpoints."""

import numpy as np
import pytest
import torch
from PIL import Image

import dmllm
from dmllm.board import Board
from dmllm.checkpoints import folder
from dmllm.checkpoints.image_tokenizer import save_image_tokenizer
from dmllm.cli import main
from dmllm.data.processor import Processor, ProcessorConfig
from dmllm.image_vocabulary import ImageVocabulary
from dmllm.models.configuration import DmllmConfig
from dmllm.models.image_tokenizers import build_image_tokenizer
from dmllm.models.multimodal import MultimodalModel
from dmllm.pipeline import Pipeline
from tests.test_pipeline import SPECIAL_TOKENS, make_tokenizer, picture

DEFAULTS = {"size": 16, "steps": 5, "guidance": 1.0}
STRIDE = 4


def make(visibility: str = "full", **fields) -> Pipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    count = len(tokenizer)
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[n]) for n in ("mask", "eos", "pad")}
    own = {"begin": count, "end": count + 1, "draw": (count + 2,), "mask": ids["mask_token_id"], **fields}
    config = DmllmConfig(
        backbone={"vocab_size": count + 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        visibility=visibility,
        image_vocabulary=ImageVocabulary(offset=count + 4, size=16, **own),
        **ids,
    )
    model = MultimodalModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    codes = build_image_tokenizer("fsq", {"levels": (4, 4), "channels": (8, 8), "patch": 2, "depth": 0})
    for parameter in codes.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    processor = Processor(tokenizer, ProcessorConfig(), config.special)
    return Pipeline(model, processor, {"max_new_tokens": 8, "drawing": dict(DEFAULTS)}).drawing_by(codes)


@pytest.fixture(scope="module", params=["full", "prefix"])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return make(request.param)


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return make()


def same(one: Image.Image, other: Image.Image) -> bool:
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def codes_of(pipeline: Pipeline, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return pipeline.image_tokenizer.encode(pixels)[0]


def drawn_again(pipeline: Pipeline, codes: torch.Tensor) -> np.ndarray:
    return pipeline.image_tokenizer.decode(codes[None])[0].permute(1, 2, 0).numpy()


def test_each_of_a_batch_of_pictures_is_the_one_that_is_drawn_alone(pipeline):
    together = pipeline.imagine(["a red circle", "two"], num_images=2, generator=seeds(1, 2, 3, 4))
    assert [image.size for image in together] == [(16, 16)] * 4
    for number, (text, seed) in enumerate(zip(["a red circle"] * 2 + ["two"] * 2, (1, 2, 3, 4), strict=True)):
        assert same(pipeline.imagine(text, generator=seed)[0], together[number])
    assert not same(together[0], together[1])


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_one_number_gives_several_pictures_of_one_text_and_the_same_ones_again(plain):
    first, again = (plain.imagine("a dog", num_images=3, generator=5) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], first[1])


def test_a_picture_has_the_size_that_is_asked_for(plain):
    wide = plain.imagine("a", size=(24, 8), generator=1)[0]
    assert wide.size == (24, 8)
    with pytest.raises(ValueError, match=r"size=10x10 is not in codes of 4 pixels; try 8x8"):
        plain.imagine("a", size=10)


def test_what_is_not_known_yet_is_grey_on_the_way(plain):
    steps = [np.asarray(images[0]) for images in plain.imagining("a", generator=2)]
    assert len(steps) == DEFAULTS["steps"]
    grey = [int((step == 127).all(-1).reshape(4, STRIDE, 4, STRIDE).all((1, 3)).sum()) for step in steps]
    assert grey[0] > 8
    assert grey == sorted(grey, reverse=True)
    assert same(Image.fromarray(steps[-1]), plain.imagine("a", generator=2)[0])


def test_guidance_leads_away_from_a_picture_of_nothing(plain):
    settings = {"generator": 3, "temperature": 0.0, "order_temperature": 0.0}
    none, some, much = (plain.imagine("a cat", guidance=scale, **settings)[0] for scale in (0.0, 1.0, 8.0))
    assert same(some, plain.imagine("a cat", **settings)[0])
    assert not same(none, much)


def test_inpainting_draws_every_code_that_the_mask_touches_and_no_other(plain, monkeypatch):
    image, decoded = picture(3, (16, 16)), []
    known, decode = codes_of(plain, image), plain.image_tokenizer.decode
    monkeypatch.setattr(plain.image_tokenizer, "decode", lambda codes: decoded.append(codes[0]) or decode(codes))
    mask = np.zeros((16, 16), dtype=bool)
    mask[5, 6] = True  # one pixel of the code in row 1, column 1
    mask[8:16, 8:16] = True
    anew = torch.tensor([[False] * 4, [False, True, False, False], *[[False, False, True, True]] * 2])
    for given in (mask, torch.from_numpy(mask), Image.fromarray(mask.astype(np.uint8) * 255)):
        assert torch.equal(Board.of(plain, None).cells(given, (4, 4)), anew)
        plain.edit(image, "a", mask=given, generator=1)
        assert torch.equal(decoded[-1][~anew], known[~anew])
    assert not torch.equal(decoded[-1], known)


def test_a_mask_of_nothing_gives_the_picture_back_as_its_codes_have_it(plain):
    image = picture(4, (16, 16))
    kept = plain.edit(image, "a", mask=np.zeros((16, 16), dtype=bool))[0]
    assert np.array_equal(np.asarray(kept), drawn_again(plain, codes_of(plain, image)))
    same_again = plain.edit(image, "a", strength=0.0, generator=1)[0]
    assert same(kept, same_again)


def test_a_variation_draws_a_share_of_the_codes_anew_each_picture_another(plain):
    image = picture(5, (16, 16))
    steps = list(plain.editing(image, "a", strength=0.25, num_images=2, generator=6, steps=2, schedule="even"))
    known = drawn_again(plain, codes_of(plain, image))
    assert all(len(images) == 2 for images in steps)
    assert not same(steps[-1][0], steps[-1][1])
    fully = plain.edit(image, "a", strength=1.0, generator=6)[0]
    assert not np.array_equal(np.asarray(fully), known)


def test_a_picture_grows_by_what_is_asked_for_on_each_side(plain):
    image = picture(6, (16, 16))
    larger = plain.edit(image, "a", expand=(4, 0, 8, 12), generator=1)[0]
    assert larger.size == (28, 28)
    with pytest.raises(ValueError, match=r"each a multiple of 4"):
        plain.edit(image, "a", expand=(1, 0, 0, 0))


def test_an_edit_sees_the_picture_and_is_guided_by_both(plain):
    settings = {"generator": 1, "temperature": 0.0, "order_temperature": 0.0}
    one, other = (plain.edit(picture(seed, (16, 16)), "make it blue", **settings)[0] for seed in (7, 8))
    assert not same(one, other)
    guided = plain.edit(picture(7, (16, 16)), "make it blue", guidance=2.0, image_guidance=3.0, **settings)[0]
    assert not same(one, guided)
    by_image = plain.edit(picture(7, (16, 16)), "make it blue", guidance=0.0, image_guidance=3.0, **settings)[0]
    assert not same(guided, by_image)


def test_a_text_and_a_picture_complete_each_other_and_what_is_fixed_stays(pipeline):
    image = picture(9, (16, 16))
    mask = np.zeros((16, 16), dtype=bool)
    mask[:, 8:] = True
    found = pipeline.complete("a [MASK:3] b[MASK] c", image, mask=mask, generator=4, steps=4)
    assert found.text == f"a {found.filled[0]} b{found.filled[1]} c"
    assert found.num_forwards == 4
    again = pipeline.complete("a [MASK:3] b[MASK] c", image, mask=mask, generator=4, steps=4)
    assert (again.text, same(again.image, found.image)) == (found.text, True)
    slow = pipeline.complete("a [MASK:3]", image, mask=mask, generator=4, steps=2, text_decode={"steps": 3})
    assert slow.num_forwards == 3, "each goes by its own schedule"
    alone = pipeline.complete("a tree", size=(8, 8), generator=1)
    assert (alone.text, alone.filled, alone.image.size) == ("a tree", [], (8, 8))
    with pytest.raises(ValueError, match=r"a hole beside a picture has one length"):
        pipeline.complete("a [MASK:1..2]", size=8)


def test_a_description_is_left_out_by_its_own_token_where_there_is_one():
    plain, own = make(), make(draw_text="draw <{}>", unconditional=260)
    assert Board.of(plain, None).drawing(None) == [*plain.model.config.images.draw, plain.model.config.images.begin]
    encode = own.processor.tokens.encode
    around = [*encode("draw <")[0].tolist(), 260, *encode(">")[0].tolist()]
    images = own.model.config.images
    assert Board.of(own, None).drawing(None) == [*images.draw, *around, images.begin]


def test_a_checkpoint_keeps_its_image_tokenizer_and_settings(plain, tmp_path):
    folder.save(
        tmp_path / "saved",
        plain.model,
        plain.processor,
        generation=plain.generation,
        image_tokenizer=plain.image_tokenizer,
    )
    loaded = dmllm.load(str(tmp_path / "saved"), device="cpu")
    assert same(loaded.imagine("a", generator=1)[0], plain.imagine("a", generator=1)[0])
    folder.save(tmp_path / "without", plain.model, plain.processor, generation=plain.generation)
    save_image_tokenizer(plain.image_tokenizer, tmp_path / "codes")
    without = dmllm.load(str(tmp_path / "without"), device="cpu")
    with pytest.raises(ValueError, match=r"no image tokenizer.*image_tokenizer="):
        without.imagine("a")
    path = str(tmp_path / "codes")
    assert same(without.imagine("a", generator=1, image_tokenizer=path)[0], plain.imagine("a", generator=1)[0])
    named = dmllm.load(str(tmp_path / "without"), device="cpu", image_tokenizer=path)
    assert same(named.imagine("a", generator=1)[0], plain.imagine("a", generator=1)[0])


def test_an_option_that_says_nothing_of_a_picture_and_another_tokenizers_codes_are_refused(plain):
    with pytest.raises(ValueError, match=r"'step' is no setting of a picture; did you mean steps"):
        plain.imagine("a", step=3)
    other = build_image_tokenizer("fsq", {"levels": (3, 3), "channels": (8,), "patch": 4})
    with pytest.raises(ValueError, match=r"has 9 codes and the model 16"):
        plain.imagine("a", image_tokenizer=other)


def test_the_command_draws_edits_and_shows_how_a_picture_comes_to_be(plain, tmp_path, capsys):
    saved = str(tmp_path / "saved")
    folder.save(saved, plain.model, plain.processor, generation=plain.generation, image_tokenizer=plain.image_tokenizer)
    out, gif = tmp_path / "a.png", tmp_path / "a.gif"
    assert main(["imagine", saved, "a", "--out", str(out), "--gif", str(gif), "--generator=1", "--device=cpu"]) == 0
    assert same(Image.open(out), plain.imagine("a", generator=1)[0])
    assert Image.open(gif).n_frames >= 2
    mask = tmp_path / "mask.png"
    Image.new("L", (16, 16)).save(mask)
    options = ["--image", str(out), "--mask", str(mask), "--num-images=2", "--steps=2", "--device=cpu"]
    assert main(["imagine", saved, "b", "--out", str(tmp_path / "b.png"), *options]) == 0
    assert sorted(path.name for path in tmp_path.glob("b*.png")) == ["b-0.png", "b-1.png"]
    assert main(["imagine", saved, "b", "--size=[8, 12]", "--out", str(out), "--device=cpu"]) == 0
    assert Image.open(out).size == (8, 12)
    assert main(["imagine", saved, "b", "--sizes=8", "--device=cpu"]) == 2
    assert "no setting of a picture" in capsys.readouterr().err
