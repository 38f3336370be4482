"""RMSNorm in plain differentiable torch."""

from __future__ import annotations

from torch import Tensor

from posttrain.kernels.wide import wide


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight`."""
    normed = wide(x) / (wide(x).square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed if weight is None else normed * wide(weight)).to(x.dtype)
