"""A rollout worker: one engine in one Ray actor, stepped by a thread of its own.

What happens in the engine's thread, one after the other: steps, and between two steps whatever was asked for
(requests, new weights, scores). After each step the new tokens go to the worker's log, and only then are they reported.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from posttrain.errors import RunFailed
from rollouts.engine import Engine
from rollouts.log.writer import LogFailed, LogWriter
from rollouts.masks import FIELD as MASKS
from rollouts.masks import masks_of_tokens
from rollouts.routes import FIELD as ROUTES
from rollouts.routes import routes_of_tokens
from rollouts.settings import EngineInfo, EngineSettings
from rollouts.types import NewTokens, SampleRequest
from rollouts.weights import checksum_of, combined_checksum

if TYPE_CHECKING:
    from rollouts.loading import Verification
    from rollouts.publishing import PublishedWeights

IDLE_SECONDS = 0.05
"""How long the engine's thread sleeps at most when there is nothing to do."""

AUDIT_SECONDS = 1.0
AUDIT_SHARE = 0.01
"""An engine that works has its weights audited so often, or less where that would take more than this share of time."""


@dataclass(frozen=True)
class LoadReport:
    """A worker's word on the weights that stand in its engine."""

    version: int
    checksum: str
    """Over all tensors as they arrived (`combined_checksum`)."""
    verified: int
    """Engine parameters compared with what arrived."""
    unverified: tuple[str, ...]
    """Engine parameters that nothing could be compared with."""
    tensors: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class WorkerStats:
    """Totals of one worker since its start."""

    completions: int
    tokens: int
    """Tokens sampled."""
    busy_seconds: float
    """Time spent in steps of the engine, logging included."""
    idle_seconds: float
    """Time in which the engine's thread waited for something to do."""
    steps: int
    version: int | None
    rss_bytes: int
    alive_seconds: float
    pid: int


@dataclass(frozen=True)
class Report:
    """What a worker has to say when it is polled."""

    finished: list[list[NewTokens]]
    """Samples that ended since the poll before: what this worker sampled of each, in order."""
    running: dict[str, int]
    """Samples in progress, with their tokens so far."""
    steps: int
    tokens: int
    stalled_seconds: float
    """Since there is something to do and no token came of it."""
    version: int | None
    failure: str | None
    """The traceback of the engine's thread, which has ended."""
    idle_seconds: float
    """Time since the start in which the engine's thread waited for something to do."""


class RolloutWorker:
    """The methods of the actor. `start` builds the engine, not the constructor: so its errors arrive as they are."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._loop: EngineLoop | None = None

    def prepare(self) -> tuple[int, str]:
        """Import what an engine needs, which takes longer than to build a small one; returns process and node."""
        if self._settings.kind == "native":
            from rollouts.plugin import register

            register()
        import vllm.v1.worker.gpu_model_runner
        from vllm import LLM

        del LLM, vllm
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def start(self, log_directory: str, name: str, incarnation: int) -> EngineInfo:
        """Build the engine. It has no weights yet.

        Args:
            log_directory: Of the run.
            name: Of this worker.
            incarnation: A number that no worker of this name had before.

        Raises:
            BadInput: settings that the model cannot serve.
        """
        # Also answers when the interpreter is stuck in a call that does not let go of it.
        self._stacks = stacks_file(log_directory, name, incarnation).open("w")
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        self._loop = EngineLoop(self._settings, LogWriter(log_directory, name, incarnation))
        return self._loop.info

    def submit(self, requests: Sequence[SampleRequest], cancelled: Sequence[str]) -> None:
        """Take in samples, and forget others."""
        self._running.call(lambda: self._running.take(requests, cancelled))

    def poll(self, seconds: float) -> Report:
        """What is new; waits up to `seconds` for a sample to end."""
        return self._running.report(seconds)

    def publish(self, published: PublishedWeights) -> LoadReport:
        """Bring the engine to a version of the weights, between two steps.

        Raises:
            RunFailed: gone or damaged on the way, or a version that does not grow: the engine keeps the weights it had.
                Incomplete, unknown names, or not what stands in the engine afterwards: the engine serves nothing
                until a good publication.
        """
        from rollouts.publishing import receive

        begin = time.monotonic()
        report = self._running.load(
            lambda engine: receive(engine, published), published.version, combined_checksum(published.checksums)
        )
        return replace(report, tensors=len(published.checksums), seconds=time.monotonic() - begin)

    def load_checkpoint(self, path: str, version: int) -> LoadReport:
        """Read the weights of a checkpoint directory from disk into the engine; errors as `publish`, and BadInput."""
        from rollouts.loading import read_checkpoint

        begin = time.monotonic()
        tensors = read_checkpoint(path, self._settings.kind)
        checksums = {name: checksum_of(tensor) for name, tensor in tensors.items()}
        report = self._running.load(
            lambda engine: engine.load_weights(tensors, version, checksums), version, combined_checksum(checksums)
        )
        return replace(report, tensors=len(tensors), seconds=time.monotonic() - begin)

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See `Engine.score`. Samples in progress are held meanwhile."""
        return self._running.call(lambda: self._running.engine.score(prompts, completions))

    def version(self) -> int | None:
        """Of the weights in the engine; None when it serves nothing."""
        return self._running.engine.version

    def stats(self) -> WorkerStats:
        """Totals since the start, and the process's resident memory now."""
        return self._running.stats()

    def dump(self) -> str:
        """What the worker is doing: the stacks of all its threads, and its samples."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        return f"{self._running.describe()}\n\n{stacks}"

    @property
    def _running(self) -> EngineLoop:
        if self._loop is None:
            raise RunFailed("the rollout worker has not been started")
        return self._loop


def stacks_file(log_directory: str | Path, name: str, incarnation: int) -> Path:
    """Where a worker writes the stacks of its threads on SIGUSR1."""
    return Path(log_directory) / f"{name}-{incarnation}.stacks"


class EngineLoop:
    """An engine and the thread that it lives in.

    Attributes:
        engine: To be touched in the thread only (`call`).
        info: Of the engine.
    """

    def __init__(self, settings: EngineSettings, log: LogWriter) -> None:
        self._log = log
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._parts: dict[str, list[NewTokens]] = {}
        """What was sampled here of samples in progress."""
        self._finished: list[list[NewTokens]] = []
        self._news = threading.Condition()
        self._failure: str | None = None
        self._log_failure: LogFailed | None = None
        self._begin = time.monotonic()
        self._busy_since: float | None = None
        self._busy_seconds = self._idle_seconds = 0.0
        self._steps = self._tokens = self._completions = 0
        self._next_audit = self._begin + AUDIT_SECONDS
        self.engine: Engine
        ready: Future[EngineInfo] = Future()
        threading.Thread(target=self._run, args=(settings, ready), name="engine", daemon=True).start()
        self.info = ready.result()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the engine's thread, between two steps; returns what it returns, raises what it raises."""
        future: Future[Any] = Future()
        self._calls.put((function, future))
        if self._failure is not None:  # nobody takes it any more
            raise RunFailed(f"the engine has failed: {self._failure.splitlines()[-1]}")
        return future.result()

    def load(self, change: Callable[[Engine], Verification], version: int, checksum: str) -> LoadReport:
        """Change the engine's weights between two steps, and note in the log what it holds from there on."""

        def load() -> LoadReport:
            found = change(self.engine)
            self._log.weights(version, checksum)
            return LoadReport(version, checksum, found.verified, tuple(found.unverified))

        return self.call(load)

    def take(self, requests: Sequence[SampleRequest], cancelled: Sequence[str]) -> None:
        """Take in samples and forget others; in the engine's thread."""
        for sample_id in cancelled:
            if sample_id in self.engine.samples:
                self._log.cancel(sample_id)
                self._parts.pop(sample_id, None)
        self.engine.abort(cancelled)
        for request in requests:
            self.engine.add(request)
            self._log.open(request)

    def report(self, seconds: float) -> Report:
        """What ended since the report before, durable in the log; waits up to `seconds` for something to end.

        Raises:
            LogFailed: the log takes nothing more; what it has is all that there is.
        """
        with self._news:
            self._news.wait_for(lambda: self._finished or self._failure, seconds)
            finished, self._finished = self._finished, []
        if self._log_failure is not None:
            raise self._log_failure
        # Copied at once: the engine's thread goes on changing it.
        running = {sample.id: len(sample.token_ids) for sample in list(self.engine.samples.values())}
        if finished:
            self._log.sync()
        version, stalled = self.engine.version, self._stalled_seconds()
        return Report(finished, running, self._steps, self._tokens, stalled, version, self._failure, self._idle_seconds)

    def stats(self) -> WorkerStats:
        """See `WorkerStats`."""
        import psutil

        return WorkerStats(
            self._completions,
            self._tokens,
            self._busy_seconds,
            self._idle_seconds,
            self._steps,
            self.engine.version,
            psutil.Process().memory_info().rss,
            time.monotonic() - self._begin,
            os.getpid(),
        )

    def describe(self) -> str:
        """Its state, for people."""
        lines = [
            f"process {os.getpid()}, weights of version {self.engine.version}, {self._steps} steps, "
            f"{self._tokens} tokens, none for {self._stalled_seconds():.1f} s; samples in progress:"
        ]
        for sample in list(self.engine.samples.values()):
            lines.append(f"  {sample.id}: {len(sample.prompt_ids)} + {len(sample.token_ids)} tokens")
        return "\n".join(lines)

    def _stalled_seconds(self) -> float:
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self, settings: EngineSettings, ready: Future[EngineInfo]) -> None:
        try:
            self.engine = Engine(settings)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(self.engine.info)
        try:
            while True:
                self._run_calls()
                if self.engine.busy:
                    self._audit()
                    self._step()
        except BaseException as error:
            self._log_failure = error if isinstance(error, LogFailed) else None
            self._fail(traceback.format_exc())

    def _run_calls(self) -> None:
        """Do all that is asked for; wait a little if there is nothing else to do."""
        try:
            call = self._calls.get_nowait() if self.engine.busy else self._wait()
            while True:
                self._busy_since = self._busy_since or time.monotonic()
                _answer(*call)
                call = self._calls.get_nowait()
        except queue.Empty:
            pass
        if not self.engine.busy:
            self._busy_since = None

    def _wait(self) -> tuple[Callable[[], Any], Future[Any]]:
        """The next call; raises `queue.Empty` after a moment without one."""
        begin = time.monotonic()
        try:
            return self._calls.get(timeout=IDLE_SECONDS)
        finally:
            self._idle_seconds += time.monotonic() - begin

    def _audit(self) -> None:
        """Find out, now and then, whether the weights are still those that were loaded; if not, the engine ends."""
        begin = time.monotonic()
        if begin >= self._next_audit:
            self.engine.audit()
            end = time.monotonic()
            self._next_audit = end + max(AUDIT_SECONDS, (end - begin) / AUDIT_SHARE)

    def _step(self) -> None:
        begin = time.monotonic()
        self._busy_since = self._busy_since or begin
        steps = self.engine.step()
        self._log.append(steps, {new.id: fields for new in steps if (fields := fields_of(new))})
        self._steps += 1
        for new in steps:
            self._parts.setdefault(new.id, []).append(new)
            self._tokens += len(new.token_ids)
        ended = [self._parts.pop(new.id) for new in steps if new.finish_reason is not None]
        end = time.monotonic()
        self._busy_seconds += end - begin
        if steps:
            self._busy_since = end
        if ended:
            self._completions += len(ended)
            with self._news:
                self._finished.extend(ended)
                self._news.notify_all()

    def _fail(self, failure: str) -> None:
        with self._news:
            self._failure = failure
            self._news.notify_all()
        while True:
            try:
                _, future = self._calls.get(timeout=1)
            except queue.Empty:
                return
            future.set_exception(RunFailed(f"the engine has failed: {failure.splitlines()[-1]}"))


def fields_of(new: NewTokens) -> dict[str, list[bytes]]:
    """What the log keeps of tokens beside the tokens."""
    routes = {ROUTES: routes_of_tokens(new)} if new.routes else {}
    return routes | ({MASKS: masks_of_tokens(new)} if new.mask else {})


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
