"""Manifold-constrained hyper-connections (V4 report §2.2): n residual streams, mixed by doubly stochastic matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable, has_kernels, narrow, run
from posttrain.kernels.linear.op import linear
from posttrain.kernels.mhc import oracle

cpu = Kernels(__package__)
triton = Kernels(__package__, "triton")


class _Site(torch.autograd.Function):
    """Weights from streams, and the collapse. `rms_norm(x) · fnᵀ` is computed as `(x · fnᵀ) / norm(x)`."""

    @staticmethod
    def forward(
        ctx: Any, streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale: Tensor, *constants: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        iterations, eps, norm_eps = constants
        tokens, n, dim = streams_TND.shape
        raw_TM = linear(streams_TND.view(tokens, n * dim), fn_MC).contiguous()
        x_TD, inverse_T = streams_TND.new_empty(tokens, dim), streams_TND.new_empty(tokens)
        others = n if len(base_M) > n else 0
        post_TN, comb_TNN = streams_TND.new_empty(tokens, others), streams_TND.new_empty(tokens, others, others)
        shape = tokens, n, dim, len(base_M), iterations, eps
        results = x_TD, post_TN, comb_TNN, inverse_T
        run(cpu.pre_forward, streams_TND, raw_TM, base_M, scale, *shape, norm_eps, *results)
        ctx.save_for_backward(streams_TND, raw_TM, inverse_T, base_M, scale, fn_MC)
        ctx.shape = shape
        return x_TD, post_TN, comb_TNN

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, fn_MC = ctx.saved_tensors
        streams_TND, raw_TM, _, base_M, scale = inputs
        tokens, n, dim, *_ = ctx.shape
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        draw_TM, factors = torch.empty_like(raw_TM), raw_TM.new_empty(tokens, 1 + n)
        dbase_M, dscale = torch.zeros_like(base_M), torch.zeros_like(scale)
        run(cpu.pre_backward, *inputs, *ctx.shape, *gradients, draw_TM, factors, dbase_M, dscale)
        dstreams_TC = draw_TM @ fn_MC
        dfn_MC = draw_TM.t() @ streams_TND.view(tokens, n * dim)
        run(cpu.add_stream_gradient, streams_TND, gradients[0], factors, tokens, n, dim, dstreams_TC)
        return dstreams_TC.view_as(streams_TND), dfn_MC, dbase_M, dscale, None, None, None


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams_TND: Tensor, out_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
        inputs = streams_TND, out_TD, post_TN, comb_TNN
        mixed_TND = torch.empty_like(inputs[0])
        run(cpu.post_forward, *inputs, *streams_TND.shape, mixed_TND)
        ctx.save_for_backward(*inputs)
        return mixed_TND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        results = tuple(torch.empty_like(tensor) for tensor in inputs)
        run(cpu.post_backward, *inputs, *inputs[0].shape, gradients[0].contiguous(), *results)
        return results


def mhc_pre(
    streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale_3: Tensor, *, iterations: int, eps: float, norm_eps: float
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
    _expect_site("mhc_pre", streams_TND, fn_MC, base_M, scale_3)
    if backend_of(streams_TND) == "triton":
        return triton.mhc_site("mhc_pre", streams_TND, fn_MC, base_M, scale_3, iterations, eps, norm_eps)[:3]
    if has_kernels(streams_TND):
        inputs = dense(streams_TND), dense(fn_MC), dense(base_M), dense(scale_3)
        x_TD, post_TN, comb_TNN = differentiable(_Site, *inputs, iterations, eps, norm_eps)
        return narrow(x_TD, streams_TND), post_TN, comb_TNN
    return oracle.mhc_pre(streams_TND, fn_MC, base_M, scale_3, iterations=iterations, eps=eps, norm_eps=norm_eps)


def mhc_site(
    streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale_3: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mhc_pre`, and the streams as `mhc_post` is to take them.

    They are the same numbers in the same memory. On a GPU the gradient that `mhc_post` gives them goes through the
    gradient of `mhc_pre`, which adds its own: autograd would read and write all streams once more for that sum.

    Returns:
        input, post and comb of `mhc_pre`, streams `[T, n, D]`.
    """
    _expect_site("mhc_site", streams_TND, fn_MC, base_M, scale_3)
    if backend_of(streams_TND) == "triton":
        return triton.mhc_site("mhc_site", streams_TND, fn_MC, base_M, scale_3, iterations, eps, norm_eps)
    constants: dict[str, Any] = {"iterations": iterations, "eps": eps, "norm_eps": norm_eps}
    return *mhc_pre(streams_TND, fn_MC, base_M, scale_3, **constants), streams_TND


def _expect_site(op: str, streams_TND: Tensor, fn_MC: Tensor, base_M: Tensor, scale_3: Tensor) -> None:
    _, n, dim = expect(op, "streams", streams_TND, "T", "n", "D")
    width = (2 + n) * n
    expect(op, "fn", fn_MC, width, n * dim)
    expect(op, "base", base_M, width)
    expect(op, "scale", scale_3, 3)


def mhc_post(streams_TND: Tensor, out_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """New streams: `stream_k = post_k · out + sum_j comb[j, k] · stream_j`, mixed in fp32."""
    tokens, n, dim = expect("mhc_post", "streams", streams_TND, "T", "n", "D")
    expect("mhc_post", "out", out_TD, tokens, dim)
    expect("mhc_post", "post", post_TN, tokens, n)
    expect("mhc_post", "comb", comb_TNN, tokens, n, n)
    if backend_of(streams_TND) == "triton":
        return triton.mhc_post(streams_TND, out_TD, post_TN, comb_TNN)
    if has_kernels(streams_TND):
        inputs = dense(streams_TND), dense(out_TD), dense(post_TN), dense(comb_TNN)
        return narrow(differentiable(_Post, *inputs), streams_TND)
    return oracle.mhc_post(streams_TND, out_TD, post_TN, comb_TNN)


def mhc_head(
    streams_TND: Tensor, fn_NC: Tensor, base_N: Tensor, scale_1: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """Collapse the streams after the last layer: `sum_n (sigmoid(mix_n) + eps) · stream_n`."""
    _, n, dim = expect("mhc_head", "streams", streams_TND, "T", "n", "D")
    expect("mhc_head", "fn", fn_NC, n, n * dim)
    expect("mhc_head", "base", base_N, n)
    expect("mhc_head", "scale", scale_1, 1)
    if backend_of(streams_TND) == "triton":
        return triton.mhc_site("mhc_head", streams_TND, fn_NC, base_N, scale_1, 1, eps, norm_eps)[0]
    if has_kernels(streams_TND):
        inputs = dense(streams_TND), dense(fn_NC), dense(base_N), dense(scale_1)
        return narrow(differentiable(_Site, *inputs, 0, eps, norm_eps)[0], streams_TND)
    return oracle.mhc_head(streams_TND, fn_NC, base_N, scale_1, eps=eps, norm_eps=norm_eps)
