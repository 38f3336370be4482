"""The mHC operations in plain differentiable torch, on any device, in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.linear.op import linear
from posttrain.kernels.norm.oracle import rms_norm
from posttrain.kernels.wide import wide


def sinkhorn(matrix_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """Columns, then `iterations - 1` times rows and columns (V4 report eq. 8, ending on columns as the released code).

    The first pair has no row half, because its rows come normalised from a softmax.
    """
    matrix_TNN = matrix_TNN / (matrix_TNN.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix_TNN = matrix_TNN / (matrix_TNN.sum(-1, keepdim=True) + eps)
        matrix_TNN = matrix_TNN / (matrix_TNN.sum(-2, keepdim=True) + eps)
    return matrix_TNN


def _collapse(weights_TN: Tensor, streams_TND: Tensor) -> Tensor:
    return (weights_TN.unsqueeze(-1) * wide(streams_TND)).sum(1).to(streams_TND.dtype)


def mhc_pre(
    streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale_3: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See the op."""
    n = streams_TND.shape[1]
    mixes_TM = linear(rms_norm(wide(streams_TND.flatten(1)), None, norm_eps), wide(fn_MC))
    pre, post, comb = mixes_TM.split([n, n, n * n], -1)
    base_pre, base_post, base_comb = wide(base_M).split([n, n, n * n])
    scale_pre, scale_post, scale_comb = wide(scale_3).unbind(0)
    pre_TN = torch.sigmoid(pre * scale_pre + base_pre) + eps
    post_TN = 2 * torch.sigmoid(post * scale_post + base_post)
    start_TNN = torch.softmax((comb * scale_comb + base_comb).unflatten(-1, (n, n)), -1) + eps
    return _collapse(pre_TN, streams_TND), post_TN, sinkhorn(start_TNN, iterations, eps)


def mhc_post(streams_TND: Tensor, out_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """See the op."""
    mixed = torch.bmm(comb_TNN.transpose(1, 2), wide(streams_TND))
    return (mixed + post_TN.unsqueeze(-1) * wide(out_TD).unsqueeze(1)).to(streams_TND.dtype)


def mhc_head(
    streams_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """See the op."""
    mixes_TN = linear(rms_norm(wide(streams_TND.flatten(1)), None, norm_eps), wide(fn_NC))
    return _collapse(torch.sigmoid(mixes_TN * wide(scale_1) + wide(base_N)) + eps, streams_TND)
