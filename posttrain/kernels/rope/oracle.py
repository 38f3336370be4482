"""Partial rotary embedding in plain differentiable torch."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.wide import wide


def apply_rope(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the trailing pairs of neighbouring channels."""
    half = cos_TR.shape[-1]
    shape = (cos_TR.shape[0],) + (1,) * (x.dim() - 2) + (half,)
    cos, sin = cos_TR.view(shape), sin_TR.view(shape)
    rest, rotated = x.split([x.shape[-1] - 2 * half, 2 * half], -1)
    even, odd = wide(rotated[..., 0::2]), wide(rotated[..., 1::2])
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return torch.cat((rest, pairs.flatten(-2).to(x.dtype)), -1)
