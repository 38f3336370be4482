"""Triton: log-probability and entropy of sampled tokens, batch-invariant, and the gradient in a tile of logits.

A logit is one fp32 sum along the width, in steps of one instruction; a token's softmax goes through the vocabulary in
one order, span by span, and a tree of fixed shape puts the spans together. Neither knows how many tokens there are.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bf16 as if its bits were integers; there, operands are widened first."""

FLOOR = tl.constexpr(-1e30)
"""What columns beyond the vocabulary hold, and the maximum of none. Finite, so that 0 · FLOOR is 0."""

SPAN = 1024
"""Entries of the vocabulary of one program: 127 programs for V4's 129,280, about one for each multiprocessor."""

GROUP = 16
"""Blocks of tokens that run beside each other over the same part of the head."""

GRADIENT_BLOCK = 2048


class Blocks(NamedTuple):
    """Chosen by dtype and width alone: the number of tokens must not change a row."""

    tokens: int
    vocabulary: int
    inner: int
    warps: int
    stages: int


def blocks(dtype: torch.dtype, width: int) -> Blocks:
    """bf16: 128 fp32 accumulators a thread, 192 KB of shared memory. fp32 runs on the plain units: small blocks."""
    inner = max(16, triton.next_power_of_2(width))
    if dtype is torch.float32:
        return Blocks(64, 64, min(inner, 32), warps=4, stages=2)
    return Blocks(128, 256, min(inner, 64), warps=8, stages=4)


@triton.jit(do_not_specialize=["tokens"])  # the same machine code for any number of them
def _logprob_kernel(
    hidden,
    head,
    targets,
    partial,
    tokens,
    vocabulary,
    spans,
    inverse_temperature,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A block of tokens by a span of the vocabulary, to `partial[4, tokens, spans]`:

    maximum m, mass = sum e^(z - m), spread = sum e^(z - m) (z - m), logit of the token's target.
    """
    program = tl.program_id(0)
    block_count = tl.cdiv(tokens, BLOCK_N)
    first = program // (GROUP * spans) * GROUP
    beside = tl.minimum(block_count - first, GROUP)
    block = first + program % (GROUP * spans) % beside
    span = program % (GROUP * spans) // beside

    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows past the end are not stored, columns past it masked out of the sums: what is read there does not matter.
    readable = tl.minimum(rows, tokens - 1).to(tl.int64)
    target = tl.load(targets + readable).to(tl.int32)
    highest = tl.zeros((BLOCK_N,), tl.float32) + FLOOR
    mass = tl.zeros((BLOCK_N,), tl.float32)
    spread = tl.zeros((BLOCK_N,), tl.float32)
    chosen = tl.zeros((BLOCK_N,), tl.float32) - float("inf")
    for start in range(0, SPAN, BLOCK_V):
        first_column = span * SPAN + start
        columns = first_column + tl.arange(0, BLOCK_V)
        entries = tl.minimum(columns, vocabulary - 1).to(tl.int64)
        logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            if DESCRIBED:
                a = hidden.load([block * BLOCK_N, k])
                b = tl.trans(head.load([first_column, k]))
            else:
                a_at = hidden + readable[:, None] * WIDTH + (k + inner)[None, :]
                b_at = head + entries[None, :] * WIDTH + (k + inner)[:, None]
                if WIDTH % BLOCK_K == 0:
                    a = tl.load(a_at)
                    b = tl.load(b_at)
                else:
                    a = tl.load(a_at, mask=(k + inner < WIDTH)[None, :], other=0.0)
                    b = tl.load(b_at, mask=(k + inner < WIDTH)[:, None], other=0.0)
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            logits = tl.dot(a, b, logits, input_precision="ieee")
        z = tl.where(columns[None, :] < vocabulary, logits * inverse_temperature, FLOOR)
        higher = tl.maximum(highest, tl.max(z, axis=1))
        rescale = tl.exp(highest - higher)
        below = z - higher[:, None]
        share = tl.exp(below)
        spread = rescale * (spread + mass * (highest - higher)) + tl.sum(share * below, axis=1)
        mass = rescale * mass + tl.sum(share, axis=1)
        highest = higher
        hit = columns[None, :] == target[:, None]
        chosen = tl.maximum(chosen, tl.max(tl.where(hit, z, -float("inf")), axis=1))
    at = rows.to(tl.int64) * spans + span
    field_stride = tokens.to(tl.int64) * spans
    tl.store(partial + at, highest, mask=rows < tokens)
    tl.store(partial + field_stride + at, mass, mask=rows < tokens)
    tl.store(partial + 2 * field_stride + at, spread, mask=rows < tokens)
    tl.store(partial + 3 * field_stride + at, chosen, mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _finish_kernel(partial, out, tokens, spans, LANES: tl.constexpr):
    """A token's spans together, as a tree of fixed shape, to `out[3, tokens]`: log-probability, entropy, log mass."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    mask = lanes < spans
    at = row * spans + lanes
    field_stride = tokens.to(tl.int64) * spans
    highest = tl.load(partial + at, mask=mask, other=FLOOR)
    mass = tl.load(partial + field_stride + at, mask=mask, other=0.0)
    spread = tl.load(partial + 2 * field_stride + at, mask=mask, other=0.0)
    chosen = tl.max(tl.load(partial + 3 * field_stride + at, mask=mask, other=-float("inf")), axis=0)
    top = tl.max(highest, axis=0)
    rescale = tl.exp(highest - top)
    total = tl.sum(rescale * mass, axis=0)
    total_spread = tl.sum(rescale * (spread + mass * (highest - top)), axis=0)
    log_total = tl.log(total)
    tl.store(out + row, (chosen - top) - log_total)
    tl.store(out + tokens + row, log_total - total_spread / total)
    tl.store(out + 2 * tokens.to(tl.int64) + row, top + log_total)


@triton.jit
def _gradient_kernel(
    logits,
    row_stride,
    targets,
    log_masses,
    entropies,
    logprob_slopes,
    entropy_slopes,
    out,
    out_stride,
    vocabulary,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Program (row, block): the gradient in the logits, rounded to the type of `out`.

    d log p_t / dz_k = [k = t] - p_k,    dH / dz_k = -p_k (log p_k + H),    both by 1/temperature
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocabulary
    z = tl.load(logits + row * row_stride + columns, mask=mask, other=0.0) * inverse_temperature
    log_p = z - tl.load(log_masses + row)
    p = tl.exp(log_p)
    to_logprob, to_entropy = tl.load(logprob_slopes + row), tl.load(entropy_slopes + row)
    hit = columns == tl.load(targets + row).to(tl.int32)
    gradient = tl.where(hit, to_logprob, 0.0) - p * (to_logprob + to_entropy * (log_p + tl.load(entropies + row)))
    gradient = gradient * inverse_temperature
    tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=mask)


def logprob(hidden_NH: Tensor, head_VH: Tensor, tokens_N: Tensor, inverse_temperature: float) -> Tensor:
    """Log-probability, entropy and log of the softmax's denominator, `[3, N]`, fp32."""
    (tokens, width), vocabulary = hidden_NH.shape, len(head_VH)
    out_3N = torch.empty(3, tokens, dtype=torch.float32, device=hidden_NH.device)
    if not tokens:
        return out_3N
    shape = blocks(hidden_NH.dtype, width)
    span = min(SPAN, triton.cdiv(vocabulary, shape.vocabulary) * shape.vocabulary)
    spans = triton.cdiv(vocabulary, span)
    partial = out_3N.new_empty(4, tokens, spans)
    hidden, head, described = _operands(hidden_NH, head_VH, shape)
    _logprob_kernel[(triton.cdiv(tokens, shape.tokens) * spans,)](
        *(hidden, head, tokens_N, partial, tokens, vocabulary, spans, inverse_temperature),
        WIDTH=width,
        SPAN=span,
        GROUP=GROUP,
        BLOCK_N=shape.tokens,
        BLOCK_V=shape.vocabulary,
        BLOCK_K=shape.inner,
        DESCRIBED=described,
        WIDEN=INTERPRETED,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    lanes = triton.next_power_of_2(spans)
    _finish_kernel[(tokens,)](partial, out_3N, tokens, spans, LANES=lanes, num_warps=1)
    return out_3N


def _operands(hidden_NH: Tensor, head_VH: Tensor, shape: Blocks) -> tuple[Any, Any, bool]:
    """As descriptors for Hopper's tensor copy engine where it takes them (rows of 16 bytes); the width decides."""
    hidden_NH, head_VH = (one if one.data_ptr() % 16 == 0 else one.clone() for one in (hidden_NH, head_VH))
    if hidden_NH.element_size() != 2 or hidden_NH.shape[1] % 8:
        return hidden_NH, head_VH, False
    hidden = TensorDescriptor.from_tensor(hidden_NH, [shape.tokens, shape.inner])
    return hidden, TensorDescriptor.from_tensor(head_VH, [shape.vocabulary, shape.inner]), True


def logprob_gradient(
    logits_NV: Tensor,
    tokens_N: Tensor,
    log_mass_N: Tensor,
    entropy_N: Tensor,
    slopes_2N: Tensor,
    inverse_temperature: float,
    out_NV: Tensor,
) -> None:
    """The gradient in a tile's logits, given the slopes of the loss in the log-probability and in the entropy."""
    rows, vocabulary = logits_NV.shape
    _gradient_kernel[(rows, triton.cdiv(vocabulary, GRADIENT_BLOCK))](
        *(logits_NV, logits_NV.stride(0), tokens_N, log_mass_N, entropy_N, *slopes_2N),
        *(out_NV, out_NV.stride(0), vocabulary, inverse_temperature),
        BLOCK=GRADIENT_BLOCK,
        num_warps=8,
    )
