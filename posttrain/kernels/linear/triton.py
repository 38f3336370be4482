"""Matrix products on the GPU whose rows do not depend on how many rows there are.

One kernel for every number of rows: an output is one fp32 sum, added up along the inner dimension from its start to
its end in steps of the same instruction, whatever tile it falls into. The shape of the tile decides who computes an
output, never in which order; so few rows may take small tiles, which read the weight with the whole GPU.

Gradients are the vendor's products: deterministic for equal shapes, and nobody compares their rows between calls.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from posttrain.kernels.compiled import differentiable
from posttrain.kernels.gradients import handed_over, matrix_gradient, owner_of
from posttrain.kernels.launches import Launcher

BAND = 8
"""Tiles in a column that are computed before the next column begins: what they read stays in the L2 cache."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""


class Tiles(NamedTuple):
    """A tile of outputs, `rows` by `outer`, and how it is computed.

    `inner` terms at a time, by one program for each tile or, if persistent, by one for each multiprocessor.
    """

    rows: int
    outer: int
    inner: int
    warps: int
    stages: int
    persistent: bool = False
    descriptors: bool = True
    """Load by Hopper's tensor copy engine where the shape allows it; plain loads give the same bits.

    The engine wants each tensor described to it at each launch, which costs some 15 µs of Python."""


# The inner step is the same for all tiles of a dtype; rows come in multiples of 64 for the narrow dtypes, so that all
# tiles use the same instruction of Hopper's tensor cores (`wgmma`, 16 terms at once into one accumulator).
NARROW = {
    "large": Tiles(128, 256, 64, warps=8, stages=3, persistent=True),
    "square": Tiles(128, 128, 64, warps=8, stages=3, descriptors=False),
    "middle": Tiles(128, 64, 64, warps=4, stages=6, descriptors=False),
    "decode, very wide": Tiles(64, 128, 64, warps=4, stages=4, descriptors=False),
    "decode, wide": Tiles(64, 64, 64, warps=4, stages=6, descriptors=False),
    "decode": Tiles(64, 32, 64, warps=4, stages=8, descriptors=False),
}
SINGLE = {
    "decode": Tiles(16, 16, 32, warps=2, stages=4),
    "middle": Tiles(32, 32, 32, warps=4, stages=4),
    "large": Tiles(64, 64, 32, warps=4, stages=3),
}
MULTIPROCESSORS = 132
"""Of an H100. On another GPU the choice of tiles may be a slower one; the results are the same."""


CLOCK, SHARED = 1.7e9, 227 * 2**10
"""Hz, and bytes of shared memory of a multiprocessor."""
MEMORY_SPEED, CACHE_SPEED, LOAD_SPEED = 3e12, 9e12, 100e9
"""Bytes a second: from memory and from the L2 cache, all together, and into one multiprocessor."""
START = 1.5e-6
"""Seconds until the first tiles have arrived, and from the last product to the end."""


def estimate(tiles: Tiles, rows: int, inner: int, outer: int, groups: int) -> float:
    """Seconds on an H100, for narrow dtypes: mostly the slowest of memory, cache, and the busiest multiprocessor."""
    count = math.ceil(rows / tiles.rows) * math.ceil(outer / tiles.outer) * groups
    loaded = 2.0 * inner * (min(tiles.rows, rows) + tiles.outer)
    # Of a `wgmma` of 64 rows and 16 terms: products, or the operands' way from shared memory (128 bytes a cycle).
    cycles = max(tiles.outer / 2, 16 + tiles.outer / 4) * tiles.rows / 64 * inner / 16
    each = max(loaded / LOAD_SPEED, cycles / CLOCK)
    busiest = math.ceil(count / MULTIPROCESSORS)
    resident = max(SHARED // (2 * tiles.inner * (tiles.rows + tiles.outer) * tiles.stages), 1)
    starts = 1 if tiles.persistent else math.ceil(busiest / resident)
    memory = 2.0 * groups * (rows * inner + outer * inner + rows * outer) / MEMORY_SPEED
    times = memory, count * loaded / CACHE_SPEED, busiest * each
    return 0.75 * max(times) + 0.25 * sum(times) + starts * START  # they overlap, though never quite


def tiles_for(rows: int, inner: int, outer: int, groups: int, dtype: torch.dtype) -> Tiles:
    """Those that should be fastest; of fp32, the largest that keep the GPU busy. No choice changes a bit."""
    if dtype is not torch.float32:
        candidates = [tiles for tiles in NARROW.values() if rows > 64 or tiles.rows == 64]
        return min(candidates, key=lambda tiles: estimate(tiles, rows, inner, outer, groups))
    for tiles in (SINGLE["large"], SINGLE["middle"]):
        if math.ceil(rows / tiles.rows) * math.ceil(outer / tiles.outer) * groups >= 0.9 * MULTIPROCESSORS:
            return tiles
    return SINGLE["decode"]


@triton.jit
def tile_place(tile, rows, columns, BLOCK_M: tl.constexpr, BAND: tl.constexpr):
    """Row and column of a tile in bands of `BAND` rows of tiles, each gone through column by column."""
    in_band = BAND * columns
    first = tile // in_band * BAND
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, BAND)
    return first + tile % in_band % height, tile % in_band // height


@triton.jit(do_not_specialize=["rows", "programs"])
def product_kernel(
    x,
    weight,
    out,
    rows,
    outer,
    inner,
    groups,
    programs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    EVEN: tl.constexpr,
    FLATTEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`out[m, g, n] = Σ_k x[m, g, k] · weight[g, n, k]`: each program computes every `programs`-th tile."""
    columns = tl.cdiv(outer, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * columns
    k = tl.arange(0, BLOCK_K)
    for place in tl.range(tl.program_id(0), tiles * groups, programs, flatten=FLATTEN):
        group = place // tiles
        tile_m, tile_n = tile_place(place % tiles, rows, columns, BLOCK_M, BAND)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        m, n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
        wide_m, wide_n = m.to(tl.int64), (group * outer + n).to(tl.int64)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, inner, BLOCK_K):
            if DESCRIPTORS:
                a = x.load([start_m, group * inner + start])
                b = tl.trans(weight.load([group * outer + start_n, start]))
            else:
                x_at = x + wide_m[:, None] * (groups * inner) + (group * inner + start + k)[None, :]
                weight_at = weight + wide_n[None, :] * inner + (start + k)[:, None]
                if EVEN:
                    a = tl.load(x_at, mask=(m < rows)[:, None], other=0.0)
                    b = tl.load(weight_at, mask=(n < outer)[None, :], other=0.0)
                else:
                    left = k < inner - start
                    a = tl.load(x_at, mask=(m < rows)[:, None] & left[None, :], other=0.0)
                    b = tl.load(weight_at, mask=(n < outer)[None, :] & left[:, None], other=0.0)
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            sums = tl.dot(a, b, sums, input_precision="ieee")
        out_at = out + wide_m[:, None] * (groups * outer) + (group * outer + n)[None, :]
        tl.store(out_at, sums.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outer)[None, :])


launch = Launcher(product_kernel)


class Plan(NamedTuple):
    """How a shape is computed: the tiles, their number, and what the kernel is compiled for."""

    tiles: Tiles
    described: bool
    programs: int
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def plan(rows: int, groups: int, inner: int, outer: int, dtype: torch.dtype, tiles: Tiles | None) -> Plan:
    """Cached: decode meets few shapes, and this would take longer than some of its products."""
    tiles = tiles or tiles_for(rows, inner, outer, groups, dtype)
    # The copy engine wants rows of multiples of 16 bytes; and no step may reach into the next group.
    can_be = dtype.itemsize == 2 and inner % 8 == 0 and (groups == 1 or inner % tiles.inner == 0)
    count = math.ceil(rows / tiles.rows) * math.ceil(outer / tiles.outer) * groups
    constants = {
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.outer,
        "BLOCK_K": tiles.inner,
        "BAND": BAND,
        "EVEN": inner % tiles.inner == 0,
        "FLATTEN": tiles.persistent,
        "DESCRIPTORS": tiles.descriptors and can_be,
        "WIDEN": INTERPRETED,
    }
    programs = min(count, MULTIPROCESSORS) if tiles.persistent else count
    return Plan(tiles, tiles.descriptors and can_be, programs, constants)


def product(x: Tensor, weight: Tensor, tiles: Tiles | None = None) -> Tensor:
    """`[T, G, I]` by `[G, O, I]` to `[T, G, O]`, or all without G; with these tiles or those that suit the shape."""
    rows, groups, inner = x.shape if x.dim() == 3 else (x.shape[0], 1, x.shape[1])
    outer = weight.shape[-2]
    out = x.new_empty((*x.shape[:-1], outer))
    if out.numel() == 0:
        return out
    x, weight = _aligned(x), _aligned(weight)
    tiles, described, programs, constants = plan(rows, groups, inner, outer, x.dtype, tiles)
    key = x.device, x.dtype, groups, inner, outer, tiles
    sources: tuple[Any, Any] = (x, weight)
    if described:
        sources = (
            TensorDescriptor(x, [rows, groups * inner], [groups * inner, 1], [tiles.rows, tiles.inner]),
            TensorDescriptor(weight, [groups * outer, inner], [inner, 1], [tiles.outer, tiles.inner]),
        )
    arguments = *sources, out, rows, outer, inner, groups, programs
    launch((programs, 1, 1), key, arguments, constants, num_warps=tiles.warps, num_stages=tiles.stages)
    return out


def _aligned(tensor: Tensor) -> Tensor:
    """Without gaps, and begun where the widest loads may begin."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        by_x, by_weight = ctx.needs_input_grad or (False, False)
        ctx.save_for_backward(x if by_weight else None, weight if by_x else None)
        ctx.owner = owner_of(weight) if by_weight else None
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient, dx, dweight = gradients[0], None, None
        if gradient.dim() == 2:
            return (
                None if weight is None else torch.mm(gradient, weight),
                None if x is None else matrix_gradient(ctx.owner, gradient, x),
            )
        rows, groups, outer = gradient.shape
        if weight is not None:
            dx = weight.new_empty(rows, groups, weight.shape[2])
        if x is not None:
            dweight = x.new_empty(groups, outer, x.shape[2])
        for group in range(groups):
            if dx is not None:
                torch.mm(gradient[:, group], weight[group], out=dx[:, group])
            if dweight is not None:
                torch.mm(gradient[:, group].t(), x[:, group], out=dweight[group])
        return dx, handed_over(ctx.owner, dweight)


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """`[T, I]` by `[O, I]` to `[T, O]`, in the inputs' dtype, summed in fp32."""
    return differentiable(_Product, x_TI, weight_OI)


def grouped_linear(x_TGI: Tensor, weight_GOI: Tensor) -> Tensor:
    """`[T, G, I]` by `[G, O, I]` to `[T, G, O]`, in the inputs' dtype, summed in fp32."""
    return differentiable(_Product, x_TGI, weight_GOI)
