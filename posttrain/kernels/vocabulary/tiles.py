"""Which piece of the `[N, V]` matrices is in memory at a time, and the matrix products on such pieces.

Two things are held, each within a budget that is written here and depends on nothing else:

    logits     a *tile* of tokens, fp32, over the whole vocabulary; student and teacher
    gradient   of the loss in the logits, a *group* of tokens, in the hidden states' dtype

A group is large because the head's gradient is a sum over tokens: each group after the first reads and writes that
`[V, H]` sum once more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from posttrain.kernels.blocks import round_up
from posttrain.kernels.gradients import handed_over, total_of

LOGIT_BYTES = {"cpu": 4 * 2**20, "cuda": 3 * 2**27}
"""On the CPU so that the passes over a tile stay in its cache; on a GPU so that the products have rows enough."""

DIVERGENCE_BYTES = {"cpu": 4 * 2**20, "cuda": 3 * 2**28}
"""The same for divergences: twice as many rows are 5 % faster at V4's size. A training step would pay for them with
memory that it has not, and is not faster."""

GRADIENT_BYTES = 2 * 2**30
"""A gradient that fits here is one group. Of a longer one, groups have half as much: the fp32 sum comes beside it."""

ROWS = 128
"""Tiles and groups are multiples of this many tokens where the budget allows so many."""

ALIGNMENT = 64
"""Rows of a tile start at multiples of this many elements, as the fast matrix products want it."""

HALF = (torch.bfloat16, torch.float16)


def tile_tokens(vocabulary: int, device: torch.device, divergence: bool = False) -> int:
    """Tokens whose logits of both models are in memory at once."""
    budget = (DIVERGENCE_BYTES if divergence else LOGIT_BYTES)["cpu" if device.type == "cpu" else "cuda"]
    return _rows(budget, 2 * 4 * round_up(vocabulary, ALIGNMENT))


def group_tokens(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens whose gradient in the logits is in memory at once."""
    row_bytes = dtype.itemsize * round_up(vocabulary, ALIGNMENT)
    fitting = _rows(GRADIENT_BYTES, row_bytes)
    return tokens if tokens <= fitting else _rows(GRADIENT_BYTES // 2, row_bytes)


def _rows(budget: int, row_bytes: int) -> int:
    rows = budget // row_bytes
    return max(rows // ROWS * ROWS if rows >= ROWS else rows, 1)


def spans(start: int, end: int, size: int) -> Iterator[slice]:
    """`[start, end)` in pieces of `size`."""
    for first in range(start, end, size):
        yield slice(first, min(first + size, end))


def matrix(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of this shape, rows aligned."""
    *outer, columns = shape
    return torch.empty(*outer, round_up(columns, ALIGNMENT), dtype=dtype, device=device)[..., :columns]


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a · b`, added up in fp32 and rounded to `out.dtype` once."""
    if out.dtype is a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and a.dtype in HALF:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a · b`, where `total` is fp32."""
    if a.is_cuda and a.dtype in HALF:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class HeadGradient:
    """The sum over groups of tokens of `gradientᵀ · hidden`, `[V, H]`."""

    def __init__(
        self, head_VH: Tensor, groups: int, total_VH: Tensor | None = None, owner: Tensor | None = None
    ) -> None:
        """Adds to `total_VH` (fp32) if given. Else a single group writes in the head's dtype, several add in fp32.

        An `owner` (see `kernels.gradients`) gets the sum in the end.
        """
        self._like, self._dtype = head_VH, head_VH.dtype if groups == 1 else torch.float32
        self._owner, self._single = owner, groups == 1
        self._total_VH, self._given = total_VH, total_VH is not None

    def add(self, gradient_NV: Tensor, hidden_NH: Tensor) -> None:
        """Take a group in. Memory is taken at the first, when the tiles of logits have been let go."""
        total_VH = total_of(self._owner, hidden_NH.dtype) if self._single else None
        if total_VH is not None:
            self._total_VH = total_VH.addmm_(gradient_NV.t(), hidden_NH)
        elif self._total_VH is None:
            self._total_VH = torch.empty_like(self._like, dtype=self._dtype)
            product(gradient_NV.t(), hidden_NH, self._total_VH)
        else:
            add_product(self._total_VH, gradient_NV.t(), hidden_NH)

    def result(self) -> Tensor | None:
        """The sum, in the head's dtype; or the very tensor that it was to be added to. None if an owner has it."""
        if self._total_VH is None:
            return None if self._owner is not None else torch.zeros_like(self._like)
        if self._owner is not None:
            return handed_over(self._owner, self._total_VH)
        return self._total_VH if self._given else self._total_VH.to(self._like.dtype)


def hidden_gradient(gradient_NV: Tensor, head_VH: Tensor, out_NH: Tensor, scale_N: Tensor | None = None) -> None:
    """`out = gradient · head`, rows times `scale_N` if given; one rounding to `out.dtype`."""
    if out_NH.dtype is torch.float32 and scale_N is None:
        return product(gradient_NV, head_VH, out_NH)
    wide_NH = torch.empty_like(out_NH, dtype=torch.float32)
    product(gradient_NV, head_VH, wide_NH)
    out_NH.copy_(wide_NH if scale_N is None else wide_NH.mul_(scale_N[:, None]))
