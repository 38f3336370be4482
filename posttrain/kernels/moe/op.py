"""Routing and experts (V4 report §2.1): sqrt-softplus and hash routers, clamped SwiGLU, ragged expert batches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable, has_kernels, narrow, run
from posttrain.kernels.linear.op import ALIGNMENT, linear, minimum_rows
from posttrain.kernels.moe import oracle
from posttrain.kernels.quant.op import packed_bytes, packed_numbers, unpack_rows_mxfp4
from posttrain.kernels.tape import whole
from posttrain.kernels.wide import without_autocast

cpu = Kernels(__package__)
triton = Kernels(__package__, "triton")


def _expect_beside(op: str, x: Tensor, **others: Tensor) -> None:
    """Nothing, once all are known to be where `x` is.

    Raises:
        ValueError: names the op, the argument, its device and the one that is allowed.
    """
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {x.device}, where x is")


class _Route(torch.autograd.Function):
    """Experts and weights from router logits; given a bias it chooses, given experts it weighs them."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, experts_TK: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        scores_TE, weights_TK = torch.empty_like(logits_TE), logits_TE.new_empty(experts_TK.shape)
        shape = *logits_TE.shape, experts_TK.shape[1], scaling
        run(cpu.route, logits_TE, bias_E, *shape, scores_TE, experts_TK, weights_TK)
        ctx.save_for_backward(logits_TE, scores_TE, experts_TK)
        ctx.shape = shape
        ctx.mark_non_differentiable(experts_TK)
        return experts_TK, weights_TK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, *others = ctx.saved_tensors
        dlogits_TE = torch.zeros_like(logits_TE)
        run(cpu.route_gradient, logits_TE, *others, *ctx.shape, gradients[1].contiguous(), dlogits_TE)
        return dlogits_TE, None, None, None


@without_autocast
def route_topk(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The `k` experts of highest `sqrt_softplus(x·wᵀ) + bias`; the bias selects but does not weigh.

    Returns:
        Expert numbers `[T, k]` int64 (ties to the lowest) and their weights `[T, k]` fp32, which sum to `scaling`.
    """
    tokens, hidden = expect("route_topk", "x", x_TH, "T", "H")
    experts, _ = expect("route_topk", "weight", weight_EH, "E", hidden)
    expect("route_topk", "bias", bias_E, experts)
    if not 1 <= k <= experts:
        raise ValueError(f"route_topk: k is {k}; expected 1 to {experts}, the number of experts")
    _expect_beside("route_topk", x_TH, weight=weight_EH, bias=bias_E)
    if backend_of(x_TH) == "triton":
        return triton.route_topk(x_TH, weight_EH, bias_E, k, scaling)
    if has_kernels(x_TH):
        logits_TE = dense(linear(x_TH.float(), weight_EH.float()))
        chosen_TK = torch.empty(tokens, k, dtype=torch.int64)
        return differentiable(_Route, logits_TE, dense(bias_E), chosen_TK, scaling)
    return oracle.route_topk(x_TH, weight_EH, bias_E, k, scaling)


@without_autocast
def route_hash(
    x_TH: Tensor, weight_EH: Tensor, table_VK: Tensor, tokens_T: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Experts by a frozen table of token ids; the learned gate only weighs them. Returns as `route_topk`."""
    tokens, hidden = expect("route_hash", "x", x_TH, "T", "H")
    expect("route_hash", "weight", weight_EH, "E", hidden)
    expect("route_hash", "table", table_VK, "V", "K")
    expect("route_hash", "tokens", tokens_T, tokens)
    _expect_beside("route_hash", x_TH, weight=weight_EH, table=table_VK, tokens=tokens_T)
    if backend_of(x_TH) == "triton":
        return triton.route_hash(x_TH, weight_EH, table_VK, tokens_T, scaling)
    if has_kernels(x_TH):
        logits_TE = dense(linear(x_TH.float(), weight_EH.float()))
        return differentiable(_Route, logits_TE, None, table_VK[tokens_T].long(), scaling)
    return oracle.route_hash(x_TH, weight_EH, table_VK, tokens_T, scaling)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NJ: Tensor, limit: float) -> Tensor:
        shape = len(hidden_NJ), hidden_NJ.shape[1] // 2
        out_NI = hidden_NJ.new_empty(shape)
        run(cpu.swiglu, hidden_NJ, *shape, limit, out_NI)
        ctx.save_for_backward(hidden_NJ)
        ctx.limit = limit
        return out_NI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (hidden_NJ,) = ctx.saved_tensors
        gradient_NI, dhidden_NJ = gradients[0].contiguous(), torch.empty_like(hidden_NJ)
        run(cpu.swiglu_gradient, hidden_NJ, *gradient_NI.shape, ctx.limit, gradient_NI, dhidden_NJ)
        return dhidden_NJ, None


def swiglu_mlp(x_TH: Tensor, gate_up_JH: Tensor, down_HI: Tensor, limit: float) -> Tensor:
    """The shared expert: `down(silu(min(gate, limit)) · clamp(up, ±limit))`; `gate_up_JH` is gate above up (J = 2I)."""
    _, hidden = expect("swiglu_mlp", "x", x_TH, "T", "H")
    inner = expect("swiglu_mlp", "gate_up", gate_up_JH, "J", hidden)[0] // 2
    expect("swiglu_mlp", "down", down_HI, hidden, inner)
    _expect_beside("swiglu_mlp", x_TH, gate_up=gate_up_JH, down=down_HI)
    if backend_of(x_TH) == "triton":
        return triton.swiglu_mlp(x_TH, gate_up_JH, down_HI, limit)
    hidden_TJ = linear(x_TH, gate_up_JH)
    if has_kernels(x_TH):
        return linear(narrow(differentiable(_Swiglu, dense(hidden_TJ), limit), x_TH), down_HI)
    return linear(oracle.swiglu(hidden_TJ, limit), down_HI)


class _Experts(torch.autograd.Function):
    """Rows laid out by expert, one product for each expert that has any, results added in slot order."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, limit: float
    ) -> Tensor:
        hidden, inner = x_TH.shape[1], w2.shape[2]
        starts, places = experts_TK.new_empty(len(w13) + 1), torch.empty_like(experts_TK)
        run(cpu.group, experts_TK, experts_TK.numel(), len(w13), minimum_rows(x_TH.device), starts, places)
        bounds = starts.tolist()
        rows, layout = bounds[-1], (places, *experts_TK.shape, hidden)
        used = [expert for expert, (start, end) in enumerate(pairwise(bounds)) if start < end]
        sizes = [bounds[expert + 1] - bounds[expert] for expert in used]
        x_NH, hidden_NJ = x_TH.new_empty(rows, hidden), x_TH.new_empty(rows, 2 * inner)
        act_NI, out_NH, out_TH = x_TH.new_empty(rows, inner), x_TH.new_empty(rows, hidden), torch.empty_like(x_TH)
        run(cpu.scatter, x_TH, *layout, None, x_NH, rows)
        _multiply(x_NH, w13.transpose(1, 2), used, sizes, hidden_NJ)
        run(cpu.swiglu, hidden_NJ, rows, inner, limit, act_NI)
        _multiply(act_NI, w2.transpose(1, 2), used, sizes, out_NH)
        run(cpu.combine, out_NH, *layout, weights_TK, out_TH)
        ctx.save_for_backward(x_NH, hidden_NJ, act_NI, out_NH, weights_TK, w13, w2, places)
        ctx.used, ctx.sizes, ctx.limit = used, sizes, limit
        return out_TH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NH, hidden_NJ, act_NI, out_NH, weights_TK, w13, w2, places = ctx.saved_tensors
        used, sizes = ctx.used, ctx.sizes
        gradient_TH, layout = gradients[0].contiguous(), (places, *weights_TK.shape, x_NH.shape[1])
        dweights_TK, dx_TH = torch.empty_like(weights_TK), torch.empty_like(gradient_TH)
        dout_NH, dact_NI, dhidden_NJ = torch.empty_like(out_NH), torch.empty_like(act_NI), torch.empty_like(hidden_NJ)
        dx_NH, dw13, dw2 = torch.empty_like(x_NH), torch.zeros_like(w13), torch.zeros_like(w2)
        run(cpu.weight_gradient, out_NH, *layout, gradient_TH, dweights_TK)
        run(cpu.scatter, gradient_TH, *layout, weights_TK, dout_NH, len(dout_NH))
        _multiply(dout_NH, w2, used, sizes, dact_NI)
        _multiply_transposed(dout_NH, act_NI, used, sizes, dw2)
        run(cpu.swiglu_gradient, hidden_NJ, *act_NI.shape, ctx.limit, dact_NI, dhidden_NJ)
        _multiply(dhidden_NJ, w13, used, sizes, dx_NH)
        _multiply_transposed(dhidden_NJ, x_NH, used, sizes, dw13)
        run(cpu.combine, dx_NH, *layout, None, dx_TH)
        return dx_TH, None, dweights_TK, dw13, dw2, None


def _multiply(rows_NI: Tensor, matrices_EIO: Tensor, used: list[int], sizes: list[int], out_NO: Tensor) -> None:
    """Each used expert's rows, of which there are enough, times its matrix."""
    matrices = matrices_EIO.unbind(0)
    for expert, rows, out in zip(used, rows_NI.split(sizes), out_NO.split(sizes), strict=True):
        if rows.shape[1] % ALIGNMENT:
            out.copy_(linear(rows, matrices[expert].t()))
        else:
            torch.mm(rows, matrices[expert], out=out)


def _multiply_transposed(left_NA: Tensor, right_NB: Tensor, used: list[int], sizes: list[int], out_EAB: Tensor) -> None:
    """Each used expert's `leftᵀ · right`."""
    outs = out_EAB.unbind(0)
    for expert, left, right in zip(used, left_NA.split(sizes), right_NB.split(sizes), strict=True):
        torch.mm(left.t(), right, out=outs[expert])


def moe_experts(
    x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, w13_EJH: Tensor, w2_EHI: Tensor, limit: float
) -> Tensor:
    """`out[t] = sum_k weight[t, k] · expert_k(x[t])` over ragged expert batches.

    Args:
        x_TH: tokens.
        experts_TK: int64 expert of each slot.
        weights_TK: fp32 weight of each slot.
        w13_EJH: gate and up projections stacked, `J = 2I`.
        w2_EHI: down projections. Both may be in MXFP4, rows of `quant.op.pack_rows_mxfp4` (uint8): the result is
            that of the numbers they stand for, to the bit; there is no gradient then.
        limit: SwiGLU clamp.

    Returns:
        `[T, H]`; slots are added in their order, so the sum does not depend on the batch.
    """
    tokens, hidden = expect("moe_experts", "x", x_TH, "T", "H")
    slots = expect("moe_experts", "experts", experts_TK, tokens, "K")[1]
    expect("moe_experts", "weights", weights_TK, tokens, slots)
    experts, _, inner = expect("moe_experts", "w2", w2_EHI, "E", hidden, "I")
    packed = w2_EHI.dtype is torch.uint8
    inner = packed_numbers(inner) if packed else inner
    expect("moe_experts", "w13", w13_EJH, experts, 2 * inner, packed_bytes(hidden) if packed else hidden)
    _expect_beside("moe_experts", x_TH, experts=experts_TK, weights=weights_TK, w13=w13_EJH, w2=w2_EHI)
    if backend_of(x_TH) == "triton":
        return triton.moe_experts(x_TH, experts_TK, weights_TK, w13_EJH, w2_EHI, limit)
    if packed:
        w13_EJH, w2_EHI = (unpack_rows_mxfp4(matrix, x_TH.dtype) for matrix in (w13_EJH, w2_EHI))
    if has_kernels(x_TH):
        routes = experts_TK.long().contiguous(), dense(weights_TK)
        inputs = dense(x_TH), *routes, w13_EJH.float(), w2_EHI.float()
        return narrow(whole(differentiable, _Experts, *inputs, limit), x_TH)  # the host lays out the rows
    return oracle.moe_experts(x_TH, experts_TK, weights_TK, w13_EJH, w2_EHI, limit)
