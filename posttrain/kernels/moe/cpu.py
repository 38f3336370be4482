"""Routing, and the parts of the experts between their matrix products, on the CPU.

A slot is one of a token's `K` choices. Slots are laid out by expert, each expert's rows padded with zeros to the number
from which on the BLAS library treats all rows alike (see `posttrain.kernels.linear`). Tensors come as addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import (
    choose,
    exp,
    fill,
    fma,
    get,
    get_integer,
    load,
    put,
    put_integer,
    store,
    total,
)  # fmt: skip

F = np.float32


@compiled
def _choose(scores: int, bias: int, at: int, experts: int, chosen: int, first: int, k: int) -> None:
    """The `k` largest of `scores[at...] + bias`, the largest first; of equal ones the first."""
    for slot in range(k):
        best, top = -1, F(0)
        for expert in range(experts):
            value = get(scores, at + expert) + get(bias, expert)
            taken = False
            for before in range(slot):
                taken = taken or get_integer(chosen, first + before) == expert
            if not taken and (best < 0 or value > top):
                best, top = expert, value
        put_integer(chosen, first + slot, best)


@compiled
def route(
    logits: int, bias: int, tokens: int, experts: int, k: int, scaling: Any, scores: int, chosen: int, weights: int
) -> None:
    """`scores[T, E] = sqrt(softplus(logits))`, and `weights[T, k]` of the chosen; with a bias it chooses them, too."""
    for place in range(tokens * experts):
        x = get(logits, place)
        put(scores, place, np.sqrt(max(x, F(0)) + np.log1p(np.exp(-abs(x)))))
    for t in range(tokens):
        if bias != 0:
            _choose(scores, bias, t * experts, experts, chosen, t * k, k)
        norm = F(1e-20)
        for slot in range(t * k, (t + 1) * k):
            norm += get(scores, t * experts + get_integer(chosen, slot))
        for slot in range(t * k, (t + 1) * k):
            put(weights, slot, get(scores, t * experts + get_integer(chosen, slot)) / norm * F(scaling))


@compiled
def route_gradient(
    logits: int, scores: int, chosen: int, tokens: int, experts: int, k: int, scaling: Any, dweights: int, dlogits: int
) -> None:
    """Adds to `dlogits[T, E]`, which start as zeros."""
    for t in range(tokens):
        norm, inner = F(1e-20), F(0)
        for slot in range(t * k, (t + 1) * k):
            score = get(scores, t * experts + get_integer(chosen, slot))
            norm += score
            inner += get(dweights, slot) * score
        for slot in range(t * k, (t + 1) * k):
            place = t * experts + get_integer(chosen, slot)
            score, x = get(scores, place), get(logits, place)
            if score > 0:
                dscore = F(scaling) / norm * (get(dweights, slot) - inner / norm)
                put(dlogits, place, get(dlogits, place) + dscore / (F(1) + np.exp(-x)) / (F(2) * score))


@compiled
def group(chosen: int, slots: int, experts: int, least: int, starts: int, places: int) -> None:
    """First row of each expert in `starts[E + 1]`, and the end of the last; the row of each slot, in slots' order."""
    counts = np.zeros(experts, np.int64)
    for slot in range(slots):
        expert = get_integer(chosen, slot)
        if not 0 <= expert < experts:
            raise IndexError("moe_experts: an expert number is out of range")
        counts[expert] += 1
    following = np.zeros(experts, np.int64)
    row = 0
    for expert in range(experts):
        following[expert] = row
        put_integer(starts, expert, row)
        if counts[expert] > 0:
            row += max(counts[expert], least)
    put_integer(starts, experts, row)
    for slot in range(slots):
        expert = get_integer(chosen, slot)
        put_integer(places, slot, following[expert])
        following[expert] += 1


@compiled
def scatter(x: int, places: int, tokens: int, slots: int, dim: int, weights: int, out: int, rows: int) -> None:
    """Token rows to their slots' rows, times the slots' weights if there are any (address 0: none); the rest are 0."""
    for d in range(0, rows * dim, 16):
        store(out, d, fill(F(0)), rows * dim - d)
    for slot in range(tokens * slots):
        source, target = slot // slots * dim, get_integer(places, slot) * dim
        weight = get(weights, slot) if weights != 0 else F(1)
        for d in range(0, dim, 16):
            store(out, target + d, weight * load(x, source + d, dim - d), dim - d)


@compiled
def combine(rows: int, places: int, tokens: int, slots: int, dim: int, weights: int, out: int) -> None:
    """Slots' rows added up by token, in the slots' order, times their weights if there are any."""
    for t in range(tokens):
        for d in range(0, dim, 16):
            sums = fill(F(0))
            for slot in range(t * slots, (t + 1) * slots):
                weight = get(weights, slot) if weights != 0 else F(1)
                sums = fma(weight, load(rows, get_integer(places, slot) * dim + d, dim - d), sums)
            store(out, t * dim + d, sums, dim - d)


@compiled
def weight_gradient(rows: int, places: int, tokens: int, slots: int, dim: int, gradient: int, dweights: int) -> None:
    """Product of each slot's row with its token's gradient."""
    for slot in range(tokens * slots):
        sums = fill(F(0))
        for d in range(0, dim, 16):
            row = load(rows, get_integer(places, slot) * dim + d, dim - d)
            sums = fma(row, load(gradient, slot // slots * dim + d, dim - d), sums)
        put(dweights, slot, total(sums))


@compiled
def swiglu(hidden: int, rows: int, inner: int, limit: Any, out: int) -> None:
    """`hidden[N, 2 · inner]`, gate before up, to `out[N, inner]`."""
    high, low = fill(F(limit)), fill(F(-limit))
    for row in range(rows):
        for d in range(0, inner, 16):
            gate = load(hidden, 2 * row * inner + d, inner - d)
            up = load(hidden, (2 * row + 1) * inner + d, inner - d)
            gate = choose(high, gate, high, gate)
            up = choose(high, up, high, choose(up, low, low, up))
            store(out, row * inner + d, gate / (F(1) + exp(F(0) - gate)) * up, inner - d)


@compiled
def swiglu_gradient(hidden: int, rows: int, inner: int, limit: Any, gradient: int, dhidden: int) -> None:
    """Gradient by `hidden`: nothing passes where a clamp has cut."""
    high, low, zero = fill(F(limit)), fill(F(-limit)), fill(F(0))
    for row in range(rows):
        for d in range(0, inner, 16):
            at = 2 * row * inner + d
            gate, up = load(hidden, at, inner - d), load(hidden, at + inner, inner - d)
            slope = load(gradient, row * inner + d, inner - d)
            cut_gate = choose(high, gate, high, gate)
            cut_up = choose(high, up, high, choose(up, low, low, up))
            sigmoid = F(1) / (F(1) + exp(F(0) - cut_gate))
            dgate = slope * cut_up * sigmoid * (F(1) + cut_gate * (F(1) - sigmoid))
            store(dhidden, at, choose(gate, high, dgate, zero), inner - d)
            dup = choose(low, up, slope * cut_gate * sigmoid, zero)
            store(dhidden, at + inner, choose(up, high, dup, zero), inner - d)
