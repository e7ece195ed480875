"""Pictures of one to six large printed characters, for a model that is to read more than small lines of text.

The typeface is Pillow's own; strokes, widths, slants, turns and resolutions vary, so that no two look quite alike.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmllm.data.builtin import rows
from dmllm.data.builtin.picture import Picture, pick, split_of
from dmllm.data.builtin.reading import CHARACTERS

VARIANTS = 64  # of each character
DETAIL = 64  # pixels from which a character is scaled down


def compose(rng: np.random.Generator, split: str, size: int, turns: int) -> Picture:
    """One picture of `split`: only digits in two pictures of three, else digits and letters."""
    alphabet = rows.DIGITS if rng.random() < 2 / 3 else CHARACTERS

    def draw(rng: np.random.Generator) -> tuple[str, int]:
        return pick(rng, alphabet), int(rng.random() * VARIANTS)

    drawn = rows.draw_rows(rng, size, draw)
    while split_of(canonical(drawn, size)) != split:
        drawn = rows.draw_rows(rng, size, draw)
    shown = [[{"character": p.character, "box": p.box} for p in row] for row in drawn]
    truth = {"picture": "large print", "rows": shown}
    return rows.compose(rng, drawn, size=size, alphabet=alphabet, turns=turns, mask=printed, truth=truth)


def canonical(drawn: rows.Rows, size: int) -> str:
    """What decides the split: the characters and their coarse places."""
    return ";".join(f"{p.character},{p.left * 16 // size},{p.top * 16 // size}" for row in drawn for p in row)


@lru_cache(maxsize=32768)
def printed(character: str, variant: int, side: int) -> np.ndarray:
    """The character in one of its variants as coverage in 0..1, [side, side, 1]."""
    rng = np.random.default_rng([ord(character), variant])
    image = Image.new("L", (3 * DETAIL, 3 * DETAIL))
    stroke = round(rng.uniform(0, DETAIL / 12))
    ImageDraw.Draw(image).text(
        (1.5 * DETAIL, 1.5 * DETAIL),
        character,
        fill=255,
        font=ImageFont.load_default(DETAIL),
        stroke_width=stroke,
        anchor="mm",
    )
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    slant = rng.uniform(-0.25, 0.3)
    image = image.transform(
        image.size, Image.Transform.AFFINE, (1, slant, -slant * 1.5 * DETAIL, 0, 1, 0), Image.Resampling.BICUBIC
    )
    image = image.crop(Image.fromarray(np.asarray(image) // 64).getbbox())
    height = round(side * rng.uniform(0.8, 1))
    width = min(max(round(height * image.width / image.height * rng.uniform(0.8, 1.3)), 2), side)
    if rng.random() < 0.5:  # as if scanned coarsely
        coarse = int(rng.integers(7, 12))
        image = image.resize((max(round(coarse * width / height), 3), coarse), Image.Resampling.BOX)
    scaled = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mask = np.zeros((side, side, 1), dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    mask[top : top + height, left : left + width, 0] = scaled
    mask.flags.writeable = False
    return mask
