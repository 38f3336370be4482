"""From what the log has of a sample to where it goes on."""

from __future__ import annotations

from pathlib import Path

from rollouts.log import format as log_format
from rollouts.log.reader import Attempt, RecoveredRequest, WriterState, open_segment
from rollouts.routes import FIELD as ROUTES
from rollouts.scheduler import Progress
from rollouts.types import GroupRequest


def read_attempts(directory: Path, writer: tuple[str, int]) -> dict[str, Attempt]:
    """What one incarnation of a worker logged, by sample; the latest attempt of each."""
    state = WriterState(writer)
    found: dict[str, Attempt] = {}
    for name in log_format.segments(directory):
        segment = open_segment(directory, name) if name.writer == writer else None
        if segment is not None:
            state.begin_segment()
            for record in segment:
                state.take(record)
    for attempt in state.attempts.values():
        found[attempt.opened.id] = attempt
    return found


def continued(before: Progress, attempt: Attempt) -> Progress:
    """A sample after an attempt that began where it was."""
    begin = attempt.opened.begin
    if attempt.opened.attempt != before.attempt or begin != len(before.token_ids):
        return before
    length = begin + len(attempt.token_ids)
    finished = attempt.finished is not None and attempt.finished[0] == length
    return Progress(
        before.token_ids + attempt.token_ids,
        before.logprobs + attempt.logprobs,
        before.versions + attempt.versions,
        attempt.finished[1] if finished and attempt.finished else None,
        before.attempt,
        before.routes + attempt.fields.get(ROUTES, [b""] * len(attempt.token_ids)),
    )


def recovered_progress(logged: RecoveredRequest, group: GroupRequest) -> Progress:
    """What the log had of a sample; nothing if its id belonged to another prompt then."""
    if logged.prompt_ids != group.prompt_ids or logged.sampling != group.sampling:
        return Progress(attempt=logged.attempt)
    routes = logged.fields.get(ROUTES, [b""] * len(logged.token_ids))
    return Progress(logged.token_ids, logged.logprobs, logged.versions, logged.finish_reason, logged.attempt, routes)
