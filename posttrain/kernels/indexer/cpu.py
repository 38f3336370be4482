"""`index_scores` and `index_topk` on the CPU: only candidates that exist are read."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import fill, fma, get, get_integer, load, put, put_integer, store, total

F = np.float32


@compiled
def _dot(a: int, at_a: int, b: int, at_b: int, dim: int) -> Any:
    sums = fill(F(0))
    for d in range(0, dim, 16):
        sums = fma(load(a, at_a + d, dim - d), load(b, at_b + d, dim - d), sums)
    return total(sums)


@compiled
def _score(q: int, weights: int, first: int, heads: int, dim: int, keys: int, at: int) -> Any:
    """Of the key at `at` for the token whose first head is `first`."""
    score = F(0)
    for head in range(first, first + heads):
        product = _dot(q, head * dim, keys, at, dim)
        if not product <= 0:
            score += get(weights, head) * product
    return score


@compiled
def forward(
    q: int, weights: int, tokens: int, heads: int, dim: int, keys: int, stride: int, size: int, candidates: int,
    columns: int, out: int,
) -> None:  # fmt: skip
    """`q[T, H, dim]`, `weights[T, H]` and `size` keys that stand `stride` apart to scores `[T, E]`."""
    for t in range(tokens):
        for e in range(columns):
            row = get_integer(candidates, t * columns + e)
            score = F(-np.inf)
            if row >= 0:
                if row >= size:
                    raise IndexError("index_scores: a candidate names a row that the keys do not have")
                score = _score(q, weights, t * heads, heads, dim, keys, row * stride)
            put(out, t * columns + e, score)


@compiled
def _comes_after(score: Any, number: int, other: Any, others_number: int) -> bool:
    """Whether an entry comes after another: the highest score is first, NaN before all, of equal ones the earlier."""
    if np.isnan(score) != np.isnan(other):
        return bool(np.isnan(other))
    return bool(score < other or (not score > other and number > others_number))


@compiled
def _keep(best: Any, numbers: Any, held: int, limit: int, score: Any, number: int) -> int:
    """Take an entry into the heap of the first `limit`, whose top is the last of them. Returns how many it holds."""
    if held < limit:
        place = held
        while place > 0:
            above = (place - 1) // 2
            if not _comes_after(score, number, best[above], numbers[above]):
                break
            best[place], numbers[place] = best[above], numbers[above]
            place = above
        best[place], numbers[place] = score, number
        return held + 1
    if not _comes_after(best[0], numbers[0], score, number):
        return held
    place = 0
    while 2 * place + 1 < held:
        below = 2 * place + 1
        if below + 1 < held and _comes_after(best[below + 1], numbers[below + 1], best[below], numbers[below]):
            below += 1
        if not _comes_after(best[below], numbers[below], score, number):
            break
        best[place], numbers[place] = best[below], numbers[below]
        place = below
    best[place], numbers[place] = score, number
    return held


@compiled
def choose(
    q: int, weights: int, tokens: int, heads: int, dim: int, keys: int, stride: int, size: int, count: int,
    sequence: int, pages: int, pages_each: int, page_size: int, k: int, out: int,
) -> None:  # fmt: skip
    """Numbers of the `k` best of each token's `count[T]` entries to `out[T, k]`, rising, then -1.

    Entry `e` is row `pages[sequence[t], e // page_size] + e % page_size` of the keys.
    """
    best, numbers = np.empty(k, np.float32), np.empty(k, np.int64)
    taken = np.zeros(pages_each * page_size, np.bool_)
    for t in range(tokens):
        held, entries, first_page = 0, get_integer(count, t), get_integer(sequence, t) * pages_each
        if entries > len(taken):
            raise IndexError("index_topk: a count goes beyond the pages of its sequence")
        for e in range(entries if entries > k else 0):
            row = get_integer(pages, first_page + e // page_size) + e % page_size
            if not 0 <= row < size:
                raise IndexError("index_topk: a candidate names a row that the keys do not have")
            score = _score(q, weights, t * heads, heads, dim, keys, row * stride)
            held = _keep(best, numbers, held, k, score, e)
        taken[:entries] = entries <= k
        for place in range(held):
            taken[numbers[place]] = True
        place = 0
        for e in range(entries):
            if taken[e]:
                put_integer(out, t * k + place, e)
                place += 1
        for missing in range(place, k):
            put_integer(out, t * k + missing, -1)


@compiled
def backward(
    q: int, weights: int, tokens: int, heads: int, dim: int, keys: int, stride: int, candidates: int, columns: int,
    gradient: int, dq: int, dweights: int, dkeys: int,
) -> None:  # fmt: skip
    """Adds to all three gradients, token after token."""
    for t in range(tokens):
        for e in range(columns):
            row, slope = get_integer(candidates, t * columns + e), get(gradient, t * columns + e)
            if row < 0:
                continue
            for h in range(heads):
                head = t * heads + h
                at = head * dim
                product = _dot(q, at, keys, row * stride, dim)
                if product <= 0:
                    continue
                put(dweights, head, get(dweights, head) + slope * product)
                factor = slope * get(weights, head)
                for d in range(0, dim, 16):
                    key, query = load(keys, row * stride + d, dim - d), load(q, at + d, dim - d)
                    store(dq, at + d, fma(factor, key, load(dq, at + d, dim - d)), dim - d)
                    store(dkeys, row * dim + d, fma(factor, query, load(dkeys, row * dim + d, dim - d)), dim - d)
