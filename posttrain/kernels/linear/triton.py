"""Matrix products on the GPU whose rows do not depend on how many rows there are.

One kernel for every number of rows: an output is one fp32 sum, added up along the inner dimension from its start to
its end in steps of the same instruction, whatever tile it falls into. The shape of the tile decides who computes an
output, never in which order; so few rows may take small tiles, which read the weight with the whole GPU.

Gradients are the vendor's products: deterministic for equal shapes, and nobody compares their rows between calls.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from posttrain.kernels.compiled import differentiable

DESCRIPTORS = True
"""Load tiles by Hopper's tensor copy engine where the shape allows it; plain loads give the same bits."""

BAND = 8
"""Tiles in a column that are computed before the next column begins: what they read stays in the L2 cache."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""


@dataclass(frozen=True)
class Tiles:
    """A tile of outputs, `rows` by `outer`, and how it is computed.

    `inner` terms at a time, by one program for each tile or, if persistent, by one for each multiprocessor.
    """

    rows: int
    outer: int
    inner: int
    warps: int
    stages: int
    persistent: bool = False


# The inner step is the same for all tiles of a dtype; rows come in multiples of 64 for the narrow dtypes, so that all
# tiles use the same instruction of Hopper's tensor cores (`wgmma`, 16 terms at once into one accumulator).
NARROW = {
    "decode": Tiles(64, 32, 64, warps=4, stages=8),
    "decode, wide": Tiles(64, 64, 64, warps=4, stages=6),
    "middle": Tiles(128, 64, 64, warps=4, stages=6),
    "large": Tiles(128, 256, 64, warps=8, stages=3, persistent=True),
}
SINGLE = {
    "decode": Tiles(16, 16, 32, warps=2, stages=4),
    "middle": Tiles(32, 32, 32, warps=4, stages=4),
    "large": Tiles(64, 64, 32, warps=4, stages=3),
}
MULTIPROCESSORS = 132
"""Of an H100. On another GPU the choice of tiles may be a slower one; the results are the same."""


def tiles_for(rows: int, outer: int, groups: int, dtype: torch.dtype) -> Tiles:
    """The largest tiles of which there are enough to keep the GPU busy. No choice changes a bit of the result."""
    candidates: tuple[Tiles, ...]
    if dtype is torch.float32:
        candidates = (SINGLE["large"], SINGLE["middle"])
        smallest = SINGLE["decode"]
    else:
        candidates = (NARROW["decode, wide"],) if rows <= 64 else (NARROW["large"], NARROW["middle"])
        smallest = NARROW["decode"]
    for tiles in candidates:
        if math.ceil(rows / tiles.rows) * math.ceil(outer / tiles.outer) * groups >= 0.9 * MULTIPROCESSORS:
            return tiles
    return smallest


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


def product(x_TGI: Tensor, weight_GOI: Tensor, tiles: Tiles | None = None, descriptors: bool = DESCRIPTORS) -> Tensor:
    """`[T, G, I]` by `[G, O, I]` to `[T, G, O]`, with these tiles or those that suit the shape."""
    rows, groups, inner = x_TGI.shape
    outer = weight_GOI.shape[1]
    out_TGO = x_TGI.new_empty(rows, groups, outer)
    if out_TGO.numel() == 0:
        return out_TGO
    x_TGI, weight_GOI = _aligned(x_TGI), _aligned(weight_GOI)
    tiles = tiles or tiles_for(rows, outer, groups, x_TGI.dtype)
    x, weight, described = x_TGI, weight_GOI, descriptors and _can_be_described(x_TGI, tiles)
    if described:
        x = TensorDescriptor.from_tensor(x_TGI.view(rows, groups * inner), [tiles.rows, tiles.inner])
        weight = TensorDescriptor.from_tensor(weight_GOI.view(groups * outer, inner), [tiles.outer, tiles.inner])
    count = math.ceil(rows / tiles.rows) * math.ceil(outer / tiles.outer) * groups
    programs = min(count, MULTIPROCESSORS) if tiles.persistent else count
    product_kernel[(programs,)](
        *(x, weight, out_TGO, rows, outer, inner, groups, programs),
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.outer,
        BLOCK_K=tiles.inner,
        BAND=BAND,
        EVEN=inner % tiles.inner == 0,
        FLATTEN=tiles.persistent,
        DESCRIPTORS=described,
        WIDEN=INTERPRETED,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out_TGO


def _aligned(tensor: Tensor) -> Tensor:
    """Without gaps, and begun where the widest loads may begin."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _can_be_described(x_TGI: Tensor, tiles: Tiles) -> bool:
    """The copy engine wants rows of multiples of 16 bytes; and no step may reach into the next group."""
    _, groups, inner = x_TGI.shape
    narrow = x_TGI.element_size() == 2
    return narrow and inner % 8 == 0 and (groups == 1 or inner % tiles.inner == 0)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TGI: Tensor, weight_GOI: Tensor) -> Tensor:
        by_x, by_weight = ctx.needs_input_grad or (False, False)
        ctx.save_for_backward(x_TGI if by_weight else None, weight_GOI if by_x else None)
        return product(x_TGI, weight_GOI)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TGI, weight_GOI = ctx.saved_tensors
        gradient_TGO, dx_TGI, dweight_GOI = gradients[0], None, None
        rows, groups, outer = gradient_TGO.shape
        if weight_GOI is not None:
            dx_TGI = weight_GOI.new_empty(rows, groups, weight_GOI.shape[2])
        if x_TGI is not None:
            dweight_GOI = x_TGI.new_empty(groups, outer, x_TGI.shape[2])
        for group in range(groups):
            gradient_TO = gradient_TGO[:, group]
            if dx_TGI is not None:
                torch.mm(gradient_TO, weight_GOI[group], out=dx_TGI[:, group])
            if dweight_GOI is not None:
                torch.mm(gradient_TO.t(), x_TGI[:, group], out=dweight_GOI[group])
        return dx_TGI, dweight_GOI


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """`[T, I]` by `[O, I]` to `[T, O]`, in the inputs' dtype, summed in fp32."""
    return differentiable(_Product, x_TI.unsqueeze(1), weight_OI.unsqueeze(0)).squeeze(1)


def grouped_linear(x_TGI: Tensor, weight_GOI: Tensor) -> Tensor:
    """`[T, G, I]` by `[G, O, I]` to `[T, G, O]`, in the inputs' dtype, summed in fp32."""
    return differentiable(_Product, x_TGI, weight_GOI)
