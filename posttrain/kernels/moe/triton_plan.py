"""Which rows of which expert each program of a grouped matrix product takes, found on the GPU without waiting for it.

Slots (a token's `K` choices) are sorted by expert, those of one expert in their order, by a stable radix sort. Each
expert's rows are cut into tiles; the host only knows how many tiles there can be, and starts that many.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES_PER_PROGRAM = 64


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
def _first_not_below(values, size, number):
    """How many of the sorted values are below each number."""
    low = tl.zeros_like(number)
    high = low + size
    left = size
    while left > 0:
        middle = (low + high) // 2
        inside = low < high
        value = tl.load(values + middle, mask=inside, other=0)
        below = inside & (value < number)
        high = tl.where(inside & (value >= number), middle, high)
        low = tl.where(below, middle + 1, low)
        left = left // 2
    return low


@triton.jit(do_not_specialize=["slots", "tiles"])
def plan_kernel(
    sorted_experts,
    starts,
    tile_starts,
    tile_experts,
    slots,
    tiles,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
) -> None:
    """Each program finds all experts' bounds and fills its part of the table of tiles."""
    lane = tl.arange(0, WIDTH)
    first = _first_not_below(sorted_experts, slots, lane)
    end = _first_not_below(sorted_experts, slots, lane + 1)
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
    sorted_S, order_S = torch.sort(experts_TK.reshape(-1).to(torch.int32), stable=True)
    return Plan(order_S, *_tables(sorted_S, experts, rows), tiles, experts_TK.shape[1])


def one_expert_plan(x_TH: Tensor, tiles: str, rows: int) -> Plan:
    """The plan of one expert that takes every token, of which there is at least one: rows are tokens."""
    zeros_T = torch.zeros(len(x_TH), dtype=torch.int32, device=x_TH.device)
    return Plan(zeros_T, *_tables(zeros_T, 1, rows), tiles, 0)


def _tables(sorted_S: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sorted experts of all slots: first rows, first tiles, and tiles' experts."""
    slots = len(sorted_S)
    tiles = slots // rows + min(slots, experts)
    starts_F, tile_starts_F = sorted_S.new_empty(2, experts + 1).unbind(0)
    tile_experts_N = sorted_S.new_empty(tiles)
    plan_kernel[(triton.cdiv(tiles, TILES_PER_PROGRAM),)](
        *(sorted_S, starts_F, tile_starts_F, tile_experts_N, slots, tiles),
        EXPERTS=experts,
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
    COLUMNS: tl.constexpr,
    BAND: tl.constexpr,
):
    """First row, end of the expert's rows and tile column of an expert's program, `place` counted from tile 0.

    An expert's tiles are gone through in bands of `BAND` rows of tiles, each column by column: programs that run at the
    same time read the same part of the expert's matrix, so that it comes from memory once.
    """
    first_tile = tl.load(tile_starts + expert)
    height = tl.load(tile_starts + expert + 1) - first_tile
    local = place - first_tile * COLUMNS
    band = local // (BAND * COLUMNS) * BAND
    band_height = tl.minimum(height - band, BAND)
    inside = local % (BAND * COLUMNS)
    row = tl.load(starts + expert) + (band + inside % band_height) * BLOCK_M
    return row, tl.load(starts + expert + 1), inside // band_height
