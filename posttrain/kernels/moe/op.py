"""Routing and experts (V4 report §2.1): sqrt-softplus and hash routers, clamped SwiGLU, ragged expert batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.indexer.op import topk_stable
from posttrain.kernels.linear.op import linear, minimum_rows


def sqrt_softplus(logits: Tensor) -> Tensor:
    """`sqrt(log(1 + exp(x)))` in fp32."""
    logits = logits.float()
    return torch.sqrt(logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs())))


def _combine_weights(scores_TE: Tensor, experts_TK: Tensor, scaling: float) -> Tensor:
    weights_TK = scores_TE.gather(1, experts_TK)
    return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) * scaling


def route_topk(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The `k` experts of highest `sqrt_softplus(x·wᵀ) + bias`; the bias selects but does not weigh.

    Returns:
        Expert numbers `[T, k]` int64 (ties to the lowest) and their weights `[T, k]` fp32, which sum to `scaling`.
    """
    scores_TE = sqrt_softplus(linear(x_TH.float(), weight_EH.float()))
    experts_TK = topk_stable(scores_TE.detach() + bias_E, k)
    return experts_TK, _combine_weights(scores_TE, experts_TK, scaling)


def route_hash(
    x_TH: Tensor, weight_EH: Tensor, table_VK: Tensor, tokens_T: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Experts by a frozen table of token ids; the learned gate only weighs them. Returns as `route_topk`."""
    scores_TE = sqrt_softplus(linear(x_TH.float(), weight_EH.float()))
    experts_TK = table_VK[tokens_T].long()
    return experts_TK, _combine_weights(scores_TE, experts_TK, scaling)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _swiglu(hidden_N2I: Tensor, limit: float) -> Tensor:
    gate, up = hidden_N2I.chunk(2, -1)
    return _silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _swiglu_backward(hidden_N2I: Tensor, gradient_NI: Tensor, limit: float) -> Tensor:
    gate, up = hidden_N2I.chunk(2, -1)
    clamped_gate, clamped_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = 1 / (1 + torch.exp(-clamped_gate))
    dgate = gradient_NI * clamped_up * sigmoid * (1 + clamped_gate * (1 - sigmoid)) * (gate <= limit)
    dup = gradient_NI * clamped_gate * sigmoid * (up.abs() <= limit)
    return torch.cat((dgate, dup), -1)


class _SwigluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_N2I: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(hidden_N2I)
        ctx.limit = limit
        return _swiglu(hidden_N2I, limit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (hidden_N2I,) = ctx.saved_tensors
        return _swiglu_backward(hidden_N2I, gradients[0], ctx.limit), None


def swiglu_mlp(x_TH: Tensor, gate_up_JH: Tensor, down_HI: Tensor, limit: float) -> Tensor:
    """The shared expert: `down(silu(min(gate, limit)) · clamp(up, ±limit))`, gate and up stacked in `gate_up_JH` (J = 2I)."""
    return linear(_SwigluFunction.apply(linear(x_TH, gate_up_JH), limit), down_HI)


def _rows_product(x_NI: Tensor, weight_OI: Tensor, out_NO: Tensor) -> None:
    """`out = x · weightᵀ` in place, with `linear`'s promise about rows."""
    if x_NI.shape[0] >= minimum_rows(x_NI.device):
        torch.mm(x_NI, weight_OI.t(), out=out_NO)
    else:
        out_NO.copy_(linear(x_NI, weight_OI))


class _Experts(torch.autograd.Function):
    """Tokens sorted by expert, one product for each expert that has any, results added in slot order."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, limit: float
    ) -> Tensor:
        tokens, slots = experts_TK.shape
        order_N = torch.argsort(experts_TK.flatten(), stable=True)
        ends = torch.bincount(experts_TK.flatten(), minlength=w13.shape[0]).cumsum(0).tolist()
        x_NH = x_TH.index_select(0, order_N // slots)
        hidden_NJ = x_NH.new_empty(len(order_N), w13.shape[1])
        out_NH = torch.empty_like(x_NH)
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                _rows_product(x_NH[start:end], w13[expert], hidden_NJ[start:end])
        act_NI = _swiglu(hidden_NJ, limit)
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                _rows_product(act_NI[start:end], w2[expert], out_NH[start:end])
        slots_TKH = torch.empty_like(out_NH).index_copy_(0, order_N, out_NH).view(tokens, slots, -1)
        ctx.save_for_backward(x_NH, hidden_NJ, act_NI, slots_TKH, order_N, weights_TK, w13, w2)
        ctx.ends, ctx.limit = ends, limit
        return (slots_TKH * weights_TK.to(x_TH.dtype).unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NH, hidden_NJ, act_NI, slots_TKH, order_N, weights_TK, w13, w2 = ctx.saved_tensors
        gradient_TH = gradients[0]
        tokens, slots, hidden_size = slots_TKH.shape
        dweights_TK = (slots_TKH * gradient_TH.unsqueeze(1)).sum(-1).to(weights_TK.dtype)
        dslots_TKH = gradient_TH.unsqueeze(1) * weights_TK.to(gradient_TH.dtype).unsqueeze(-1)
        dout_NH = dslots_TKH.view(-1, hidden_size).index_select(0, order_N)
        dw13, dw2 = torch.zeros_like(w13), torch.zeros_like(w2)
        dact_NI = torch.empty_like(act_NI)
        spans = [span for span in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)) if span[1][1] > span[1][0]]
        for expert, (start, end) in spans:
            torch.mm(dout_NH[start:end], w2[expert], out=dact_NI[start:end])
            torch.mm(dout_NH[start:end].t(), act_NI[start:end], out=dw2[expert])
        dhidden_NJ = _swiglu_backward(hidden_NJ, dact_NI, ctx.limit)
        dx_NH = torch.empty_like(x_NH)
        for expert, (start, end) in spans:
            torch.mm(dhidden_NJ[start:end], w13[expert], out=dx_NH[start:end])
            torch.mm(dhidden_NJ[start:end].t(), x_NH[start:end], out=dw13[expert])
        dx_TH = torch.empty_like(dx_NH).index_copy_(0, order_N, dx_NH).view(tokens, slots, -1).sum(1)
        return dx_TH, None, dweights_TK, dw13, dw2, None


def moe_experts(
    x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, w13_EJH: Tensor, w2_EHI: Tensor, limit: float
) -> Tensor:
    """`out[t] = sum_k weight[t, k] · expert_k(x[t])` over ragged expert batches.

    Args:
        x_TH: tokens.
        experts_TK: int64 expert of each slot.
        weights_TK: fp32 weight of each slot.
        w13_EJH: gate and up projections stacked, `J = 2I`.
        w2_EHI: down projections.
        limit: SwiGLU clamp.

    Returns:
        `[T, H]`; slots are added in their order, so the sum does not depend on the batch.
    """
    return _Experts.apply(x_TH, experts_TK, weights_TK, w13_EJH, w2_EHI, limit)
