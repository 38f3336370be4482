"""Routers on the GPU: logits in fp32, the choice and the weights of a token's experts, and their gradients."""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""

TOKENS_PER_PROGRAM = 16

TOKENS_AT_ONCE = 16384
"""In a weight gradient: no more of the input is widened to fp32 at one time."""


@triton.jit(do_not_specialize=["tokens"])
def logits_kernel(
    x_TH,
    weight_EH,
    logits_TE,
    tokens,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """`logits = x · weightᵀ` as if in fp32 throughout.

    `PARTS` says how: 0 multiplies in fp32; 1 in the operands' own narrow dtype, whose products are exact in fp32; 3
    splits the fp32 weight into three bf16 numbers that add up to it, and multiplies with each: exact products again.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    x_at = x_TH + t.to(tl.int64)[:, None] * HIDDEN
    weight_at = weight_EH + e[None, :] * HIDDEN
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < HIDDEN
        x = tl.load(x_at + h[None, :], mask=(t < tokens)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_at + h[:, None], mask=(e < EXPERTS)[None, :] & inside[:, None], other=0.0)
        if PARTS == 3:
            high = weight.to(tl.bfloat16)
            rest = weight - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            if WIDEN:
                x, high, middle, low = x.to(tl.float32), high.to(tl.float32), middle.to(tl.float32), low.to(tl.float32)
            sums = tl.dot(x, low, sums, input_precision="ieee")
            sums = tl.dot(x, middle, sums, input_precision="ieee")
            sums = tl.dot(x, high, sums, input_precision="ieee")
        else:
            if PARTS == 0 or WIDEN:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            sums = tl.dot(x, weight, sums, input_precision="ieee")
    at = logits_TE + t.to(tl.int64)[:, None] * EXPERTS + e[None, :]
    tl.store(at, sums, mask=(t < tokens)[:, None] & (e < EXPERTS)[None, :])


@triton.jit
def _score(x):
    """`sqrt(softplus(x))`; `log1p` keeps what is small next to 1."""
    small = tl.exp(-tl.abs(x))
    above = 1.0 + small
    log1p = tl.where(above == 1.0, small, tl.log(above) * (small / tl.where(above == 1.0, 1.0, above - 1.0)))
    return tl.sqrt(tl.maximum(x, 0.0) + log1p)


@triton.jit
def _best(logits_TE, bias, t, tokens, EXPERTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, KP: tl.constexpr):
    """The `K` experts of highest score and bias, the highest first; of equal ones the lowest number."""
    lane = tl.arange(0, WIDTH)
    inside = (t < tokens)[:, None] & (lane < EXPERTS)[None, :]
    logits = tl.load(logits_TE + t.to(tl.int64)[:, None] * EXPERTS + lane[None, :], mask=inside, other=0.0)
    value = _score(logits) + tl.load(bias + lane, mask=lane < EXPERTS, other=0.0)[None, :]
    free = (lane < EXPERTS)[None, :] & (t >= 0)[:, None]
    chosen = tl.zeros([t.shape[0], KP], tl.int32)
    for place in range(K):
        top = tl.max(tl.where(free, value, float("-inf")), 1)
        found = free & (value == top[:, None])
        best = tl.minimum(tl.min(tl.where(found, lane[None, :], WIDTH), 1), EXPERTS - 1)  # all NaN: any will do
        chosen = tl.where(tl.arange(0, KP)[None, :] == place, best[:, None], chosen)
        free = free & (lane[None, :] != best[:, None])
    return chosen


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits_TE,
    bias_E,
    chosen_TK,
    weights_TK,
    tokens,
    scaling,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    CHOOSE: tl.constexpr,
    WIDTH: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Weights of the chosen experts, which `bias` chooses if `CHOOSE`. An expert that does not exist weighs NaN."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, KP)
    slot = t.to(tl.int64)[:, None] * K + k[None, :]
    mask = (t < tokens)[:, None] & (k < K)[None, :]
    if CHOOSE:
        chosen = _best(logits_TE, bias_E, t, tokens, EXPERTS, K, WIDTH, KP).to(tl.int64)
        tl.store(chosen_TK + slot, chosen, mask=mask)
    else:
        chosen = tl.load(chosen_TK + slot, mask=mask, other=0)
    exists = (chosen >= 0) & (chosen < EXPERTS)
    logits = tl.load(
        logits_TE + t.to(tl.int64)[:, None] * EXPERTS + chosen, mask=mask & exists, other=float("nan")
    )  # fmt: skip
    scores = tl.where(mask, _score(logits), 0.0)
    norm = tl.sum(scores, 1) + 1e-20
    tl.store(weights_TK + slot, scores / norm[:, None] * scaling, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def route_gradient_kernel(
    logits_TE,
    chosen_TK,
    dweights_TK,
    dlogits_TE,
    tokens,
    scaling,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """`dlogits`, zero but for the chosen: through the normalised weights, the square root and softplus."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, KP)
    slot = t.to(tl.int64)[:, None] * K + k[None, :]
    mask = (t < tokens)[:, None] & (k < K)[None, :]
    row = logits_TE + t.to(tl.int64)[:, None] * EXPERTS
    chosen = tl.load(chosen_TK + slot, mask=mask, other=0)
    logits = tl.load(row + chosen, mask=mask & (chosen >= 0) & (chosen < EXPERTS), other=0.0)
    scores = tl.where(mask, _score(logits), 0.0)
    dweights = tl.load(dweights_TK + slot, mask=mask, other=0.0)
    norm = tl.sum(scores, 1) + 1e-20
    inner = tl.sum(dweights * scores, 1) / norm
    lane = tl.arange(0, WIDTH)
    dlogits = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    for place in range(K):
        here = (k == place)[None, :]
        expert = tl.sum(tl.where(here, chosen, 0), 1)
        score, logit = tl.sum(tl.where(here, scores, 0.0), 1), tl.sum(tl.where(here, logits, 0.0), 1)
        dscore = scaling / norm * (tl.sum(tl.where(here, dweights, 0.0), 1) - inner)
        # d sqrt(softplus(x)) = sigmoid(x) / (2 sqrt(softplus(x))); where the score has vanished, so has its slope
        slope = tl.where(score > 0, 1.0 / (1.0 + tl.exp(-logit)) / tl.where(score > 0, 2.0 * score, 1.0), 0.0)
        dlogits += tl.where(lane[None, :] == expert[:, None], (dscore * slope)[:, None], 0.0)
    at = dlogits_TE + t.to(tl.int64)[:, None] * EXPERTS + lane[None, :]
    tl.store(at, dlogits, mask=(t < tokens)[:, None] & (lane < EXPERTS)[None, :])


def router_logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """`[T, E]` fp32, exact products and fp32 sums; a token's row depends on nothing but the token."""
    (tokens, hidden), experts = x_TH.shape, len(weight_EH)
    logits_TE = x_TH.new_empty(tokens, experts, dtype=torch.float32)
    exact = {(torch.bfloat16, torch.bfloat16): 1, (torch.float16, torch.float16): 1, (torch.bfloat16, torch.float32): 3}
    parts = exact.get((x_TH.dtype, weight_EH.dtype), 0)
    block_t, block_e, most = (64, 32, 64) if parts else (32, 32, 32)
    if logits_TE.numel():
        logits_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(experts, block_e))](
            *(x_TH, weight_EH, logits_TE, tokens),
            HIDDEN=hidden,
            EXPERTS=experts,
            PARTS=parts,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_H=min(most, max(16, triton.next_power_of_2(hidden))),
            WIDEN=INTERPRETED,
            num_warps=4,
            num_stages=4,
        )
    return logits_TE


def _sizes(experts: int, k: int) -> dict[str, int]:
    return {
        "EXPERTS": experts,
        "K": k,
        "WIDTH": triton.next_power_of_2(experts),
        "KP": triton.next_power_of_2(k),
        "BLOCK_T": TOKENS_PER_PROGRAM,
    }


class Route(torch.autograd.Function):
    """Experts and weights from tokens and the router's weight; with a bias it chooses, else it weighs those given."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, chosen_TK: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        logits_TE = router_logits(x_TH, weight_EH)
        tokens, k = chosen_TK.shape
        weights_TK = logits_TE.new_empty(tokens, k)
        if weights_TK.numel():
            route_kernel[(triton.cdiv(tokens, TOKENS_PER_PROGRAM),)](
                *(logits_TE, logits_TE if bias_E is None else bias_E, chosen_TK, weights_TK, tokens, scaling),
                CHOOSE=bias_E is not None,
                **_sizes(len(weight_EH), k),
            )
        ctx.save_for_backward(x_TH, weight_EH, logits_TE, chosen_TK)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(chosen_TK)
        return chosen_TK, weights_TK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weight_EH, logits_TE, chosen_TK = ctx.saved_tensors
        tokens, k = chosen_TK.shape
        dlogits_TE = torch.zeros_like(logits_TE)
        if chosen_TK.numel():
            route_gradient_kernel[(triton.cdiv(tokens, TOKENS_PER_PROGRAM),)](
                *(logits_TE, chosen_TK, gradients[1].contiguous(), dlogits_TE, tokens, ctx.scaling),
                **_sizes(len(weight_EH), k),
            )
        by_x, by_weight = ctx.needs_input_grad[:2]
        wide_EH, dx_TH, dweight_EH = weight_EH.float(), torch.empty_like(x_TH), torch.zeros_like(weight_EH).float()
        for first in range(0, tokens, TOKENS_AT_ONCE):
            part = slice(first, first + TOKENS_AT_ONCE)
            if by_x:
                dx_TH[part] = dlogits_TE[part] @ wide_EH
            if by_weight:
                dweight_EH += dlogits_TE[part].t() @ x_TH[part].float()
        return dx_TH if by_x else None, dweight_EH.to(weight_EH.dtype) if by_weight else None, None, None, None
