"""Runs Python that nobody has read: isolated, limited, watched (docs/sandbox.md)."""

from __future__ import annotations

from functools import lru_cache

from rewards.sandbox.grading import Case, Verdict, compare, examine
from rewards.sandbox.jail.plan import Report
from rewards.sandbox.launch import (
    Execution,
    Limits,
    NotIsolated,
    Outcome,
    Protections,
    SandboxError,
    run,
    run_together,
)

__all__ = [
    "Case",
    "Execution",
    "Limits",
    "NotIsolated",
    "Outcome",
    "Protections",
    "SandboxError",
    "Verdict",
    "compare",
    "examine",
    "protections",
    "run",
    "run_together",
    "uncovered",
]


@lru_cache(maxsize=1)
def protections() -> Protections:
    """What would stand between a program and this machine, found out by running one that does nothing.

    Raises:
        SandboxError: no program can be run.
    """
    return run("", isolated=False).protections


def uncovered() -> list[str]:
    """What a program could reach on this machine in spite of all protections; nothing if it is isolated.

    Raises:
        SandboxError: no program can be run.
    """
    found = protections()
    return Report(dict(found.active)).uncovered()
