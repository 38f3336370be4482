"""A layer over a long sequence, some of its tokens at a time: what fits 128k tokens of training into one GPU.

Tokens of a layer know of one another through keys and values alone (`Block.remember`), which are small; the rest of the
layer is each token's own (`Block.after`), and large: V4-Flash's queries have 64 KiB a token. So a layer is computed in
chunks of tokens, keeping nothing but its input; backward computes each chunk again and takes its gradient before the
next. Results are those of the whole layer to the last bit, as no op depends on what else is in a call. Gradients differ
in the order of additions: those of keys and values are summed over chunks in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from posttrain.models.deepseek_v4.context import AttentionContext
from posttrain.models.deepseek_v4.layers import Block, Past, Rope
from posttrain.models.deepseek_v4.routing import RoutedTokens

TOKENS = 8192
"""Of one chunk. The experts' matrices are read once for each, which so many tokens hide."""

STORES = "window_SD", "entries_SD"
"""What gradients reach of `Past`."""


class _Chunked(torch.autograd.Function):
    """Recomputes with gradients inside its backward pass, as reentrant checkpointing does."""

    @staticmethod
    def forward(
        ctx: Any,
        streams_TND: Tensor,
        layer: Block,
        tokens_T: Tensor | RoutedTokens,
        context: AttentionContext,
        ropes: dict[str, Rope],
        size: int,
    ) -> Tensor:
        ctx.save_for_backward(streams_TND)
        ctx.arguments = layer, tokens_T, context, ropes, size
        past, rope = layer.remember(streams_TND, context, ropes), ropes[layer.attn.rope_kind]
        out_TND = torch.empty_like(streams_TND)
        for part in _parts(len(streams_TND), size):
            out_TND[part] = layer.after(streams_TND[part], tokens_T[part], rope.of_tokens(part), past.of_tokens(part))
        return out_TND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (streams_TND,), (layer, tokens_T, context, ropes, size) = ctx.saved_tensors, ctx.arguments
        # Where a chunk's gradient has been read, that of its input is put: a second tensor of this size would not fit.
        # It belongs to this function alone: it is the whole of what comes back from the next layer or the head.
        gradient_TND = gradients[0].contiguous()
        past, rope = layer.remember(streams_TND, context, ropes), ropes[layer.attn.rope_kind]
        sums = {name: torch.zeros_like(store, dtype=torch.float32) for name, store in _stores(past)}
        for part in _parts(len(streams_TND), size):
            leaves = {name: store.detach().requires_grad_() for name, store in _stores(past)}
            chunk_TND = streams_TND[part].detach().requires_grad_()
            with torch.enable_grad():
                mine = replace(past.of_tokens(part), **leaves)
                out_TND = layer.after(chunk_TND, tokens_T[part], rope.of_tokens(part), mine)
            torch.autograd.backward(out_TND, gradient_TND[part])
            gradient_TND[part] = chunk_TND.grad
            for name, leaf in leaves.items():
                sums[name] += leaf.grad
            del out_TND, mine, leaves, chunk_TND
        whole_TND = streams_TND.detach().requires_grad_()
        with torch.enable_grad():
            stores = dict(_stores(layer.remember(whole_TND, context, ropes)))
        names = [name for name, store in stores.items() if store.requires_grad]
        torch.autograd.backward([stores[name] for name in names], [sums[name].to(stores[name].dtype) for name in names])
        gradient_TND += whole_TND.grad
        return gradient_TND, None, None, None, None, None


def _parts(total: int, size: int) -> Iterator[slice]:
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))


def _stores(past: Past) -> Iterator[tuple[str, Tensor]]:
    for name in STORES:
        if (store := getattr(past, name)) is not None:
            yield name, store


def in_chunks(
    layer: Block,
    streams_TND: Tensor,
    tokens_T: Tensor | RoutedTokens,
    context: AttentionContext,
    ropes: dict[str, Rope],
    size: int = TOKENS,
) -> Tensor:
    """`layer(...)`, `size` tokens at a time, with gradients; `streams` must require one."""
    out_TND: Tensor = _Chunked.apply(streams_TND, layer, tokens_T, context, ropes, size)
    return out_TND
