"""The writer of the rollout log: one for each incarnation of a worker, called by the thread that runs the engine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from posttrain.errors import RunFailed
from posttrain.files import sync_directory
from rollouts.log import format
from rollouts.log.format import Rows, SegmentName
from rollouts.types import NewTokens, SampleRequest

SEGMENT_BYTES = 16 << 20
SYNC_SECONDS = 0.2

Fields = Mapping[str, Mapping[str, Sequence[bytes]]]
"""Request id → name of a per-token field (routes, sampling mask) → a blob for each of the step's tokens."""


class LogFailed(RunFailed):
    """The log cannot take anything more: a full disk, say. Another worker would fare no better."""


class SegmentFile:
    """A new append-only file of records. A lock on it tells other processes that its writer lives.

    The file gets its name when it is locked: under that name nobody ever sees it without a lock before it is complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._salt = format.salt(path.name)
        self.sequence = 0
        self.size = 0
        if path.exists():
            raise RunFailed(f"{path}: exists; a worker that starts again needs a new incarnation number")
        temporary = path.with_name(f".{path.name}.new")
        with _failures(path, "cannot be created"):
            self.descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            self._write(format.header())
            with _failures(path, "cannot be created"):
                os.rename(temporary, path)
                sync_directory(path.parent)
        except BaseException:
            os.close(self.descriptor)
            raise

    def append(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Write records (kind, payload) with one system call. On an error none of them is left in the file."""
        framed = [
            format.frame(kind, self.sequence + number, payload, self._salt)
            for number, (kind, payload) in enumerate(records)
        ]
        self._write(b"".join(framed))
        self.sequence += len(records)

    def sync(self) -> None:
        """Make everything that was written durable."""
        with _failures(self.path, "cannot be made durable"):
            os.fsync(self.descriptor)

    def close(self) -> None:
        """Give up the file and its lock."""
        os.close(self.descriptor)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            with _failures(self.path, "cannot be written"):
                while rest:
                    rest = rest[os.write(self.descriptor, rest) :]
        except RunFailed:
            # Readers would cut the half record anyway; without it the file is whole.
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, self.size)
            raise
        self.size += len(data)


class LogWriter:
    """Appends what an engine does to segments of its own.

    When a method has returned, what it was told survives the death of this process. A thread makes it survive the
    death of the machine, `sync_seconds` later at most; `sync` does so at once. `written` and `synced` count records:
    what was appended while `written` was n is durable as soon as `synced` is n.

    One thread calls `open`, `append`, `cancel` and `weights`; any thread may call `sync` and read `synced`.

    Args:
        directory: The log's directory; made if it is not there.
        worker: The worker's name.
        incarnation: A number that this worker never had before (`next_incarnation`).
        segment_bytes: A new segment is begun when one has grown to this size.
        sync_seconds: Time between two fsyncs.

    Raises:
        RunFailed: (any method) the disk is full or broken, or the segment exists. What was written before stays
            readable; the writer takes nothing more.
    """

    def __init__(
        self,
        directory: str | Path,
        worker: str,
        incarnation: int,
        segment_bytes: int = SEGMENT_BYTES,
        sync_seconds: float = SYNC_SECONDS,
    ) -> None:
        self._directory = Path(directory)
        with _failures(self._directory, "cannot be created"):
            self._directory.mkdir(parents=True, exist_ok=True)
        self._name = SegmentName(worker, incarnation, 0)
        self._segment_bytes = segment_bytes
        self._handles: dict[str, int] = {}
        self._lengths: dict[str, int] = {}
        self._opened = 0
        self._rows: tuple[int, Rows] | None = None
        self._failure: RunFailed | None = None
        self.written = 0
        self._synced = 0
        self._closed = threading.Event()
        # Held while the file is being synced or exchanged.
        self._file_lock = threading.Lock()
        self._file = SegmentFile(self._directory / str(self._name))
        self._sync_thread = threading.Thread(
            target=self._sync_regularly, args=(sync_seconds,), name="rollout-log-sync", daemon=True
        )
        self._sync_thread.start()

    @property
    def synced(self) -> int:
        """How many records are durable.

        Raises:
            RunFailed: the disk could not make them so.
        """
        self._check()
        return self._synced

    def open(self, request: SampleRequest) -> None:
        """A request begins here, or continues after `request.token_ids`; comes before its first token."""
        handle = self._opened
        self._write([(format.OPENED, format.encode_opened(handle, request))])
        self._opened += 1
        self._handles[request.id] = handle
        self._lengths[request.id] = len(request.token_ids)

    def append(self, step: Sequence[NewTokens], fields: Fields | None = None) -> None:
        """The new tokens of one engine step, of any number of requests, and which of them are finished.

        Raises:
            ValueError: tokens of a request that is not open, or not the next ones.
        """
        fields = fields or {}
        for new in step:
            if self._lengths.get(new.id) != new.position or len(new.token_ids) != len(new.logprobs):
                raise ValueError(f"{new.id}: tokens from {new.position}; the log has {self._lengths.get(new.id)}")
        records = [
            (format.FIELDS, format.encode_fields(self._handles[new.id], self._rows_of([new]), fields[new.id]))
            for new in step
            if new.id in fields
        ]
        plain = [new for new in step if new.id not in fields and new.token_ids]
        for version in dict.fromkeys(new.version for new in plain):
            self._add_rows(records, self._rows_of([new for new in plain if new.version == version]))
        lengths = {new.id: new.position + len(new.token_ids) for new in step}
        for new in step:
            if new.finish_reason is not None:
                finished = format.encode_finished(self._handles[new.id], lengths[new.id], new.finish_reason)
                records.append((format.FINISHED, finished))
        self._write(records)
        self._lengths.update(lengths)
        for new in step:
            if new.finish_reason is not None:
                self._forget(new.id)

    def cancel(self, request_id: str) -> None:
        """Nobody wants this request any more."""
        self._write([(format.CANCELLED, format.encode_cancelled(self._handles[request_id]))])
        self._forget(request_id)

    def weights(self, version: int, checksum: str) -> None:
        """The engine now holds these weights."""
        self._write([(format.WEIGHTS, format.encode_weights(version, checksum))])

    def sync(self) -> None:
        """Make everything that was written durable before returning."""
        self._check()
        try:
            with self._file_lock:
                written = self.written
                if written > self._synced:
                    self._file.sync()
                    self._synced = written
        except RunFailed as failure:
            # After a failed fsync the kernel may forget what it could not write: a later one would prove nothing.
            self._failure = failure
            raise

    def close(self) -> None:
        """Make everything durable and give up the file; the writer cannot be used afterwards."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._sync_thread.join()
        try:
            if self._failure is None:
                self.sync()
        finally:
            self._file.close()
            self._failure = self._failure or RunFailed(f"{self._directory}: the rollout log is closed")

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows_of(self, step: Sequence[NewTokens]) -> Rows:
        return Rows(
            version=step[0].version,
            handles=[self._handles[new.id] for new in step],
            positions=[new.position for new in step],
            counts=[len(new.token_ids) for new in step],
            token_ids=[token for new in step for token in new.token_ids],
            logprobs=[logprob for new in step for logprob in new.logprobs],
        )

    def _add_rows(self, records: list[tuple[int, bytes]], rows: Rows) -> None:
        """As `NEXT` when the same rows as before have one token more each, else as `TOKENS`."""
        if self._rows is not None:
            sequence, before = self._rows
            steps = rows.positions[0] - before.positions[0]
            same = rows.handles == before.handles and rows.counts == before.counts
            if same and rows.positions == [position + steps for position in before.positions]:
                payload = format.encode_next(rows.version, sequence, steps, rows.token_ids, rows.logprobs)
                records.append((format.NEXT, payload))
                return
        sequence = self._file.sequence + len(records)
        # Only one token a row can be continued by `NEXT`.
        self._rows = (sequence, rows) if set(rows.counts) == {1} else None
        records.append((format.TOKENS, format.encode_rows(rows)))

    def _write(self, records: list[tuple[int, bytes]]) -> None:
        self._check()
        if not records:
            return
        try:
            self._file.append(records)
            self.written += len(records)
            if self._file.size >= self._segment_bytes:
                self._rotate()
        except RunFailed as failure:
            self._failure = failure
            raise

    def _rotate(self) -> None:
        with self._file_lock:
            self._file.sync()
            self._synced = self.written
            self._name = SegmentName(self._name.worker, self._name.incarnation, self._name.number + 1)
            following = SegmentFile(self._directory / str(self._name))
            self._file.close()
            self._file = following
        self._rows = None

    def _forget(self, request_id: str) -> None:
        del self._handles[request_id], self._lengths[request_id]

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _sync_regularly(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self.sync()
            except RunFailed:
                return


@contextlib.contextmanager
def _failures(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        directory = path if path.is_dir() else path.parent
        raise LogFailed(
            f"{directory}: the rollout log {what} ({error.strerror}); free space or repair this file system, then "
            "resume the run: every token that is in the log is kept"
        ) from error
