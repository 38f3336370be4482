"""The rollout service: one Ray actor that owns the workers, the queue, the weights and the log of a run.

    clients (`rollouts.client`)  groups in, finished groups out
    scheduler                    which sample runs where
    fleet                        workers: started, fed, watched, replaced
    log                          every token, before anybody hears of it

Anything may be killed. A worker's samples go on from its log on other workers. When the service itself is killed Ray
starts it again: it reads the log, starts workers, and its clients tell it again what they wait for and which weights
they published. When the driver is killed, so is all of it; the next one that opens the same log and submits the same
ids gets what was finished, and the rest goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError

from posttrain.errors import RunFailed
from posttrain.files import atomic_write
from posttrain.observe.metrics import MetricsLog
from rollouts.fleet import Fleet, FleetStats, Slot, Weights
from rollouts.lanes import LaneWeights
from rollouts.log.compaction import LogKeeper
from rollouts.log.reader import Recovered, RecoveredRequest, recover
from rollouts.monitor import MONITOR_SECONDS, Average, Monitor, Queues
from rollouts.recovery import continued, read_attempts, recovered_progress
from rollouts.scheduler import Ended, Lane, Limits, Progress, Scheduler
from rollouts.settings import EngineInfo, EngineSettings
from rollouts.types import UNNAMED, Completion, FinishedGroup, GroupRequest, sample_name
from rollouts.weights import WeightUpdate
from rollouts.worker import Report, WorkerStats

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.util.placement_group import PlacementGroup

COMPACT_SECONDS = 5.0
"""Between two looks for segments of the log that nobody needs."""
MIN_AHEAD = 8
"""Samples that wait in an engine at least: short answers end several at a step, and refilling takes some steps."""
LOCK_SECONDS = 15.0
"""How long a service that was killed may take to let go of the log."""
RESIZED = "workers"
"""A file that says how many workers `resize` asked for, should the service be started anew."""
PUBLISHER_SECONDS = 60.0
"""After a restart, how long to wait for the client that has the weights; until then others may not be served."""
QUARANTINE = "quarantine.jsonl"
"""Beside the log: the requests that were given up."""

Judge = Callable[[GroupRequest, Completion], float]
"""A verdict on a completion, such as its reward."""


@dataclass(frozen=True)
class ServiceSettings:
    """What the service is started from; picklable."""

    engine: EngineSettings
    workers: int
    directory: str
    """Of the log."""
    gpus_per_worker: float = 0
    queue_samples: int = 4096
    """Unfinished samples of a lane, beyond which `submit` waits."""
    stuck_seconds: float = 300.0
    """Without a token or an answer, after which a worker is dumped and replaced."""
    spares: int = 0
    """Processes that are kept ready to replace a worker."""
    deaths: int = 3
    """See `Limits.deaths`."""
    domain_running: Mapping[str, int] = field(default_factory=dict)
    """See `Limits.domain_running`."""
    room: PlacementGroup | None = None
    """Where Ray is to put the workers; those beyond `workers`, and spares, go anywhere."""
    metrics: MetricsLog | None = None
    """Where to write how things stand (`rollouts.monitor`); default: nowhere."""


@dataclass(frozen=True)
class EarlyStop:
    """End a group once `after` of its samples or more have finished and all their verdicts are equal: it will hardly
    say more. (Samples of a run before, read back from the log, have no verdict: their group is sampled whole.)

    What finishes first is short, so this favours short answers in what it decides by; hence it is off by default.
    """

    after: int
    judge: Judge
    """Called in the service's process; picklable."""


@dataclass(frozen=True)
class ServiceStats:
    """The state of the service."""

    epoch: str
    pid: int
    workers: dict[int, int]
    """Index → process of the workers that are there."""
    ready: list[int]
    """Workers with weights."""
    waiting: int
    """Samples in no engine."""
    running: int
    ready_groups: int
    """Finished and not collected, or not acknowledged."""
    deaths: int
    stuck: int
    quarantined: int
    tokens: int
    """Sampled by the workers that are there."""
    recovery_seconds: list[float]


@dataclass(eq=False)
class _Entry:
    """A group that was submitted and not acknowledged."""

    request: GroupRequest
    session: str
    early_stop: EarlyStop | None
    ended: Ended | None = None
    delivered: bool = False


class RolloutService:
    """The methods of the actor. Clients call `call`, which tells them when the service was started anew."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.epoch = f"{os.getpid()}-{time.time_ns()}"
        self._starting: asyncio.Task[EngineInfo] | None = None
        self._restarted = False
        self._scheduler = Scheduler(
            Limits(
                running=settings.engine.max_num_seqs,
                ahead=max(MIN_AHEAD, settings.engine.max_num_seqs // 2),
                deaths=settings.deaths,
                domain_running=settings.domain_running,
            )
        )
        self._directory = Path(settings.directory)
        self._keeper: LogKeeper
        self._fleet: Fleet
        self._logged: dict[str, dict[str, RecoveredRequest]] = defaultdict(dict)
        """Group → sample → what the log had when the service started, until somebody asks for the group."""
        self._consumed: dict[str, tuple[int, int]] = {}
        """Groups whose answers are in the log alone: their samples, and the latest attempt of any."""
        self._keeping = asyncio.Lock()
        self._weights: LaneWeights
        self._admitting: dict[Lane, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._entries: dict[str, _Entry] = {}
        self._arriving: set[str] = set()
        """Groups that are being submitted."""
        self._quarantined = 0
        self._waiting, self._running = Average(), Average()
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._judging: set[asyncio.Task[None]] = set()

    async def call(self, epoch: str | None, method: str, *arguments: Any) -> tuple[str, Any]:
        """Call a method for a client that knows the service under `epoch`.

        Returns:
            The service's epoch, and what the method returned; None without a call when the epochs differ: the client
            then tells again what it waits for (`adopt`).
        """
        if epoch is not None and epoch != self.epoch:
            return self.epoch, None
        await self.start()
        return self.epoch, await getattr(self, method)(*arguments)

    async def start(self, driver: bool = False) -> EngineInfo:
        """Open the log and start the workers; waits until all of them have an engine. May be called again.

        Args:
            driver: A new driver has come: forget what only an earlier one could have asked for, or had decided.

        Raises:
            BadInput: settings that the model cannot serve.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(driver))
        return await asyncio.shield(self._starting)

    async def adopt(self, lane: Lane, version: int, publications: list[tuple[str, list[Any]]]) -> None:
        """After a restart: make a client's publications again, up to its latest, unless others made newer ones."""
        if (self._weights.version(lane) or -1) < version:
            for method, arguments in publications:
                await getattr(self, method)(lane, *arguments)

    async def submit(
        self, session: str, lane: Lane, groups: Sequence[GroupRequest], early_stop: EarlyStop | None
    ) -> None:
        """Queue groups; waits while the lane's queue is full. Those that are here already are handed out once more.

        Raises:
            RunFailed: the lane has no weights.
        """
        await self._require_weights(lane)
        for group in groups:
            if group.id in self._entries and self._entries[group.id].request != group:
                raise RunFailed(f"{group.id!r} is the id of another prompt already; ids must be unique in a run")
        self._arriving |= {group.id for group in groups}
        async with self._admitting[lane]:
            order = self._scheduler.next_order()
            for row, group in enumerate(groups):
                if self._scheduler.unfinished(lane) >= self.settings.queue_samples:
                    self._pump()
                    await self._until(lambda: self._scheduler.unfinished(lane) < self.settings.queue_samples)
                if group.id in self._arriving:  # else it was cancelled while it waited
                    self._arriving.remove(group.id)
                    self._admit(session, lane, group, early_stop, order, row)
        self._pump()

    async def collect(self, session: str, count: int, ids: Sequence[str] | None, seconds: float) -> list[FinishedGroup]:
        """Up to `count` groups of a session that have ended; waits up to `seconds` for the first."""

        def ready() -> list[_Entry]:
            entries = self._entries.values() if ids is None else [self._entries[i] for i in ids if i in self._entries]
            return [entry for entry in entries if entry.session == session and entry.ended and not entry.delivered]

        await self._until(lambda: bool(ready()), seconds)
        groups = []
        for entry in ready()[:count]:
            assert entry.ended is not None
            entry.delivered = True
            groups.append(entry.ended.group)
        return groups

    async def consume(self, ids: Sequence[str]) -> None:
        """Finished groups that were learned from: from now on they are in the log alone, until they are forgotten."""
        for group_id in ids:
            entry = self._entries.get(group_id)
            if entry is not None and entry.ended is not None:
                del self._entries[group_id]
                self._consumed[group_id] = entry.request.sampling.n, max(entry.ended.attempts.values(), default=-1)

    async def forget_under(self, prefix: str) -> None:
        """`forget` of all groups whose ids begin so, also of those that the log has from before a restart."""
        known = [*self._entries, *self._logged, *self._consumed, *self._arriving]
        await self.forget([group_id for group_id in dict.fromkeys(known) if group_id.startswith(prefix)])

    async def forget(self, ids: Sequence[str]) -> None:
        """Groups that nobody wants any more, consumed or cancelled: what is being sampled of them is stopped."""
        self._arriving -= set(ids)
        cancelled, attempts = self._scheduler.cancel(ids)
        self._drop(cancelled)
        for group_id in ids:
            entry = self._entries.pop(group_id, None)
            if entry is not None and entry.ended is not None:
                attempts |= entry.ended.attempts
            for sample_id, logged in self._logged.pop(group_id, {}).items():
                attempts.setdefault(sample_id, logged.attempt)
            count, attempt = self._consumed.pop(group_id, (0, -1))
            attempts |= {sample_name(group_id, number): attempt for number in range(count)}
        self._pump()
        await self._acknowledge(attempts)

    async def known_checksums(self, lane: Lane) -> dict[str, str]:
        """Of the weights that were published last in a lane: tensors that have them need not be sent."""
        return self._weights.checksums(lane)

    async def publish(self, lane: Lane, update: Sequence[ObjectRef[WeightUpdate]]) -> None:
        """Have all workers of a lane take an update (the only element); when it returns, all serve it.

        Raises:
            RunFailed: damaged, a version that does not grow, or an engine that does not hold what was sent.
        """
        await self._weights.publish(lane, await update[0])

    async def load_checkpoint(self, lane: Lane, path: str, version: int) -> None:
        """Have all workers of a lane load a checkpoint directory; errors as `publish`, and BadInput."""
        await self._weights.load_checkpoint(lane, path, version)

    async def weight_version(self, lane: Lane) -> int | None:
        """The newest version on the lane's workers; None before the first."""
        return self._weights.version(lane)

    async def score(self, lane: Lane, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See `RolloutClient.score`: rows are shared out over the lane's workers."""
        while True:
            slots = [slot for slot in self._fleet.lane(lane) if slot.version is not None]
            if not slots:
                await self._require_weights(lane)
                await self._until(lambda: any(slot.version is not None for slot in self._fleet.lane(lane)))
                continue
            costs = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
            ranges = split_evenly(costs, len(slots))

            def part(slot: Slot, begin: int, end: int) -> Any:
                return self._fleet.ask(slot, lambda h: h.score.remote(prompts[begin:end], completions[begin:end]))

            try:
                parts = await asyncio.gather(*(part(slot, *rows) for slot, rows in zip(slots, ranges, strict=True)))
            except RayActorError:
                await asyncio.sleep(0.1)  # until its death is known here too
                continue
            return [row for found in parts for row in found]

    async def stats(self, lane: Lane) -> list[WorkerStats]:
        """One entry for each worker of the lane that is there."""
        found = await asyncio.gather(*(self._fleet.worker_stats(slot) for slot in self._fleet.lane(lane)))
        return [stats for stats in found if stats is not None]

    async def service_stats(self) -> ServiceStats:
        """See `ServiceStats`."""
        slots = self._fleet.slots.values()
        fleet: FleetStats = self._fleet.stats
        return ServiceStats(
            epoch=self.epoch,
            pid=os.getpid(),
            workers={slot.index: slot.worker.pid for slot in slots if slot.worker is not None},
            ready=[slot.index for slot in slots if slot.version is not None],
            waiting=self._scheduler.waiting,
            running=self._scheduler.in_engines,
            ready_groups=sum(entry.ended is not None for entry in self._entries.values()),
            deaths=fleet.deaths,
            stuck=fleet.stuck,
            quarantined=self._quarantined,
            tokens=sum(slot.beat.tokens for slot in slots if slot.beat is not None),
            recovery_seconds=fleet.recovery_seconds,
        )

    async def resize(self, workers: int) -> None:
        """Have so many workers; returns when those that are new have an engine."""
        atomic_write(self._directory / RESIZED, str(workers))
        surplus = self._fleet.resize(workers)
        await asyncio.gather(*(self._fleet.remove(slot) for slot in surplus))
        await self._until(lambda: all(slot.ready.is_set() for slot in self._fleet.slots.values()))

    async def stop(self) -> None:
        """End all processes of the service but this one."""
        if self._starting is not None:
            self._fleet.stop()
            self._keeper.close()

    # What the fleet tells (`rollouts.fleet.Owner`).

    def weights_for(self, worker: int) -> Weights | None:
        """See `Owner`."""
        return self._weights.of_worker(worker)

    def worker_up(self, worker: int) -> None:
        """See `Owner`."""
        self._scheduler.worker_up(worker)
        self._pump()

    def worker_report(self, worker: int, report: Report) -> None:
        """See `Owner`."""
        ended = self._scheduler.report(worker, report.finished, report.running)
        for group_id, completion in ended:
            entry = self._entries.get(group_id)
            if entry is not None and entry.early_stop is not None:
                task = asyncio.create_task(self._judge(entry, entry.early_stop.judge, completion))
                self._judging.add(task)
                task.add_done_callback(self._judging.discard)
        self._pump()

    def worker_forgot(self, worker: int, cancelled: Sequence[str]) -> None:
        """See `Owner`."""
        self._scheduler.worker_forgot(worker, cancelled)
        self._pump()

    def worker_lost(self, worker: int) -> bool:
        """See `Owner`."""
        return self._scheduler.worker_lost(worker)

    async def worker_down(self, worker: int, writer: tuple[str, int], killed: bool) -> None:
        """See `Owner`."""
        in_flight, known = self._scheduler.in_flight(worker), {}
        attempts = await asyncio.to_thread(read_attempts, self._directory, writer, in_flight.keys())
        for sample_id, before in in_flight.items():
            attempt = attempts.get(sample_id)
            known[sample_id] = before if attempt is None else continued(before, attempt)
        self._drop(self._scheduler.worker_down(worker, known, killed))
        self._pump()

    def failed(self, error: Exception) -> None:
        """See `Owner`."""
        self._failure = error
        self._changed.set()

    async def _start(self, driver: bool) -> EngineInfo:
        self._restarted = not driver
        self._keeper = await self._open_log()
        recovered: Recovered = await asyncio.to_thread(recover, self._directory)
        for sample_id, request in recovered.requests.items():
            self._logged[sample_id.rpartition("#")[0]][sample_id] = request
        for stacks in self._directory.glob("*.stacks"):
            if not stacks.stat().st_size:
                stacks.unlink()
        self._fleet = Fleet(
            self.settings.engine,
            self._directory,
            self,
            self.settings.gpus_per_worker,
            self.settings.stuck_seconds,
            self.settings.spares,
            (self.settings.room, self.settings.workers),
        )
        self._weights = LaneWeights(self._fleet, self._directory / "weights", self.worker_up, self._until)
        if driver:
            await self._forget_driver()
        else:
            self._weights.restore()
        resized = self._directory / RESIZED
        self._fleet.resize(int(resized.read_text()) if resized.exists() else self.settings.workers)
        self._compacting = asyncio.create_task(self._compact())
        if self.settings.metrics is not None:
            self._monitoring = asyncio.create_task(self._monitor(Monitor(self.settings.metrics)))
        await self._until(lambda: all(slot.ready.is_set() for slot in self._fleet.slots.values()))
        assert self._fleet.info is not None
        return self._fleet.info

    async def _open_log(self) -> LogKeeper:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return LogKeeper(self._directory)
            except RunFailed:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)

    async def _compact(self) -> None:
        while True:
            await asyncio.sleep(COMPACT_SECONDS)
            try:
                async with self._keeping:
                    await asyncio.to_thread(self._keeper.compact)
            except RunFailed as error:
                self.failed(error)
                return

    async def _monitor(self, monitor: Monitor) -> None:
        while True:
            await asyncio.sleep(MONITOR_SECONDS)
            stats, slots = await self.service_stats(), self._fleet.slots.values()
            waiting, running = self._waiting.take(), self._running.take()
            queues = Queues(waiting, running, stats.ready_groups, len(stats.ready), stats.deaths)
            reports = {
                slot.index: (slot.worker.pid, slot.beat)
                for slot in slots
                if slot.worker is not None and slot.beat is not None
            }
            with suppress(OSError):  # must not stop the run
                monitor.observe(queues, reports)

    async def _acknowledge(self, attempts: dict[str, int]) -> None:
        async with self._keeping:
            self._keeper.acknowledge(attempts)

    async def _forget_driver(self) -> None:
        unnamed = [self._logged.pop(group_id) for group_id in list(self._logged) if group_id.startswith(UNNAMED)]
        await self._acknowledge({name: logged.attempt for samples in unnamed for name, logged in samples.items()})
        (self._directory / RESIZED).unlink(missing_ok=True)

    async def _require_weights(self, lane: Lane) -> None:
        seconds = PUBLISHER_SECONDS if self._restarted else 0
        if not await self._until(lambda: self._weights.version(lane) is not None, seconds):
            raise RunFailed("the engines have no weights: publish some before asking them to generate or score")

    def _admit(
        self, session: str, lane: Lane, group: GroupRequest, early_stop: EarlyStop | None, order: int, row: int
    ) -> None:
        entry = self._entries.get(group.id)
        if entry is not None:
            entry.session, entry.delivered = session, False
            return
        self._entries[group.id] = _Entry(group, session, early_stop)
        logged, (_, consumed) = self._logged.pop(group.id, {}), self._consumed.pop(group.id, (0, -1))
        known = {}
        for number in range(group.sampling.n):
            sample_id = group.sample_id(number)
            if sample_id in logged:
                known[sample_id] = recovered_progress(logged[sample_id], group)
            elif sample_id in self._keeper.acknowledged:
                known[sample_id] = Progress(attempt=self._keeper.acknowledged[sample_id])
            elif consumed >= 0:  # read back when the service starts, not before
                known[sample_id] = Progress(attempt=consumed)
        self._scheduler.add(group, lane, order, row, known, early_stop.after if early_stop else None)

    async def _judge(self, entry: _Entry, judge: Judge, completion: Completion) -> None:
        try:
            verdict = await asyncio.to_thread(judge, entry.request, completion)
        except Exception as error:
            self.failed(RunFailed(f"the verdict that stops groups early failed: {error!r}"))
            return
        self._drop(self._scheduler.judge(entry.request.id, verdict))
        self._pump()

    def _drop(self, cancelled: Mapping[int, Sequence[str]]) -> None:
        """Have workers forget samples."""
        for worker, samples in cancelled.items():
            self._fleet.send(worker, [], samples)

    def _pump(self) -> None:
        """Send out what can be placed, take in what has ended, wake up who waits."""
        for worker, requests in self._scheduler.assign().items():
            self._fleet.send(worker, requests, [])
        for ended in self._scheduler.take_ended():
            self._entries[ended.group.request.id].ended = ended
            if ended.group.failure is not None:
                self._quarantine(ended.group)
        self._waiting.set(self._scheduler.waiting)
        self._running.set(self._scheduler.in_engines)
        self._changed.set()

    def _quarantine(self, group: FinishedGroup) -> None:
        """Write down what was given up, and why, for whoever wants to look into it."""
        self._quarantined += 1
        found = {"id": group.request.id, "domain": group.request.domain, "prompt_ids": group.request.prompt_ids}
        with suppress(OSError), (self._directory / QUARANTINE).open("a") as file:  # must not stop the run
            file.write(json.dumps({**found, "reason": group.failure, "time": time.time()}) + "\n")

    async def _until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait for a condition on the service's state, and no longer than `seconds`; whether it holds.

        Raises:
            BadInput, RunFailed: the service has failed.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while not condition():
            if self._failure is not None:
                raise self._failure
            left = 1.0 if end is None else min(1.0, end - time.monotonic())
            if left <= 0:
                return False
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                continue
            if changed is self._changed:  # the first to wake up; the others have the same event
                self._changed = asyncio.Event()
        return True


def split_evenly(costs: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Cut rows into `parts` contiguous ranges (begin, end) of about the same cost; some may be empty."""
    total, spent, row, ranges = sum(costs), 0, 0, []
    for part in range(1, parts + 1):
        begin = row
        # A row belongs to the part in which its middle lies.
        while row < len(costs) and (part == parts or (spent + costs[row] / 2) * parts < total * part):
            spent += costs[row]
            row += 1
        ranges.append((begin, row))
    return ranges
