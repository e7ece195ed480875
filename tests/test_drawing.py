"""Pictures as codes: rows of a batch, known codes, orders and rules, and how much of the vocabulary a step reads."""

import pytest
import torch
from torch import Generator

import dmllm.samplers.modalities
from dmllm.drawing import SETTINGS, UNKNOWN, Guidance, draw, drawing_config, fill
from dmllm.image_vocabulary import ImageVocabulary
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.samplers.config import DecodeConfig
from dmllm.samplers.maskgit import halton
from dmllm.samplers.modalities import Part
from tests.test_as_on_a_gpu import act

IMAGES = ImageVocabulary(offset=24, size=16, begin=20, end=21, mask=23, newline=22, draw=(19,))
PROMPTS = [IMAGES.drawing([1, 2, 3]), IMAGES.drawing([4]), IMAGES.drawing([5, 6, 7, 8, 9])]
RULES = {
    "maskgit": {},
    "constant": {"order_cooling": "constant", "order_temperature": 4.5},
    "compounding": {"order_cooling": "compounding", "schedule": "maskgit_fixed", "noise_schedule": "square"},
    "halton": {"remasking": "halton"},
    "entropy bound": {"schedule": "even", "remasking": "entropy", "entropy_bound": 2.0, "num_to_transfer": 1},
    "margin": {"schedule": "even", "remasking": "margin", "steps": 6},
    "random": {"remasking": "random"},
    "remdm": {"schedule": "time", "remasking": "origin", "remdm": "cap", "eta": 0.2, "steps": 10},
    "revoke": {"schedule": "even", "threshold": 0.2, "order_temperature": 0.0, "revoke_threshold": 0.3},
    "multinomial": {"sampling": "multinomial"},
    "gumbel": {"sampling": "gumbel"},
}


def model_of(visibility="full", **config):
    torch.manual_seed(0)
    backbone = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    special = {"mask_token_id": 23, "eos_token_id": 18, "pad_token_id": 18}
    model = MultimodalModel(
        DmllmConfig(backbone=backbone, visibility=visibility, image_vocabulary=IMAGES, **special, **config)
    )
    model.initialise()
    torch.nn.init.normal_(model.backbone.lm_head.weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return model_of()


def last(*arguments, **options):
    *_, drawing = draw(*arguments, **options)
    return drawing


@pytest.mark.parametrize("name", RULES)
def test_a_row_of_a_batch_is_drawn_as_it_is_alone(model, name):
    codes = torch.full((3, 3, 4), UNKNOWN)
    codes[1, 0] = torch.tensor([3, 1, 4, 1])  # it has fewer calls to wait for
    empty = IMAGES.drawing([])
    options = {"guidance": Guidance(scales=(2.0,)), **RULES[name]}
    prompts = [PROMPTS, [empty] * 3]
    draws = [Generator().manual_seed(seed) for seed in (7, 8, 9)]
    together = last(model, prompts, (3, 4), codes=codes, generator=draws, **options)
    assert bool((together.codes != UNKNOWN).all() & (together.codes < 16).all() & together.finished.all())
    assert torch.equal(together.codes[1, 0], codes[1, 0])
    for row, seed in enumerate((7, 8, 9)):
        mine = {"codes": codes[row : row + 1], "generator": Generator().manual_seed(seed), **options}
        alone = last(model, [[PROMPTS[row]], [empty]], (3, 4), **mine)
        assert torch.equal(alone.codes[0], together.codes[row])
        assert alone.num_forwards.tolist() == together.num_forwards[row : row + 1].tolist()


def test_a_step_reads_no_row_of_the_vocabulary_that_is_no_code(model):
    expected = last(model, [PROMPTS], (3, 4), generator=1)
    spoilt = model_of()
    with torch.no_grad():
        spoilt.backbone.lm_head.weight[: IMAGES.offset] = torch.nan
    assert torch.equal(last(spoilt, [PROMPTS], (3, 4), generator=1).codes, expected.codes)


def test_a_text_beside_a_picture_reads_no_code_and_a_picture_no_text():
    spoilt = model_of()
    ids, slots = IMAGES.canvas(2, 3)
    text = torch.tensor([1, 23, 23, 4])  # a description with holes
    canvas = torch.cat([text, torch.tensor([20]), ids])[None]
    settings = {"eos_token_id": [], "temperature": 1.0, "remasking": "entropy"}
    parts = [
        Part(slots=torch.tensor([1, 2]), words=IMAGES.text_of, config=DecodeConfig(max_new_tokens=2, **settings)),
        Part(slots=slots + 5, words=IMAGES.codes_of, config=DecodeConfig(max_new_tokens=6, steps=3, **settings)),
    ]
    steps = list(fill(spoilt, [[[19]]], canvas, parts, generator=3))
    full = steps[-1].ids[0]
    assert bool((full[[1, 2]] < 23).all())
    assert bool((full[slots + 5] >= 24).all())
    given = canvas[0] != 23
    assert torch.equal(full[given], canvas[0][given])
    assert len(steps) == 3  # both are filled by the same calls: two for the text, three for the picture
    with torch.no_grad():
        spoilt.backbone.lm_head.weight[24:] = torch.nan
    again = list(fill(spoilt, [[[19]]], canvas, parts[:1], generator=3))[-1].ids[0]
    assert bool((again[[1, 2]] < 23).all())
    both = canvas.repeat(2, 1)
    both[1, 1] = 7  # the second row's text is full a call earlier
    draws = [Generator().manual_seed(seed) for seed in (5, 6)]
    whole = model_of()
    *_, together = fill(whole, [[[19], [19]]], both, parts, generator=draws)
    for row, seed in enumerate((5, 6)):
        *_, alone = fill(whole, [[[19]]], both[row : row + 1], parts, generator=Generator().manual_seed(seed))
        assert torch.equal(alone.ids[0], together.ids[row])


def test_where_the_prompt_does_not_see_the_canvas_it_is_computed_once_and_nothing_changes():
    model = model_of("prefix")
    options = {"guidance": Guidance(scales=(1.5, 0.5), interval=(0.2, 0.7)), "generator": 4, "steps": 6}
    prompts = [PROMPTS, [IMAGES.drawing([])] * 3, [IMAGES.drawing([2])] * 3]
    cached, plain = (last(model, prompts, (3, 4), use_cache=use, **options) for use in (None, False))
    assert torch.equal(cached.codes, plain.codes)


def test_guidance_of_nothing_is_none_and_outside_its_interval_it_costs_nothing(model):
    fed = []

    def counted(*arguments, **options):
        fed.append(len(options["inputs_embeds"]))
        return type(model).forward(model, *arguments, **options)

    free = [PROMPTS[:1], [IMAGES.drawing([])]]
    plain = last(model, free[:1], (2, 2), generator=2, steps=4, temperature=0.0, order_temperature=0.0)
    nothing = last(
        model, free, (2, 2), guidance=Guidance(scales=(0.0,)), steps=4, temperature=0.0, order_temperature=0.0
    )
    assert torch.equal(plain.codes, nothing.codes)
    model.forward = counted
    try:
        guided = Guidance(scales=(3.0,), interval=(0.25, 0.75))
        last(model, free, (2, 2), guidance=guided, generator=2, steps=4)
    finally:
        del model.forward
    assert fed == [1, 2, 2, 1]


def test_haltons_order_takes_every_code_once_and_spreads_the_first_ones():
    order = halton(8, 8)
    assert sorted(order) == list(range(64))
    first = [divmod(place, 8) for place in sorted(range(64), key=order.__getitem__)[:4]]
    assert {(row // 4, column // 4) for row, column in first} >= {(0, 0), (0, 1), (1, 0)}
    assert halton(1, 1) == (0,)
    assert sorted(halton(2, 5)) == list(range(10))


def test_codes_come_in_haltons_order(model):
    order = torch.tensor(halton(3, 4)).view(3, 4)
    for drawing in draw(model, [PROMPTS[:1]], (3, 4), generator=1, remasking="halton", steps=5):
        known = drawing.codes[0] != UNKNOWN
        assert int(order[known].max()) == int(known.sum()) - 1


def test_maskgits_noise_reorders_what_is_found_first(model):
    def firsts(**options):
        found = []
        for seed in range(20):
            drawing = next(draw(model, [PROMPTS[:1]], (3, 4), generator=seed, temperature=0.0, steps=4, **options))
            found.append(tuple((drawing.codes[0] != UNKNOWN).flatten().tolist()))
        return len(set(found))

    assert firsts(order_temperature=0.0) == 1
    assert firsts(order_temperature=5.0) > 5


def test_settings_that_say_nothing_of_a_picture_and_models_without_codes_are_refused(model):
    with pytest.raises(ValueError, match=r"'block_length' is no setting of a picture"):
        drawing_config({"block_length": 4}, {}, 12)
    with pytest.raises(ValueError, match=r"order_temperature=2.0: 0 or above, and with remasking='low_confidence'"):
        drawing_config({"remasking": "margin", "order_temperature": 2.0}, {}, 12)
    with pytest.raises(ValueError, match=r"codes are \[1, 2, 2\] in -2 .. 3"):
        last(model, [PROMPTS[:1]], (2, 2), codes=torch.tensor([[[-2, 3], [0, 1]]]))
    with pytest.raises(ValueError, match=r"2 prompts for each of 1 rows with 0 scales"):
        last(model, [PROMPTS[:1], PROMPTS[:1]], (2, 2))
    with pytest.raises(ValueError, match=r"visibility full or prefix, not 'causal'"):
        last(model_of("causal"), [PROMPTS[:1]], (2, 2))
    with pytest.raises(ValueError, match=r"guidance_interval=\(0.5, 0.2\)"):
        Guidance(scales=(1.0,), interval=(0.5, 0.2))
    plain = model_of()
    plain.config.image_vocabulary = None
    with pytest.raises(ValueError, match=r"draws no pictures"):
        last(plain, [PROMPTS[:1]], (2, 2))
    assert {*SETTINGS} <= {*DecodeConfig.__dataclass_fields__}


def test_a_checkpoints_settings_go_under_the_callers_and_over_the_common_ones():
    config, spread = drawing_config({"steps": 3}, {"steps": 9, "order_cooling": "constant", "size": 512}, 16)
    assert (config.steps, config.order_cooling, config.schedule, spread) == (3, "constant", "maskgit", False)
    config, spread = drawing_config({"remasking": "halton"}, {"order_temperature": 4.0}, 16)
    assert (config.remasking, config.order_temperature, spread) == ("sequential", 0.0, True)


@pytest.mark.parametrize("name", ["maskgit", "halton", "entropy bound", "remdm", "multinomial"])
def test_where_no_shape_depends_on_data_as_on_a_gpu_the_same_codes_are_drawn(model, name, monkeypatch):
    options = {"guidance": Guidance(scales=(2.0,), interval=(0.2, 0.9)), "generator": 3, **RULES[name]}
    codes = torch.full((3, 3, 4), UNKNOWN)
    codes[1, 0] = torch.tensor([3, 1, 4, 1])
    plain = last(model, [PROMPTS, [IMAGES.drawing([])] * 3], (3, 4), codes=codes, **options)
    act(monkeypatch)
    monkeypatch.setattr(dmllm.samplers.modalities, "is_static", lambda device: True)
    static = last(model, [PROMPTS, [IMAGES.drawing([])] * 3], (3, 4), codes=codes, **options)
    assert torch.equal(static.codes, plain.codes)
