"""The rollout log: every sampled token is here before anyone learns from it, and survives the death of anything.

A worker writes (`LogWriter`), whoever comes after a death reads (`recover`), the driver forgets what was consumed
(`LogKeeper`). The format is described in `format.py`, the rules of recovery in `reader.py`.
"""

from rollouts.log.compaction import Compaction, LogKeeper
from rollouts.log.format import next_incarnation
from rollouts.log.reader import Damage, Recovered, RecoveredRequest, recover
from rollouts.log.writer import LogWriter

__all__ = [
    "Compaction",
    "Damage",
    "LogKeeper",
    "LogWriter",
    "Recovered",
    "RecoveredRequest",
    "next_incarnation",
    "recover",
]
