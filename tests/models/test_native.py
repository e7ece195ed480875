"""Pictures at native resolution: pixels, features, positions, logits are those of transformers' Qwen2-VL and 2.5-VL."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dmllm.data.collate import collate
from dmllm.data.images import cut_tiles
from dmllm.data.packing import Chunk, Document, lay_out
from dmllm.families import dream, qwen_vl
from dmllm.families.family import Rename, to_ours
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.models.vision import VisionConfig, build_vision, resolve_vision
from dmllm.pipeline import Pipeline
from dmllm.tiling import TilingConfig, axis_positions, native_size, plan

IMAGE, START, END, PAD = 110, 111, 112, 113
LIMITS = {"min_pixels": 64, "max_pixels": 2000}
TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
TOWERS = {
    "qwen2_5_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    },
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
}
NAMES = {"qwen2_5_vl": qwen_vl.QWEN2_5, "qwen2_vl": qwen_vl.QWEN2}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def transformers_model(kind: str):
    torch.manual_seed(0)
    config, model = (Qwen2VLConfig, Qwen2VL) if kind == "qwen2_vl" else (
        Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)  # fmt: skip
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "pad_token_id": PAD}
    made = model(config(text_config=dict(TEXT), vision_config=TOWERS[kind], **ids)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return made


def converted(theirs: torch.nn.Module, kind: str) -> Pipeline:
    rope = TEXT["rope_parameters"]
    shape = {key: value for key, value in TEXT.items() if key not in ("max_position_embeddings", "rope_parameters")}
    shape |= {"qkv_bias": True, "rope_theta": rope["rope_theta"], "mrope_section": rope["mrope_section"]}
    config = DmllmConfig(
        backbone=shape,
        vision={"name": f"native:{kind}", "pretrained": False, "options": {"model_type": kind, **TOWERS[kind]}},
        projector={"name": "identity"},
        tiling=LIMITS,
        visibility="causal",
        mask_token_id=119,
        eos_token_id=PAD,
        pad_token_id=PAD,
        image_token_id=IMAGE,
    )
    model = MultimodalModel(config)
    text = tuple(Rename(key.theirs.replace("model.", "model.language_model."), key.ours) for key in dream.KEYS)
    keys = (*text, *qwen_vl.tower_keys("model.visual", NAMES[kind]))
    ours = {}
    for name, tensor in theirs.state_dict().items():
        ((own, _, values),) = to_ours(keys, name, tensor, shape)
        ours[own] = values
    model.load_state_dict(ours)
    return Pipeline(model)


@pytest.mark.parametrize("kind", list(TOWERS))
def test_patches_and_features_are_those_of_transformers(kind):
    pictures = [picture(24, 16), picture(8, 40), picture(41, 30)]
    processor = Qwen2VLImageProcessorPil(patch_size=4, **LIMITS)
    theirs = processor(pictures, return_tensors="pt")
    config = resolve_vision(VisionConfig(name=f"native:{kind}", options={"model_type": kind, **TOWERS[kind]}))
    assert resolve_vision(config) == config
    encoder = build_vision(config, load_weights=False).eval()
    tiling = TilingConfig(mode="native", tile_size=encoder.image_size, grid=(1, 1), **LIMITS)
    plans = [plan(p.width, p.height, tiling) for p in pictures]
    tiles = torch.cat([cut_tiles(p, cut, tiling) for p, cut in zip(pictures, plans, strict=True)])
    grids = torch.tensor([cut.grid for cut in plans])
    assert (grids * torch.tensor([1, 2, 2])).tolist() == theirs["image_grid_thw"].tolist()
    patches = encoder.patches(encoder.normalise(tiles))
    assert torch.allclose(patches, theirs["pixel_values"], atol=1e-6)
    with torch.no_grad():
        features = encoder.tower(theirs["pixel_values"], grid_thw=theirs["image_grid_thw"]).pooler_output
        assert torch.allclose(encoder(tiles, grids)[:, 0], features, atol=1e-6)
        alone = encoder(tiles[: plans[0].num_tiles], grids[:1])  # pictures do not see each other
        assert torch.allclose(alone[:, 0], features[: plans[0].num_tiles], atol=1e-5)


def test_sizes_are_those_of_transformers():
    module = Qwen2VLImageProcessorPil.__module__
    smart_resize = __import__(module, fromlist=["smart_resize"]).smart_resize
    tiling = TilingConfig(mode="native", tile_size=(28, 28), grid=(1, 1), min_pixels=3136, max_pixels=1_000_000)
    for width, height in (
        (1, 1),
        (10, 300),
        (300, 10),
        (28, 42),
        (70, 14),
        (640, 480),
        (3000, 2000),
        (199, 1),
        (5, 900),
    ):
        expected = smart_resize(height, width, 28, 3136, 1_000_000)
        assert native_size(width, height, tiling) == expected, (width, height)
    with pytest.raises(ValueError, match="more than 200 times"):
        native_size(201, 1, tiling)


def test_positions_of_text_and_pictures_are_those_of_transformers():
    model = transformers_model("qwen2_5_vl").model
    segments = [3, (1, 2, 3), 1, (1, 4, 1), (1, 1, 1), 5]
    kinds = [[0] * s if isinstance(s, int) else [1] * int(np.prod(s)) for s in segments]
    # without text between them two pictures are one run to transformers, so the last is given apart
    joined = segments[:4] + segments[5:]
    types = torch.tensor([[*chain(*kinds[:4], *kinds[5:])]])
    grids = torch.tensor([[1, 4, 6], [1, 8, 2]])
    expected, _ = model.get_rope_index(torch.zeros_like(types), types, grids)
    assert axis_positions(joined).tolist() == expected[:, 0].tolist()
    adjacent = axis_positions(segments)
    assert adjacent[:, 14].tolist() == [11, 11, 11]  # behind the four rows of the one before it
    assert adjacent[:, 15:].tolist() == [[12, 13, 14, 15, 16]] * 3
    assert axis_positions([2], start=7).tolist() == [[7, 8]] * 3


@pytest.mark.parametrize("kind", list(TOWERS))
def test_logits_are_those_of_transformers(kind):
    theirs = transformers_model(kind)
    pipeline = converted(theirs, kind)
    processor = Qwen2VLImageProcessorPil(patch_size=4, **LIMITS)
    requests = [
        ([1, 2, 3, 4, 5], []),
        ([1, START, IMAGE, END, 6, 7], [picture(24, 16)]),
        ([START, IMAGE, END, 8, START, IMAGE, END, 9], [picture(8, 40, seed=1), picture(41, 30, seed=2)]),
    ]
    found = []
    for ids, pictures in requests:
        inputs = {"input_ids": ids}
        expanded, slots = list(ids), []
        if pictures:
            given = processor(pictures, return_tensors="pt")
            supply = iter((given["image_grid_thw"].prod(1) // 4).tolist())
            expanded = [token for i in ids for token in ([i] * next(supply) if i == IMAGE else [i])]
            inputs = dict(given)
        whole = torch.tensor([expanded])
        inputs |= {"input_ids": whole, "mm_token_type_ids": (whole == IMAGE).int()}
        with torch.no_grad():
            expected = theirs(**inputs).logits[0]
        assert torch.allclose(pipeline.logits(whole, images=pictures or None)[0], expected, atol=1e-4), slots
        # an image token that stands for the whole picture gives the logits of its first row
        kept = [k for k, token in enumerate(expanded) if token != IMAGE or expanded[k - 1] != IMAGE]
        assert torch.allclose(
            pipeline.logits(torch.tensor([ids]), images=pictures or None)[0], expected[kept], atol=1e-4
        )
        found.append(expected[kept])
    longest = max(len(ids) for ids, _ in requests)
    padded = torch.tensor([[PAD] * (longest - len(ids)) + ids for ids, _ in requests])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in requests])
    together = pipeline.logits(padded, mask, images=[pictures for _, pictures in requests])
    for row, expected in zip(together, found, strict=True):
        assert torch.allclose(row[-len(expected) :], expected, atol=1e-4)


def prefixed(visibility: str, shift: bool) -> Pipeline:
    pipeline = converted(transformers_model("qwen2_5_vl"), "qwen2_5_vl")
    pipeline.model.config.visibility, pipeline.model.config.shift = visibility, shift
    return pipeline


@pytest.mark.parametrize("shift", [False, True])
def test_questions_packed_behind_one_picture_score_as_each_alone(shift):
    model = prefixed("prefix", shift).model
    tiling = model.tiling
    image = picture(24, 16)
    cut = plan(image.width, image.height, tiling)
    tiles = cut_tiles(image, cut, tiling)
    shown = [
        Chunk(np.array([START])),
        Chunk(np.full(cut.num_tiles, IMAGE), np.array(cut.slots), grid=cut.grid),
        Chunk(np.array([END])),
    ]
    questions = [[Chunk(np.array(ids)), Chunk(np.array(answer), None, True)] for ids, answer in ((
        [3, 4, 5], [6, 7]), ([8, 9], [10, 11, 12]))]  # fmt: skip

    def run(documents: list[Document]) -> list[torch.Tensor]:
        example = lay_out([[*shown, *own] for own in documents], 3, tiles, 0)
        batch = collate([example], model.config.special, rows_per_tile=1)
        canvas = batch.labels != -100
        logits = model(
            batch.input_ids,
            pixel_values=batch.pixel_values,
            image_grids=batch.image_grids,
            image_slots=batch.image_slots,
            positions=batch.positions,
            documents=batch.documents,
            canvas=canvas,
        ).logits[0]
        return [logits[(batch.documents[0] == number) & canvas[0]] for number in range(len(documents))]

    with torch.no_grad():
        together = run(questions)
        for packed, own in zip(together, questions, strict=True):
            assert torch.allclose(packed, run([own])[0], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.5}])
@pytest.mark.parametrize("visibility", ["prefix", "full"])
def test_decoding_is_the_same_cached_or_not_and_batched_or_not(visibility, options):
    pipeline = prefixed(visibility, True)
    rows = [[1, START, IMAGE, END, 6, 7], [START, IMAGE, END, 8, START, IMAGE, END, 9], [4, 5]]
    pictures = [[picture(24, 16)], [picture(8, 40), picture(24, 16)], []]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 6, "steps": 3, "eos_token_id": [], **options}
    together = pipeline.generate(ids, mask, pictures, **options).sequences[:, -6:]
    assert torch.equal(pipeline.generate(ids, mask, pictures, use_cache=False, **options).sequences[:, -6:], together)
    for row, own, found in zip(rows, pictures, together, strict=True):
        alone = pipeline.generate(torch.tensor([row]), images=own or None, **options)
        assert torch.equal(alone.sequences[0, -6:], found)


def test_what_does_not_fit_is_refused():
    options = {"model_type": "qwen2_vl", **TOWERS["qwen2_vl"]}
    encoder = build_vision(VisionConfig(name="native:a", options=options), load_weights=False)
    tiles = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="image_grids tell of 0 tiles for pixel_values of 4"):
        encoder(tiles)
    with pytest.raises(ValueError, match="image_grids tell of 6 tiles"):
        encoder(tiles, torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"tiles \[T, 3, 8, 8\]"):
        encoder(torch.zeros(4, 3, 9, 8, dtype=torch.uint8), torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="did you mean depth"):
        resolve_vision(VisionConfig(name="native:a", options={**options, "depht": 3}))
    with pytest.raises(ValueError, match="model_type='qwen9_vl'"):
        resolve_vision(VisionConfig(name="native:a", options={"model_type": "qwen9_vl"}))
    with pytest.raises(ValueError, match="one stream row of each tile"):
        TilingConfig(mode="native", tile_size=(28, 28), grid=(2, 2))
    with pytest.raises(ValueError, match="min_pixels"):
        TilingConfig(mode="native", min_pixels=10, max_pixels=9)
    with pytest.raises(ValueError, match="must be three numbers"):
        MultimodalModel(DmllmConfig(backbone={"hidden_size": 32, "num_attention_heads": 2, "mrope_section": [2, 2, 2]}))
