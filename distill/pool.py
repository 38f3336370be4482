"""The teachers as the student's trainer sees them: a few Ray workers that each serve any number of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.canary import Canary
from distill.store import DamagedBlock, HiddenBlock, TeacherWork, joined
from distill.teacher import TeacherWorker
from posttrain.errors import BadInput, RunFailed
from rollouts.weights import PackedTensor


@dataclass(frozen=True)
class _Request:
    """Samples that were sent to a teacher."""

    teacher: str
    sequences: Sequence[Sequence[int]]
    kept: Sequence[int]
    worker: int
    references: list[Any]
    """What it took, then the blocks; emptied as they are read."""


class TeacherPool:
    """Requests run while the trainer goes on. The pool can be sent to another actor.

    Each teacher belongs to one worker, so that its weights are in memory once. When a worker is lost for good, or a
    block is damaged, what it was asked for goes to another one: samples are never left out.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers = list(workers)
        self._lost: set[int] = set()
        self._heads: dict[str, tuple[int, Any]] = {}
        """Who was asked, and the reference."""
        self._owners: dict[str, int] = {}
        self._work: dict[str, TeacherWork] = {}

    def examine(self, teachers: Sequence[str], canary: Canary, outside: Sequence[str] = ()) -> None:
        """Hold every teacher against the canary, and fetch its head.

        Args:
            outside: those of the teachers that this run did not train; they are looked at more closely.

        Raises:
            BadInput: one that cannot teach; nothing is to be started then.
        """
        asked = {}
        for teacher in dict.fromkeys(teachers):
            owner = self._owner(teacher)
            asked[teacher] = self.workers[owner].examine.remote(teacher, canary, teacher in outside)
            self._heads[teacher] = owner, self.workers[owner].head.remote(teacher)  # while the teacher is in memory
        for reference in asked.values():
            _get(reference)

    def hidden_states(
        self, teacher: str, sequences: Sequence[Sequence[int]], kept: Sequence[int], dtype: str | None = None
    ) -> Callable[[], Tensor]:
        """Start `TeacherWorker.hidden_states`; `[sum(kept), G]` is there when the returned function is called, once."""
        request = _Request(teacher, sequences, kept, -1, [])
        return partial(self._states, self._send(request, dtype), dtype)

    def head(self, teacher: str) -> Callable[[], Tensor]:
        """A function that copies the teacher's head out of the object store, where it stays for the stage."""
        return partial(self._head, teacher)

    def release(self, teacher: str) -> None:
        """The teacher is not asked any more: its head may go from the object store."""
        self._heads.pop(teacher, None)
        self._owners.pop(teacher, None)

    def take_work(self) -> dict[str, TeacherWork]:
        """What the states that were read since the last call have cost, by teacher."""
        work, self._work = self._work, {}
        return work

    def _send(self, request: _Request, dtype: str | None) -> _Request:
        owner = self._owner(request.teacher)
        method = self.workers[owner].hidden_states.options(num_returns=len(request.sequences) + 1)
        references = method.remote(request.teacher, request.sequences, request.kept, dtype)
        return replace(request, worker=owner, references=references)

    def _states(self, request: _Request, dtype: str | None) -> Tensor:
        reasons: list[str] = []
        while True:
            try:
                return joined(request.teacher, request.kept, self._blocks(request))
            except Exception as error:
                reasons.append(f"worker {request.worker}: {' '.join(str(_plain(error)).split())[:300]}")
                if not _elsewhere(error):
                    raise _plain(error) from error
                if len(reasons) > len(self.workers):
                    raise RunFailed(f"the teacher {request.teacher} gives no answer ({'; '.join(reasons)})") from error
                self._pass_on(request.teacher, request.worker, error)
                request = self._send(request, dtype)

    def _blocks(self, request: _Request) -> Iterator[HiddenBlock]:
        import ray

        work = ray.get(request.references.pop(0))
        while request.references:
            # the reference goes before the block is used, and the store's copy with the block
            yield ray.get(request.references.pop(0))
        self._work[request.teacher] = self._work.get(request.teacher, TeacherWork()) + work

    def _head(self, teacher: str) -> Tensor:
        import ray

        attempts = 0
        while True:
            if teacher not in self._heads:
                owner = self._owner(teacher)
                self._heads[teacher] = owner, self.workers[owner].head.remote(teacher)
            owner, reference = self._heads[teacher]  # the teacher may have gone to another worker meanwhile
            try:
                packed: PackedTensor = ray.get(reference)
                return packed.tensor().clone()
            except Exception as error:
                attempts += 1
                if not _elsewhere(error) or attempts > len(self.workers):
                    raise _plain(error) from error
                del self._heads[teacher]
                self._pass_on(teacher, owner, error)

    def _pass_on(self, teacher: str, worker: int, error: Exception) -> None:
        """Give the teacher to another worker, and all others of this one if it is gone."""
        from ray.exceptions import RayActorError

        if isinstance(error, RayActorError):
            self._lost.add(worker)
            self._owners = {name: owner for name, owner in self._owners.items() if owner not in self._lost}
        elif self._owners.get(teacher) == worker:
            left = self._left()
            self._owners[teacher] = left[(left.index(worker) + 1) % len(left)] if worker in left else left[0]

    def _left(self) -> list[int]:
        left = [index for index in range(len(self.workers)) if index not in self._lost]
        if not left:
            raise RunFailed("no teacher worker is left; see the log of the run for why they ended")
        return left

    def _owner(self, teacher: str) -> int:
        if teacher not in self._owners:
            left = self._left()
            counts = [sum(owner == index for owner in self._owners.values()) for index in left]
            self._owners[teacher] = left[counts.index(min(counts))]
        return self._owners[teacher]


def start_teachers(
    count: int,
    family: str,
    budget_bytes: int,
    threads: int = 1,
    actor_options: dict[str, Any] | None = None,
    pulses: Path | None = None,
) -> TeacherPool:
    """Start `count` teacher actors. `actor_options` go to Ray (`num_cpus`, `runtime_env`, ...).

    `pulses`: the directory where they leave signs of life.

    A worker keeps nothing but a cache, so a dead one is restarted and its calls are repeated. It takes two calls at a
    time: while it computes one, it loads the teacher of the next.
    """
    import ray

    options = {"num_cpus": threads, "max_restarts": 3, "max_task_retries": 3, "max_concurrency": 2}
    actor = ray.remote(TeacherWorker).options(**(options | (actor_options or {})))
    return TeacherPool(
        [
            actor.remote(family, budget_bytes, threads, pulses=pulses and (pulses, f"teacher {index}"))
            for index in range(count)
        ]
    )


def _get(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except Exception as error:
        raise _plain(error) from error


def _elsewhere(error: Exception) -> bool:
    """Whether another worker may succeed: this one died, cannot read the checkpoint, or its answer was lost."""
    from ray.exceptions import ObjectLostError, RayActorError

    return isinstance(error, RayActorError | ObjectLostError | DamagedBlock) or isinstance(_plain(error), BadInput)


def _plain(error: Exception) -> Exception:
    """The project's own error where that is the cause."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BadInput | RunFailed) else error
