"""Reasoning to show for sums of reasoning-gym's `chain_sum`, for `domains.<name>.modes.<mode>.reasoning`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.data.problems import Problem


def _steps(problem: Problem) -> Iterator[tuple[int, str, int, int]]:
    """Sum so far, sign, number, and sum with it, for every number from the second on."""
    first, *rest = problem.entry["metadata"]["expression"].split()
    total = int(first)
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        before, total = total, total + number if sign == "+" else total - number
        yield before, sign, number, total


def partial_sums(problem: Problem) -> str:
    """`4 - 1 - 7 + 7` → `3,-4,3`: the sum after each number from the second on."""
    return ",".join(str(total) for *_, total in _steps(problem))


def written_sums(problem: Problem) -> str:
    """`4 - 1 - 7 + 7` → `4-1=3,3-7=-4,-4+7=3`: every step in full."""
    return ",".join(f"{before}{sign}{number}={total}" for before, sign, number, total in _steps(problem))
