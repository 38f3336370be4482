"""What the forward and backward kernels of sparse attention share."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

UNITS = tl.constexpr(1.4426950408889634)
"""log2(e): scores are kept in units of log 2."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""


@dataclass(frozen=True)
class Entries:
    """Two stores and, for each token, the rows that it reads: those that exist first, in the order of its index."""

    store_a: Tensor
    store_b: Tensor
    rows_TK: Tensor
    """int32; the first `columns_a` columns are rows of `store_a`, the others of `store_b`, -1 after the last."""
    counts_T2: Tensor
    """int32; how many rows of each store, or -1 where an index named a row that its store does not have."""
    columns_a: int

    @property
    def stores(self) -> tuple[Tensor, Tensor]:
        """Both stores `[S, D]`."""
        return self.store_a, self.store_b

    @property
    def strides(self) -> tuple[int, int]:
        """Distance between rows of each store, in elements."""
        return self.store_a.stride(0), self.store_b.stride(0)

    def wide_for(self, q_THD: Tensor) -> bool:
        """Whether the stores' rows take more room than the queries' dtype needs."""
        return self.store_a.dtype.itemsize > q_THD.dtype.itemsize

    def tokens(self, part: slice) -> Entries:
        """The same for some of the tokens."""
        return Entries(self.store_a, self.store_b, self.rows_TK[part], self.counts_T2[part], self.columns_a)


def row_width(dim: int) -> int:
    """Channels of a row inside a kernel."""
    return max(16, triton.next_power_of_2(dim))


def head_tile(heads: int, dtype: torch.dtype) -> int:
    """Heads of one program: as many as Hopper's matrix instruction has rows, where there are as many."""
    return 16 if dtype is torch.float32 else min(64, max(16, triton.next_power_of_2(heads)))


@triton.jit
def product(a, b, sums, WIDEN: tl.constexpr):
    """`sums + a · b` in fp32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def places(start, count_a, start_b, end, columns_a, BLOCK: tl.constexpr):
    """Columns of the block that begins at `start`, and which of them hold an entry."""
    k = tl.arange(0, BLOCK)
    first = start < start_b
    return tl.where(first, start, start - start_b + columns_a) + k, start + k < tl.where(first, count_a, end)
