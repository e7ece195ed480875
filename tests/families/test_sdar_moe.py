"""SDAR with experts: the authors' model and generate.py as recorded, and transformers' Qwen3-MoE under its mask."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dmllm.families import family_of
from dmllm.families.sdar_moe import SDAR_MOE
from tests.families.recorded import Recorded, assert_written_back
from tests.families.test_sdar import options

RECORDED = Recorded("sdar_moe")
INPUTS, EXPECTED = RECORDED.inputs, RECORDED.expected
CASES = {case["name"]: case for case in json.loads((RECORDED.folder / "cases.json").read_text())}
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def pipe():
    return RECORDED.load()


@pytest.mark.parametrize(("case", "visibility"), [("fwd_block4", None), ("fwd_full", "full")])
def test_logits_are_the_authors_in_blocks_and_with_full_visibility(pipe, case, visibility) -> None:
    """The layer in the middle has no experts (mlp_only_layers)."""
    found = pipe.logits(INPUTS["ids"], visibility=visibility)
    assert (found - EXPECTED[f"{case}.logits"]).abs().max() < 1e-4


def test_weights_of_the_chosen_experts_are_divided_by_their_sum_only_if_config_json_says_so(tmp_path) -> None:
    found = RECORDED.changed(tmp_path, norm_topk_prob=False).logits(INPUTS["ids"])
    assert (found - EXPECTED["fwd_not_normed.logits"]).abs().max() < 1e-4
    assert (found - EXPECTED["fwd_block4.logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", list(CASES))
def test_greedy_decoding_makes_the_authors_calls_and_finds_their_tokens(pipe, name) -> None:
    case = CASES[name]
    ids = INPUTS[case["inputs"]["prompt"]]
    out = pipe.generate(ids, **options(case["params"]))
    assert torch.equal(out.sequences, EXPECTED[f"{name}.tokens"][:, : ids.shape[1] + case["params"]["gen_length"]])
    assert int(out.num_forwards) == case["nfe"]


def test_rows_of_a_batch_of_several_lengths_get_what_they_get_alone(pipe) -> None:
    chosen = options(CASES["dynamic_b4_th0.5"]["params"])
    prompts = [INPUTS[name][0] for name in ("p9", "p8", "p3")]
    padded, mask = torch.full((3, 9), 5), torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    together = pipe.generate(padded, mask, **chosen)
    for row, prompt in enumerate(prompts):
        alone = pipe.generate(prompt[None], **chosen)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, len(prompt) :])
        assert int(together.num_forwards[row]) == int(alone.num_forwards)


@pytest.mark.parametrize("sparse_step", [1, 2])
def test_a_qwen3_moe_of_transformers_is_the_same_model_under_the_block_mask(tmp_path, sparse_step) -> None:
    """From the file that transformers writes: one matrix for each expert and projection."""
    torch.manual_seed(0)
    fields = {name: value for name, value in RECORDED.config.items() if name not in ("architectures", "model_type")}
    fields |= {"decoder_sparse_step": sparse_step, "mlp_only_layers": []}
    theirs = Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**fields), attn_implementation="sdpa").eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    pipe = RECORDED.changed(tmp_path, load_file(tmp_path / "theirs" / "model.safetensors"), **fields)
    ids, block = INPUTS["ids"], torch.arange(14) // 4
    mask = (block[:, None] >= block)[None, None].expand(2, 1, 14, 14)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)).logits
    assert (pipe.logits(ids) - expected).abs().max() < 1e-4
    experts = [layer for layer in range(3) if hasattr(pipe.model.backbone.layers[layer].mlp, "experts")]
    assert experts == ([0, 1, 2] if sparse_step == 1 else [1])


def test_a_checkpoint_is_written_back_to_the_bit(pipe, tmp_path) -> None:
    assert_written_back(pipe, RECORDED, tmp_path)


def test_the_released_vocabulary_has_its_mask_token_and_ends_though_config_json_names_no_mask() -> None:
    config = {**SDAR_MOE.example, "vocab_size": 151936, "eos_token_id": 151643}
    del config["mask_token_id"]
    assert family_of(config) is SDAR_MOE
    assert SDAR_MOE.config(config)["mask_token_id"] == 151669
    assert SDAR_MOE.decode_defaults(config)["eos_token_id"] == [151645, 151643]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mask_token_id": None}, "lacks mask_token_id"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is more than the 6 experts"),
        ({"mlp_only_layers": []}, r"lacks model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight"),
        ({"num_experts": 5}, r"mlp\.gate\.weight is \[6, 32\], but config\.json makes it \[5, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        RECORDED.changed(tmp_path, **fields)


def test_a_missing_expert_is_named(tmp_path) -> None:
    weights = {name: tensor for name, tensor in RECORDED.weights.items() if name != EXPERT}
    with pytest.raises(ValueError, match=rf"lacks {EXPERT} \(1 in all\)"):
        RECORDED.changed(tmp_path, weights)
