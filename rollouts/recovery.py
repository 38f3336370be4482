"""From what the log has of a sample to where it goes on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rollouts.log import format as log_format
from rollouts.log.format import SegmentName
from rollouts.log.reader import Attempt, RecoveredRequest, WriterState, open_segment
from rollouts.masks import FIELD as MASKS
from rollouts.routes import FIELD as ROUTES
from rollouts.scheduler import Progress
from rollouts.types import GroupRequest


def read_attempts(directory: Path, writer: tuple[str, int], wanted: Collection[str]) -> dict[str, Attempt]:
    """What one incarnation of a worker logged of the samples that it had when it ended; the latest attempt of each.

    A sample's records all lie behind the one that opened it, so that older segments need not be read.
    """
    state = WriterState(writer)
    names = [name for name in log_format.segments(directory) if name.writer == writer]
    for name in names[_first_segment(directory, names, set(wanted)) :]:
        segment = open_segment(directory, name)
        if segment is not None:
            state.begin_segment()
            for record in segment:
                state.take(record)
    return {attempt.opened.id: attempt for attempt in state.attempts.values() if attempt.opened.id in wanted}


def _first_segment(directory: Path, names: Sequence[SegmentName], missing: set[str]) -> int:
    """Where the first of these samples was opened; 0 if one of them is nowhere."""
    for number in reversed(range(len(names))):
        for record in open_segment(directory, names[number]) or ():
            if record.kind == log_format.OPENED:
                missing.discard(log_format.decode_opened(record.payload).id)
        if not missing:
            return number
    return 0


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
        *(
            known + attempt.fields.get(name, [b""] * len(attempt.token_ids))
            for name, known in ((ROUTES, before.routes), (MASKS, before.masks))
        ),
    )


def recovered_progress(logged: RecoveredRequest, group: GroupRequest) -> Progress:
    """What the log had of a sample; nothing if its id belonged to another prompt then."""
    if logged.prompt_ids != group.prompt_ids or logged.sampling != group.sampling:
        return Progress(attempt=logged.attempt)
    routes, masks = (logged.fields.get(name, [b""] * len(logged.token_ids)) for name in (ROUTES, MASKS))
    tokens = logged.token_ids, logged.logprobs, logged.versions
    return Progress(*tokens, logged.finish_reason, logged.attempt, routes, masks)
