"""YAML and the command line are one mechanism: what is read back is what was written; a typo names its neighbour."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from dmllm.config import load_config, save_config


@dataclass(frozen=True, kw_only=True)
class Shape:
    width: int = 32
    layers: int = 2

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError("width must be positive")


@dataclass(frozen=True, kw_only=True)
class Run:
    shape: str | Shape = field(default_factory=Shape)
    tower: Shape | None = None
    options: dict = field(default_factory=dict)
    lr: float = 1e-3
    kind: Literal["a", "b"] = "a"
    many: list[Shape] = field(default_factory=list)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("shape: {width: 64}\noptions: {free: {form: 1}}\nlr: 1e-5\nmany: [{width: 3}]\n")
    return path


def test_yaml_and_overrides_become_one_frozen_instance(recipe):
    run = load_config(Run, recipe, ["--shape.layers=5", "--tower.width=4", "--kind", "b"])
    assert run == Run(
        shape=Shape(width=64, layers=5),
        tower=Shape(width=4),
        options={"free": {"form": 1}},
        lr=1e-5,
        kind="b",
        many=[Shape(width=3)],
    )


def test_a_saved_configuration_reads_back_equal(recipe, tmp_path):
    run = load_config(Run, recipe, ["--lr=3e-4"])
    save_config(run, tmp_path / "saved.yaml")
    assert load_config(Run, tmp_path / "saved.yaml") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--shape.widht=3", "did you mean shape.width"),
        ("--lrr=3", "did you mean lr"),
        ("--lr=fast", "Expected a <class 'float'>"),
        ("--kind=c", "'a', 'b'"),
        ("--shape.width=0", "width must be positive"),
    ],
)
def test_what_is_wrong_is_named(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(Run, recipe, [override])


def test_a_typo_in_a_list_entry_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("many: [{width: 1}, {layrs: 3}]\n")
    with pytest.raises(ValueError, match=r"'many.layrs'.*did you mean many.layers"):
        load_config(Run, path)


def test_yaml_that_is_none_says_where(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(ValueError, match=r"line 2"):
        load_config(Run, tmp_path / "broken.yaml")
    (tmp_path / "twice.yaml").write_text("lr: 1.0\nlr: 2.0\n")
    with pytest.raises(ValueError, match="given twice"):
        load_config(Run, tmp_path / "twice.yaml")
    with pytest.raises(FileNotFoundError, match="working directory"):
        load_config(Run, tmp_path / "absent.yaml")
