"""`compress` on the GPU: a program holds a whole window of some channels, so that everything is read once."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.compiled import differentiable
from posttrain.kernels.launches import Launcher

TILE = 4096
"""Numbers of a window in one program: 32 for each thread of four warps."""


@triton.jit
def load_window(
    kv,
    gate,
    valid,
    kv_entry,
    kv_member,
    gate_entry,
    gate_member,
    entry,
    d,
    MEMBERS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Values and weights `[BLOCK_M, len(d)]` of an entry's channels; a member that is not there has weight 0."""
    m = tl.arange(0, BLOCK_M)
    there = tl.load(valid + entry * MEMBERS + m, mask=m < MEMBERS, other=0) != 0
    inside = (m < MEMBERS)[:, None] & (d < DIM)[None, :]  # what is not valid is read as well: so no load waits
    value = tl.load(kv + entry * kv_entry + m[:, None] * kv_member + d[None, :], mask=inside, other=0.0)
    score = tl.load(gate + entry * gate_entry + m[:, None] * gate_member + d[None, :], mask=inside, other=0.0)
    score = tl.where(there[:, None], score.to(tl.float32), float("-inf"))
    weight = tl.exp(score - tl.max(score, 0)[None, :])
    value = tl.where(there[:, None], value.to(tl.float32), 0.0)
    return value, weight / tl.sum(weight, 0)[None, :]


@triton.jit(do_not_specialize_on_alignment=["valid"])
def forward_kernel(
    kv,
    gate,
    valid,
    out,
    kv_entry,
    kv_member,
    gate_entry,
    gate_member,
    MEMBERS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`out[e, d] = Σ_m softmax_m(gate[e, m, d]) · kv[e, m, d]`; axis 0 of the grid is entries, axis 1 channels."""
    entry = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value, weight = load_window(
        kv, gate, valid, kv_entry, kv_member, gate_entry, gate_member, entry, d, MEMBERS, DIM, BLOCK_M
    )
    tl.store(out + entry * DIM + d, tl.sum(weight * value, 0).to(out.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize_on_alignment=["valid"])
def backward_kernel(
    kv,
    gate,
    valid,
    gradient,
    dkv,
    dgate,
    kv_entry,
    kv_member,
    gate_entry,
    gate_member,
    MEMBERS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`dkv = weight · g` and `dgate = weight · g · (kv - out)`, the weights and `out` computed again."""
    entry = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value, weight = load_window(
        kv, gate, valid, kv_entry, kv_member, gate_entry, gate_member, entry, d, MEMBERS, DIM, BLOCK_M
    )
    slope = tl.load(gradient + entry * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    share = weight * slope[None, :]
    m = tl.arange(0, BLOCK_M)
    at = entry * MEMBERS * DIM + m[:, None] * DIM + d[None, :]
    inside = (m < MEMBERS)[:, None] & (d < DIM)[None, :]
    tl.store(dkv + at, share.to(dkv.dtype.element_ty), mask=inside)
    middle = tl.sum(weight * value, 0)
    tl.store(dgate + at, (share * (value - middle[None, :])).to(dgate.dtype.element_ty), mask=inside)


forward, backward = Launcher(forward_kernel), Launcher(backward_kernel)


@lru_cache
def _shape(members: int, dim: int) -> tuple[dict[str, int], int]:
    """Tiles and warps by the shape of a window alone: its sums are added up in the same order in every call."""
    block_m = triton.next_power_of_2(members)
    block_d = min(max(TILE // block_m, 16), triton.next_power_of_2(dim))
    warps = min(max(block_m * block_d // 1024, 4), 16)
    return {"MEMBERS": members, "DIM": dim, "BLOCK_M": block_m, "BLOCK_D": block_d}, warps


def _windows(tensor_EMD: Tensor) -> tuple[Tensor, int, int]:
    """Windows and the strides of entries and members. Channels of a wider state are read where they are.

    That is, where 16-byte loads fit them as they fit a tensor without gaps: how a window is spread over threads, and
    with it the order of its sums, follows from what the strides are multiples of.
    """
    _, members, dim = tensor_EMD.shape
    entry, member, channel = tensor_EMD.stride()
    if channel == 1 and (dim | entry | member) % 16 == 0 and tensor_EMD.data_ptr() % 16 == 0:
        return tensor_EMD, entry, member
    tensor_EMD = tensor_EMD.contiguous()
    return tensor_EMD if tensor_EMD.data_ptr() % 16 == 0 else tensor_EMD.clone(), members * dim, dim


def _inputs(kv_EMD: Tensor, gate_EMD: Tensor, valid_EM: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    kv, *kv_strides = _windows(kv_EMD)
    gate, *gate_strides = _windows(gate_EMD)
    return (kv, gate, valid_EM.bool().contiguous().view(torch.uint8)), (*kv_strides, *gate_strides)


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_EMD: Tensor, gate_EMD: Tensor, valid_EM: Tensor) -> Tensor:
        ctx.save_for_backward(kv_EMD, gate_EMD, valid_EM)
        entries, members, dim = kv_EMD.shape
        out_ED = kv_EMD.new_empty(entries, dim)
        if out_ED.numel():
            tensors, strides = _inputs(kv_EMD, gate_EMD, valid_EM)
            constants, warps = _shape(members, dim)
            key = kv_EMD.device, kv_EMD.dtype, gate_EMD.dtype, strides, members, dim
            grid = entries, -(-dim // constants["BLOCK_D"]), 1
            forward(grid, key, (*tensors, out_ED, *strides), constants, num_warps=warps)
        return out_ED

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        kv_EMD, gate_EMD, valid_EM = ctx.saved_tensors
        entries, members, dim = kv_EMD.shape
        dkv_EMD, dgate_EMD = (one.new_empty(one.shape) for one in (kv_EMD, gate_EMD))
        if dkv_EMD.numel():
            tensors, strides = _inputs(kv_EMD, gate_EMD, valid_EM)
            gradient_ED = gradients[0].contiguous()
            gradient_ED = gradient_ED if gradient_ED.data_ptr() % 16 == 0 else gradient_ED.clone()
            constants, warps = _shape(members, dim)
            key = kv_EMD.device, kv_EMD.dtype, gate_EMD.dtype, gradient_ED.dtype, strides, members, dim
            grid = entries, -(-dim // constants["BLOCK_D"]), 1
            arguments = *tensors, gradient_ED, dkv_EMD, dgate_EMD, *strides
            backward(grid, key, arguments, constants, num_warps=warps)
        return dkv_EMD, dgate_EMD, None


def compress(kv_EMD: Tensor, gate_EMD: Tensor, valid_EM: Tensor) -> Tensor:
    """`[E, M, D]` windows to `[E, D]` entries in `kv_EMD`'s dtype, computed in fp32; gates may have another dtype."""
    return differentiable(_Compress, kv_EMD, gate_EMD, valid_EM)
