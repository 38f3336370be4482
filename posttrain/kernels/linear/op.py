"""Matrix products whose rows do not depend on how many rows there are, nor on where in the matrix they stand.

On GPUs one Triton kernel sees to that (`triton.py`). On the CPU, MKL gives a row the same bits under three conditions,
found by trial over sizes (tests/test_kernels_invariance.py): enough rows for its blocked path, rows that start on 16
bytes, and more than one column of output. What does not meet them is padded with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.checks import expect, expect_kind
from posttrain.kernels.compiled import Kernels
from posttrain.kernels.linear import oracle

triton = Kernels(__package__, "triton")

ROWS_PER_THREAD = 8
"""From this many rows for each thread on, the CPU's BLAS computes a row the same way whatever the count."""

ALIGNMENT = 4
"""Rows of a multiple of this many floats start on 16 bytes."""


def minimum_rows(device: torch.device) -> int:
    """Rows that a product is padded to: 16, or 8 for each CPU thread if that is more."""
    return max(16, ROWS_PER_THREAD * torch.get_num_threads()) if device.type == "cpu" else 16


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """`x · weightᵀ`.

    Args:
        x_TI: `[T, I]`, any number of rows including none.
        weight_OI: `[O, I]`, the same dtype (triton: fp32, bf16 or fp16; sums are fp32).

    Returns:
        `[T, O]`; a row is bitwise the same in every call, alone or among others.
    """
    rows, inner = expect("linear", "x", x_TI, "T", "I")
    outer, _ = expect("linear", "weight", weight_OI, "O", inner)
    if backend_of(x_TI) == "triton":
        expect_kind("linear", "weight", weight_OI, x_TI)
        return triton.linear(x_TI, weight_OI)
    if x_TI.dtype is torch.float64:
        return oracle.linear(x_TI, weight_OI)
    missing_rows = max(minimum_rows(x_TI.device) - rows, 0) if rows else 0
    missing_columns, single = -inner % ALIGNMENT, int(outer == 1)
    if missing_rows or missing_columns:
        x_TI = F.pad(x_TI, (0, missing_columns, 0, missing_rows))
    if missing_columns or single:
        weight_OI = F.pad(weight_OI, (0, missing_columns, 0, single))
    result = oracle.linear(x_TI, weight_OI)
    return result[:rows, :outer] if missing_rows or single else result


def grouped_linear(x_TGI: Tensor, weight_GOI: Tensor) -> Tensor:
    """One product for each group: `[T, G, I]` by `[G, O, I]` gives `[T, G, O]` (V4's output projection)."""
    _, groups, inner = expect("grouped_linear", "x", x_TGI, "T", "G", "I")
    expect("grouped_linear", "weight", weight_GOI, groups, "O", inner)
    if backend_of(x_TGI) == "triton":
        expect_kind("grouped_linear", "weight", weight_GOI, x_TGI)
        return triton.grouped_linear(x_TGI, weight_GOI)
    if x_TGI.dtype is torch.float64:
        return oracle.grouped_linear(x_TGI, weight_GOI)
    pairs = zip(x_TGI.unbind(1), weight_GOI.unbind(0), strict=True)
    return torch.stack([linear(x_TI, weight_OI) for x_TI, weight_OI in pairs], 1)
