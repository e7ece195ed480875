"""LLaDA2: the authors' logits and routing, recorded from their code; both layouts of experts; refusals."""

import re

import pytest
import torch

from dmllm.checkpoints import folder
from dmllm.families.llada2 import LLADA2
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel
from tests.families.recorded import Recorded, assert_written_back

RECORDED = Recorded("llada2_moe")
EXPERT = re.compile(r"(.*mlp\.experts\.)(\d+)\.(\w+)\.weight")


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


def stacked() -> dict[str, torch.Tensor]:
    """The weights as dFactory's converter merges them."""
    weights, found = {}, {}
    for name, tensor in RECORDED.weights.items():
        if match := EXPERT.fullmatch(name):
            found.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
        else:
            weights[name] = tensor
    return weights | {name: torch.stack([parts[e] for e in range(len(parts))]) for name, parts in found.items()}


@pytest.mark.parametrize(("case", "visibility"), [("fwd_block4", "block:4"), ("fwd_full", "full")])
def test_logits_are_the_authors(pipe, case, visibility):
    logits = pipe.logits(RECORDED.inputs["ids"], visibility=visibility)
    assert (logits - RECORDED.expected[f"{case}.logits"]).abs().max() < 1e-4


@pytest.mark.parametrize(("case", "visibility"), [("fwd_block4", "block:4"), ("fwd_full", "full")])
def test_rows_go_to_the_experts_to_which_the_authors_send_them(pipe, case, visibility):
    seen = []
    router = pipe.model.backbone.layers[1].mlp.router
    hook = router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    pipe.logits(RECORDED.inputs["ids"], visibility=visibility)
    hook.remove()
    experts = RECORDED.expected[f"{case}.topk_idx.0"].flatten(0, 1)
    logits = RECORDED.expected[f"{case}.router_logits.0"].flatten(0, 1)
    assert torch.equal(seen[0].experts.sort().values, experts.sort().values)
    torch.testing.assert_close(seen[0].scores, logits.sigmoid(), rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_no_logit(pipe):
    ids = RECORDED.inputs["ids"]
    padded = torch.cat([torch.full((2, 5), 165), ids], 1)
    mask = (torch.arange(23) >= 5).expand(2, -1)
    shifted = pipe.logits(padded, mask, visibility="block:4")[:, 5:]
    assert (shifted - RECORDED.expected["fwd_block4.logits"]).abs().max() < 1e-4


def test_blocks_are_of_32_and_the_mask_is_the_third_token_after_the_padding(pipe):
    config = pipe.model.config
    assert (config.visibility, config.mask_token_id, config.eos_token_id) == ("block:32", 168, 165)


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path):
    assert_written_back(pipe, RECORDED, tmp_path)


@pytest.mark.parametrize("model_type", ["llada2_moe", "llada2_moe_veomni"])
def test_stacked_experts_are_the_same_model_and_are_written_back_stacked(pipe, tmp_path, model_type):
    merged = RECORDED.changed(tmp_path / "merged", stacked(), model_type=model_type)
    ids = RECORDED.inputs["ids"]
    assert torch.equal(merged.logits(ids), pipe.logits(ids))
    recorded = Recorded("llada2_moe")
    recorded.weights, recorded.config = stacked(), {**RECORDED.config, "model_type": model_type}
    recorded.config = {name: value for name, value in recorded.config.items() if value is not None}
    assert_written_back(merged, recorded, tmp_path / "back")


def test_the_layout_is_remembered_by_our_own_format(pipe, tmp_path):
    merged = RECORDED.changed(tmp_path / "merged", stacked())
    again = folder.load(folder.save(tmp_path / "ours", merged.model)).model
    recorded = Recorded("llada2_moe")
    recorded.weights = stacked()
    recorded.config = {name: value for name, value in recorded.config.items() if value is not None}
    merged.model = again
    assert_written_back(merged, recorded, tmp_path / "back")


def test_a_projection_with_biases_and_a_tied_head_are_read(tmp_path):
    weights = {name: w for name, w in RECORDED.weights.items() if name != "lm_head.weight"}
    for layer in (0, 1):
        weights[f"model.layers.{layer}.attention.query_key_value.bias"] = torch.arange(192.0) + layer
    pipe = RECORDED.changed(tmp_path, weights, use_qkv_bias=True, tie_word_embeddings=True)
    attention = pipe.model.backbone.layers[1].self_attn
    parts = [part.bias for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert torch.equal(torch.cat(parts), torch.arange(192.0) + 1)
    assert pipe.model.backbone.lm_head.weight is pipe.model.backbone.embed_tokens.weight


NAME = "model.layers.1.mlp.experts.5.down_proj.weight"
STACK = "model.layers.1.mlp.experts.down_proj"


def without(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (without(NAME, RECORDED.weights), rf"lacks {NAME} \(1 in all\)"),
        (without(STACK, stacked()), rf"lacks {STACK} \(1 in all\)"),
        (without("model.layers.1.mlp.gate.expert_bias", RECORDED.weights), "lacks model.layers.1.mlp.gate.expert_bias"),
        ({**RECORDED.weights, NAME.replace("5", "8"): torch.zeros(64, 16)}, rf"unexpected {NAME.replace('5', '8')}"),
        ({**RECORDED.weights, STACK: torch.zeros(8, 64, 16)}, "has unexpected"),
        ({**RECORDED.weights, NAME: torch.zeros(64, 17)}, rf"{NAME} is \[64, 17\], but .* \[64, 16\]"),
        ({**stacked(), STACK: torch.zeros(7, 64, 16)}, rf"{STACK} is \[7, 64, 16\], but .* \[8, 64, 16\]"),
        (
            {**RECORDED.weights, "model.layers.0.attention.query_key_value.weight": torch.zeros(191, 64)},
            r"query_key_value.weight has 191 rows; the configuration says 96\+48\+48",
        ),
    ],
    ids=["missing", "missing stack", "missing bias", "extra", "both layouts", "shape", "shape of a stack", "fused"],
)
def test_a_weight_that_does_not_fit_is_named(tmp_path, weights, said):
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, weights)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_bias": True}, "use_bias=True"),
        ({"score_function": "softmax"}, "score_function='softmax'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"n_group": 3}, "n_group=3"),
        ({"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
    ],
)
def test_a_field_that_our_parts_do_not_compute_is_refused(tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_of_the_published_mini_shape_it_has_16_billion_parameters():
    widths = {"hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512, "head_dim": 128}
    counts = {"num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 157184}
    experts = {"num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
    fields = RECORDED.config | widths | counts | experts | {"pad_token_id": 156892}
    config = LLADA2.config(fields)
    with torch.device("meta"):
        model = MultimodalModel(DmllmConfig(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == 16_255_638_528
    assert config["mask_token_id"] == 156895


def test_it_trains_on_experts_in_blocks(pipe, tmp_path):
    model = RECORDED.changed(tmp_path).model.train()
    output = model(RECORDED.inputs["ids"])
    (output.logits.logsumexp(-1).sum() + output.aux["load_balance"]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert output.aux["expert_load"].shape == (1, 8)
