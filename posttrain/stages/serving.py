"""A checkpoint on the rollout workers, for everything that is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.stages.work import Work
    from rollouts.pool import RolloutClient


@dataclass
class Served:
    """A checkpoint that the rollout workers of a slot (None: all of them) load when they are first asked.

    Good until anything else loads or publishes weights there.
    """

    work: Work
    checkpoint: Path
    slot: int | None = None

    @cached_property
    def client(self) -> RolloutClient:
        """The workers, with the checkpoint's weights."""
        client = self.work.cluster.client(self.slot)
        client.load_checkpoint(self.checkpoint, (client.weight_version() or 0) + 1)
        return client
