"""Log-probability and entropy of sampled tokens, and their gradients.

Forward, a row does not depend on the others: `cpu.py` on products of `linear`, `triton.py` in one kernel of its own.
Backward computes the logits of a tile again, by the vendor's product: three products in a backward pass, one forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.compiled import Kernels, run
from posttrain.kernels.gradients import owner_of
from posttrain.kernels.linear.op import linear
from posttrain.kernels.vocabulary import plain
from posttrain.kernels.vocabulary.tiles import (
    HeadGradient,
    group_tokens,
    hidden_gradient,
    matrix,
    product,
    spans,
    tile_tokens,
)

cpu = Kernels(__package__)


class OnCpu:
    """The functions of `triton.py`, on the CPU."""

    logprob_gradient = staticmethod(plain.logprob_gradient)

    @staticmethod
    def logprob(hidden_NH: Tensor, head_VH: Tensor, tokens_N: Tensor, inverse_temperature: float) -> Tensor:
        """Log-probability, entropy and log of the softmax's denominator, `[3, N]`."""
        tokens, vocabulary = len(hidden_NH), len(head_VH)
        out_3N = torch.empty(3, tokens, dtype=torch.float32)
        for tile in spans(0, tokens, tile_tokens(vocabulary, hidden_NH.device)):
            logits_NV = linear(hidden_NH[tile], head_VH).contiguous()
            rows = out_3N[:, tile].contiguous()
            run(cpu.logprob, logits_NV, *logits_NV.shape, tokens_N[tile], inverse_temperature, rows)
            out_3N[:, tile] = rows
        return out_3N


def log_softmax_of_sampler(logits_NV: Tensor, temperature: float) -> Tensor:
    """fp32 `[N, V]`, by the operations of vLLM's sampler (`vllm/v1/sample/sampler.py`): equal logits, equal bits."""
    logits_NV = logits_NV.float()
    if temperature != 1:  # by a tensor: torch divides by a plain number in another way
        logits_NV = logits_NV / torch.full((len(logits_NV), 1), temperature, device=logits_NV.device)
    return torch.log_softmax(logits_NV, -1)


def rounded_logprob(hidden_NH: Tensor, head_VH: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
    """What `OnCpu.logprob` gives, from logits that are rounded to the hidden states' dtype, as an engine has them."""
    out_3N = hidden_NH.new_empty(3, len(hidden_NH), dtype=torch.float32)
    for tile in spans(0, len(hidden_NH), tile_tokens(len(head_VH), hidden_NH.device)):
        logits_NV = linear(hidden_NH[tile], head_VH)
        log_p_NV = log_softmax_of_sampler(logits_NV, temperature)
        columns_N1 = tokens_N[tile].unsqueeze(1)
        logprob_N = log_p_NV.gather(1, columns_N1).squeeze(1)
        out_3N[0, tile] = logprob_N
        out_3N[1, tile] = -(log_p_NV.exp() * log_p_NV).sum(-1)
        out_3N[2, tile] = logits_NV.gather(1, columns_N1).squeeze(1).float() / temperature - logprob_N
    return out_3N


class LogProb(torch.autograd.Function):
    """Saves two numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        tokens_N: Tensor,
        temperature: float,
        kernels: Any,
        rounded: bool,
    ) -> tuple[Tensor, Tensor]:
        inverse_temperature, head = 1 / temperature, head_VH.to(hidden_NH.dtype)
        if rounded:
            out_3N = rounded_logprob(hidden_NH, head, tokens_N, temperature)
        else:
            out_3N = kernels.logprob(hidden_NH, head, tokens_N, inverse_temperature)
        logprob_N, entropy_N, log_mass_N = out_3N.unbind(0)
        ctx.save_for_backward(hidden_NH, head_VH, tokens_N, entropy_N.clone(), log_mass_N.clone())
        ctx.inverse_temperature, ctx.kernels, ctx.rounded = inverse_temperature, kernels, rounded
        ctx.owner = owner_of(head_VH)
        return logprob_N.clone(), entropy_N.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, wide_head_VH, tokens_N, entropy_N, log_mass_N = ctx.saved_tensors
        head_VH, (tokens, _) = wide_head_VH.to(hidden_NH.dtype), hidden_NH.shape
        slopes_2N = torch.stack([slope.float() for slope in slopes])
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        groups = list(spans(0, tokens, max(group_tokens(tokens, len(head_VH), hidden_NH.dtype), 1)))
        out_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        total = HeadGradient(wide_head_VH, len(groups), owner=ctx.owner) if wants_head else None
        for group in groups:
            per_token = tokens_N[group], log_mass_N[group], entropy_N[group], slopes_2N[:, group]
            gradient_NV = _gradient_in_logits(ctx, hidden_NH[group], head_VH, *per_token)
            if out_NH is not None:
                hidden_gradient(gradient_NV, head_VH, out_NH[group])
            if total is not None:
                total.add(gradient_NV, hidden_NH[group])
            del gradient_NV
        return out_NH, None if total is None else total.result(), None, None, None, None


def _gradient_in_logits(
    ctx: Any,
    hidden_NH: Tensor,
    head_VH: Tensor,
    tokens_N: Tensor,
    log_mass_N: Tensor,
    entropy_N: Tensor,
    slopes_2N: Tensor,
) -> Tensor:
    """`[N, V]` in the hidden states' dtype, for the tokens of a group, tile by tile."""
    (tokens, _), vocabulary, device = hidden_NH.shape, len(head_VH), hidden_NH.device
    size = min(tile_tokens(vocabulary, device), tokens)
    buffer_NV = matrix(size, vocabulary, dtype=torch.float32, device=device)
    out_NV = matrix(tokens, vocabulary, dtype=hidden_NH.dtype, device=device)
    for tile in spans(0, tokens, size):
        logits_NV = buffer_NV[: tile.stop - tile.start]
        if ctx.rounded:  # the very logits of the forward pass
            logits_NV.copy_(linear(hidden_NH[tile], head_VH))
        else:
            product(hidden_NH[tile], head_VH.t(), logits_NV)
        per_token = tokens_N[tile], log_mass_N[tile], entropy_N[tile], slopes_2N[:, tile]
        ctx.kernels.logprob_gradient(logits_NV, *per_token, ctx.inverse_temperature, out_NV[tile])
    return out_NV
