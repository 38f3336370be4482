"""Reductions over candidate lists in blocks of a fixed size, so that padding cannot change a sum."""

from __future__ import annotations

from torch import Tensor

BLOCK = 16
"""Candidate lists (window and compressed entries of attention) are padded to a multiple of this."""


def round_up(length: int, multiple: int = BLOCK) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple


def block_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension (a multiple of `BLOCK`): inside blocks first, then block after block.

    Appending blocks of zeros leaves every bit of the result as it was.
    """
    blocks = values.unflatten(-1, (values.shape[-1] // BLOCK, BLOCK)).sum(-1)
    if blocks.shape[-1] == 0:
        return blocks.sum(-1)
    return blocks[..., 0] if blocks.shape[-1] == 1 else blocks.cumsum(-1)[..., -1]
