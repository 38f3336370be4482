"""The driver's side of the rollout log: what was consumed, and which files are no longer needed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.errors import RunFailed
from posttrain.files import atomic_write
from rollouts.log import format
from rollouts.log.format import SegmentName
from rollouts.log.reader import ACKNOWLEDGED_NAME, Record, RowsDecoder, open_segment, read_acknowledged

REWRITE_SHARE = 0.25
"""A segment is written anew when less than this share of its bytes belongs to requests that are still wanted."""
REWRITE_BYTES = 64 << 10
"""Smaller segments are left as they are until they can be deleted."""
FORGET_MARGIN = 1000
"""Acknowledgements that may be remembered for nothing before their file is written anew."""


@dataclass(frozen=True)
class Compaction:
    """What one `compact` did."""

    deleted: int
    rewritten: int
    freed_bytes: int


Request = tuple[str, int]
"""Id and attempt."""


@dataclass
class _Index:
    """Whose records a complete segment holds."""

    size: int
    bytes_of: dict[Request, int] = field(default_factory=dict)


class LogKeeper:
    """Remembers acknowledged requests in the log's directory and deletes what only they needed.

    An acknowledgement is lost when the machine dies within moments of it; its request then shows up once more.
    A segment is deleted when all its requests are acknowledged and its writer has left it (ended, or gone on to the
    next). A segment that is mostly dead is written anew without the dead records. One thread at a time calls `compact`;
    the others may go on acknowledging meanwhile.

    Raises:
        RunFailed: another process keeps this directory, or the file system fails.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._directory, os.O_RDONLY)
        except OSError as error:
            raise self._failed(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise RunFailed(f"{self._directory}: the rollout log belongs to a run that is still alive") from None
        self.acknowledged: dict[str, int] = read_acknowledged(self._directory)[0]
        # An acknowledgement can be forgotten when every segment is gone that was there when it came.
        self._batches = [(set(self.acknowledged), set(format.segments(self._directory)))]
        self._indices: dict[SegmentName, _Index] = {}
        # The requests behind the handles of each writer; a handle that is not here belongs to nobody who is wanted.
        self._requests: dict[tuple[str, int], dict[int, Request]] = {}
        # Held while acknowledgements change: `compact` may run in a thread of its own.
        self._changing = threading.Lock()
        self._rewrite_acknowledged()

    def acknowledge(self, attempts: Mapping[str, int]) -> None:
        """These requests were consumed for good: id → its latest attempt. Later attempts of an id are new requests."""
        if not attempts:
            return
        payload, start = format.encode_acknowledged(attempts), format.salt(ACKNOWLEDGED_NAME)
        with self._changing:
            record = format.frame(format.ACKNOWLEDGED, self._sequence, payload, start)
            try:
                with (self._directory / ACKNOWLEDGED_NAME).open("ab", buffering=0) as file:
                    size = file.tell()
                    if file.write(record) != len(record):
                        file.truncate(size)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise self._failed(error) from error
            self._sequence += 1
            self.acknowledged.update(attempts)
            self._batches.append((set(attempts), set(format.segments(self._directory))))

    def compact(self) -> Compaction:
        """Delete and rewrite what can be; cheap when nothing changed since the last call."""
        deleted = rewritten = freed = 0
        try:
            for name in format.segments(self._directory):
                index = self._index(name)
                if index is None:
                    continue
                live = sum(size for request, size in index.bytes_of.items() if self._live(request))
                if live == 0:
                    (self._directory / str(name)).unlink()
                    del self._indices[name]
                    deleted += 1
                    freed += index.size
                elif index.size >= REWRITE_BYTES and live < REWRITE_SHARE * index.size:
                    freed += index.size - self._rewrite(name)
                    rewritten += 1
            with self._changing:
                self._forget_old_acknowledgements()
        except OSError as error:
            raise self._failed(error) from error
        return Compaction(deleted, rewritten, freed)

    def close(self) -> None:
        """Leave the directory to others."""
        os.close(self._lock)

    def _live(self, request: Request) -> bool:
        name, attempt = request
        return attempt > self.acknowledged.get(name, -1)

    def _index(self, name: SegmentName) -> _Index | None:
        """None while the segment's writer is at it."""
        if name in self._indices:
            return self._indices[name]
        path = self._directory / str(name)
        segment = open_segment(self._directory, name) if _left(path) else None
        if segment is None:
            return None
        requests = self._requests.setdefault(name.writer, {})
        index = _Index(path.stat().st_size)
        for opened, handles, size in _shares(segment):
            requests.update(opened)
            for handle in handles:
                if handle in requests:
                    request = requests[handle]
                    index.bytes_of[request] = index.bytes_of.get(request, 0) + size // len(handles)
        self._indices[name] = index
        return index

    def _rewrite(self, name: SegmentName) -> int:
        """Write a segment without its dead records. Returns the new size."""
        segment = open_segment(self._directory, name)
        assert segment is not None, name
        requests = self._requests[name.writer]
        live = {handle for handle, request in requests.items() if self._live(request)}
        start = format.salt(str(name))
        parts = [format.header()]
        decode_rows = RowsDecoder()
        for record in segment:
            kind, payload = record.kind, bytes(record.payload)
            if kind in (format.TOKENS, format.NEXT):
                rows = decode_rows(record)
                left = rows.only(live) if rows is not None else None
                if left is not None and left.handles:
                    parts.append(format.frame(format.TOKENS, len(parts) - 1, format.encode_rows(left), start))
            elif kind == format.WEIGHTS or format.decode_handle(record.payload) in live:
                parts.append(format.frame(kind, len(parts) - 1, payload, start))
        data = b"".join(parts)
        atomic_write(self._directory / str(name), data)
        del self._indices[name]
        self._index(name)
        return len(data)

    def _forget_old_acknowledgements(self) -> None:
        there = set(format.segments(self._directory))
        writers = {name.writer for name in there}
        self._requests = {
            writer: {handle: request for handle, request in requests.items() if self._live(request)}
            for writer, requests in self._requests.items()
            if writer in writers
        }
        left = [(ids, names & there) for ids, names in self._batches]
        self._batches = [(ids, names) for ids, names in left if names]
        wanted = set().union(*(ids for ids, _ in self._batches))
        if len(self.acknowledged) > 2 * len(wanted) + FORGET_MARGIN:
            self.acknowledged = {name: attempt for name, attempt in self.acknowledged.items() if name in wanted}
            self._rewrite_acknowledged()

    def _rewrite_acknowledged(self) -> None:
        start = format.salt(ACKNOWLEDGED_NAME)
        record = format.frame(format.ACKNOWLEDGED, 0, format.encode_acknowledged(self.acknowledged), start)
        try:
            atomic_write(self._directory / ACKNOWLEDGED_NAME, format.header() + record)
        except OSError as error:
            raise self._failed(error) from error
        self._sequence = 1

    def _failed(self, error: OSError) -> RunFailed:
        return RunFailed(
            f"{self._directory}: the rollout log cannot be kept ({error.strerror}); free space or repair this file "
            "system, then resume the run"
        )


def _shares(segment: Iterable[Record]) -> Iterator[tuple[dict[int, Request], list[int], int]]:
    """What a segment's bytes belong to: new handles with their requests, the handles that share them, how many bytes.

    Tokens are not looked at, and steps of the same rows are added up: this runs while the service works.
    """
    steps: dict[int, tuple[list[int], int]] = {}
    for record in segment:
        kind, payload, size = record.kind, record.payload, format.FRAME.size + len(record.payload)
        if kind == format.TOKENS:
            steps[record.sequence] = format.row_handles(payload), size
        elif kind == format.NEXT:
            handles, before = steps.get(format.referred(payload), ([], 0))
            steps[format.referred(payload)] = handles, before + size
        elif kind == format.OPENED:
            opened = format.decode_opened(payload)
            yield {opened.handle: (opened.id, opened.attempt)}, [opened.handle], size
        elif kind != format.WEIGHTS:
            yield {}, [format.decode_handle(payload)], size
    for handles, size in steps.values():
        yield {}, handles, size


def _left(path: Path) -> bool:
    """Whether a segment's writer is done with it. The kernel gives up a dead writer's lock."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False
