"""V4's hybrid Newton-Schulz iteration (V4 report, section 5.5), which makes a matrix of updates nearly orthogonal."""

from __future__ import annotations

from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels
from posttrain.kernels.newton_schulz import oracle

triton = Kernels(__package__, "triton")


def newton_schulz(matrices_KNM: Tensor) -> Tensor:
    """`U S Vᵀ` becomes about `U Vᵀ`, for every matrix of the batch.

        X_0 = M / ||M||_F;   X_k = a X_{k-1} + (b G + c G²) X_{k-1} with G = X_{k-1} X_{k-1}ᵀ

    Eight steps whose coefficients grow small singular values fast, then two that settle them at one.

    Args:
        matrices_KNM: `[K, N, M]`, fp32 or bf16. A zero matrix stays zero. Not differentiable.

    Returns:
        `[K, N, M]` in the same dtype. On a GPU the iteration itself runs in bf16, as V4's.

    Raises:
        ValueError: not three dimensions; on a GPU, another dtype.
    """
    expect("newton_schulz", "matrices", matrices_KNM, "K", "N", "M")
    if backend_of(matrices_KNM) == "triton":
        return triton.newton_schulz(matrices_KNM)
    return oracle.newton_schulz(matrices_KNM)
