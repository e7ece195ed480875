"""What a caller may type, and what they are told when it cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dmllm.config import load_config
from dmllm.objectives import OBJECTIVES
from dmllm.samplers.config import DecodeConfig, decode_config


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"max_new_tokens": 96, "block_length": 32, "steps": 100},
         "steps=100 is not divisible by the 3 blocks of 32 tokens; try 99 or 102."),
        ({"max_new_tokens": 96, "block_length": 32, "steps": 2}, "try 3."),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number, at least 1."),
        ({"steps": 2.5}, "steps=2.5 must be a whole number, at least 1 or None."),
        ({"remasking": "low_confidance"}, "did you mean low_confidence?"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({"temperature": -1}, "must be 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "above 0"),
        ({"top_p": 0.9}, "has no effect at temperature=0"),
        ({"temperature": "warm"}, "temperature='warm' must be a number."),
        ({"eos_token_id": "<|end|>"}, "must be a token id"),
        ({"cfg_scale": -0.5}, "0 (no guidance)"),
        ({"max_tokens": 9}, "Unknown decode option 'max_tokens'; did you mean max_new_tokens"),
        ({"blok_length": 9}, "did you mean block_length"),
    ],
)  # fmt: skip
def test_errors_say_what_to_type(options: dict, advice: str) -> None:
    with pytest.raises(ValueError) as error:
        decode_config(options)
    assert advice in str(error.value)


def test_options_go_over_the_checkpoints_defaults_and_foreign_keys_of_the_file_are_passed_by() -> None:
    stored = {"max_new_tokens": 32, "temperature": 0.5, "transformers_version": "5", "eos_token_id": [1, 2]}
    config = decode_config({"temperature": 0.0}, stored)
    assert config == DecodeConfig(max_new_tokens=32, temperature=0.0, eos_token_id=[1, 2])
    assert config.stop_ids == (1, 2)


def test_a_block_longer_than_the_canvas_is_the_canvas() -> None:
    config = DecodeConfig(max_new_tokens=5, block_length=32, steps=3)
    assert config.block_of(5) == 5
    assert config.steps_per_block(5) == 3


def test_the_configuration_can_be_written_in_yaml(tmp_path) -> None:
    (tmp_path / "d.yaml").write_text("max_new_tokens: 16\nthreshold: 0.9\neos_token_id: [3]\n")
    config = load_config(DecodeConfig, tmp_path / "d.yaml", ["--remasking=margin"])
    assert config == DecodeConfig(max_new_tokens=16, threshold=0.9, eos_token_id=[3], remasking="margin")


def test_the_settings_of_the_page_on_decoding_are_settings() -> None:
    page = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()
    found = [yaml.safe_load(f"{{{text}}}") for text in re.findall(r"`([a-z_]+: [^`]+)`", page)]
    assert len(found) == 24
    for options in found:
        decode_config({"block_length": 32, **options})
    others = {"generation_config", "num_forwards", "use_cache", "image_prefix"}
    names = set(re.findall(r"`([a-z]+_[a-z_]+)", page)) - others - {*OBJECTIVES}
    assert not names - vars(DecodeConfig()).keys()
