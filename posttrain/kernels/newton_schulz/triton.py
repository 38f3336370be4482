"""The hybrid Newton-Schulz iteration on the GPU, in bf16 with fp32 sums, for a batch of matrices.

`X Xᵀ` and `G²` (`G Gᵀ`, as G is symmetric) are symmetric: one kernel computes the tiles on and below the diagonal and
writes each tile below it a second time, transposed. What is left, `a X + P X`, is the vendor's batched product.
"""
# mypy: allow-incomplete-defs, allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from posttrain.kernels.newton_schulz.oracle import COEFFICIENTS, SMALLEST_NORM

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""

DESCRIPTORS = True
"""Load tiles by Hopper's tensor copy engine where the shape allows it; plain loads give the same bits."""

WORKSPACE = 2 * 2**30
"""Bytes that the iterates and Gram matrices of the matrices treated at a time may take, beside the result."""


@dataclass(frozen=True)
class Tiles:
    """A tile of outputs, `rows` by `columns`, and how it is computed: `inner` terms at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


LARGE = Tiles(128, 256, 64, warps=8, stages=3)
MIDDLE = Tiles(64, 128, 64, warps=4, stages=4)
SMALL = Tiles(32, 32, 32, warps=4, stages=3)


def tiles_for(size: int) -> Tiles:
    """Tiles for a symmetric matrix of this size."""
    return LARGE if size >= 512 else MIDDLE if size >= 128 else SMALL


@triton.jit
def lower_tile(place, RATIO: tl.constexpr):
    """Row and column of the `place`-th tile that touches the lower triangle; a tile has `RATIO` times more columns.

    Row tiles come in groups of `RATIO`, of which group g has g + 1 tiles in each row.
    """
    group = ((tl.sqrt(1.0 + 8.0 * (place // RATIO).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    group = tl.where(RATIO * (group * (group + 1) // 2) > place, group - 1, group)  # the root may be rounded
    group = tl.where(RATIO * ((group + 1) * (group + 2) // 2) <= place, group + 1, group)
    rest = place - RATIO * (group * (group + 1) // 2)
    return group * RATIO + rest // (group + 1), rest % (group + 1)


@triton.jit
def symmetric_kernel(
    left,
    right,
    plain,
    out,
    size,
    inner,
    tiles,
    alpha,
    beta,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of `alpha · A Aᵀ + beta · A` for one of many matrices `A[size, inner]`; with `ADD`, inner is size.

    `left`, `right` and `plain` are A: as descriptors the first two load tiles of different heights. Matrices lie below
    one another in two dimensions: a tile may reach into the next one, whose rows are not stored.
    """
    RATIO: tl.constexpr = BLOCK_N // BLOCK_M
    matrix = tl.program_id(0) // tiles
    tile_m, tile_n = lower_tile(tl.program_id(0) % tiles, RATIO)
    start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    m, n, k = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    first = matrix.to(tl.int64) * size
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        if DESCRIPTORS:
            a = left.load([matrix * size + start_m, start])
            b = tl.trans(right.load([matrix * size + start_n, start]))
        else:
            a_at = plain + (first + m[:, None]) * inner + (start + k)[None, :]
            b_at = plain + (first + n[None, :]) * inner + (start + k)[:, None]
            if EVEN:
                a = tl.load(a_at, mask=(m < size)[:, None], other=0.0)
                b = tl.load(b_at, mask=(n < size)[None, :], other=0.0)
            else:
                rest = k < inner - start
                a = tl.load(a_at, mask=(m < size)[:, None] & rest[None, :], other=0.0)
                b = tl.load(b_at, mask=(n < size)[None, :] & rest[:, None], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    inside = (m < size)[:, None] & (n < size)[None, :]
    sums = alpha * sums
    if ADD:
        same = tl.load(plain + (first + m[:, None]) * size + n[None, :], mask=inside, other=0.0)
        sums += beta * same.to(tl.float32)
    result = sums.to(out.dtype.element_ty)
    tl.store(out + (first + m[:, None]) * size + n[None, :], result, mask=inside)
    if tile_m // RATIO > tile_n:  # then no program has these columns as rows
        tl.store(out + (first + n[:, None]) * size + m[None, :], tl.trans(result), mask=tl.trans(inside))


def symmetric_product(
    a_KNM: Tensor, out_KNN: Tensor, alpha: float, beta: float = 0.0, tiles: Tiles | None = None
) -> None:
    """`alpha · A Aᵀ + beta · A` of every matrix into `out_KNN`; with a beta, A is square. Both bf16 and contiguous."""
    count, size, inner = a_KNM.shape
    tiles = tiles or tiles_for(size)
    ratio = tiles.columns // tiles.rows
    groups = triton.cdiv(triton.cdiv(size, tiles.rows), ratio)
    number = ratio * groups * (groups + 1) // 2
    left: Any = a_KNM
    right: Any = a_KNM
    described = DESCRIPTORS and inner % 8 == 0 and a_KNM.data_ptr() % 16 == 0
    if described:
        rows = a_KNM.view(count * size, inner)
        left = TensorDescriptor.from_tensor(rows, [tiles.rows, tiles.inner])
        right = TensorDescriptor.from_tensor(rows, [tiles.columns, tiles.inner])
    symmetric_kernel[(count * number,)](
        *(left, right, a_KNM, out_KNN, size, inner, number, alpha, beta),
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.inner,
        ADD=beta != 0,
        EVEN=inner % tiles.inner == 0,
        DESCRIPTORS=described,
        WIDEN=INTERPRETED,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _iterate(matrices_KNM: Tensor) -> Tensor:
    """All steps for matrices that are not tall, in bf16."""
    norm_K = torch.linalg.vector_norm(matrices_KNM, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (matrices_KNM / norm_K.clamp_(min=SMALLEST_NORM)).to(torch.bfloat16).contiguous()
    count, size, _ = x.shape
    gram, polynomial, other = x.new_empty(count, size, size), x.new_empty(count, size, size), torch.empty_like(x)
    for a, b, c in COEFFICIENTS:
        symmetric_product(x, gram, 1.0)
        symmetric_product(gram, polynomial, c, b)
        torch.baddbmm(x, polynomial, x, beta=a, out=other)
        x, other = other, x
    return x


@torch.no_grad()
def newton_schulz(matrices_KNM: Tensor) -> Tensor:
    """See the op. As many matrices at a time as `WORKSPACE` has room for.

    Raises:
        ValueError: neither fp32 nor bf16.
    """
    if matrices_KNM.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"newton_schulz: matrices is {matrices_KNM.dtype}; expected torch.float32 or torch.bfloat16")
    result_KNM = torch.empty_like(matrices_KNM)
    count, *sizes = matrices_KNM.shape
    if not result_KNM.numel():
        return result_KNM
    short, long = min(sizes), max(sizes)
    together = max(1, WORKSPACE // (4 * short * short + 8 * short * long))
    for start in range(0, count, together):
        part = matrices_KNM[start : start + together]
        tall = sizes[0] > sizes[1]
        found = _iterate(part.mT if tall else part)
        result_KNM[start : start + together] = found.mT if tall else found
    return result_KNM
