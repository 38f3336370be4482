"""The part of a recipe that says what becomes of a run that is cut short, or hangs (docs/operations.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.recipe.section import Section

Phase = Literal[
    "loading", "learning", "sampling", "publishing", "rewarding", "distilling", "teaching", "saving", "silent"
]
"""What an actor can be doing. `silent`: the rollout service does not answer."""


class SnapshotConfig(Section):
    """What a stage that was cut short goes on from; without it such a stage starts again."""

    every: int = Field(ge=1)
    """Steps of a stage between two snapshots."""
    keep: int = Field(2, ge=1)
    """The newest of each stage stay until it is done: should one be damaged, the one before it is used."""


class WatchdogConfig(Section):
    """When an actor counts as stuck, and what is done then. Rollout workers are always replaced, after 300 s."""

    seconds: float = Field(1800.0, gt=0)
    """Without any progress."""
    phases: dict[Phase, Annotated[float, Field(gt=0)]] = {}
    """Other bounds for single phases."""
    action: Literal["wait", "replace", "stop"] = "wait"
    """`wait`: say so, once. `replace`: kill the actor; another one goes on from the last snapshot. `stop`: end the run,
    to be resumed."""

    def bound(self, phase: str) -> float:
        """Seconds without progress that are allowed in a phase."""
        return next((seconds for name, seconds in self.phases.items() if name == phase), self.seconds)
