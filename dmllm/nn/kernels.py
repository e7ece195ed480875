"""What a GPU does between the products of a decoding call: few rows, many kept keys.

A kernel that gives each head to one processor leaves most of them idle where there is one sequence, or a few. Here each
part of the keys is attended to by itself, and the parts are put together by their weights, as in flash-decoding (Dao et
al., 2023; the online softmax of Milakov and Gimelshein, arXiv:1805.02867). On an H200, 32 rows of 32 heads with 1024
keys take 9.4 us where the fused kernel takes 27, with 3840 keys 25 us instead of 92.

Shapes: B rows of the batch, H query heads, G key/value heads, W rows that ask, S places, d head dimension, N parts.
"""

from __future__ import annotations

# pyright: reportCallIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES = 64  # keys that are read at once
PROGRAMS = 132  # as many are wanted at a time: one for each processor of the larger GPUs


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, H, W, d] with k and v [B, G, S, d], whose last dimension is contiguous -> [B, W, H * d].

    Args:
        mask: [B, 1, W, S], what is added to the scores: 0, or minus infinity.
    """
    batch, heads, width, size = q.shape
    places, groups = k.shape[2], k.shape[1]
    rows = min(max(triton.next_power_of_2(width), 16), 64)
    tiles = triton.cdiv(width, rows)
    wanted = max(1, PROGRAMS // (batch * heads * tiles))
    part = triton.cdiv(triton.cdiv(places, wanted), PLACES) * PLACES
    parts = triton.cdiv(places, part)
    out = torch.empty(batch, width, heads * size, dtype=q.dtype, device=q.device)
    if parts == 1:
        mixed, share = out, out
    else:
        mixed = torch.empty(batch, heads, parts, width, size, dtype=torch.float32, device=q.device)
        share = torch.empty(batch, heads, parts, width, 2, dtype=torch.float32, device=q.device)
    _attend_part[(batch * heads, tiles, parts)](
        q, k, v, mask, mixed, share,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], mask.stride(0), mask.stride(2),
        heads, heads // groups, width, places, part, parts, size**-0.5 * 1.4426950408889634,
        ROWS=rows, PLACES=PLACES, SIZE=size, SPLIT=parts > 1, num_warps=4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        _put_together[(batch * heads, width)](
            mixed, share, out, heads, width, parts, PARTS=triton.next_power_of_2(parts), SIZE=size, num_warps=1
        )
    return out


def place(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor
) -> Tensor:
    """Turns q [B, H, W, d] and k by their positions, and writes k and v [B, G, W, d] into `keys` and `values`.

    Args:
        cos, sin: [B or 1, 1, W, d].
        keys, values: [B, G, S + 1, d], written at `places` [B, W].

    Returns:
        the turned q.
    """
    batch, heads, width, size = q.shape
    turned = torch.empty(batch, width, heads, size, dtype=q.dtype, device=q.device)
    _place[(batch * width, heads + 2 * k.shape[1])](
        q, k, v, cos, sin, keys, values, places, turned,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, cos.stride(2),
        *keys.stride()[:3], *values.stride()[:3], heads, k.shape[1], width, SIZE=size, num_warps=1,
    )  # fmt: skip
    return turned.transpose(1, 2)


@triton.jit
def _place(
    q, k, v, cos, sin, keys, values, places, turned,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, cos_batch, cos_row,
    keys_batch, keys_head, keys_place, values_batch, values_head, values_place, heads, groups, width,
    SIZE: tl.constexpr,
):  # fmt: skip
    """One row of one head of the queries, keys or values."""
    batch = (tl.program_id(0) // width).to(tl.int64)
    row = tl.program_id(0) % width
    head = tl.program_id(1)
    column = tl.arange(0, SIZE)
    other = (column + SIZE // 2) % SIZE
    sign = tl.where(column < SIZE // 2, -1.0, 1.0)
    angle = batch * cos_batch + row * cos_row + column
    place = tl.load(places + batch * width + row)
    if head < heads + groups:
        source = q + batch * q_batch + head * q_head + row * q_row
        target = turned + ((batch * width + row) * heads + head) * SIZE
        if head >= heads:
            source = k + batch * k_batch + (head - heads) * k_head + row * k_row
            target = keys + batch * keys_batch + (head - heads) * keys_head + place * keys_place
        x, crossed = tl.load(source + column).to(tl.float32), tl.load(source + other).to(tl.float32)
        found = x * tl.load(cos + angle).to(tl.float32) + sign * crossed * tl.load(sin + angle).to(tl.float32)
        tl.store(target + column, found.to(turned.dtype.element_ty))
    else:
        head = head - heads - groups
        value = tl.load(v + batch * v_batch + head * v_head + row * v_row + column)
        tl.store(values + batch * values_batch + head * values_head + place * values_place + column, value)


@triton.jit
def _attend_part(
    q, k, v, mask, mixed, share,
    q_batch, q_head, q_row, k_batch, k_head, k_place, v_batch, v_head, v_place, mask_batch, mask_row,
    heads, repeats, width, places, part, parts, scale,
    ROWS: tl.constexpr, PLACES: tl.constexpr, SIZE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head with one part of the keys; scores are in powers of two."""
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    number = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    there = row < width
    asking = tl.load(
        q + batch.to(tl.int64) * q_batch + head * q_head + row[:, None] * q_row + column, mask=there[:, None], other=0.0
    )
    keys = k + batch.to(tl.int64) * k_batch + (head // repeats).to(tl.int64) * k_head
    values = v + batch.to(tl.int64) * v_batch + (head // repeats).to(tl.int64) * v_head
    added = mask + batch.to(tl.int64) * mask_batch + row[:, None] * mask_row
    highest = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, SIZE], tl.float32)
    end = tl.minimum((number + 1) * part, places)
    for start in range(number * part, end, PLACES):
        place = start + tl.arange(0, PLACES)
        real = place < end
        key = tl.load(keys + place[:, None] * k_place + column, mask=real[:, None], other=0.0)
        score = tl.dot(asking, tl.trans(key)) * scale
        hidden = tl.load(added + place, mask=there[:, None] & real, other=float("-inf")).to(tl.float32)
        score = tl.where(hidden < -1.0, -1.0e30, score)
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.where(score <= -1.0e30, 0.0, tl.exp2(score - higher[:, None]))
        fade = tl.exp2(highest - higher)
        value = tl.load(values + place[:, None] * v_place + column, mask=real[:, None], other=0.0)
        total = total * fade + tl.sum(weight, 1)
        sums = sums * fade[:, None] + tl.dot(weight.to(value.dtype), value)
        highest = higher
    if SPLIT:
        line = (tl.program_id(0).to(tl.int64) * parts + number) * width + row
        tl.store(mixed + line[:, None] * SIZE + column, sums, mask=there[:, None])
        tl.store(share + line * 2, highest, mask=there)
        tl.store(share + line * 2 + 1, total, mask=there)
    else:
        line = (batch.to(tl.int64) * width + row) * heads + head
        found = sums / tl.maximum(total, 1.0e-30)[:, None]
        tl.store(mixed + line[:, None] * SIZE + column, found.to(mixed.dtype.element_ty), mask=there[:, None])


@triton.jit
def _put_together(mixed, share, out, heads, width, parts, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """The parts of one row of one head, by their weights."""
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    row = tl.program_id(1)
    number = tl.arange(0, PARTS)
    column = tl.arange(0, SIZE)
    there = number < parts
    line = (tl.program_id(0).to(tl.int64) * parts + number) * width + row
    highest = tl.load(share + line * 2, mask=there, other=-1.0e30)
    total = tl.load(share + line * 2 + 1, mask=there, other=0.0)
    weight = tl.exp2(highest - tl.max(highest, 0))
    sums = tl.load(mixed + line[:, None] * SIZE + column, mask=there[:, None], other=0.0)
    found = tl.sum(sums * weight[:, None], 0) / tl.maximum(tl.sum(total * weight, 0), 1.0e-30)
    place = (batch.to(tl.int64) * width + row) * heads + head
    tl.store(out + place * SIZE + column, found.to(out.dtype.element_ty))
