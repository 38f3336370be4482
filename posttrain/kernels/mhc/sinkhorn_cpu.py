"""The loops of `sinkhorn`, compiled. Lanes are tokens, so a token's arithmetic is the same whoever stands beside it."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

LANES = 16


@numba.njit(cache=True, nogil=True)
def _normalise(a: Any, n: int, rows: bool, eps: Any, totals: Any) -> None:
    """Divide `a[n·n, LANES]` by its row or column sums (+ eps), keeping the sums."""
    for group in range(n):
        for lane in range(LANES):
            totals[group, lane] = eps
        for member in range(n):
            index = group * n + member if rows else member * n + group
            for lane in range(LANES):
                totals[group, lane] += a[index, lane]
        for member in range(n):
            index = group * n + member if rows else member * n + group
            for lane in range(LANES):
                a[index, lane] /= totals[group, lane]


@numba.njit(cache=True, nogil=True)
def forward(matrix: Any, out: Any, n: int, iterations: int, eps: Any) -> None:
    size = n * n
    a = np.empty((size, LANES), np.float32)
    totals = np.empty((n, LANES), np.float32)
    for start in range(0, matrix.shape[0], LANES):
        width = min(LANES, matrix.shape[0] - start)
        a[:] = np.float32(1)
        for lane in range(width):
            for i in range(size):
                a[i, lane] = matrix[start + lane, i]
        _normalise(a, n, False, eps, totals)
        for _ in range(iterations - 1):
            _normalise(a, n, True, eps, totals)
            _normalise(a, n, False, eps, totals)
        for lane in range(width):
            for i in range(size):
                out[start + lane, i] = a[i, lane]


@numba.njit(cache=True, nogil=True)
def backward(matrix: Any, gradient: Any, out: Any, n: int, iterations: int, eps: Any) -> None:
    """Recomputes every stage of a chunk of tokens, then walks back: dx = (dy - sum(dy · y)) / total."""
    size, stages = n * n, 2 * iterations - 1
    values = np.empty((stages + 1, size, LANES), np.float32)
    totals = np.empty((stages, n, LANES), np.float32)
    d = np.empty((size, LANES), np.float32)
    dot = np.empty(LANES, np.float32)
    for start in range(0, matrix.shape[0], LANES):
        width = min(LANES, matrix.shape[0] - start)
        values[0] = np.float32(1)
        d[:] = np.float32(0)
        for lane in range(width):
            for i in range(size):
                values[0, i, lane] = matrix[start + lane, i]
                d[i, lane] = gradient[start + lane, i]
        for stage in range(stages):
            values[stage + 1] = values[stage]
            _normalise(values[stage + 1], n, stage % 2 == 1, eps, totals[stage])
        for stage in range(stages - 1, -1, -1):
            rows = stage % 2 == 1
            for group in range(n):
                dot[:] = np.float32(0)
                for member in range(n):
                    index = group * n + member if rows else member * n + group
                    for lane in range(LANES):
                        dot[lane] += d[index, lane] * values[stage + 1, index, lane]
                for member in range(n):
                    index = group * n + member if rows else member * n + group
                    for lane in range(LANES):
                        d[index, lane] = (d[index, lane] - dot[lane]) / totals[stage, group, lane]
        for lane in range(width):
            for i in range(size):
                out[start + lane, i] = d[i, lane]
