"""LLaDA-MoE: the authors' logits and generations, recorded from their code; conversion both ways; refusals."""

import pytest
import torch

from tests.families.recorded import Recorded, assert_written_back

RECORDED = Recorded("llada_moe")
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def test_logits_are_the_authors(pipe):
    logits = pipe.logits(RECORDED.inputs["ids"])
    assert (logits - RECORDED.expected["fwd.logits"]).abs().max() < 1e-4


def test_logits_behind_padding_on_the_left_are_the_authors(pipe):
    mask = RECORDED.inputs["am_l"]
    logits = pipe.logits(RECORDED.inputs["idl"], mask)
    assert (logits - RECORDED.expected["fwd_leftpad.logits"])[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize(("case", "steps", "block_length"), [("s16_b8", 16, 8), ("s8_b16", 8, 16)])
def test_generations_are_the_authors_in_as_many_forwards(pipe, case, steps, block_length):
    found = pipe.generate(
        RECORDED.inputs["p1"], max_new_tokens=16, steps=steps, block_length=block_length, eos_token_id=[]
    )
    assert torch.equal(found.sequences, RECORDED.expected[f"{case}.tokens"])
    assert found.num_forwards.tolist() == [steps]


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path):
    assert_written_back(pipe, RECORDED, tmp_path)


def test_layers_may_be_without_experts(tmp_path):
    weights = {name: w for name, w in RECORDED.weights.items() if not name.startswith("model.layers.0.mlp.")}
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] = torch.randn(96, 64)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.randn(64, 96)
    pipe = RECORDED.changed(tmp_path, weights, moe_layer_freq=[0, 1])
    assert pipe.model.backbone.layers[0].mlp.up_proj.out_features == 96
    assert pipe.logits(RECORDED.inputs["ids"]).isfinite().all()


def test_a_missing_expert_is_named(tmp_path):
    weights = {name: w for name, w in RECORDED.weights.items() if name != EXPERT}
    with pytest.raises(ValueError, match=rf"lacks {EXPERT} \(1 in all\)"):
        RECORDED.changed(tmp_path, weights)


def test_without_any_expert_each_is_named(tmp_path):
    weights = {name: w for name, w in RECORDED.weights.items() if "layers.1.mlp.experts" not in name}
    with pytest.raises(ValueError, match=r"mlp.experts.0.down_proj.weight.*\(18 in all\)"):
        RECORDED.changed(tmp_path, weights)


def test_an_expert_too_many_is_named(tmp_path):
    extra = "model.layers.0.mlp.experts.6.up_proj.weight"
    with pytest.raises(ValueError, match=f"has unexpected {extra}"):
        RECORDED.changed(tmp_path, {**RECORDED.weights, extra: torch.zeros(32, 64)})


def test_an_expert_of_another_shape_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{EXPERT} is \[32, 63\], but config.json makes it \[32, 64\]"):
        RECORDED.changed(tmp_path, {**RECORDED.weights, EXPERT: torch.zeros(32, 63)})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7"),
    ],
)
def test_a_field_that_our_parts_do_not_compute_is_refused(tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)
