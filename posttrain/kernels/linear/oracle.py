"""Matrix products in plain differentiable torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """`x · weightᵀ`."""
    return F.linear(x_TI, weight_OI)


def grouped_linear(x_TGI: Tensor, weight_GOI: Tensor) -> Tensor:
    """`x[:, g] · weight[g]ᵀ` for each group."""
    return torch.einsum("tgi,goi->tgo", x_TGI, weight_GOI)
