"""Manifold-constrained hyper-connections (V4 report §2.2): n residual streams, mixed by doubly stochastic matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.linear.op import linear
from posttrain.kernels.mhc.sinkhorn import sinkhorn
from posttrain.kernels.norm.op import rms_norm


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _collapse(weights_TN: Tensor, streams_TND: Tensor) -> Tensor:
    return (weights_TN.unsqueeze(-1) * streams_TND.float()).sum(1).to(streams_TND.dtype)


def mhc_pre(
    streams_TND: Tensor,
    fn_MC: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of one mHC site from its streams, and the collapsed input of the sub-layer.

    Args:
        streams_TND: the `n` residual streams.
        fn_MC: projection `[(2 + n)·n, n·D]`, fp32; rows are pre (n), post (n), comb (n²).
        base_M, scale_3: static part, and one gate each for pre, post and comb; fp32.
        iterations, eps: of Sinkhorn. norm_eps: of the unweighted RMSNorm over all streams.

    Returns:
        input `[T, D]`, post `[T, n]` fp32, comb `[T, n, n]` fp32 (columns sum to 1).
    """
    n = streams_TND.shape[1]
    mixes_TM = linear(rms_norm(streams_TND.flatten(1).float(), None, norm_eps), fn_MC.float())
    pre, post, comb = mixes_TM.split([n, n, n * n], -1)
    base_pre, base_post, base_comb = base_M.float().split([n, n, n * n])
    scale_pre, scale_post, scale_comb = scale_3.float().unbind(0)
    pre_TN = _sigmoid(pre * scale_pre + base_pre) + eps
    post_TN = 2 * _sigmoid(post * scale_post + base_post)
    logits_TNN = (comb * scale_comb + base_comb).unflatten(-1, (n, n))
    exponentials = torch.exp(logits_TNN - logits_TNN.amax(-1, keepdim=True).detach())
    start_TNN = exponentials / exponentials.sum(-1, keepdim=True) + eps
    return _collapse(pre_TN, streams_TND), post_TN, sinkhorn(start_TNN, iterations, eps)


def mhc_post(streams_TND: Tensor, out_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """New streams: `stream_k = post_k · out + sum_j comb[j, k] · stream_j`, mixed in fp32."""
    mixed = torch.bmm(comb_TNN.transpose(1, 2), streams_TND.float())
    return (mixed + post_TN.unsqueeze(-1) * out_TD.float().unsqueeze(1)).to(streams_TND.dtype)


def mhc_head(
    streams_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """Collapse the streams after the last layer: `sum_n (sigmoid(mix_n) + eps) · stream_n`."""
    mixes_TN = linear(rms_norm(streams_TND.flatten(1).float(), None, norm_eps), fn_NC.float())
    return _collapse(_sigmoid(mixes_TN * scale_1.float() + base_N.float()) + eps, streams_TND)
