"""Drawings of a canvas: what a frame shows, and that a GIF is whole."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from PIL import Image, ImageChops
from rich.console import Console

from dmllm.animation import UNKNOWN, draw_frames, frames, is_special, play, save_gif, trace
from dmllm.types import Step

WORDS = ["two", " red", " dots", "\nhere", "<|end|>", "<|mask|>", "\x1b[2J"]
FINAL = [0, 1, 2, 3, 4, 4]
ORDER = [[1, 4], [0], [2], [3]]


def texts(ids: list[int]) -> list[str]:
    return [WORDS[i] for i in ids]


def steps(rows: int = 1) -> list[Step]:
    """Words appear in ORDER; the row ends with the last token never asked for."""
    committed = torch.zeros(rows, len(FINAL), dtype=torch.bool)
    found = []
    for number, places in enumerate(ORDER, 1):
        committed = committed.clone()
        committed[:, places] = True
        found.append(
            Step(
                ids=torch.tensor(FINAL).expand(rows, -1).masked_fill(~committed, 5),
                committed=committed,
                num_forwards=torch.full((rows,), number),
                finished=torch.full((rows,), number == len(ORDER)),
            )
        )
    return found


def test_a_token_ages_with_every_call_and_what_follows_the_end_is_over() -> None:
    seen = list(trace(steps(), texts))
    assert [c.age for c in seen[0].cells] == [UNKNOWN, 0, UNKNOWN, UNKNOWN, 0, UNKNOWN]
    assert [c.age for c in seen[3].cells] == [2, 3, 1, 0, 3, UNKNOWN]
    assert [c.text for c in seen[3].cells] == ["two", " red", " dots", "\nhere", "", ""]
    assert [c.ends for c in seen[3].cells] == [False] * 4 + [True, True]
    assert [c.ends for c in seen[2].cells] == [False] * 4 + [True, False]
    assert [f.known for f in seen] == [2, 3, 4, 5]


def test_names_of_special_tokens_are_told_from_words() -> None:
    assert all(is_special(t) for t in ("<|end|>", "</s>", "[EOS]", " <eos>"))
    assert not any(is_special(t) for t in ("<", "[]", "a<b>", "< b >", "end"))


def test_the_terminal_shows_unknown_tokens_as_shades_and_nothing_it_would_obey() -> None:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    for frame in frames(steps(), texts, prompt="how many?"):
        console.print(frame)
    drawn = console.file.getvalue()
    assert "how many?" in drawn
    assert "░░ red░░░░" in drawn
    assert "two red dots" in drawn.rpartition("how many?")[2]
    assert "░" not in drawn.rpartition("how many?")[2]
    odd = [Step(ids=torch.tensor([[6]]), committed=torch.tensor([[True]]), num_forwards=torch.tensor([1]), finished=torch.tensor([True]))]  # fmt: skip  # noqa: E501
    assert "\x1b" not in next(iter(trace(odd, texts))).cells[0].text


def test_play_draws_steps_as_they_come() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    play(iter(steps()), texts, console=console)
    assert "4 model calls" in console.file.getvalue()


def test_a_gif_has_a_frame_a_call_and_one_before_and_after(tmp_path) -> None:
    path = save_gif(iter(steps()), tmp_path / "new" / "a.gif", texts, image=Image.new("RGB", (5, 9)), question="what?")
    with Image.open(path) as gif:
        assert gif.n_frames == len(ORDER) + 2
        assert gif.info["loop"] == 0
        assert gif.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    assert [p.name for p in path.parent.iterdir()] == ["a.gif"]


def test_a_failed_gif_leaves_the_old_one_and_no_rubbish(tmp_path) -> None:
    path = save_gif(steps(), tmp_path / "a.gif", texts)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no such file"):
        save_gif(steps(), path, texts, image=tmp_path / "none.png")
    with pytest.raises(ValueError, match="no steps"):
        save_gif([], path, texts)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_pages_are_of_one_size_and_each_call_changes_them() -> None:
    pages = draw_frames(steps(rows=2), texts, question="a long question " * 20, row=1)
    assert len({p.size for p in pages}) == 1
    assert all(ImageChops.difference(a, b).getbbox() for a, b in pairwise(pages))


def test_long_canvases_and_long_words_stay_on_the_page() -> None:
    ids = torch.randint(0, 4, (1, 300), generator=torch.Generator().manual_seed(0))
    step = Step(ids=ids, committed=ids >= 0, num_forwards=torch.tensor([1]), finished=torch.tensor([True]))
    page = draw_frames([step], lambda ids: ["w" * 200 if i == 3 else f" {i}" for i in ids])[-1]
    assert page.width == 800
