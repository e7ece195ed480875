"""The command line: what is printed, what is written, and errors in one line that say what to type."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from dmllm.cli import main
from dmllm.families import FAMILIES


def said(capsys, *words: str) -> str:
    """What a command printed; it must succeed."""
    assert main(words) == 0
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    """The one line that a command that cannot be run printed."""
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.fixture
def llada(tmp_path, capsys):
    said(capsys, "init", "--family", "llada", "--out", str(tmp_path / "llada"))
    return str(tmp_path / "llada")


def test_models_lists_every_family_and_its_test(capsys):
    table = said(capsys, "models")
    assert all(f" {name} " in table for name in FAMILIES)
    assert "tests/" in table


def test_info_says_family_caches_and_decode_defaults(capsys, llada, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = said(capsys, "info", llada)
    assert "llada: LLaDA 8B base, instruct, 1.5" in text
    assert "max_new_tokens=128, block_length=32" in text
    assert "exact" in text
    text = said(capsys, "info", "dmllm-tiny")
    assert "tokens per image" in text


def test_init_convert_and_chat_work_together(capsys, llada, tmp_path):
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert said(capsys, "convert", llada, ours).strip() == ours
    assert said(capsys, "convert", ours, back, "--to", "published").strip() == back
    one, two = (load_file(f"{folder}/model.safetensors") for folder in (llada, back))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    answers = [said(capsys, "chat", f, "so?", "--max-new-tokens=8", "--steps=8") for f in (llada, ours, back)]
    assert len(set(answers)) == 1


def test_what_is_wrong_is_one_line_that_says_what_is_right(capsys, llada, tmp_path):
    assert "did you mean llada" in refused(capsys, "init", "--family", "lada", "--out", str(tmp_path / "x"))
    assert "name another folder" in refused(capsys, "init", "--family", "llada", "--out", llada)
    assert "--from IN OUT" in refused(capsys, "convert", llada)
    assert "masked, or block:N" in refused(capsys, "convert", "--from", llada, "--to", "blok:4", str(tmp_path / "x"))
    assert "--to published" in refused(capsys, "convert", "dmllm-tiny", str(tmp_path / "x"))
