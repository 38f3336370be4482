"""Timing of contestants that take turns, so that whatever else the machine does strikes all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Contestant = Callable[[], object]

HOPELESS = 1.5
"""A contestant this many times slower than the fastest in a first round is timed no further."""


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def seconds(contestant: Contestant) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    contestant()
    return time.perf_counter() - begin


def take_turns(contestants: Mapping[str, Contestant], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, in order; each contestant runs once beforehand to warm up."""
    for contestant in contestants.values():
        contestant()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            found[name].append(seconds(contestant))
    return found


def without_hopeless(contestants: Mapping[str, Contestant]) -> dict[str, Contestant]:
    """Those that a first round does not rule out."""
    first = {name: times[0] for name, times in take_turns(contestants, 1).items()}
    return {name: contestants[name] for name in first if first[name] <= HOPELESS * min(first.values())}


def compare(ours: Contestant, theirs: Mapping[str, Contestant], repeats: int, units: int) -> dict[str, Any]:
    """Units per second of ours and of the fastest of theirs, and how many times faster ours is, turn by turn."""
    times = take_turns({"ours": ours} | without_hopeless(theirs), repeats)
    own = times.pop("ours")
    fastest = min(times, key=lambda name: statistics.median(times[name]))
    rates = {name: Spread.of([units / one for one in every]).as_dict() for name, every in times.items()}
    return {
        "ours": Spread.of([units / one for one in own]).as_dict(),
        "transformers": rates[fastest],
        "transformers_experts": fastest,
        "transformers_all": rates,
        "ratio": Spread.of([other / one for one, other in zip(own, times[fastest], strict=True)]).as_dict(),
    }
