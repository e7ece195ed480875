"""The architecture: packed == separate, cached == uncached, rows asked for == rows of the whole, images in place."""

import pytest
import torch

from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from dmllm.nn.cache import KVCache
from dmllm.nn.visibility import Visibility, layout
from dmllm.types import PADDING, PREFIX, ROW_BREAK

VISION = {
    "name": "timm:vit_tiny_patch16_224",
    "pretrained": False,
    "image_size": [16, 16],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "options": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
}


def tiny(**changes) -> MultimodalModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= changes.pop("backbone", {})
    ids = {"mask_token_id": 63, "eos_token_id": 1, "pad_token_id": 0, "image_token_id": 62}
    model = MultimodalModel(DmllmConfig(backbone=shape, **ids, **changes))
    model.initialise()
    return model.eval()


def with_vision(**changes) -> MultimodalModel:
    return tiny(vision=VISION, projector={"name": "linear"}, **changes)


@pytest.mark.parametrize(
    "shape",
    [{}, {"num_key_value_heads": 2, "qk_norm": True}, {"qkv_bias": True, "head_dim": 16, "tie_word_embeddings": True}],
)
def test_logits_at_asked_rows_are_those_of_the_whole(shape):
    model = tiny(backbone=shape)
    ids = torch.randint(0, 60, (2, 7))
    whole = model(ids).logits
    some = torch.tensor([[1, 3], [6, 0]])
    flat = torch.tensor([0, 5, 13])
    assert torch.allclose(model(ids, rows=some).logits, torch.stack([whole[0, [1, 3]], whole[1, [6, 0]]]), atol=1e-6)
    assert torch.allclose(model(ids, rows=flat).logits, whole.flatten(0, 1)[flat], atol=1e-6)


def test_a_prompt_in_the_cache_gives_the_logits_of_the_whole_stream():
    model = tiny(visibility="prefix", backbone={"num_key_value_heads": 2})
    ids = torch.randint(0, 60, (2, 9))
    documents = torch.tensor([[0] * 9, [0, 0, 0, PADDING, PADDING, 0, 0, 0, 0]])
    positions = torch.tensor([list(range(9)), [0, 1, 2, 0, 0, 3, 4, 5, 6]])
    canvas = torch.tensor([[0] * 5 + [1] * 4] * 2).bool()
    look = layout("prefix", documents=documents, canvas=canvas)
    whole = model(ids, positions=positions, visibility=look).logits
    head, tail = (Visibility(look.rank[:, s], look.canvas[:, s], look.document[:, s]) for s in (slice(5), slice(5, 9)))
    cache = KVCache(9)
    cache.put(torch.arange(5).expand(2, -1))
    model(ids[:, :5], positions=positions[:, :5], visibility=head, cache=cache)
    assert cache.length == 5
    cache.put(torch.arange(5, 9).expand(2, -1))
    for _ in range(2):  # writing anew leaves no trace
        again = model(ids[:, 5:], positions=positions[:, 5:], visibility=tail, cache=cache).logits
        assert torch.allclose(again, whole[:, 5:], atol=1e-5)
    one = cache.select(torch.tensor([1]))
    one.put(torch.arange(5, 9)[None])
    alone = model(ids[1:, 5:], positions=positions[1:, 5:], visibility=tail.select(torch.tensor([1])), cache=one).logits
    assert torch.allclose(alone, whole[1:, 5:], atol=1e-5)


def test_questions_packed_behind_one_picture_score_as_each_alone():
    model = with_vision(visibility="prefix")
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    picture = torch.full((4,), 62)
    questions = [torch.randint(0, 60, (5,)), torch.randint(0, 60, (3,))]

    def run(parts: list[torch.Tensor]) -> torch.Tensor:
        ids = torch.cat([picture, *parts])[None]
        documents = torch.cat([torch.full((4,), PREFIX), *(torch.full((len(p),), i) for i, p in enumerate(parts))])[
            None
        ]
        positions = torch.cat([torch.arange(4), *(torch.arange(4, 4 + len(p)) for p in parts)])[None]
        slots = torch.cat([torch.arange(4), *(torch.full((len(p),), -1) for p in parts)])[None]
        canvas = torch.cat([torch.zeros(4), *((torch.arange(len(p)) >= 2).float() for p in parts)])[None].bool()
        look = layout("prefix", documents=documents, canvas=canvas)
        return model(ids, pixel_values=pixels, image_slots=slots, positions=positions, visibility=look).logits[0]

    packed = run(questions)
    assert torch.allclose(packed[4:9], run(questions[:1])[4:], atol=1e-5)
    assert torch.allclose(packed[9:], run(questions[1:])[4:], atol=1e-5)


def test_padding_changes_nothing():
    model = tiny()
    ids = torch.randint(0, 60, (1, 5))
    right = torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)], 1)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    alone = model(ids).logits
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    assert torch.allclose(model(right, attention_mask=mask).logits[:, :5], alone, atol=1e-5)
    assert torch.allclose(model(left, attention_mask=mask.flip(1)).logits[:, 3:], alone, atol=1e-5)


def test_image_rows_and_row_breaks_enter_at_their_slots():
    model = with_vision(row_break=True)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = model.encode_images(pixels)
    assert features.shape == (8, 32)
    slots = torch.tensor([[-1, 5, 0, ROW_BREAK]])
    ids = torch.tensor([[7, 62, 62, 62]])
    stream = model.embed(ids, slots, features)[0]
    expected = torch.stack([model.backbone.embed(torch.tensor(7)), features[5], features[0], model.row_break])
    assert torch.equal(stream, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = torch.randint(0, 60, (2, 6))

    def gradient(checkpointing: bool) -> torch.Tensor:
        model = tiny().train()
        model.set_gradient_checkpointing(checkpointing)
        model(ids).logits.square().mean().backward()
        return model.backbone.layers[0].mlp.up_proj.weight.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_text_model_refuses_pictures():
    with pytest.raises(ValueError, match="takes text only"):
        tiny().encode_images(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_key_value_heads"):
        tiny(backbone={"num_key_value_heads": 3})
    with pytest.raises(ValueError, match="set head_dim"):
        tiny(backbone={"hidden_size": 30})
    with pytest.raises(ValueError, match="full, prefix, causal"):
        tiny(visibility="sideways")
