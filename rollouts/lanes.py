"""The weights of the workers: published to a lane, held for those that start later, and compared on arrival."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import RunFailed
from posttrain.files import atomic_write
from rollouts.fleet import Fleet, Slot, Weights
from rollouts.publishing import PublishedWeights, WeightStore
from rollouts.scheduler import Lane, in_lane
from rollouts.weights import WeightUpdate, combined_checksum
from rollouts.worker import LoadReport

if TYPE_CHECKING:
    from ray.actor import ActorHandle


@dataclass(frozen=True)
class CheckpointWeights:
    """Weights that each worker reads from disk itself."""

    path: str
    version: int

    def load_on(self, worker: ActorHandle) -> Any:
        """See `Weights`."""
        return worker.load_checkpoint.remote(self.path, self.version)


@dataclass(frozen=True)
class StoredWeights:
    """Weights that were published."""

    published: PublishedWeights

    @property
    def version(self) -> int:
        """See `Weights`."""
        return self.published.version

    def load_on(self, worker: ActorHandle) -> Any:
        """See `Weights`."""
        return worker.publish.remote(self.published)


@dataclass(eq=False)
class _LaneState:
    store: WeightStore
    weights: Weights | None = None
    order: int = 0
    """Publications are counted over all lanes: the latest that covers a worker is the worker's. 0: none yet."""


class LaneWeights:
    """The weights of all lanes.

    Args:
        directory: For weights that do not fit into memory, and the names of checkpoints.
        up: Called with the index of a worker that has weights now.
        until: Waits for a condition on the fleet.
    """

    def __init__(
        self,
        fleet: Fleet,
        directory: Path,
        up: Callable[[int], None],
        until: Callable[[Callable[[], bool]], Awaitable[Any]],
    ) -> None:
        self._fleet = fleet
        self._directory = directory
        self._records = directory / "checkpoints.json"
        self._up = up
        self._until = until
        self._lanes: dict[Lane, _LaneState] = {}
        self._publications = 0

    def of_worker(self, worker: int) -> Weights | None:
        """What a worker has to have."""
        own = [state for lane, state in self._lanes.items() if in_lane(worker, lane) and state.order]
        return max(own, key=lambda state: state.order).weights if own else None

    def version(self, lane: Lane) -> int | None:
        """The newest version that workers of a lane have to have; None before the first."""
        own = [self.of_worker(slot.index) for slot in self._fleet.lane(lane)]
        return max((weights.version for weights in own if weights is not None), default=None)

    def checksums(self, lane: Lane) -> dict[str, str]:
        """Of the weights that were published last in a lane: tensors that have them need not be sent."""
        return dict(self._state(lane).store.checksums)

    async def publish(self, lane: Lane, update: WeightUpdate) -> None:
        """See `RolloutService.publish`."""
        self._require_growth(lane, update.version)
        published = await asyncio.to_thread(self._state(lane).store.put, update)
        await self._load(lane, StoredWeights(published), combined_checksum(published.checksums))

    async def load_checkpoint(self, lane: Lane, path: str, version: int) -> None:
        """See `RolloutService.load_checkpoint`."""
        self._require_growth(lane, version)
        await self._load(lane, CheckpointWeights(path, version), None)

    async def _load(self, lane: Lane, weights: Weights, checksum: str | None) -> None:
        state = self._state(lane)
        before = {slot.index: self.of_worker(slot.index) for slot in self._fleet.lane(lane)}
        own_before = state.weights, state.order
        self._publications += 1
        state.weights, state.order = weights, self._publications
        try:
            slots = [slot for slot in self._fleet.lane(lane) if slot.ready.is_set()]
            reports = await asyncio.gather(*(self._fleet.load(slot, weights) for slot in slots), return_exceptions=True)
            for slot, report in zip(slots, reports, strict=True):
                if isinstance(report, BaseException):
                    raise report
                if report is not None:
                    _require_agreement(slot, report, weights.version, checksum)
                    self._up(slot.index)
            # One that died meanwhile will have them before its first token; one at least has to serve.
            await self._until(lambda: any(slot.version == weights.version for slot in self._fleet.lane(lane)))
        except Exception:
            # What engines refused must not be given to those that start: either all still have what they had, or
            # the lane has nothing.
            kept = all(had is not None and self._fleet.slots[at].version == had.version for at, had in before.items())
            state.weights, state.order = own_before if kept else (None, state.order)
            if isinstance(weights, StoredWeights):
                state.store = self._new_store(lane)
            raise
        finally:
            self._record()
        self._drop_covered(lane)

    def restore(self) -> None:
        """After the service's death: what was loaded from checkpoints. What was published is the clients' to bring."""
        if not self._records.exists():
            return
        for lane, path, version in json.loads(self._records.read_text()):
            self._publications += 1
            state = self._state((lane[0], lane[1]))
            state.weights = None if path is None else CheckpointWeights(path, version)
            state.order = self._publications

    def _record(self) -> None:
        states = sorted(self._lanes.items(), key=lambda item: item[1].order)
        found: list[tuple[Lane, str | None, int | None]] = []
        for lane, state in states:
            if isinstance(state.weights, CheckpointWeights):
                found.append((lane, state.weights.path, state.weights.version))
            elif state.order:
                found.append((lane, None, None))
        atomic_write(self._records, json.dumps(found))

    def _drop_covered(self, lane: Lane) -> None:
        """Forget the weights of lanes all of whose workers have newer ones."""
        for other in list(self._lanes):
            inside = other[1] % lane[1] == 0 and in_lane(other[0], lane)
            if other != lane and inside:
                del self._lanes[other]

    def _state(self, lane: Lane) -> _LaneState:
        if lane not in self._lanes:
            self._lanes[lane] = _LaneState(self._new_store(lane))
        return self._lanes[lane]

    def _new_store(self, lane: Lane) -> WeightStore:
        return WeightStore(self._directory / f"{lane[0]}-of-{lane[1]}")

    def _require_growth(self, lane: Lane, version: int) -> None:
        newest = self.version(lane)
        if newest is not None and version <= newest:
            raise RunFailed(f"weights of version {version} after version {newest}: versions must grow")


def _require_agreement(slot: Slot, report: LoadReport, version: int, checksum: str | None) -> None:
    if report.version != version or (checksum is not None and report.checksum != checksum):
        raise RunFailed(
            f"rollout worker {slot.index} reports weights of version {report.version} with checksum {report.checksum}; "
            f"version {version} with checksum {checksum} was sent"
        )
