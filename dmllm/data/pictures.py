"""Records drawn as a picture: the images above, the conversation below, so that a person can look at the data."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dmllm.data.images import load_image
from dmllm.types import Record

WIDTH, IMAGE, MARGIN = 420, 280, 14  # pixels of a panel, of the longer side of an image, around everything
FONT_SIZE, LINE, LONGEST = 14, 19, 48  # pixels, pixels, lines of text that are shown
SMALLEST_SCALE = 8  # small pictures are enlarged up to this many times, pixel by pixel
INK = {"system": (110, 110, 110), "user": (20, 60, 160), "assistant": (0, 105, 50)}
Lines = list[tuple[str, tuple[int, int, int]]]


def draw_samples(records: Sequence[Record]) -> Image.Image:
    """The records side by side, each under its place in the data. Raises ValueError for an unreadable image."""
    panels = [_panel(record) for record in records]
    height = max(panel.height for panel in panels)
    sheet = Image.new("RGB", (WIDTH * len(panels), height), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number * WIDTH, 0))
    return sheet


def _panel(record: Record) -> Image.Image:
    parts = [p for m in record.messages for p in m["content"] if p["type"] == "image"]
    images = [_scaled(load_image(part.get("image"))) for part in parts]
    font = ImageFont.load_default(FONT_SIZE)
    lines = _lines(record, font)
    shown = lines[:LONGEST] + ([(f"... {len(lines) - LONGEST} more lines", (0, 0, 0))] if len(lines) > LONGEST else [])
    height = MARGIN + sum(image.height + MARGIN for image in images) + LINE * len(shown) + MARGIN
    panel = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(panel)
    y = MARGIN
    for image in images:
        panel.paste(image, (MARGIN, y))
        draw.rectangle((MARGIN - 1, y - 1, MARGIN + image.width, y + image.height), outline=(160, 160, 160))
        y += image.height + MARGIN
    for text, ink in shown:
        draw.text((MARGIN, y), text, fill=ink, font=font)
        y += LINE
    return panel


def _lines(record: Record, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Lines:
    columns = int((WIDTH - 2 * MARGIN) / font.getlength("n"))
    lines: Lines = [(line, (0, 0, 0)) for line in textwrap.wrap(f"{record.source}: {record.location}", columns)]
    for message in record.messages:
        text = "".join("[image] " if p["type"] == "image" else p.get("text", "") for p in message["content"])
        kind = f" ({message.get('kind')})" if message.get("kind") else ""
        for paragraph in f"{message['role']}{kind}: {text}".splitlines():
            wrapped = textwrap.wrap(paragraph, columns) or [""]
            lines += [(line, INK[message["role"]]) for line in wrapped]
    return lines


def _scaled(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest > IMAGE:
        image.thumbnail((IMAGE, IMAGE))
        return image
    scale = max(1, min(SMALLEST_SCALE, IMAGE // longest))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
