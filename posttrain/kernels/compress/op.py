"""Compression of token windows into single KV entries (V4 report eqs. 9-12 for CSA, 20-23 for HCA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable, has_kernels, narrow, run
from posttrain.kernels.compress import oracle

cpu = Kernels(__package__)
triton = Kernels(__package__, "triton")


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_EMD: Tensor, gate_EMD: Tensor, valid_EM: Tensor) -> Tensor:
        out_ED, weights_EMD = kv_EMD.new_empty(kv_EMD.shape[0], kv_EMD.shape[2]), torch.empty_like(kv_EMD)
        run(cpu.forward, kv_EMD, gate_EMD, valid_EM, *kv_EMD.shape, out_ED, weights_EMD)
        ctx.save_for_backward(kv_EMD, weights_EMD, out_ED)
        return out_ED

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        kv_EMD, weights_EMD, out_ED = ctx.saved_tensors
        dkv_EMD, dgate_EMD = torch.empty_like(kv_EMD), torch.empty_like(kv_EMD)
        gradient_ED = gradients[0].contiguous()
        run(cpu.backward, kv_EMD, weights_EMD, out_ED, *kv_EMD.shape, gradient_ED, dkv_EMD, dgate_EMD)
        return dkv_EMD, dgate_EMD, None


def compress(kv_EMD: Tensor, gate_EMD: Tensor, valid_EM: Tensor) -> Tensor:
    """Softmax-gated sum over each window, channel by channel.

    `entry[e, d] = sum_m softmax_m(gate[e, m, d]) · kv[e, m, d]`

    Args:
        kv_EMD: the window's projected tokens. For CSA the first half of `M` is the previous block's
            `a` series and the second half this block's `b` series; for HCA it is one block.
        gate_EMD: the gates with their position bias added, fp32.
        valid_EM: False for places before the sequence's start (CSA's first entry): weight 0. At least one is True.

    Returns:
        `[E, D]` in `kv_EMD`'s dtype, before norm and rotation.
    """
    entries, members, dim = expect("compress", "kv", kv_EMD, "E", "M", "D")
    expect("compress", "gate", gate_EMD, entries, members, dim)
    expect("compress", "valid", valid_EM, entries, members)
    if has_kernels(kv_EMD):
        inputs = dense(kv_EMD), dense(gate_EMD), valid_EM.bool().contiguous()
        return narrow(differentiable(_Compress, *inputs), kv_EMD)
    if backend_of(kv_EMD) == "triton":
        return triton.compress(kv_EMD, gate_EMD, valid_EM)
    return oracle.compress(kv_EMD, gate_EMD, valid_EM)
