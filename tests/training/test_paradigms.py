"""docs/paradigms.md: every fragment of YAML in it trains, and what it trains answers."""

import re
from pathlib import Path

import pytest
import yaml

from dmllm.checkpoints.tokenizer import train_tokenizer
from dmllm.config import load_config
from dmllm.data import builtin
from dmllm.evaluation.comparison.config import merge
from dmllm.objectives import OBJECTIVES
from dmllm.pipeline import load
from dmllm.training import train
from dmllm.training.config import TrainConfig

PAGE = (Path(__file__).parents[2] / "docs" / "paradigms.md").read_text(encoding="utf-8")
FRAGMENTS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    base = tmp_path_factory.mktemp("ground")
    data = builtin.make("stories", base / "stories", num=12, workers=1) / "data.json"
    train_tokenizer([data], vocab_size=400, out=base / "tokenizer")
    return base


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda f: "-".join(map(str, [*f["objective"].values()])))
def test_every_fragment_trains_and_answers(ground, tmp_path, fragment):
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "backbone": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "tokenizer": str(ground / "tokenizer"),
        },
        "data": {"datasets": [{"json_path": str(ground / "stories" / "data.json")}]},
        "steps": 2,
        "batch_size": 4,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(merge(recipe, fragment)))
    result = train(load_config(TrainConfig, file))
    assert result.step == 2
    pipeline = load(str(result.model), device="cpu")
    reply = pipeline.chat("story", max_new_tokens=8, generator=0)
    assert reply.num_forwards >= 1
    assert pipeline.chat("story", max_new_tokens=8, generator=0) == reply


def test_the_page_runs_every_objective_and_tells_of_each_in_its_table():
    shown = {*OBJECTIVES} - {"unified"}  # which learns pictures too: docs/drawing.md
    assert {fragment["objective"]["name"] for fragment in FRAGMENTS} == shown
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, re.M)
    assert [name for name, _ in rows if name in {*OBJECTIVES}] == [name for name, _ in rows]
    assert {name for name, _ in rows} == shown
    assert all(len(row.split("|")) == 6 and all(cell.strip() for cell in row.split("|")) for _, row in rows)
