"""What a caller may ask, in every form it may come, as rows of a batch.

A chat is a question, a list of messages, or a list of such requests; ids come with an attention mask and with images
that their image tokens stand for. Both become Examples, on which the rest of inference agrees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dmllm.data.images import cut_tiles, load_image
from dmllm.tiling import ROW_BREAK, Grid, Resize, TilingConfig, axis_positions, plan
from dmllm.types import IGNORE, PREFIX, TEXT, Example, SpecialTokens

Seeds = int | Generator | Sequence[Generator] | None


def split_requests(conversation: Any, images: Any = None) -> tuple[list[tuple[Any, list[Any]]], bool]:
    """The requests as pairs (question or messages, images), and whether there was a single one, not a list.

    Raises:
        ValueError: neither a text, nor messages, nor a list of these; or a different number of images for a list.
    """
    if isinstance(conversation, str):
        return [(conversation, _images_of(images))], True
    if not isinstance(conversation, list | tuple):
        raise ValueError(
            f"A request is a text or a list of messages like {{'role': 'user', 'content': '...'}}, or a list of these "
            f"for a batch, not {type(conversation).__name__}."
        )
    messages = [isinstance(item, dict) for item in conversation]
    if messages and all(messages):
        return [(conversation, _images_of(images))], True
    for number, item in enumerate(conversation):
        if not (isinstance(item, str) or (isinstance(item, list | tuple) and all(isinstance(m, dict) for m in item))):
            raise ValueError(
                f"Request {number} of the batch is neither a text nor a list of messages: {item!r:.60}. One "
                "conversation is a list of messages; a batch is a list of texts and conversations."
            )
    if images is None:
        return [(item, []) for item in conversation], False
    if not isinstance(images, list | tuple) or len(images) != len(conversation):
        given = len(images) if isinstance(images, list | tuple) else type(images).__name__
        raise ValueError(
            f"images: {given} for {len(conversation)} requests; a batch takes a list with an image, a list of images, "
            "or None for each request."
        )
    return [(item, _images_of(own)) for item, own in zip(conversation, images, strict=True)], False


def _images_of(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def prompts_of(processor: Any, requests: list[tuple[Any, list[Any]]]) -> list[Example]:
    """The requests as rows that end with the generation prompt. Raises ValueError naming the request."""
    examples = []
    for number, (conversation, images) in enumerate(requests):
        try:
            examples.append(processor.prompt(conversation, images or None))
        except ValueError as error:
            raise error if len(requests) == 1 else ValueError(f"request {number}: {error}") from None
    return examples


@dataclass(frozen=True)
class Asked:
    """One row of ids as an Example whose image tokens are expanded, and how the two lie on each other."""

    example: Example
    columns: Tensor  # [L] the caller's column of each row of the example
    rows: Tensor  # [P] the example's (first) row of each of the caller's columns; 0 for padding

    @property
    def counted(self) -> Example:
        """The example with positions that count the padding before it."""
        return replace(self.example, positions=self.example.positions + self.columns[:1])


def rows_of_ids(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    images: Any,
    *,
    tiling: TilingConfig | None,
    image_prefix: bool,
    special: SpecialTokens,
) -> list[Asked]:
    """Rows of ids [B, P], each without its padding and with its image tokens standing for image rows.

    An image token stands once for each image, or as often as the image has rows. `images` is a list in the order of
    their tokens, or one list (or None) for each row. With `image_prefix`, what comes up to the end of the first run of
    image rows is document PREFIX, as where a processor meets pictures that open the first question.

    Raises:
        ValueError: shapes do not fit, a row's padding is not at one end, or image tokens and images differ in number.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be whole numbers [B, L], not {tuple(input_ids.shape)} of {input_ids.dtype}.")
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
    if real.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {tuple(real.shape)} for input_ids {tuple(input_ids.shape)}; one entry a token."
        )
    if bool((real.long().diff(dim=1) != 0).sum(1).gt(1).any()):
        raise ValueError("attention_mask has zeros inside a row; padding stands at its left or its right end.")
    ids = [row[keep] for row, keep in zip(input_ids.cpu(), real, strict=True)]
    counts = [0 if special.image is None else int((row == special.image).sum()) for row in ids]
    asked = []
    for number, (row, cuts) in enumerate(zip(ids, _pictures(images, counts, tiling), strict=True)):
        example, columns = _expand(row, cuts, counts[number], f"row {number}", tiling, image_prefix, special)
        columns = columns + int(real[number].long().argmax()) if len(row) else columns
        first = torch.full((input_ids.shape[1],), len(columns))
        first = first.scatter_reduce_(0, columns, torch.arange(len(columns)), "amin")
        asked.append(Asked(example, columns, first.masked_fill(~real[number], 0)))
    return asked


@dataclass(frozen=True)
class _Picture:
    slots: Tensor  # [n]
    tiles: Tensor  # [T, 3, H, W]
    resize: Resize | None
    grid: Grid | None


def _pictures(images: Any, counts: list[int], tiling: TilingConfig | None) -> list[list[_Picture]]:
    """The pictures of each row, cut into tiles; from `counts` of image tokens when they come as one list."""
    given = _images_of(images)
    if any(image is None or isinstance(image, list | tuple) for image in given):
        if len(given) != len(counts):
            raise ValueError(f"images: {len(given)} lists for {len(counts)} rows of ids; give one (or None) for each.")
        return [_cut(_images_of(own), tiling, count) for own, count in zip(given, counts, strict=True)]
    if len(counts) == 1:
        return [_cut(given, tiling, counts[0])]
    if sum(counts) == len(given):
        rest = iter(given)
        return [_cut([next(rest) for _ in range(count)], tiling) for count in counts]
    return _share(_cut(given, tiling, each=True), counts)


def _cut(images: list[Any], tiling: TilingConfig | None, count: int = 0, *, each: bool = False) -> list[_Picture]:
    """The images of one row of `count` image tokens cut into tiles; `each`: of a row of its own."""
    if not images:
        return []
    if tiling is None:
        raise ValueError("This model takes text only; leave the images out.")
    own, loaded = tiling if each else tiling.of(len(images)), [load_image(image) for image in images]
    if own.other_max_pixels and count > len(images):
        own = own.making(count, [(picture.height, picture.width) for picture in loaded])
    pictures = []
    for picture in loaded:
        scheme = plan(picture.width, picture.height, own)
        slots, tiles = torch.tensor(scheme.slots), cut_tiles(picture, scheme, own)
        pictures.append(_Picture(slots, tiles, scheme.resize, scheme.grid))
    return pictures


def _share(pictures: list[_Picture], counts: list[int]) -> list[list[_Picture]]:
    """Which pictures belong to which row, where an image token stands for each of an image's rows."""
    rest, shares = list(pictures), []
    for count in counts:
        share: list[_Picture] = []
        while rest and sum(len(p.slots) for p in share) < count:
            share.append(rest.pop(0))
        shares.append(share)
    if rest:
        raise ValueError(
            f"images: {len(pictures)} for {sum(counts)} image tokens in {len(counts)} rows; an image token stands once "
            "for each image, or once for each of its rows."
        )
    return shares


def _expand(
    ids: Tensor,
    pictures: list[_Picture],
    count: int,
    where: str,
    tiling: TilingConfig | None,
    image_prefix: bool,
    special: SpecialTokens,
) -> tuple[Example, Tensor]:
    sizes = [len(p.slots) for p in pictures]
    if count not in (len(pictures), sum(sizes)):
        raise ValueError(
            f"{where}: {count} image tokens for {len(pictures)} images of {sizes} rows; image token {special.image} "
            f"stands once for each image ({len(pictures)}) or once for each of its rows ({sum(sizes)})."
        )
    columns = torch.arange(len(ids))
    is_image = torch.zeros(len(ids), dtype=torch.bool) if special.image is None else ids == special.image
    if count != sum(sizes):
        repeats = torch.ones(len(ids), dtype=torch.int64)
        repeats[is_image] = torch.tensor(sizes)
        columns = columns.repeat_interleave(repeats)
        ids, is_image = ids[columns], is_image[columns]
    slots = torch.full((len(ids),), TEXT)
    tiles = 0
    parts, resizes = [], []
    for picture in pictures:
        assert tiling is not None
        if picture.resize is not None:
            resizes.append(picture.resize._replace(tile=picture.resize.tile + tiles))
        parts.append(torch.where(picture.slots == ROW_BREAK, ROW_BREAK, picture.slots + tiles * tiling.rows_per_tile))
        tiles += len(picture.tiles)
    if parts:
        slots[is_image] = torch.cat(parts)
    documents = torch.zeros_like(ids)
    if image_prefix and bool(is_image.any()):
        start = int(is_image.long().argmax())
        documents[: start + int(is_image[start:].long().cumprod(0).sum())] = PREFIX
    example = Example(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        image_slots=slots,
        documents=documents,
        positions=_positions(is_image, pictures),
        pixel_values=torch.cat([p.tiles for p in pictures]) if pictures else None,
        image_resizes=torch.tensor(resizes) if resizes else None,
        image_grids=torch.tensor(grids) if (grids := [p.grid for p in pictures if p.grid is not None]) else None,
    )
    return example, columns


def _positions(is_image: Tensor, pictures: list[_Picture]) -> Tensor:
    """Places [L] of a row whose image rows are expanded; with images of native size [4, L], as in `Example`."""
    place = torch.arange(len(is_image))
    if all(picture.grid is None for picture in pictures):
        return place
    segments: list[int | Grid] = []
    starts, at = is_image.nonzero().squeeze(1).tolist(), 0
    for picture in pictures:
        assert picture.grid is not None
        start = starts[0]
        segments += [start - at, picture.grid]
        at, starts = start + len(picture.slots), starts[len(picture.slots) :]
    segments.append(len(is_image) - at)
    return torch.cat([place[None], torch.from_numpy(axis_positions(segments))])


def row_generators(generator: Seeds, examples: list[Example]) -> list[Generator]:
    """One generator a row, so that a row draws what it would draw alone with the same `generator`.

    A list is used as it is. A whole number, a generator or None (a number from torch's global generator) starts every
    row from the same state, but for repeats of a request in the batch: asking the same twice gives two answers.

    Raises:
        ValueError: a list of another length than the batch.
    """
    if isinstance(generator, Sequence):
        if len(generator) != len(examples):
            raise ValueError(f"generator: {len(generator)} generators for {len(examples)} requests; give one for each.")
        return list(generator)
    if not isinstance(generator, Generator):
        generator = Generator().manual_seed(int(torch.randint(2**62, ())) if generator is None else int(generator))
    if len(examples) == 1:
        return [generator]
    start = generator.clone_state()
    others = torch.randint(2**62, (len(examples),), generator=generator, device=generator.device).tolist()
    seen: dict[str, int] = {}
    rows = []
    for example in examples:
        key = fingerprint(example.input_ids, example.image_slots, example.pixel_values)
        repeats = seen.get(key, 0)
        seen[key] = repeats + 1
        rows.append(Generator().manual_seed(others[repeats]) if repeats else start.clone_state())
    return rows


def fingerprint(*tensors: Tensor | None) -> str:
    """A key by which equal contents are recognised."""
    digest = hashlib.sha1(usedforsecurity=False)
    for tensor in tensors:
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
