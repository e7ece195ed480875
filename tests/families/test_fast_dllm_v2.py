"""Fast-dLLM v2: Qwen2.5 in blocks, as recorded, and against transformers' Qwen2, whose shape and weights it has."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from dmllm.checkpoints.published import write_published
from dmllm.pipeline import load
from tests.families.recorded import Recorded, assert_written_back

RECORDED = Recorded("fast_dllm_v2")

SHAPE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
ADDED = {
    "model_type": "Fast_dLLM_Qwen",
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "bd_size": 4,
    "layer_types": ["full_attention"] * 2,
    "use_sliding_window": False,
    "mask_token_id": 118,
    "eos_token_id": 117,
}


def folder_of(qwen, path, **fields):
    config = {name: value for name, value in {**SHAPE, **ADDED, **fields}.items() if value is not None}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.detach().clone() for name, tensor in qwen.named_parameters()}, path / "model.safetensors")
    return str(path)


def make_qwen():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_parameters=rope)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def qwen():
    return make_qwen()


@pytest.fixture(scope="module")
def pipe(qwen, tmp_path_factory):
    return load(folder_of(qwen, tmp_path_factory.mktemp("fast_dllm_v2") / "model"), device="cpu")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(117, (2, 14), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def shifted(qwen, ids, sees: torch.Tensor) -> torch.Tensor:
    """transformers' logits under a mask [L, L], in the place of the token that they score."""
    bias = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    logits = qwen(ids, attention_mask=bias[None, None].expand(len(ids), 1, -1, -1)).logits
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


@pytest.mark.parametrize(
    ("visibility", "name"), [(None, "logits"), ("block:4", "logits_blocks_of_4"), ("causal", "logits_causal")]
)
def test_logits_are_the_authors(visibility, name):
    ours = RECORDED.load().logits(RECORDED.inputs["input_ids"], visibility=visibility)
    theirs = RECORDED.expected[name]
    assert (ours - torch.cat([theirs[:, :1], theirs[:, :-1]], 1)).abs().max() < 1e-4


def test_the_recorded_checkpoint_is_written_back(tmp_path):
    assert_written_back(RECORDED.load(), RECORDED, tmp_path)


def test_a_block_sees_itself_and_those_before_it_and_the_row_before_predicts(pipe, qwen, ids):
    block = torch.arange(14) // 4
    expected = shifted(qwen, ids, block[:, None] >= block)
    assert (pipe.logits(ids) - expected).abs().max() < 1e-4


def test_seen_causally_it_is_the_language_model_it_came_from(pipe, qwen, ids):
    place = torch.arange(14)
    expected = shifted(qwen, ids, place[:, None] >= place)
    with torch.no_grad():
        plain = qwen(ids).logits
    assert (expected[:, 1:] - plain[:, :-1]).abs().max() < 1e-5
    assert (pipe.logits(ids, visibility="causal") - expected).abs().max() < 1e-4


def test_padding_changes_nothing(pipe, ids):
    padded = torch.cat([torch.full((2, 3), 5), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    assert (pipe.logits(padded, mask)[:, 3:] - pipe.logits(ids)).abs().max() < 1e-4


def test_blocks_are_of_32_unless_the_configuration_says_otherwise(qwen, tmp_path):
    assert load(folder_of(qwen, tmp_path, bd_size=None), device="cpu").model.config.visibility == "block:32"


def test_a_checkpoint_is_written_back_to_the_bit(pipe, qwen, tmp_path):
    written = load_file(write_published(pipe.model, tmp_path) / "model.safetensors")
    weights = dict(qwen.named_parameters())
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in written)
    assert json.loads((tmp_path / "config.json").read_text()) == {**SHAPE, **ADDED}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mask_token_id": None}, "lacks mask_token_id; the usual 151665 is beyond vocab_size=120"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"num_hidden_layers": 3}, r"lacks .*model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"unexpected model\.layers\.1\."),
    ],
)
def test_what_does_not_fit_is_refused_by_name(qwen, fields, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        load(folder_of(qwen, tmp_path, **fields), device="cpu")
