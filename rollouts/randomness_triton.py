"""`rollouts.randomness.draw` on a GPU: hash, noise and argmax in one pass over the logits, without a copy of them."""

# Triton's parameters have no types that mypy knows.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollouts.randomness import FIRST_FACTOR, GOLDEN, SECOND_FACTOR

BLOCK = 4096

GOLDEN_CONSTANT = tl.constexpr(GOLDEN)
FIRST_CONSTANT = tl.constexpr(FIRST_FACTOR)
SECOND_CONSTANT = tl.constexpr(SECOND_FACTOR)


def draw_triton(logits_BV: torch.Tensor, keys_B: torch.Tensor) -> torch.Tensor:
    """See `rollouts.randomness.draw`."""
    rows, vocabulary = logits_BV.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    best_BN = torch.empty(rows, blocks, dtype=torch.float64, device=logits_BV.device)
    token_BN = torch.empty(rows, blocks, dtype=torch.int64, device=logits_BV.device)
    if rows:
        draw_kernel[(rows, blocks)](
            logits_BV, keys_B, best_BN, token_BN, vocabulary, logits_BV.stride(0), logits_BV.stride(1), blocks, BLOCK
        )
    return token_BN.gather(1, best_BN.argmax(1, keepdim=True)).squeeze(1)


@triton.jit
def draw_kernel(
    logits_ptr, keys_ptr, best_ptr, token_ptr, vocabulary, row_stride, column_stride, blocks, BLOCK: tl.constexpr
):
    """One block of one row: its largest logit + noise, and which token that is."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    logits = tl.load(logits_ptr + row * row_stride + token * column_stride, mask=inside, other=float("-inf"))
    key = tl.load(keys_ptr + row).to(tl.uint64, bitcast=True)
    bits = key + (token + 1).to(tl.uint64) * GOLDEN_CONSTANT
    bits = (bits ^ (bits >> 30)) * FIRST_CONSTANT
    bits = (bits ^ (bits >> 27)) * SECOND_CONSTANT
    bits = bits ^ (bits >> 31)
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    score = logits.to(tl.float64) - tl.log(-tl.log(uniform))
    score = tl.where(inside, score, float("-inf"))
    best, index = tl.max(score, axis=0, return_indices=True)
    tl.store(best_ptr + row * blocks + block, best)
    tl.store(token_ptr + row * blocks + block, (block * BLOCK + index).to(tl.int64))
