"""Multi-query attention over gathered entries with a sink, keys being values (V4 report §2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.attention import oracle
from posttrain.kernels.backend import backend_of
from posttrain.kernels.blocks import BLOCK
from posttrain.kernels.checks import expect
from posttrain.kernels.compiled import Kernels, dense, differentiable, float_rows, narrow, run

cpu, triton = Kernels(__package__), Kernels(__package__, "triton")
Source = tuple[int, int, int, int, int]


def _source(store_SD: Tensor, index_TK: Tensor) -> Source:
    """See `cpu`."""
    return store_SD.data_ptr(), store_SD.stride(0), len(store_SD), index_TK.data_ptr(), index_TK.shape[1]


class _SparseAttention(torch.autograd.Function):
    """Two sources; the second may have no columns."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, sink_H: Tensor, scale: float, store_a: Tensor, store_b: Tensor, *indices: Tensor
    ) -> Tensor:
        tokens, heads, dim = q_THD.shape
        keep = any(ctx.needs_input_grad)
        out_THD, sinks_TH = torch.empty_like(q_THD), q_THD.new_empty(tokens, heads)
        weights_THK = q_THD.new_empty(tokens if keep else 1, heads, indices[0].shape[1] + indices[1].shape[1])
        sources = _source(store_a, indices[0]), _source(store_b, indices[1])
        shape = scale, tokens, heads, dim
        run(cpu.forward, q_THD, sink_H, *shape, *sources, out_THD, weights_THK, keep, sinks_TH)
        ctx.save_for_backward(q_THD, store_a, store_b, weights_THK, sinks_TH, *indices)
        ctx.shape = shape
        return out_THD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, store_a, store_b, weights_THK, sinks_TH, *indices = ctx.saved_tensors
        dq_THD, dsink_H = torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[1])
        dstores = store_a.new_zeros(store_a.shape), store_b.new_zeros(store_b.shape)
        sources = _source(store_a, indices[0]), _source(store_b, indices[1])
        inputs = q_THD, gradients[0].contiguous(), weights_THK, sinks_TH
        run(cpu.backward, *inputs, *ctx.shape, *sources, dq_THD, *dstores, dsink_H)
        return dq_THD, dsink_H, None, *dstores, None, None


def sparse_attention(q_THD: Tensor, sources: Sequence[tuple[Tensor, Tensor]], sink_H: Tensor, scale: float) -> Tensor:
    """Each token attends to the entries that its index rows name, and to a sink that absorbs weight.

    `out[t, h] = sum_k exp(s_k) e_k / (sum_k exp(s_k) + exp(sink_h))`, `s_k = scale · q[t, h] · e_k`

    Args:
        q_THD: queries.
        sources: one or two pairs of a store `[S, D]` (window KV, compressed KV) and int64 rows `[T, K]` into it,
            -1 for none; each `K` a multiple of `BLOCK`. Keys and values are the same entries.
        sink_H: one logit for each head.
        scale: softmax scale, `D**-0.5` in V4.

    Returns:
        `[T, H, D]`. Gradients go to `q_THD`, every store and `sink_H`.

    Raises:
        ValueError: names the argument whose shape, dtype or device does not fit. An index that names a row which its
            store does not have is an `IndexError` on the CPU and a result of NaN on a GPU, which does not wait to see.
    """
    tokens, heads, dim = expect("sparse_attention", "q", q_THD, "T", "H", "D")
    expect("sparse_attention", "sink", sink_H, heads)
    if not 1 <= len(sources) <= 2:
        raise ValueError(f"sparse_attention: {len(sources)} sources; expected 1 or 2")
    for number, (store, index) in enumerate(sources):
        expect("sparse_attention", f"store of sources[{number}]", store, "S", dim)
        columns = expect("sparse_attention", f"index of sources[{number}]", index, tokens, "K")[1]
        if columns % BLOCK:
            raise ValueError(
                f"sparse_attention: index of sources[{number}] has {columns} columns; expected a multiple of {BLOCK}"
            )
        if index.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"sparse_attention: index of sources[{number}] is {index.dtype}; expected torch.int64")
        for name, tensor in (("store", store), ("index", index)):
            if tensor.device != q_THD.device:
                raise ValueError(
                    f"sparse_attention: {name} of sources[{number}] is on {tensor.device}; expected {q_THD.device}"
                )
    backend = backend_of(q_THD)
    if backend == "oracle":
        return oracle.sparse_attention(q_THD, sources, sink_H, scale)
    nothing = sources[0][0][:0], sources[0][1][:, :0]
    (store_a, index_a), (store_b, index_b) = sources if len(sources) == 2 else (*sources, nothing)
    if backend == "triton":
        return triton.sparse_attention(q_THD, sink_H, scale, store_a, store_b, index_a, index_b)
    inputs = dense(q_THD), dense(sink_H), scale, float_rows(store_a), float_rows(store_b)
    indices = index_a.long().contiguous(), index_b.long().contiguous()
    return narrow(differentiable(_SparseAttention, *inputs, *indices), q_THD)
