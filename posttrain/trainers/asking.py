"""A batch's samples on their way to their teachers: who is asked, when, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from torch import Tensor

from distill.canary import Canary
from distill.store import TeacherWork
from posttrain.trainers.generation import Group
from posttrain.trainers.jobs import OpdJob, Teacher
from posttrain.trainers.progress import Progress


class Teachers(Protocol):
    """The teachers' side (`distill.pool.TeacherPool`). A teacher is named by its checkpoint: a directory or a URL."""

    def examine(self, teachers: Sequence[str], canary: Canary, outside: Sequence[str]) -> None: ...

    def hidden_states(
        self, teacher: str, sequences: Sequence[Sequence[int]], kept: Sequence[int], dtype: str | None
    ) -> Callable[[], Tensor]: ...

    def head(self, teacher: str) -> Callable[[], Tensor]: ...

    def release(self, teacher: str) -> None: ...

    def take_work(self) -> dict[str, TeacherWork]: ...


@dataclass
class Taught:
    """A domain's part of a batch, on its way to its teachers."""

    domain: str
    tokens: int
    samples: int
    length: float
    """Mean, of an answer."""
    states: list[tuple[Teacher, Callable[[], Tensor]]]


class Asking:
    """Sends each domain's samples to its teachers, as soon as the last of them is finished.

    A domain's samples go together, in one request to each teacher, so that a teacher is loaded once in a step. While
    they are scored, the samples of the domains behind them are still being generated (or, when updates are in flight,
    the next batch), and then the student's own forward pass runs.
    """

    def __init__(self, job: OpdJob, teachers: Teachers, progress: Progress) -> None:
        self.job = job
        self.teachers = teachers
        self.progress = progress
        self.step = 1
        """The one whose samples are sent next."""
        self._ahead: dict[tuple[str, ...], Taught] = {}
        """What was sent before its batch was whole, by the ids of its groups."""
        self._began: float | None = None
        """When the first samples of the batch were sent."""

    def state_dict(self) -> dict[str, int]:
        """For a snapshot: what was sent for a batch that was not learned from is sent again."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What `state_dict` returned."""
        self.step = state["step"]

    def domain_finished(self, groups: Sequence[Group]) -> None:
        """All samples of a domain in the coming batch: send them."""
        self._ahead[_ids(groups)] = self._send(groups)

    def batch_finished(self, groups: Sequence[Group]) -> list[Taught]:
        """The whole batch, one domain after the other: send what was not sent yet, and report what was sampled."""
        now = time.perf_counter()
        self.progress.add("seconds_asked_ahead", now - (self._began or now))
        taught = []
        for _, members in groupby(groups, key=lambda group: group.prompt.domain):
            own = list(members)
            taught.append(self._ahead.get(_ids(own)) or self._send(own))
        total = sum(one.samples for one in taught)
        for one in taught:
            self.progress.add(f"completion_length/{one.domain}", one.length)
            self.progress.add(f"share/{one.domain}", one.samples / total)
        self._ahead.clear()
        self.step += 1
        return taught

    def batch_learned(self) -> None:
        """Report what the teachers did since the first samples of the batch were sent to them."""
        names = {teacher.checkpoint: teacher.name for teacher in self.job.all_teachers()}
        elapsed = time.perf_counter() - (self._began or 0.0)
        self._began = None
        for checkpoint, work in self.teachers.take_work().items():
            name = names[checkpoint]
            self.progress.add(f"seconds_teacher/{name}", work.seconds_compute)
            self.progress.add(f"seconds_teacher_load/{name}", work.seconds_load + work.seconds_swap)
            self.progress.add(f"teacher_bytes_loaded/{name}", work.bytes_loaded)
            self.progress.add(f"teacher_bytes_returned/{name}", work.bytes_returned)
            self.progress.add(f"teacher_busy/{name}", work.seconds_compute / elapsed)
        self._release()

    def _send(self, groups: Sequence[Group]) -> Taught:
        self._began = self._began or time.perf_counter()
        domain = groups[0].prompt.domain
        pairs = [(group.request.prompt_ids, sample) for group in groups for sample in group.completions]
        sequences = [prompt + sample.token_ids for prompt, sample in pairs]
        kept = [len(sample.token_ids) for _, sample in pairs]
        dtype = self.job.config.hidden_dtype
        states = [
            (teacher, self.teachers.hidden_states(teacher.checkpoint, sequences, kept, dtype))
            for teacher in self.job.teachers_of(domain, self.step)
        ]
        sampled = sum(sum(sample.loss_mask) for _, sample in pairs)
        return Taught(domain, sum(kept), len(pairs), sampled / len(pairs), states)

    def _release(self) -> None:
        """The batch was learned from: nobody asks any more for heads of teachers whose last step that was."""
        teachers = self.job.all_teachers()
        needed = {one.checkpoint for one in teachers if one.last_step is None or one.last_step >= self.step}
        for checkpoint in {one.checkpoint for one in teachers if one.last_step == self.step - 1} - needed:
            self.teachers.release(checkpoint)


def _ids(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(group.request.id for group in groups)
