"""Several domains in one stage: in equal parts, or in shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def share_of(domain: str, domains: Sequence[str], shares: Mapping[str, float], count: int) -> int:
    """How many of `count` examples are a domain's, rounded up; a domain that is not named has the share 1."""
    return math.ceil(count * shares.get(domain, 1.0) / sum(shares.get(one, 1.0) for one in domains))


def in_turn(drawn: Mapping[str, Sequence[Item]], shares: Mapping[str, float], count: int) -> list[Item]:
    """`count` examples of all domains: every beginning of the list has them in their shares, as near as can be.

    Args:
        drawn: of each domain its examples, in order; what there is too little of comes again.
    """
    used = dict.fromkeys(drawn, 0)
    mixed: list[Item] = []
    for _ in range(count):
        # Sainte-Laguë's method; the first one listed where two are equal.
        domain = min(used, key=lambda name: (used[name] + 0.5) / shares.get(name, 1.0))
        mixed.append(drawn[domain][used[domain] % len(drawn[domain])])
        used[domain] += 1
    return mixed
