"""The hybrid Newton-Schulz iteration in plain torch, on any device, in the dtype that comes."""

from __future__ import annotations

import torch
from torch import Tensor

GROWING = (3.4445, -4.7750, 2.0315)
SETTLING = (2.0, -1.5, 0.5)
COEFFICIENTS = (GROWING,) * 8 + (SETTLING,) * 2
SMALLEST_NORM = 1e-20
"""What a matrix is divided by at least: one without gradient stays zero."""


def newton_schulz(matrices_KNM: Tensor) -> Tensor:
    """See the op."""
    tall = matrices_KNM.size(1) > matrices_KNM.size(2)
    x = matrices_KNM.mT if tall else matrices_KNM  # the Gram matrix is built on the shorter side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
