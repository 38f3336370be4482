"""The workers of the rollout service: started, fed, polled, watched, and replaced when they die.

Each place (`Slot`) has a task of its own that keeps a worker in it. A worker that died, failed or got stuck is
replaced at once; where spare workers are kept (processes that have imported everything and built nothing), that takes
as long as it takes to build an engine and to load weights.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError

from posttrain.actors import describe_death
from posttrain.errors import BadInput, RunFailed
from posttrain.files import atomic_write
from posttrain.placement import ACTOR_CPUS, inside
from rollouts.log.format import next_incarnation
from rollouts.log.writer import LogFailed
from rollouts.scheduler import Lane, in_lane
from rollouts.settings import EngineInfo, EngineSettings, engine_environment
from rollouts.types import SampleRequest
from rollouts.worker import LoadReport, Report, RolloutWorker, WorkerStats, stacks_file

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

WORKER_CALLS = 8
"""Calls that a worker can answer at once, most of which wait for its engine's thread."""
POLL_SECONDS = 0.25
BARREN_LIVES = 8
"""So many workers in a row that died before they had a sample, in one place: then the service gives up."""
START_SECONDS = 1800.0
"""How long an engine may take to be built: large ones compile kernels meanwhile."""
DUMP_SECONDS = 5.0
"""How long a stuck worker has to say what it is doing."""
DEATH_SECONDS = 10.0
"""How long a killed process may take to be gone."""


class Weights(Protocol):
    """What a worker has to be given: a version, and how it gets it."""

    @property
    def version(self) -> int:
        """Its number."""

    def load_on(self, worker: ActorHandle) -> Any:
        """Ask a worker to load them; returns the reference to its `LoadReport`."""


@dataclass(eq=False)
class Prepared:
    """A worker process that has imported everything."""

    handle: ActorHandle
    pid: int
    node: str


@dataclass(eq=False)
class Slot:
    """A place for a worker, and the one that is in it."""

    index: int
    worker: Prepared | None = None
    incarnation: int = -1
    version: int | None = None
    """Of the weights in its engine; None while it cannot sample."""
    requests: list[SampleRequest] = field(default_factory=list)
    """To be sent."""
    cancelled: list[str] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Its engine is there; weights may be missing."""
    task: asyncio.Task[None] | None = None
    beat: Report | None = None

    @property
    def name(self) -> str:
        """In the log."""
        return f"worker{self.index}"


class Owner(Protocol):
    """Who the workers work for."""

    def weights_for(self, worker: int) -> Weights | None:
        """What a worker has to have before its first token."""

    def worker_up(self, worker: int) -> None:
        """It has its weights and waits for requests."""

    def worker_report(self, worker: int, report: Report) -> None:
        """What it said when it was polled."""

    def worker_forgot(self, worker: int, cancelled: Sequence[str]) -> None:
        """It has these samples no more."""

    def worker_lost(self, worker: int) -> bool:
        """It is gone, or about to be; whether it had samples."""

    async def worker_down(self, worker: int, writer: tuple[str, int], killed: bool) -> None:
        """It is gone, and nothing more comes into its log. `killed`: not because it was asked to go."""

    def failed(self, error: Exception) -> None:
        """Workers cannot be had any more."""


class Stuck(RunFailed):
    """A worker that makes no progress."""


@dataclass
class FleetStats:
    """Of all workers since the service started."""

    deaths: int = 0
    stuck: int = 0
    recovery_seconds: list[float] = field(default_factory=list)
    """From the moment a death was noticed to the replacement's being ready to sample; the latest hundred."""


class Fleet:
    """The workers. Everything runs in the event loop of the service."""

    def __init__(
        self,
        settings: EngineSettings,
        directory: Path,
        owner: Owner,
        gpus_per_worker: float,
        stuck_seconds: float,
        spares: int,
        room: tuple[PlacementGroup | None, int] = (None, 0),
    ) -> None:
        """`room`: a placement group, and how many of the first places have their workers in it."""
        self._settings = settings
        self._directory = directory
        self._owner = owner
        self._stuck_seconds = stuck_seconds
        self._actor = ray.remote(RolloutWorker)
        self._options = {
            "num_cpus": ACTOR_CPUS,
            "num_gpus": gpus_per_worker,
            "scheduling_strategy": "SPREAD",
            "max_restarts": 0,
            "max_concurrency": WORKER_CALLS,
            "runtime_env": {"env_vars": engine_environment(settings.threads, settings.kernels)},
        }
        self._room, self._rooms = room
        self._spare_count = spares
        self._spares: list[asyncio.Task[Prepared]] = []
        self._node = ray.get_runtime_context().get_node_id()
        self.slots: dict[int, Slot] = {}
        self.stats = FleetStats()
        self.info: EngineInfo | None = None

    def lane(self, lane: Lane) -> list[Slot]:
        """The places of a lane."""
        return [slot for index, slot in self.slots.items() if in_lane(index, lane)]

    def resize(self, count: int) -> list[Slot]:
        """Have so many places; returns those that are no longer needed, still running."""
        for index in range(count):
            if index not in self.slots:
                slot = self.slots[index] = Slot(index)
                slot.incarnation = next_incarnation(self._directory, slot.name) - 1
                slot.task = asyncio.create_task(self._keep(slot))
                slot.task.add_done_callback(self._ended)
        self._fill_spares()
        return [self.slots.pop(index) for index in sorted(self.slots) if index >= count]

    async def remove(self, slot: Slot) -> None:
        """End the worker of a place that `resize` took out; its samples go on elsewhere."""
        assert slot.task is not None
        slot.task.cancel()
        with suppress(asyncio.CancelledError):
            await slot.task
        await self._end(slot, killed=False)

    def stop(self) -> None:
        """Kill all processes at once."""
        for slot in self.slots.values():
            if slot.task is not None:
                slot.task.cancel()
            if slot.worker is not None:
                ray.kill(slot.worker.handle, no_restart=True)
        for spare in self._spares:
            if spare.done() and not spare.cancelled() and spare.exception() is None:
                ray.kill(spare.result().handle, no_restart=True)
            spare.cancel()
        self.slots, self._spares = {}, []

    def send(self, worker: int, requests: Sequence[SampleRequest], cancelled: Sequence[str]) -> None:
        """Give a worker samples and have it forget others, soon; one that is about to go gets nothing."""
        slot = self.slots.get(worker)
        if slot is None:
            return
        slot.requests = [request for request in slot.requests if request.id not in cancelled] + list(requests)
        slot.cancelled += cancelled
        slot.wake.set()

    async def load(self, slot: Slot, weights: Weights) -> LoadReport | None:
        """Have a worker load weights, unless it has them; None when it died (its replacement will have them).

        Raises:
            BadInput, RunFailed: as its engine said.
        """
        async with slot.loading:
            if slot.worker is None or slot.version == weights.version:
                return None
            slot.version = None
            try:
                report: LoadReport = await weights.load_on(slot.worker.handle)
            except RayTaskError as error:
                with suppress(RayActorError, RayTaskError):
                    slot.version = await slot.worker.handle.version.remote()
                raise own_error(error) from None
            except RayActorError:
                return None
            slot.version = report.version
            return report

    async def ask(self, slot: Slot, call: Callable[[ActorHandle], Awaitable[Any]]) -> Any:
        """Call a worker. Raises RayActorError when it is not there (any more)."""
        if slot.worker is None:
            raise RayActorError
        try:
            return await call(slot.worker.handle)
        except RayTaskError as error:
            raise own_error(error) from None

    async def worker_stats(self, slot: Slot) -> WorkerStats | None:
        """None when it is not there."""
        with suppress(RayActorError, RunFailed):
            return await self.ask(slot, lambda handle: handle.stats.remote())
        return None

    async def _keep(self, slot: Slot) -> None:
        """Have a worker in a place, one after the other."""
        barren, lost_at = 0, None
        while True:
            try:
                await self._start(slot)
                if lost_at is not None:
                    self.stats.recovery_seconds = [*self.stats.recovery_seconds[-99:], time.monotonic() - lost_at]
                await self._serve(slot)
            except Exception as error:
                # No other worker would be better off: no sample must be blamed for it, and given up.
                if isinstance(cause := own_error(error), BadInput | LogFailed):
                    self._owner.failed(cause)
                    return
                lost_at = time.monotonic()
                # Samples that end workers are given up by the scheduler.
                worked = self._owner.worker_lost(slot.index) or (slot.beat is not None and slot.beat.tokens > 0)
                barren = 0 if worked else barren + 1
                self.stats.deaths += 1
                self.stats.stuck += isinstance(error, Stuck)
                if isinstance(error, Stuck):
                    await self._dump(slot)
                await self._end(slot, killed=True)
                if barren >= BARREN_LIVES:
                    reason = _reason(error)
                    self._owner.failed(
                        RunFailed(f"{barren} rollout workers in a row died before they had a sample: {reason}")
                    )
                    return

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A place's task has ended: by a defect of ours, unless it was cancelled or has said why."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._owner.failed(
                error if isinstance(error, RunFailed) else RunFailed(f"a rollout slot failed: {error!r}")
            )

    async def _start(self, slot: Slot) -> None:
        """A worker with an engine and, if there are any, with weights; then the owner knows of it."""
        slot.worker = await self._take_spare(slot.index)
        slot.incarnation += 1
        start = slot.worker.handle.start.remote(str(self._directory), slot.name, slot.incarnation)
        try:
            async with asyncio.timeout(START_SECONDS):
                self.info = await start
        except TimeoutError:
            raise Stuck(f"worker {slot.index} did not build its engine in {START_SECONDS:g} s") from None
        slot.ready.set()
        while (weights := self._owner.weights_for(slot.index)) is not None and slot.version != weights.version:
            await self.load(slot, weights)
            if slot.version is None:
                raise RunFailed("the worker died while it loaded its weights")
        if slot.version is not None:
            self._owner.worker_up(slot.index)

    async def _serve(self, slot: Slot) -> None:
        """Returns never; raises what ended the worker."""
        tasks = [asyncio.create_task(self._send(slot)), asyncio.create_task(self._poll(slot))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, slot: Slot) -> None:
        assert slot.worker is not None
        while True:
            await slot.wake.wait()
            slot.wake.clear()
            requests, slot.requests = slot.requests, []
            cancelled, slot.cancelled = slot.cancelled, []
            await slot.worker.handle.submit.remote(requests, cancelled)
            if cancelled:
                self._owner.worker_forgot(slot.index, cancelled)

    async def _poll(self, slot: Slot) -> None:
        assert slot.worker is not None
        while True:
            try:
                # Not `wait_for`: before Python 3.12 it forgets that it was cancelled when the answer comes just then.
                async with asyncio.timeout(POLL_SECONDS + self._stuck_seconds):
                    report: Report = await slot.worker.handle.poll.remote(POLL_SECONDS)
            except TimeoutError:
                raise Stuck(f"worker {slot.index} did not answer for {self._stuck_seconds:g} s") from None
            slot.beat = report
            self._owner.worker_report(slot.index, report)
            if report.failure is not None:
                atomic_write(stacks_file(self._directory, slot.name, slot.incarnation), report.failure)
                raise RunFailed(report.failure.strip().splitlines()[-1])
            if report.stalled_seconds > self._stuck_seconds:
                raise Stuck(f"worker {slot.index} made no progress for {report.stalled_seconds:.0f} s")

    async def _dump(self, slot: Slot) -> None:
        """Write down what a stuck worker is doing: in its own words, or else the stacks of its threads."""
        assert slot.worker is not None
        where = stacks_file(self._directory, slot.name, slot.incarnation)
        try:
            async with asyncio.timeout(DUMP_SECONDS):
                text = await slot.worker.handle.dump.remote()
            atomic_write(where, text)
        except (TimeoutError, RayActorError, RayTaskError):
            if slot.worker.node == self._node:
                with suppress(ProcessLookupError):
                    os.kill(slot.worker.pid, signal.SIGUSR1)
                    await asyncio.sleep(0.5)

    async def _end(self, slot: Slot, killed: bool) -> None:
        """See to it that the process is gone, then tell the owner."""
        worker, slot.worker, slot.version, slot.beat = slot.worker, None, None, None
        slot.requests, slot.cancelled = [], []
        slot.ready.clear()
        slot.wake.clear()
        self._owner.worker_lost(slot.index)
        if worker is not None:
            ray.kill(worker.handle, no_restart=True)
            if worker.node == self._node:
                await _kill(worker.pid)
            stacks = stacks_file(self._directory, slot.name, slot.incarnation)
            if stacks.exists() and not stacks.stat().st_size:
                stacks.unlink()
        await self._owner.worker_down(slot.index, (slot.name, slot.incarnation), killed)

    async def _take_spare(self, index: int) -> Prepared:
        task = self._spares.pop(0) if self._spares else asyncio.create_task(self._prepare(index))
        self._fill_spares()
        return await task

    def _fill_spares(self) -> None:
        while len(self._spares) < self._spare_count:
            self._spares.append(asyncio.create_task(self._prepare()))

    async def _prepare(self, index: int | None = None) -> Prepared:
        """A process for a place, or for any."""
        reserved = self._room is not None and index is not None and index < self._rooms
        options = self._options | (inside(self._room) if reserved else {})
        handle = self._actor.options(**options).remote(self._settings)
        pid, node = await handle.prepare.remote()
        return Prepared(handle, pid, node)


async def _kill(pid: int) -> None:
    """SIGKILL, which also ends a process that does not listen, and wait until it is gone."""
    end = time.monotonic() + DEATH_SECONDS
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        await asyncio.sleep(0.01)


def own_error(error: Exception) -> Exception:
    """The project's own error as it was raised, where it comes inside Ray's."""
    if not isinstance(error, RayTaskError):
        return error
    own = isinstance(error.cause, BadInput | RunFailed)
    return error.cause if own else RunFailed(f"a rollout worker failed: {error}")


def _reason(error: Exception) -> str:
    return describe_death(error) if isinstance(error, RayActorError) else str(error).strip().splitlines()[-1]
