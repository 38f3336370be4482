"""The k largest of a row, exactly, on the GPU: a search for the k-th largest number, bit by bit.

One program for each row. Floats become int32 keys of the same order; 32 counts of the keys that reach a trial value
find the k-th largest one, and one more pass puts down the entries above it and the first of those equal to it, from
left to right. There is nothing to round and nothing to sort, so tiles may suit the length of the row.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RESIDENT = 32768
"""Longest row that a program keeps in registers while it searches (64 for each of 512 threads)."""

STREAMED = 8192
"""Entries at once of a longer row, which is read again for each bit."""

SCAN = 2048
"""Entries that are put down at once."""


@triton.jit
def ordered_keys(scores, entries, length):
    """int32 keys in the order of the scores: -0 equal to 0, NaN above all, less than any where there is no entry."""
    lowest = -2147483648
    values = tl.load(scores + entries, mask=entries < length, other=0.0)
    bits = values.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = tl.where(values == 0.0, 0, keys)
    keys = tl.where(values != values, 0x7FFFFFFF, keys)
    return tl.where(entries < length, keys, lowest)


@triton.jit
def count_reaching(scores, resident_B, trial, length, BLOCK: tl.constexpr, RESIDENT: tl.constexpr):
    """How many keys of the row are at least `trial`."""
    if RESIDENT:
        reached = tl.sum((resident_B >= trial).to(tl.int32), 0)
    else:
        counts_B = tl.zeros([BLOCK], tl.int32)
        for start in range(0, length, BLOCK):
            keys_B = ordered_keys(scores, start + tl.arange(0, BLOCK), length)
            counts_B += (keys_B >= trial).to(tl.int32)
        reached = tl.sum(counts_B, 0)
    return reached


@triton.jit(do_not_specialize=["length", "stride", "first"])
def select_kernel(
    scores,
    count,
    out,
    length,
    stride,
    first,
    k: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    SCAN: tl.constexpr,
):
    """`out[row, :k]`: the entries of the k largest of the row's first `count[first + row]` scores, rising; then -1."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    out += row * k
    lane = tl.arange(0, SCAN)
    if COUNTED:
        length = tl.load(count + first + row).to(tl.int32)
    if length <= k:
        for start in range(0, k, SCAN):
            entries = start + lane
            tl.store(out + entries, tl.where(entries < length, entries, -1).to(tl.int64), mask=entries < k)
    else:
        resident_B = tl.zeros([BLOCK], tl.int32)
        if RESIDENT:
            resident_B = ordered_keys(scores, tl.arange(0, BLOCK), length)
        # The sign first, then bit after bit: the largest number that k keys reach is the k-th largest key.
        reached = count_reaching(scores, resident_B, 0, length, BLOCK, RESIDENT)
        kth = tl.where(reached >= k, 0, -2147483648)
        bit = tl.full((), 1 << 30, tl.int32)
        for _ in range(31):
            reached = count_reaching(scores, resident_B, kth + bit, length, BLOCK, RESIDENT)
            kth = tl.where(reached >= k, kth + bit, kth)
            bit = bit >> 1
        # Of the entries equal to the k-th, so many as those above it leave room for. (Above the largest int: none.)
        above = count_reaching(scores, resident_B, kth + 1, length, BLOCK, RESIDENT)
        room = k - tl.where(kth == 0x7FFFFFFF, 0, above)
        larger_before = tl.full((), 0, tl.int32)
        equal_before = tl.full((), 0, tl.int32)
        for start in range(0, length, SCAN):
            entries = start + lane
            keys = ordered_keys(scores, entries, length)
            larger = (keys > kth).to(tl.int32)
            equal = (keys == kth).to(tl.int32)
            larger_rank = larger_before + tl.cumsum(larger, 0) - larger
            equal_rank = equal_before + tl.cumsum(equal, 0) - equal
            chosen = (keys > kth) | ((keys == kth) & (equal_rank < room))
            place = larger_rank + tl.minimum(equal_rank, room)
            tl.store(out + place, entries.to(tl.int64), mask=chosen)
            larger_before += tl.sum(larger, 0)
            equal_before += tl.sum(equal, 0)


def select(scores: Tensor, count_T: Tensor | None, first: int, chosen_RK: Tensor) -> None:
    """Writes into `chosen_RK`, int64 `[R, k]`, which of the row's scores are its k largest, in rising order, then -1.

    Args:
        scores: fp32, at least `R` rows; what lies past a row's count is not read.
        count_T: int64 numbers of scores, for the rows from `first` on; None: all columns.
    """
    rows, k = chosen_RK.shape
    columns = scores.shape[1]
    if rows == 0 or k == 0:
        return
    resident = columns <= RESIDENT
    block = max(256, triton.next_power_of_2(columns)) if resident else STREAMED
    select_kernel[(rows,)](
        *(scores, scores if count_T is None else count_T, chosen_RK, columns, scores.stride(0), first),
        k=k,
        COUNTED=count_T is not None,
        BLOCK=block,
        RESIDENT=resident,
        SCAN=min(SCAN, block),
        num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
    )


def topk_stable(scores: Tensor, k: int) -> Tensor:
    """See the op: what is selected, then put into descending order by a stable sort of k numbers."""
    k = min(k, scores.shape[-1])
    rows = scores.float().reshape(-1, scores.shape[-1]).contiguous() if k else scores.new_empty(0, 1)
    chosen_RK = torch.empty(len(rows), k, dtype=torch.int64, device=scores.device)
    select(rows, None, 0, chosen_RK)
    order = rows.gather(1, chosen_RK).sort(dim=1, descending=True, stable=True).indices
    return chosen_RK.gather(1, order).view(*scores.shape[:-1], k)
