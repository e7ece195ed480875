"""Pictures in and out of a model that has them as codes: drawn from a text, made into others, completed with a text.

    text, picture --codes--> prompts and a canvas --drawing--> codes --image tokenizer--> pictures

Pictures have the size of whole codes: `ImageTokenizer.stride` pixels a side each. What is not known yet is
grey. Pictures of one call are rows of one batch, each drawn as it would be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from dmllm.board import Board, Line, Size, some_of
from dmllm.checkpoints.image_tokenizer import load_image_tokenizer
from dmllm.data.images import load_image
from dmllm.drawing import UNKNOWN, Guidance, draw, drawing_config, fill, of_ids
from dmllm.models.image_tokenizers import ImageTokenizer
from dmllm.requests import Seeds, row_generators
from dmllm.samplers.maskgit import halton
from dmllm.samplers.modalities import Part


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A text and a picture whose holes are filled."""

    text: str
    filled: list[str]  # what stands in each hole of the text
    image: Image.Image
    num_forwards: int


class Draws:
    """What a pipeline can draw, whose model has an image vocabulary and to which an image tokenizer belongs."""

    model: Any
    processor: Any
    generation: dict[str, Any]
    _image_tokenizer: Any = None

    @property
    def image_tokenizer(self) -> ImageTokenizer | None:
        """What makes pictures of codes, read when it is first asked for; None: there is none."""
        found = self._image_tokenizer
        if found is not None and not isinstance(found, ImageTokenizer):
            found = load_image_tokenizer(found)
        self._image_tokenizer = None if found is None else found.to(self.model.device).eval()
        return self._image_tokenizer

    def drawing_by(self, image_tokenizer: Any) -> Any:
        """This pipeline with an image tokenizer, a path or a name of one; None leaves it without."""
        self._image_tokenizer = image_tokenizer
        return self

    def imagine(self, prompt: Any, **options: Any) -> list[Image.Image]:
        """Pictures of what a text describes, or of each of a list of texts, `num_images` of each in turn.

        The options are those of `imagining`.
        """
        *_, last = self.imagining(prompt, **options)
        return last

    def imagining(
        self,
        prompt: Any,
        *,
        num_images: int = 1,
        size: Size = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Seeds = None,
        image_tokenizer: Any = None,
        use_cache: bool | None = None,
        **decode: Any,
    ) -> Iterator[list[Image.Image]]:
        """What `imagine` does, as it goes: the pictures after every model call, grey where nothing is known yet.

        Args:
            size: pixels of a side, or (width, height); None is the checkpoint's own.
            guidance: s of c + s (c - u), away from a picture of nothing in particular; 0 is none, None the
                checkpoint's own. Each call then costs twice as much.
            guidance_interval: the shares of the calls between which it is at work.
            generator: a number, a torch.Generator, or a list of one a picture.
            image_tokenizer: in place of the checkpoint's.
            decode: steps, temperature, remasking ("halton" too), schedule, order_temperature and the other fields of
                `DecodeConfig` in `drawing.SETTINGS`.

        Raises:
            ValueError: the model draws no pictures, there is no image tokenizer, or an option is not understood.
        """
        board = Board.of(self, image_tokenizer)
        grid, texts = board.grid(size), [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [text for text in texts for _ in range(num_images)]
        scales = board.scales(guidance)
        prompts = [[board.drawing(text) for text in rows]] + [[board.drawing(None) for _ in rows] for _ in scales]
        options = {"guidance": Guidance(scales=scales, interval=guidance_interval), "use_cache": use_cache, **decode}
        for step in draw(self.model, prompts, grid, generator=generator, defaults=board.defaults, **options):
            yield board.pictures(step.codes)

    def edit(self, image: Any, prompt: str = "", **options: Any) -> list[Image.Image]:
        """Pictures made of a picture: what of it `mask`, `expand` or `strength` say is drawn anew; without any of them
        all, as `prompt` tells, the picture being seen. The options are those of `editing`."""
        *_, last = self.editing(image, prompt, **options)
        return last

    def editing(
        self,
        image: Any,
        prompt: str = "",
        *,
        mask: Any = None,
        expand: tuple[int, int, int, int] | None = None,
        strength: float | None = None,
        num_images: int = 1,
        size: Size = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Seeds = None,
        image_tokenizer: Any = None,
        use_cache: bool | None = None,
        **decode: Any,
    ) -> Iterator[list[Image.Image]]:
        """What `edit` does, as it goes; further options as for `imagining`.

        Args:
            image: path, bytes, data URL or PIL.
            prompt: what is to be seen, or without mask, expand and strength what is to be done.
            mask: a picture, white where `image` is drawn anew (every code that it touches), or booleans [H, W].
            expand: pixels that are drawn around it, at the left, top, right and bottom.
            strength: the share of codes, drawn at random, that are drawn anew: a variation of the picture.
            size: to which it is made before; None is its own, in whole codes, or the one that the checkpoint has.
            image_guidance: away from what is drawn without seeing the picture, where it is seen.

        Raises:
            ValueError: as `imagining`; or the mask, expand or strength do not fit.
        """
        board = Board.of(self, image_tokenizer)
        picture = load_image(image)
        grid = board.grid(size, picture)
        whole = mask is None and expand is None and strength is None
        codes, scales = board.codes(picture, grid), board.scales(guidance, edits=whole)
        told = [board.drawing(prompt), *(board.drawing(None) for _ in scales)]
        if whole:
            told, scales = board.guided_edit(codes, prompt, scales, image_guidance)
            strength = 1.0
        prompts = [[ids] * num_images for ids in told]
        draws = row_generators(generator, [of_ids(ids) for ids in prompts[0]])
        anew = torch.full(grid, strength is not None) if mask is None else board.cells(mask, grid)
        anew = anew.expand(num_images, -1, -1)
        codes = codes.masked_fill(anew if strength is None else some_of(anew, strength, draws), UNKNOWN)
        codes = codes if expand is None else F.pad(codes, board.margins(expand), value=UNKNOWN)
        options = {"guidance": Guidance(scales=scales, interval=guidance_interval), "use_cache": use_cache, **decode}
        shape = (codes.shape[1], codes.shape[2])
        for step in draw(self.model, prompts, shape, codes=codes, generator=draws, defaults=board.defaults, **options):
            yield board.pictures(step.codes)

    def complete(
        self,
        text: str,
        image: Any = None,
        *,
        mask: Any = None,
        size: Size = None,
        text_decode: Mapping[str, Any] | None = None,
        generator: Seeds = None,
        image_tokenizer: Any = None,
        use_cache: bool | None = None,
        **decode: Any,
    ) -> Completed:
        """A description with holes ([MASK], [MASK:4]) and a picture with holes, which complete each other.

        Args:
            text: a description, of which a hole's length is known; or one without holes.
            image: a picture, of which is missing what `mask` says; None: all of it, of `size`.
            mask: as for `edit`.
            text_decode: settings of the text, as for `chat`; the others (as for `imagine`) are the picture's. Each goes
                by its own schedule, in the same calls of the model.

        Raises:
            ValueError: as `imagine`; or a hole has no one length.
        """
        board = Board.of(self, image_tokenizer)
        picture = None if image is None else load_image(image)
        grid = board.grid(size, picture)
        codes = torch.full(grid, UNKNOWN)
        if picture is not None:
            codes = board.codes(picture, grid)
            codes = codes if mask is None else codes.masked_fill(board.cells(mask, grid), UNKNOWN)
        line = Line.of(self.processor, board.images, text)
        ids, slots = board.images.canvas(*grid)
        ids[slots] = torch.where(codes == UNKNOWN, board.images.mask, codes + board.images.offset).flatten()
        slots = slots + len(line.ids)
        config, spread = drawing_config(decode, board.defaults, len(slots))
        order = torch.tensor(halton(*grid)) if spread else None
        parts = [Part(slots=slots, words=board.images.codes_of, config=config, order=order)]
        parts += line.parts(text_decode or {}, self.generation)
        told, whole = [[list(board.images.draw)]], torch.cat([torch.tensor(line.ids), ids])
        *_, last = fill(self.model, told, whole[None], parts, generator=generator, use_cache=use_cache)
        found = last.ids[0].cpu()
        said, filled = line.read(found.tolist())
        drawn = board.pictures(found[slots].view(1, *grid) - board.images.offset)[0]
        return Completed(text=said, filled=filled, image=drawn, num_forwards=int(last.num_forwards[0]))
