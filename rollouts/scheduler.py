"""Which sample runs where: the queue of the rollout service, without processes, clocks or files.

Samples of a group are placed one by one, each on the worker that will be free first, the longest first: what is still
to be sampled is estimated from the lengths of finished samples. A worker is given as many samples as it can run and a
few more, so that it never waits for the service; the others wait here, where any worker can have them.

A sample that was in flight when its worker died goes on from its logged tokens. If it had none since it was placed, it
may be what killed the worker: after `ISOLATE_AFTER` such deaths in a row it is tried alone on an empty worker, and
given up when it has ended `Limits.deaths` of these. The first token that it gets clears it.
"""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rollouts.engine import request_seed
from rollouts.masks import joined_masks, masks_of_tokens
from rollouts.routes import joined_routes, routes_of_tokens
from rollouts.types import Completion, FinishedGroup, GroupRequest, NewTokens, SampleRequest, version_spans

ISOLATE_AFTER = 2
"""Deaths in a row, without a token in between, after which a sample is tried alone."""
REMEMBERED_LENGTHS = 256
"""Finished samples of a domain by which lengths are estimated."""
REMEMBERED_SESSIONS = 4096

Lane = tuple[int, int]
"""The workers whose index divided by the second number leaves the first: (0, 1) is all of them, now and later."""


def in_lane(worker: int, lane: Lane) -> bool:
    """Whether a worker is one of the lane's."""
    return worker % lane[1] == lane[0]


@dataclass(frozen=True)
class Limits:
    """What the scheduler may do."""

    running: int
    """Samples that an engine runs at once."""
    ahead: int = 0
    """Samples beyond that which wait in the engine, so that it need not wait for the service."""
    deaths: int = 3
    """Workers in a row that a sample may end on which it was alone and got no token; then it is given up."""
    domain_running: Mapping[str, int] = field(default_factory=dict)
    """Samples of a domain that may be in engines at once; domains that are not named have no limit."""


@dataclass
class Progress:
    """What is known of a sample: all its tokens so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    attempt: int = -1
    """The latest; -1: it was never placed."""
    routes: list[bytes] = field(default_factory=list)
    """Of each token, for `rollouts.routes.joined_routes`."""
    masks: list[bytes] = field(default_factory=list)
    """Of each token."""

    def extend(self, steps: Iterable[NewTokens]) -> None:
        """Take in what an engine sampled after what is here. Raises ValueError when something is missing between."""
        for new in steps:
            if new.position != len(self.token_ids):
                raise ValueError(f"{new.id}: tokens from position {new.position}, expected {len(self.token_ids)}")
            self.token_ids += new.token_ids
            self.logprobs += new.logprobs
            self.versions += [new.version] * len(new.token_ids)
            self.routes += routes_of_tokens(new)
            self.masks += masks_of_tokens(new)
            self.finish_reason = new.finish_reason

    def completion(self, prompt_tokens: int) -> Completion:
        """Of a sample that has ended, after a prompt of this length."""
        assert self.finish_reason is not None
        routes = joined_routes(self.routes, prompt_tokens)
        spans, masks = version_spans(self.versions), joined_masks(self.masks)
        return Completion(self.token_ids, self.logprobs, self.finish_reason, spans, routes, masks=masks)


@dataclass(eq=False)
class _Sample:
    """One sample of a group."""

    id: str
    number: int
    group: _Group
    progress: Progress
    worker: int | None = None
    expected: float = 0.0
    """Tokens that it was expected to need when it was placed or queued."""
    length: int = 0
    """Tokens as its worker last reported."""
    deaths: int = 0
    """In a row, without a token in between."""
    deaths_alone: int = 0
    """Those among them that met no other sample, since it is a suspect."""

    @property
    def suspect(self) -> bool:
        return self.deaths >= ISOLATE_AFTER

    @property
    def urgency(self) -> tuple[bool, int, float, int, int]:
        """Smallest first: what was begun, what came first, what takes longest."""
        return (self.progress.attempt < 0, self.group.order, -self.expected, self.group.row, self.number)


@dataclass(eq=False)
class _Group:
    request: GroupRequest
    lane: Lane
    order: int
    row: int
    samples: list[_Sample] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Of its samples that have ended."""
    verdicts: list[float] = field(default_factory=list)
    early_stop: int | None = None
    attempts: dict[str, int] = field(default_factory=dict)
    """Of its samples that were placed."""


@dataclass(eq=False)
class _Worker:
    running: dict[str, _Sample] = field(default_factory=dict)
    dropped: dict[str, _Sample] = field(default_factory=dict)
    """What it was told to forget and may still have: that too may end it."""
    lost: bool = False

    @property
    def samples(self) -> list[_Sample]:
        """All that its engine may have."""
        return [*self.running.values(), *self.dropped.values()]

    @property
    def load(self) -> float:
        """Tokens that are still expected of it."""
        return sum(sample.expected for sample in self.running.values())


@dataclass(frozen=True)
class Ended:
    """A group that has ended."""

    group: FinishedGroup
    attempts: dict[str, int]
    """Sample → its latest attempt, of those that were placed at all."""


class Scheduler:
    """See the module. Samples are named as `GroupRequest.sample_id` names them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._groups: dict[str, _Group] = {}
        self._samples: dict[str, _Sample] = {}
        """Those that have not ended."""
        self._waiting: list[_Sample] = []
        """In order of urgency."""
        self._workers: dict[int, _Worker] = {}
        self._ended: list[Ended] = []
        self._unfinished: dict[Lane, int] = defaultdict(int)
        self._orders = 0
        self._in_engines: dict[str, int] = defaultdict(int)
        """Samples of each domain."""
        self._lengths: dict[str, deque[int]] = defaultdict(lambda: deque(maxlen=REMEMBERED_LENGTHS))
        self._sessions: dict[str, int] = {}
        """Session → the worker that ran its latest sample."""

    def unfinished(self, lane: Lane) -> int:
        """Samples of a lane that have not ended."""
        return self._unfinished[lane]

    @property
    def waiting(self) -> int:
        """Samples that are in no engine."""
        return len(self._waiting)

    @property
    def in_engines(self) -> int:
        """Samples that workers have."""
        return sum(self._in_engines.values())

    def next_order(self) -> int:
        """A place in the queue behind all that came before, for groups that are submitted together."""
        self._orders += 1
        return self._orders

    def add(
        self,
        request: GroupRequest,
        lane: Lane,
        order: int,
        row: int,
        known: Mapping[str, Progress],
        early_stop: int | None = None,
    ) -> None:
        """Queue a group.

        Args:
            order: From `next_order`.
            row: Its place among the groups of this order.
            known: Sample id → what is already logged of it; samples that have ended are not sampled again.
            early_stop: Stop the group once so many of its samples have ended, with equal verdicts on all that have.
        """
        group = _Group(request, lane, order, row, early_stop=early_stop)
        self._groups[request.id] = group
        for number in range(request.sampling.n):
            sample_id = request.sample_id(number)
            sample = _Sample(sample_id, number, group, known.get(sample_id, Progress()))
            group.samples.append(sample)
            if sample.progress.attempt >= 0:
                group.attempts[sample_id] = sample.progress.attempt
            _end_if_complete(sample.progress, request)
            if sample.progress.finish_reason is None:
                self._samples[sample_id] = sample
                self._unfinished[lane] += 1
                self._queue(sample)
            else:
                self._remember(sample)
        self._complete(group)

    def worker_up(self, worker: int) -> None:
        """A worker is ready to sample."""
        self._workers.setdefault(worker, _Worker())

    def worker_lost(self, worker: int) -> bool:
        """A worker is gone: it gets nothing more, and `worker_down` will say what is left of its samples.

        Returns:
            Whether it has any.
        """
        if worker not in self._workers:
            return False
        self._workers[worker].lost = True
        return bool(self._workers[worker].running)

    def worker_down(self, worker: int, known: Mapping[str, Progress], killed: bool = True) -> dict[int, list[str]]:
        """What became of the samples of a worker that is gone: they are queued again, or end.

        Args:
            known: What the log has of them.
            killed: Whether they may be the reason; not so when the worker was asked to go.

        Returns:
            What other workers have to forget, as their groups were given up.
        """
        gone = self._workers.pop(worker, None) or _Worker()
        alone = len(gone.samples) == 1
        cancelled: dict[int, list[str]] = {}
        for sample in list(gone.running.values()):
            if sample.worker is None:  # dropped with its group, a moment ago
                continue
            self._leave(sample)
            begin = len(sample.progress.token_ids)
            attempt = sample.progress.attempt
            sample.progress = known.get(sample.id, sample.progress)
            sample.progress.attempt = max(attempt, sample.progress.attempt)
            if len(sample.progress.token_ids) > begin:
                sample.deaths = sample.deaths_alone = 0
            elif killed:
                sample.deaths_alone += sample.suspect and alone
                sample.deaths += 1
            _end_if_complete(sample.progress, sample.group.request)
            if sample.progress.finish_reason is not None:
                self._end(sample)
            elif sample.deaths_alone >= self.limits.deaths:
                reason = f"its sample {sample.number} ended {sample.deaths} engines in a row"
                reason += f", on the last {sample.deaths_alone} of which it was alone"
                cancelled = self._give_up(sample.group, reason)  # it alone was there: none comes after it
            elif sample.id in self._samples:
                self._queue(sample)
        return cancelled

    def worker_forgot(self, worker: int, sample_ids: Iterable[str]) -> None:
        """A worker has done what it was told: its engine has these samples no more."""
        if worker in self._workers:
            for sample_id in sample_ids:
                self._workers[worker].dropped.pop(sample_id, None)

    def assign(self) -> dict[int, list[SampleRequest]]:
        """Place what can be placed; returns the requests that each worker is to be given."""
        placed: dict[int, list[SampleRequest]] = defaultdict(list)
        skipped = []
        loads = {number: worker.load for number, worker in self._workers.items() if self._has_room(worker)}
        isolating = {sample.group.lane for sample in self._waiting if sample.suspect}
        for at, sample in enumerate(self._waiting):
            if not loads:
                skipped += self._waiting[at:]
                break
            worker = self._choose(sample, loads, isolating)
            if worker is None:
                skipped.append(sample)
                continue
            placed[worker].append(self._place(sample, worker))
            loads[worker] += sample.expected
            if not self._has_room(self._workers[worker]):
                del loads[worker]
        self._waiting = skipped
        return dict(placed)

    def report(
        self, worker: int, finished: Sequence[Sequence[NewTokens]], running: Mapping[str, int]
    ) -> list[tuple[str, Completion]]:
        """Take in what a worker says: samples that ended there, and the lengths of the others.

        Returns:
            What has ended, with the ids of the groups.
        """
        here = self._workers[worker].running if worker in self._workers else {}
        for sample_id, length in running.items():
            sample = here.get(sample_id)
            if sample is not None and length > len(sample.progress.token_ids):
                sample.length, sample.deaths, sample.deaths_alone = length, 0, 0
                sample.expected = self._expected(sample)
        ended = []
        for steps in finished:
            sample = here.get(steps[0].id)
            if sample is None:  # it was cancelled meanwhile
                continue
            sample.progress.extend(steps)
            self._leave(sample)
            self._end(sample)
            ended.append((sample.group.request.id, sample.progress.completion(len(sample.group.request.prompt_ids))))
        return ended

    def judge(self, group_id: str, verdict: float) -> dict[int, list[str]]:
        """Take in the verdict on one sample that has ended; returns what workers have to forget, by worker."""
        group = self._groups.get(group_id)
        if group is None or group.early_stop is None:
            return {}
        group.verdicts.append(verdict)
        # A sample that has ended and whose verdict is under way may differ.
        if len(group.verdicts) < max(group.early_stop, len(group.lengths)) or len(set(group.verdicts)) > 1:
            return {}
        cancelled = self._drop_unfinished(group)
        self._complete(group)
        return cancelled

    def cancel(self, group_ids: Iterable[str]) -> tuple[dict[int, list[str]], dict[str, int]]:
        """Forget groups; unknown ids are fine.

        Returns:
            What workers have to forget, by worker; and the attempts of the groups' samples, as in `Ended`.
        """
        cancelled: dict[int, list[str]] = defaultdict(list)
        attempts: dict[str, int] = {}
        for group_id in group_ids:
            group = self._groups.pop(group_id, None)
            if group is not None:
                for worker, samples in self._drop_unfinished(group).items():
                    cancelled[worker] += samples
                attempts |= group.attempts
        return dict(cancelled), attempts

    def take_ended(self) -> list[Ended]:
        """The groups that have ended since the call before."""
        ended, self._ended = self._ended, []
        return ended

    def running(self, worker: int) -> list[str]:
        """The samples that a worker has."""
        return list(self._workers[worker].running) if worker in self._workers else []

    def in_flight(self, worker: int) -> dict[str, Progress]:
        """What was known of the samples of a worker when it was given them."""
        running = self._workers[worker].running if worker in self._workers else {}
        return {sample.id: sample.progress for sample in running.values()}

    def _has_room(self, worker: _Worker) -> bool:
        if worker.lost or any(sample.suspect for sample in worker.samples):
            return False
        return len(worker.running) < self.limits.running + self.limits.ahead

    def _choose(self, sample: _Sample, loads: Mapping[int, float], isolating: set[Lane]) -> int | None:
        """The worker that will have time first; one that has the prompt in its cache is that much ahead.

        Args:
            loads: Of the workers that have room.
            isolating: Lanes in which suspects wait for an empty worker.
        """
        request, lane = sample.group.request, sample.group.lane
        limit = self.limits.domain_running.get(request.domain)
        if limit is not None and self._in_engines[request.domain] >= limit:
            return None
        own = {number: load for number, load in loads.items() if in_lane(number, lane)}
        if sample.suspect:
            own = {number: load for number, load in own.items() if not self._workers[number].samples}
        elif lane in isolating and own:
            # The one that is empty first takes no more: the suspects will have it.
            del own[min(own, key=lambda number: (own[number], number))]
        session = self._sessions.get(request.session)
        cached = {other.worker for other in sample.group.samples}

        def delay(number: int) -> tuple[float, int]:
            saved = len(request.prompt_ids) if number in cached or number == session else 0
            return own[number] - saved, number

        return min(own, key=delay, default=None)

    def _place(self, sample: _Sample, worker: int) -> SampleRequest:
        request = sample.group.request
        sample.worker = worker
        sample.length = len(sample.progress.token_ids)
        sample.progress.attempt += 1
        sample.group.attempts[sample.id] = sample.progress.attempt
        self._workers[worker].running[sample.id] = sample
        self._in_engines[request.domain] += 1
        if request.session:
            self._sessions.pop(request.session, None)
            self._sessions[request.session] = worker
            if len(self._sessions) > REMEMBERED_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
        seed = request_seed(request.sampling.seed, request.index, sample.number)
        tokens = list(sample.progress.token_ids)
        return SampleRequest(sample.id, request.prompt_ids, tokens, request.sampling, seed, sample.progress.attempt)

    def _leave(self, sample: _Sample) -> None:
        """It is in no engine any more."""
        assert sample.worker is not None
        if sample.worker in self._workers:
            self._workers[sample.worker].running.pop(sample.id, None)
        sample.worker = None
        self._in_engines[sample.group.request.domain] -= 1

    def _queue(self, sample: _Sample) -> None:
        sample.length = len(sample.progress.token_ids)
        sample.expected = self._expected(sample)
        bisect.insort(self._waiting, sample, key=lambda other: other.urgency)

    def _end(self, sample: _Sample) -> None:
        self._forget(sample)
        self._remember(sample)
        self._complete(sample.group)

    def _forget(self, sample: _Sample) -> bool:
        """It need not be sampled any more; whether it had to be."""
        if sample.id not in self._samples:
            return False
        del self._samples[sample.id]
        self._unfinished[sample.group.lane] -= 1
        return True

    def _remember(self, sample: _Sample) -> None:
        length = len(sample.progress.token_ids)
        sample.group.lengths.append(length)
        self._lengths[sample.group.request.domain].append(length)

    def _complete(self, group: _Group) -> None:
        ended = [sample.progress for sample in group.samples if sample.progress.finish_reason is not None]
        if len(ended) == len(group.samples) and group.request.id in self._groups:
            del self._groups[group.request.id]
            finished = FinishedGroup(
                group.request, [progress.completion(len(group.request.prompt_ids)) for progress in ended]
            )
            self._ended.append(Ended(finished, group.attempts))

    def _give_up(self, group: _Group, reason: str) -> dict[int, list[str]]:
        del self._groups[group.request.id]
        self._ended.append(Ended(FinishedGroup(group.request, [], reason), group.attempts))
        return self._drop_unfinished(group)

    def _drop_unfinished(self, group: _Group) -> dict[int, list[str]]:
        """Forget the samples that have not ended; returns those that workers have, by worker."""
        in_engines: dict[int, list[str]] = defaultdict(list)
        dropped = [sample for sample in group.samples if self._forget(sample)]
        for sample in dropped:
            if sample.worker is not None:
                in_engines[sample.worker].append(sample.id)
                self._workers[sample.worker].dropped[sample.id] = sample
                self._leave(sample)
        self._waiting = [sample for sample in self._waiting if sample not in dropped]
        group.samples = [sample for sample in group.samples if sample not in dropped]
        return dict(in_engines)

    def _expected(self, sample: _Sample) -> float:
        """Tokens still to come: the mean over known lengths that are longer than it is already."""
        limit = sample.group.request.sampling.max_tokens
        known = sample.group.lengths or self._lengths[sample.group.request.domain]
        longer = [min(length, limit) - sample.length for length in known if length > sample.length]
        if longer:
            return sum(longer) / len(longer)
        return (limit - sample.length) / 2


def _end_if_complete(progress: Progress, request: GroupRequest) -> None:
    """A sample whose last token was logged, but not that it was the last."""
    if progress.finish_reason is None and len(progress.token_ids) >= request.sampling.max_tokens:
        progress.finish_reason = "length"
