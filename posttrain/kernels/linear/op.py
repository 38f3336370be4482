"""Matrix products whose rows do not depend on how many rows there are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_PER_THREAD = 8
"""From this many rows for each thread on, the CPU's BLAS computes a row the same way whatever the count."""


def minimum_rows(device: torch.device) -> int:
    """Rows that a product is padded to: 16, or 8 for each CPU thread if that is more."""
    return max(16, ROWS_PER_THREAD * torch.get_num_threads()) if device.type == "cpu" else 16


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """`x · weightᵀ`.

    Args:
        x_TI: `[T, I]`, any number of rows including none.
        weight_OI: `[O, I]`, the same dtype.

    Returns:
        `[T, O]`; a row is bitwise the same in every call, alone or among others.
    """
    rows = x_TI.shape[0]
    least = minimum_rows(x_TI.device)
    if rows >= least or rows == 0:
        return F.linear(x_TI, weight_OI)
    return F.linear(F.pad(x_TI, (0, 0, 0, least - rows)), weight_OI)[:rows]


def grouped_linear(x_TGI: Tensor, weight_GOI: Tensor) -> Tensor:
    """One product for each group: `[T, G, I]` by `[G, O, I]` gives `[T, G, O]` (V4's output projection)."""
    rows = x_TGI.shape[0]
    least = minimum_rows(x_TGI.device)
    padded = x_TGI if rows >= least else F.pad(x_TGI, (0, 0, 0, 0, 0, least - rows))
    return torch.bmm(padded.transpose(0, 1), weight_GOI.transpose(1, 2)).transpose(0, 1)[:rows]
