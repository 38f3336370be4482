"""Which rows of which expert each program of a grouped matrix product takes, found on the GPU without waiting for it.

Slots (a token's `K` choices) are sorted by expert, those of one expert in their order, by counting: each program counts
a block of slots, the counts are summed up, and each program puts its slots where the sums say. Each expert's rows are
cut into tiles; the host only knows how many tiles there can be, and starts that many.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES_PER_PROGRAM = 64

SLOTS_PER_PROGRAM = 128

BUCKETS_PER_PROGRAM = 64


@dataclass(frozen=True)
class Plan:
    """Slots by expert, and the tiles they make.

    Attributes:
        order_S: slot of each row, rows by expert; slots without an expert stand before the first and after the last.
        starts_F: `[E + 1]` first row of each expert, and the end of the last.
        tile_starts_F: `[E + 1]` first tile of each expert, and the end of the last.
        tile_experts_N: expert of each tile, `E` for those that are not needed.
        tiles: which tiles (see `triton.TILES`).
        slots: slots of a token; 0 if rows are tokens, and `order_S` nothing but as long as they.
    """

    order_S: Tensor
    starts_F: Tensor
    tile_starts_F: Tensor
    tile_experts_N: Tensor
    tiles: str
    slots: int

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.starts_F) - 1

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What kernels read."""
        return self.order_S, self.starts_F, self.tile_starts_F, self.tile_experts_N


@triton.jit
def _buckets(experts, slots, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of a program's slots, and one more than their experts'; 0 and `E + 1` for experts that do not exist."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + slot, mask=slot < slots, other=0)
    bucket = tl.minimum(tl.maximum(expert, -1), EXPERTS).to(tl.int32) + 1
    return slot, tl.where(slot < slots, bucket, EXPERTS + 2)


@triton.jit(do_not_specialize=["slots", "blocks"])
def count_kernel(
    experts, counts, slots, blocks, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """`counts[bucket, block]`: how many slots of each block are in each of `WIDTH` buckets."""
    _, bucket = _buckets(experts, slots, EXPERTS, BLOCK)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    count = tl.sum((lane[:, None] == bucket[None, :]).to(tl.int32), 1)
    tl.store(counts + lane * blocks + tl.program_id(0), count, mask=lane < EXPERTS + 2)


@triton.jit(do_not_specialize=["slots", "blocks"])
def order_kernel(experts, sums, order, slots, blocks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """`order`: each slot stands after the lower buckets, and those of its own that come before it."""
    slot, bucket = _buckets(experts, slots, EXPERTS, BLOCK)
    local = tl.arange(0, BLOCK)
    earlier = (bucket[None, :] == bucket[:, None]) & (local[None, :] < local[:, None])
    before = bucket * blocks + tl.program_id(0) - 1
    base = tl.load(sums + before, mask=(slot < slots) & (before >= 0), other=0)
    tl.store(order + base + tl.sum(earlier.to(tl.int32), 1), slot, mask=slot < slots)


@triton.jit(do_not_specialize=["slots", "blocks", "tiles"])
def plan_kernel(
    sums,
    starts,
    tile_starts,
    tile_experts,
    slots,
    blocks,
    tiles,
    EXPERTS: tl.constexpr,
    ALL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
) -> None:
    """Each program finds all experts' bounds and fills its part of the table of tiles; `ALL` slots are expert 0's."""
    lane = tl.arange(0, WIDTH)
    if ALL:
        first = tl.where(lane < 1, 0, slots)
        end = first * 0 + slots
    else:
        first = tl.load(sums + (lane + 1) * blocks - 1, mask=lane <= EXPERTS, other=0)
        end = tl.load(sums + (lane + 2) * blocks - 1, mask=lane < EXPERTS, other=0)
    needed = tl.where(lane < EXPERTS, (end - first + BLOCK_M - 1) // BLOCK_M, 0)
    tile_end = tl.cumsum(needed, 0)
    if tl.program_id(0) == 0:
        tl.store(starts + lane, first, mask=lane <= EXPERTS)
        tl.store(tile_starts + lane, tile_end - needed, mask=lane <= EXPERTS)
    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    before = (tile_end[None, :] <= tile[:, None]) & (lane < EXPERTS)[None, :]
    tl.store(tile_experts + tile, tl.sum(before.to(tl.int32), 1), mask=tile < tiles)


def make_plan(experts_TK: Tensor, experts: int, tiles: str, rows: int) -> Plan:
    """The plan of at least one slot, for these tiles, which are of so many rows."""
    slots = experts_TK.numel()
    blocks = triton.cdiv(slots, SLOTS_PER_PROGRAM)
    order_S = torch.empty(slots, dtype=torch.int32, device=experts_TK.device)
    counts = order_S.new_empty((experts + 2) * blocks)
    width = min(BUCKETS_PER_PROGRAM, triton.next_power_of_2(experts + 2))
    count_kernel[(blocks, triton.cdiv(experts + 2, width))](
        *(experts_TK, counts, slots, blocks, experts, width), BLOCK=SLOTS_PER_PROGRAM
    )
    sums = torch.cumsum(counts, 0, dtype=torch.int32)
    order_kernel[(blocks,)](experts_TK, sums, order_S, slots, blocks, experts, BLOCK=SLOTS_PER_PROGRAM)
    return Plan(order_S, *_tables(sums, slots, blocks, experts, rows), tiles, experts_TK.shape[1])


def one_expert_plan(x_TH: Tensor, tiles: str, rows: int) -> Plan:
    """The plan of one expert that takes every token, of which there is at least one: rows are tokens."""
    nothing_T = torch.empty(len(x_TH), dtype=torch.int32, device=x_TH.device)
    return Plan(nothing_T, *_tables(nothing_T, len(x_TH), 0, 1, rows), tiles, 0)


def _tables(sums: Tensor, slots: int, blocks: int, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """First rows, first tiles, and tiles' experts, of slots counted in blocks, or of one expert's without a block."""
    tiles = slots // rows + min(slots, experts)
    starts_F, tile_starts_F = sums.new_empty(2, experts + 1).unbind(0)
    tile_experts_N = sums.new_empty(tiles)
    plan_kernel[(triton.cdiv(tiles, TILES_PER_PROGRAM),)](
        *(sums, starts_F, tile_starts_F, tile_experts_N, slots, blocks, tiles),
        EXPERTS=experts,
        ALL=blocks == 0,
        WIDTH=triton.next_power_of_2(experts + 1),
        BLOCK_M=rows,
        BLOCK_TILES=TILES_PER_PROGRAM,
    )
    return starts_F, tile_starts_F, tile_experts_N


@triton.jit
def find_tile(
    starts,
    tile_starts,
    expert,
    place,
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr,
    BAND: tl.constexpr,
):
    """First row, end of the expert's rows and part of the columns of an expert's program, `place` counted from tile 0.

    An expert's tiles are gone through in bands of `BAND` rows of tiles, each part by part: programs that run at the
    same time read the same part of the expert's matrix, so that it comes from memory once.
    """
    first_tile = tl.load(tile_starts + expert)
    height = tl.load(tile_starts + expert + 1) - first_tile
    local = place - first_tile * PARTS
    band = local // (BAND * PARTS) * BAND
    band_height = tl.minimum(height - band, BAND)
    inside = local % (BAND * PARTS)
    row = tl.load(starts + expert) + (band + inside % band_height) * BLOCK_M
    return row, tl.load(starts + expert + 1), inside // band_height
