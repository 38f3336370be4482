"""Reasoning for small sums, as `reasoning` of a mode: of two numbers by columns, of several by running totals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.data.problems import Problem


def _columns(problem: Problem) -> Iterator[tuple[str, str, int, int]]:
    """From the units on: the digits of both numbers, the carry, and their sum."""
    first, second = problem.entry["metadata"]["expression"].split(" + ")
    width, carry = max(len(first), len(second)), 0
    for one, other in zip(reversed(first.zfill(width)), reversed(second.zfill(width)), strict=True):
        total = int(one) + int(other) + carry
        yield one, other, carry, total
        carry = total // 10


def column_sums(problem: Problem) -> str:
    """`769 + 643` → `12,11,14`: what each column comes to, with the carry."""
    return ",".join(str(total) for *_, total in _columns(problem))


def written_sums(problem: Problem) -> str:
    """`769 + 643` → `9+3+0=12,6+4+1=11,7+6+1=14`: every column in full, the carry last."""
    return ",".join(f"{one}+{other}+{carry}={total}" for one, other, carry, total in _columns(problem))


def _totals(problem: Problem) -> Iterator[tuple[int, str, int, int]]:
    """Of a `chain_sum`, from the left: the total so far, the sign and the number that follow, and the new total."""
    first, *rest = problem.entry["metadata"]["expression"].split(" ")
    total = int(first)
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        new = total + number if sign == "+" else total - number
        yield total, sign, number, new
        total = new


def running_totals(problem: Problem) -> str:
    """`3 + 5 - 2 + 8` → `8,6,14`."""
    return ",".join(str(new) for *_, new in _totals(problem))


def written_totals(problem: Problem) -> str:
    """`3 + 5 - 2 + 8` → `3+5=8,8-2=6,6+8=14`."""
    return ",".join(f"{total}{sign}{number}={new}" for total, sign, number, new in _totals(problem))
