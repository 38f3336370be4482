"""`rms_norm` on the GPU: a row is read once, forward; twice the bytes of a copy, backward."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.compiled import differentiable
from posttrain.kernels.launches import Launcher

TILE = 4096
"""Numbers in one tile of whole rows: 32 for each thread of four warps."""

PROGRAMS = 264
"""Parts of the weight's gradient, each added up by one program: 2 for each multiprocessor of an H100, as many as fit.

A constant, so that a gradient has the same bits on every GPU."""

BACKWARD_WARPS = 2
"""Times forward's, with a weight: its gradient's sums and the tile that is on its way take registers too."""


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, weight, out, rows, eps, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr
):
    """`x / sqrt(mean(x²) + eps) · weight` for `ROWS` rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (d < DIM)[None, :]
    at = row[:, None] * DIM + d[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)
    value = value * scale[:, None]
    if WEIGHTED:
        value = value * tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tile_rows(x, gradient, tile, rows, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of `x` and of the gradient as they are, zeros where there is nothing."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (d < DIM)[None, :]
    at = row[:, None] * DIM + d[None, :]
    return tl.load(x + at, mask=inside, other=0.0), tl.load(gradient + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "programs"])
def backward_kernel(
    x,
    weight,
    gradient,
    dx,
    parts,
    rows,
    programs,
    eps,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """`dx = scale · (g·w - normed · mean(g·w·normed))` of every `programs`-th tile, and these tiles' `Σ g·normed`."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    scales = tl.zeros([BLOCK], tl.float32)
    if WEIGHTED:
        scales = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    if WEIGHTED:
        ahead, slope_ahead = tile_rows(x, gradient, program, rows, DIM, ROWS, BLOCK)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        if WEIGHTED:  # several tiles: the next is on its way while this one is computed
            value, slope = ahead.to(tl.float32), slope_ahead.to(tl.float32)
            ahead, slope_ahead = tile_rows(x, gradient, tile + programs, rows, DIM, ROWS, BLOCK)
        else:
            value, slope = tile_rows(x, gradient, tile, rows, DIM, ROWS, BLOCK)
            value, slope = value.to(tl.float32), slope.to(tl.float32)
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (d < DIM)[None, :]
        at = row[:, None] * DIM + d[None, :]
        scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)
        scale = tl.where(row < rows, scale, 0.0)  # of no row at all it may be infinite
        normed = value * scale[:, None]
        if WEIGHTED:
            sums += slope * normed
            slope = slope * scales[None, :]
        mean = tl.sum(slope * normed, 1) / DIM
        change = (slope - normed * mean[:, None]) * scale[:, None]
        tl.store(dx + at, change.to(dx.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(parts + program.to(tl.int64) * DIM + d, tl.sum(sums, 0), mask=d < DIM)


forward, backward = Launcher(forward_kernel), Launcher(backward_kernel)


def _shape(dim: int) -> tuple[dict[str, Any], int]:
    """Tiles and warps by the width of a row alone: a row's sum is added up in the same order in every call."""
    block = triton.next_power_of_2(dim)
    return {"DIM": dim, "ROWS": max(TILE // block, 1), "BLOCK": block}, min(max(block // 1024, 4), 16)


def _aligned(tensor: Tensor) -> Tensor:
    """Without gaps, and begun where the widest loads may begin: how a row is spread over threads depends on it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x, weight = _aligned(x), weight if weight is None else _aligned(weight)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out, rows, (tile, warps) = torch.empty_like(x), x.numel() // max(x.shape[-1], 1), _shape(x.shape[-1])
        if rows:
            constants = {**tile, "WEIGHTED": weight is not None}
            key = x.device, x.dtype, None if weight is None else weight.dtype, tile["DIM"], tile["ROWS"]
            grid = -(-rows // tile["ROWS"]), 1, 1
            forward(grid, key, (x, weight, out, rows, eps), constants, num_warps=warps)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient, weighted = _aligned(gradients[0]), weight is not None
        dx, rows, (tile, warps) = torch.empty_like(x), x.numel() // max(x.shape[-1], 1), _shape(x.shape[-1])
        tiles = -(-rows // tile["ROWS"])
        programs = min(tiles, PROGRAMS) if weighted else tiles
        parts = x.new_empty(programs, x.shape[-1], dtype=torch.float32) if weighted else None
        if programs:
            constants = {**tile, "WEIGHTED": weighted}
            warps = min(BACKWARD_WARPS * warps, 16) if weighted else warps
            kinds = x.dtype, None if weight is None else weight.dtype, gradient.dtype
            key = x.device, kinds, tile["DIM"], tile["ROWS"], warps
            arguments = x, weight, gradient, dx, parts, rows, programs, ctx.eps
            backward((programs, 1, 1), key, arguments, constants, num_warps=warps)
        return dx, None if parts is None else parts.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of `[..., D]`, computed in fp32, in `x.dtype`; the weight may have another dtype."""
    return differentiable(_RMSNorm, x, weight, eps)
