"""The watchdog: says which actor makes no progress, in what phase, with what queues and stacks, and acts on it.

Trainers and teachers leave signs of life in files (`posttrain.observe.pulse`); the rollout service is asked. Rollout
workers are watched by the service itself (`rollouts.fleet`), which replaces them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import RunFailed
from posttrain.observe.pulse import IDLE, Beat, read_beats, stacks_of
from posttrain.recipe.resilience import WatchdogConfig
from posttrain.rundir import RunDirectory

if TYPE_CHECKING:
    from posttrain.cluster import Cluster
    from rollouts.service import ServiceStats

LOOK_SECONDS = 5.0
"""Between two looks, if the bounds are not shorter."""
ANSWER_SECONDS = 5.0
"""How long the rollout service may take to answer a look; then it counts as silent."""
REPLACEMENTS = 3
"""Times that a run goes on by itself with a new trainer in place of a stuck one."""
SERVICE = "rollout service"
WAITS_FOR_SERVICE = ("sampling", "publishing")
WAITS_FOR_TEACHERS = "distilling"


class Stuck(RunFailed):
    """The run was ended because an actor made no progress."""

    def __init__(self, message: str, again: bool) -> None:
        """`again`: the run is to go on by itself."""
        super().__init__(message)
        self.again = again


@dataclass
class _Watched:
    """What is known of one actor."""

    signs: Hashable
    """They change when there is progress."""
    since: float
    told: bool = False


class Watchdog:
    """Looks at a run's actors from a thread of the driver's."""

    def __init__(self, config: WatchdogConfig, cluster: Cluster, run: RunDirectory, stop: Callable[[], None]) -> None:
        """`stop` kills all actors, so that whoever waits for one returns."""
        self.config = config
        self.cluster = cluster
        self.run = run
        self.stop = stop
        self.verdict: Stuck | None = None
        self._known: dict[str, _Watched] = {}
        self._end = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during the block; raises `Stuck` when that was what ended it."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        except Exception as error:
            if self.verdict is not None:
                raise self.verdict from error
            raise
        finally:
            self._end.set()
            thread.join(2 * ANSWER_SECONDS)

    def _watch(self) -> None:
        bounds = [self.config.seconds, *self.config.phases.values()]
        told = False
        while not self._end.wait(min(LOOK_SECONDS, min(bounds) / 4)) and self.verdict is None:
            try:
                self.look()
            except Exception as error:  # one look that fails is no reason to look no more
                if not told:
                    message = f"the watchdog could not look at the actors: {type(error).__name__}: {error}"
                    with suppress(OSError):
                        self.run.append_event({"event": "warning", "message": message})
                told = True

    def look(self) -> None:
        """One look at all actors."""
        assert self.cluster.pulses is not None
        beats = {beat.actor: beat for beat in read_beats(self.cluster.pulses)}
        service = self.cluster.pool.health(ANSWER_SECONDS) if self.cluster.pool is not None else None
        service_signs, teacher_signs = (
            _signs_of(service),
            tuple((name, beat.count) for name, beat in beats.items() if name.startswith("teacher")),
        )
        waits = service is None or service.waiting + service.running > 0
        stuck = set()
        if self._is_stuck(SERVICE, _phase_of(service), service_signs) and waits:
            stuck.add(SERVICE)
            self._tell(SERVICE, _phase_of(service), service, None)
        for name, beat in sorted(beats.items()):  # teachers before the trainers that wait for them
            signs: Hashable = (beat.pid, beat.count, beat.phase)
            if beat.phase in WAITS_FOR_SERVICE:
                signs, blocked = (signs, service_signs), SERVICE in stuck
            elif beat.phase == WAITS_FOR_TEACHERS:
                signs, blocked = (signs, teacher_signs), any(one.startswith("teacher") for one in stuck)
            else:
                blocked = False
            if self._is_stuck(name, beat.phase, signs) and not blocked:
                stuck.add(name)
                self._tell(name, beat.phase, service, beat)

    def _is_stuck(self, actor: str, phase: str, signs: Hashable) -> bool:
        """Whether it has just been too long without progress."""
        now, known = time.monotonic(), self._known.get(actor)
        if known is None or known.signs != signs:
            self._known[actor] = _Watched(signs, now)
            return False
        if phase == IDLE or known.told or now - known.since < self.config.bound(phase):
            return False
        known.told = True
        return True

    def _tell(self, actor: str, phase: str, service: ServiceStats | None, beat: Beat | None) -> None:
        seconds = time.monotonic() - self._known[actor].since
        process = f" (process {beat.pid})" if beat is not None else ""
        queues = "the rollout service does not answer"
        if service is not None:
            queues = (
                f"{service.waiting} samples waiting, {service.running} in engines, {service.ready_groups} groups ready"
            )
        stacks = "(no stacks: it does not answer)"
        if beat is not None and self.cluster.pulses is not None:
            stacks = stacks_of(self.cluster.pulses, beat)
        elif service is not None:
            stacks = "(no stacks: it answers, but no worker makes a token)"
        said = f"{actor}{process} made no progress for {seconds:.0f} s in the phase {phase}; {queues}"
        self.run.append_event(
            {"event": "stuck", "actor": actor, "phase": phase, "seconds": seconds, "queues": queues,
             "action": self.config.action, "message": said, "stacks": stacks}
        )  # fmt: skip
        self._act(actor, said)

    def _act(self, actor: str, said: str) -> None:
        kind, _, number = actor.partition(" ")
        if self.config.action == "wait":
            return
        if self.config.action == "replace" and actor == SERVICE and self.cluster.pool is not None:
            self.cluster.pool.replace_service()
        elif self.config.action == "replace" and kind == "teacher":
            self.cluster.replace_teacher(int(number))
        else:
            self.verdict = Stuck(f"{said} (watchdog; its stacks are in {self.run.log_path})", self._replaces)
            self.stop()

    @property
    def _replaces(self) -> bool:
        return self.config.action == "replace"


def going_on(work: Callable[[], None]) -> None:
    """Do the work of a run, and again where a trainer was stuck that the recipe wants replaced."""
    for left in reversed(range(REPLACEMENTS + 1)):
        try:
            return work()
        except Stuck as stuck:
            if not stuck.again or not left:
                raise
            print(f"{stuck}\nGoing on with new actors", flush=True)


def _phase_of(service: ServiceStats | None) -> str:
    if service is None:
        return "silent"
    return "sampling" if service.waiting + service.running else IDLE


def _signs_of(service: ServiceStats | None) -> Hashable:
    if service is None:
        return None
    counts = service.waiting, service.running, service.ready_groups, service.quarantined
    return service.epoch, service.tokens, service.deaths, tuple(service.ready), counts
