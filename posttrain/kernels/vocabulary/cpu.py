"""Log-probabilities from rows of logits on the CPU: every row on its own, in one order."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import exp, fill, fma, get, get_integer, keep, largest, load, put, total

F = np.float32


@compiled
def logprob(logits: int, rows: int, vocabulary: int, tokens: int, inverse_temperature: Any, out: int) -> None:
    """`out[3, rows]`: log-probability of `tokens[row]`, entropy, log of the denominator; from `logits[rows, V]`."""
    scale = F(inverse_temperature)
    for row in range(rows):
        at = row * vocabulary
        highest = F(-np.inf)
        for v in range(0, vocabulary, 16):
            values = keep(vocabulary - v, load(logits, at + v, vocabulary - v) * scale, F(-np.inf))
            highest = max(highest, largest(values))
        masses, spreads = fill(F(0)), fill(F(0))
        for v in range(0, vocabulary, 16):
            below = load(logits, at + v, vocabulary - v) * scale - highest
            mass = keep(vocabulary - v, exp(below), F(0))
            masses = masses + mass
            spreads = fma(mass, below, spreads)
        mass = total(masses)
        log_mass = highest + F(np.log(mass))
        put(out, row, get(logits, at + get_integer(tokens, row)) * scale - log_mass)
        put(out, rows + row, F(np.log(mass)) - total(spreads) / mass)
        put(out, 2 * rows + row, log_mass)
