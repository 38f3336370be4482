"""Random numbers that depend on a request and a position, and on nothing that happened before.

A stateful generator makes a sampled token depend on how many numbers were drawn before it: a request that
continues from the write-ahead log after its engine died would have to draw them all again. Here every number is a
hash of a counter (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key   = hash(seed of the request, index of the token in its sequence, prompt included)
    noise = Gumbel(hash(key, token id))                      one number for each token of the vocabulary
    token = argmax(logits + noise)                           a sample of softmax(logits), exactly

The index counts from the start of the prompt, so a request that is submitted again as prompt + tokens so far needs
nothing but its seed. The hash is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): `key` is the state, the token's number the step. The noise is computed in float64 from 52 bits, because
with float32's 24 bits no token below a probability of about 1e-7 has its right share.
"""

from __future__ import annotations

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB

ROW_CHUNK_ELEMENTS = 1 << 16
"""Rows are drawn in chunks of so many elements: that bounds the float64 copies, and they stay in the cache."""


def position_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The key of each row's next token.

    Args:
        seeds: [B] seeds of the requests, integers below 2**64.
        positions: [B] index of the token to be drawn in its sequence, prompt included.

    Returns:
        [B] int64 (all 64 bits are in use).
    """
    with np.errstate(over="ignore"):
        stream = _mix(seeds.astype(np.uint64) + np.uint64(GOLDEN))
        return _mix(stream ^ _mix(positions.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(1))).view(np.int64)


def draw(logits_BV: torch.Tensor, keys_B: torch.Tensor) -> torch.Tensor:
    """Sample one token for each row from softmax(logits); a row depends on its logits and its key alone.

    Args:
        logits_BV: Any floating type; `-inf` is never drawn. Not changed.
        keys_B: int64, from `position_keys`, on the same device.

    Returns:
        [B] int64 token ids.
    """
    if logits_BV.is_cuda:
        from rollouts.randomness_triton import draw_triton

        return draw_triton(logits_BV, keys_B)
    return draw_torch(logits_BV, keys_B)


def draw_torch(logits_BV: torch.Tensor, keys_B: torch.Tensor) -> torch.Tensor:
    """`draw` on any device, in chunks of rows."""
    vocabulary = logits_BV.shape[1]
    steps_V = torch.arange(1, vocabulary + 1, device=logits_BV.device) * _signed(GOLDEN)
    rows = max(1, ROW_CHUNK_ELEMENTS // vocabulary)
    chunks = zip(logits_BV.split(rows), keys_B.split(rows), strict=True)
    return torch.cat([(gumbel_noise(keys, steps_V).add_(logits)).argmax(1) for logits, keys in chunks])


def gumbel_noise(keys_B: torch.Tensor, steps_V: torch.Tensor) -> torch.Tensor:
    """[B, V] float64 of independent standard Gumbel numbers; `steps_V`: (token id + 1) * GOLDEN, modulo 2**64."""
    bits = keys_B.unsqueeze(1) + steps_V
    for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR)):
        bits.bitwise_xor_(_shift_right(bits, shift)).mul_(_signed(factor))
    bits.bitwise_xor_(_shift_right(bits, 31))
    uniform = _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's output function."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(FIRST_FACTOR)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(SECOND_FACTOR)
    return bits ^ (bits >> np.uint64(31))


def _shift_right(bits: torch.Tensor, shift: int) -> torch.Tensor:
    """Without the sign: PyTorch has no such shift for int64."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as a signed number: PyTorch's int64 arithmetic wraps."""
    return value - (1 << 64) if value >= 1 << 63 else value
