"""Fields of config.json as people publish them: honoured, harmless, or refused by name; never silently wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights

from dmllm.checkpoints import folder
from dmllm.checkpoints.example import write_example
from dmllm.families import FAMILIES, Family, family_of
from dmllm.families.family import check_fields
from dmllm.models.configuration import DmllmConfig
from dmllm.models.multimodal import MultimodalModel

OURS = [name for name in FAMILIES if FAMILIES.load(name).native is None]  # of the others transformers reads the fields
PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
COMMON = {name: PUBLISHED["GSAI-ML/LLaDA-8B-Instruct"]["config"][name] for name in ("auto_map", "torch_dtype")}
COMMON |= {"transformers_version": "4.46.3", "use_cache": False}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_as_it_is_on_the_hub_is_the_model_that_it_names(name):
    """With as many weights, rows that see each other so, and that mask token."""
    said = PUBLISHED[name]
    family = family_of(said["config"])
    assert family is not None
    assert family.name == said["family"]
    config = DmllmConfig(**family.config(said["config"]))
    with init_empty_weights(include_buffers=False):
        model = MultimodalModel(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == said["millions"]
    assert (config.visibility, config.mask_token_id) == (said["visibility"], said["mask"])


def with_fields(family: Family, **changed: Any) -> dict[str, Any]:
    """The example's config.json with these fields, where its language model's are."""
    fields = json.loads(json.dumps(dict(family.example)))
    fields.get("text_config", fields).update(changed)
    return fields


def outcome(tmp_path, name: str, fields: dict[str, Any]) -> Any:
    """Logits of the family's example under another config.json, or why it is refused."""
    path = tmp_path if (tmp_path / "config.json").exists() else write_example(name, tmp_path)
    (path / "config.json").write_text(json.dumps(fields))
    try:
        return folder.load(path).model(torch.arange(10, 22)[None]).logits
    except ValueError as error:
        return str(error)


def refusal(name: str, **changed: Any) -> str:
    """Why the family's example is refused with these fields."""
    family = FAMILIES.load(name)
    fields = with_fields(family, **changed)
    with pytest.raises(ValueError, match="config") as caught:  # noqa: PT012 (either may)
        family.config(fields)
        check_fields(fields)
    return str(caught.value)


@pytest.mark.parametrize("name", OURS)
def test_fields_that_say_nothing_about_the_result_change_nothing(tmp_path, name):
    family = FAMILIES.load(name)
    plain = outcome(tmp_path, name, with_fields(family))
    harmless = COMMON | {"dtype": "float16", "attention_dropout": 0.1, "initializer_range": 0.5}
    harmless |= {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1}
    assert torch.equal(plain, outcome(tmp_path, name, with_fields(family, **harmless)))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0}),
        ("layer_types", ["sliding_attention", "full_attention"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_family_computes_is_refused_by_name(name, field, value):
    assert (field if field != "rope_parameters" else "rope_") in refusal(name, **{field: value})


@pytest.mark.parametrize("name", OURS)
def test_attention_in_windows_is_refused(name):
    assert "use_sliding_window=True" in refusal(name, use_sliding_window=True, sliding_window=4)


def test_loading_asks_for_both(tmp_path):
    """What the family refuses, and what none computes."""
    for changed in ({"alibi": True}, {"quantization_config": {"quant_method": "awq"}}):
        assert next(iter(changed)) in outcome(tmp_path, "llada", with_fields(FAMILIES.load("llada"), **changed))


@pytest.mark.parametrize("name", ["dream", "sdar", "llada_moe", "diffullama", "fast_dllm_v2", "dimple"])
def test_the_rotary_base_is_read_where_transformers_5_writes_it_and_two_bases_are_refused(tmp_path, name):
    family = FAMILIES.load(name)
    base = family.example["rope_theta"]
    plain = outcome(tmp_path, name, with_fields(family))
    said = {"rope_type": "default", "rope_theta": base}
    assert torch.equal(plain, outcome(tmp_path, name, with_fields(family, rope_theta=None, rope_parameters=said)))
    assert torch.equal(plain, outcome(tmp_path, name, with_fields(family, rope_scaling={"rope_type": "default"})))
    other = outcome(tmp_path, name, with_fields(family, rope_parameters=said | {"rope_theta": base + 1}))
    assert "several rope_theta" in other
    assert "lacks rope_theta" in outcome(tmp_path, name, with_fields(family, rope_theta=None, rope_parameters=None))


@pytest.mark.parametrize(
    ("name", "changed", "weight"),
    [
        ("dream", {"num_key_value_heads": 4}, "self_attn.k_proj"),
        ("llada", {"n_kv_heads": 2}, "k_proj"),
        ("sdar", {"head_dim": 8}, "self_attn"),
        ("dream", {"intermediate_size": 64}, "mlp"),
        ("llada", {"include_qkv_bias": True}, "q_proj.bias"),
        ("llada", {"weight_tying": True}, "ff_out.weight"),
        ("sdar", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_a_shape_that_the_weights_do_not_have_is_refused_by_name(tmp_path, name, changed, weight):
    said = outcome(tmp_path, name, with_fields(FAMILIES.load(name), **changed))
    assert isinstance(said, str)
    assert weight in said
