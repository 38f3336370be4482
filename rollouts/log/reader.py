"""What stands in the rollout log: `recover` puts together, for every request, what all engines wrote of it.

Rules, in this order:

1.  A record counts only if its CRC is right. Behind a damaged place reading goes on at the next sound record of the
    file. Damage at the end of a writer's last segment is a torn tail, the mark of a death in the middle of a write:
    it is cut. Anything else is reported with file and offset.
2.  Of one attempt (one engine working on one request) only the tokens without a gap count, from where it began.
3.  Attempts are laid over each other in the order of their numbers. An attempt counts if the tokens before it are
    there and have the checksum that it wrote down when it began; where it has tokens, they replace the earlier
    ones. What earlier attempts have beyond its end stays if both agree on every token before (both sampled from the
    same prefix), and goes if they do not.
4.  A request is finished if an attempt says so and all its tokens are there.

So damage makes answers shorter, never wrong: what is left of a request is a prefix of what was sampled.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.errors import RunFailed
from rollouts.log import format
from rollouts.log.format import Opened, Rows, SegmentName
from rollouts.types import Sampling, VersionSpan, version_spans


@dataclass(frozen=True)
class Damage:
    """A place in the log that cannot be read."""

    file: str
    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes that are lost."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason} at byte {self.offset} ({self.length} bytes)"


@dataclass
class RecoveredRequest:
    """What the log has of a request."""

    id: str
    attempt: int
    """The latest one; the next is one higher."""
    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    """Of the weights, for each token."""
    fields: dict[str, list[bytes]] = field(default_factory=dict)
    """Blobs by name, one for each token (b"" where an engine logged none); no names if none were logged."""
    finish_reason: str | None = None
    """None: not finished."""
    cancelled: bool = False
    """The latest attempt was cancelled."""

    @property
    def spans(self) -> tuple[VersionSpan, ...]:
        """The spans of one version; empty without tokens."""
        return version_spans(self.versions) if self.versions else ()


@dataclass
class Recovered:
    """What the log has."""

    requests: dict[str, RecoveredRequest]
    """All requests that were not acknowledged."""
    acknowledged: dict[str, int]
    """Request → its attempt when it was acknowledged, as long as the log remembers."""
    damage: list[Damage]
    torn: list[Damage]
    """Tails that were cut."""
    weights: dict[int, str]
    """Version → checksum of the weights that engines held."""


@dataclass
class Attempt:
    """One engine's work on one request."""

    opened: Opened
    writer: tuple[str, int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    fields: dict[str, list[bytes]] = field(default_factory=dict)
    finished: tuple[int, str] | None = None
    cancelled: bool = False

    def add(
        self,
        version: int,
        position: int,
        token_ids: list[int],
        logprobs: list[float],
        fields: dict[str, list[bytes]] | None = None,
    ) -> None:
        """Take the tokens if they are the next ones."""
        before, count = len(self.token_ids), len(token_ids)
        if position != self.opened.begin + before:
            return
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.versions += [version] * count
        fields = fields or {}
        for name in self.fields.keys() | fields.keys():
            self.fields.setdefault(name, [b""] * before).extend(fields.get(name, [b""] * count))


@dataclass(frozen=True)
class Record:
    """One sound record; its payload is a view of the file's bytes."""

    kind: int
    sequence: int
    payload: memoryview


class SegmentReader:
    """Iterates over the sound records of one file; afterwards `damage` has the places in between.

    Raises:
        RunFailed: the file is of another format version.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.damage: list[Damage] = []
        self.torn: Damage | None = None
        """The last of the file's bytes, if they are not a record."""
        self._data = memoryview(data)
        self._bytes = data
        self._salt = format.salt(path.name)

    def __iter__(self) -> Iterator[Record]:
        offset = self._read_header()
        while offset < len(self._data):
            found = format.parse_frame(self._data, offset, self._salt)
            if found is None:
                following = self._next_sound(offset + 1)
                broken = Damage(str(self.path), offset, (following or len(self._data)) - offset, "damaged records")
                if following is None:
                    self.torn = broken
                    return
                self.damage.append(broken)
                offset = following
                continue
            kind, sequence, payload = found
            offset += format.FRAME.size + len(payload)
            yield Record(kind, sequence, payload)

    def _read_header(self) -> int:
        start = format.header()
        found = self._bytes[: len(start)]
        if found == start:
            return len(start)
        if len(found) == len(start) and zlib.crc32(found[:-4]) == int.from_bytes(found[-4:], "little"):
            version = format.HEADER.unpack(found)[1]
            raise RunFailed(
                f"{self.path}: written in version {version} of the log's format, this program reads version "
                f"{format.FORMAT_VERSION}: continue the run with the program that began it"
            )
        if len(found) == len(start):
            self.damage.append(Damage(str(self.path), 0, len(start), "damaged header"))
        return len(start) if len(found) == len(start) else 0

    def _next_sound(self, offset: int) -> int | None:
        while (offset := self._bytes.find(format.MARK_BYTES, offset)) >= 0:
            if format.parse_frame(self._data, offset, self._salt) is not None:
                return offset
            offset += 1
        return None


class RowsDecoder:
    """Decodes `TOKENS` and `NEXT` records of one segment in their order."""

    def __init__(self) -> None:
        self._rows: Rows | None = None
        self._sequence = -1

    def __call__(self, record: Record) -> Rows | None:
        """The rows; None when the record that a `NEXT` refers to was lost."""
        if record.kind == format.NEXT:
            return format.decode_next(record.payload, self._sequence, self._rows)
        self._rows, self._sequence = format.decode_rows(record.payload), record.sequence
        return self._rows


class WriterState:
    """What one writer (one incarnation of a worker) wrote, over its segments in their order."""

    def __init__(self, writer: tuple[str, int]) -> None:
        self.writer = writer
        self.attempts: dict[int, Attempt] = {}
        """By handle."""
        self.weights: dict[int, str] = {}
        self.damage: list[Damage] = []
        self.torn: list[Damage] = []
        self._decode_rows = RowsDecoder()

    def begin_segment(self) -> None:
        """Records refer to earlier ones of the same segment only."""
        self._decode_rows = RowsDecoder()

    def take(self, record: Record) -> None:
        """Bring all up to date. What refers to a lost record is lost too."""
        if record.kind in (format.TOKENS, format.NEXT):
            rows = self._decode_rows(record)
            if rows is not None:
                self._take_rows(rows)
        else:
            self._take_other(record.kind, record.payload)

    def _take_rows(self, rows: Rows, fields: dict[str, list[bytes]] | None = None) -> None:
        for handle, position, token_ids, logprobs in rows.pieces():
            if handle in self.attempts:
                self.attempts[handle].add(rows.version, position, token_ids, logprobs, fields)

    def _take_other(self, kind: int, payload: memoryview) -> None:
        if kind == format.OPENED:
            opened = format.decode_opened(payload)
            self.attempts[opened.handle] = Attempt(opened, self.writer)
        elif kind == format.FIELDS:
            self._take_rows(*format.decode_fields(payload))
        elif kind == format.FINISHED:
            handle, length, reason = format.decode_finished(payload)
            if handle in self.attempts:
                self.attempts[handle].finished = length, reason
        elif kind == format.CANCELLED:
            handle = format.decode_handle(payload)
            if handle in self.attempts:
                self.attempts[handle].cancelled = True
        elif kind == format.WEIGHTS:
            version, checksum = format.decode_weights(payload)
            self.weights[version] = checksum


def recover(directory: str | Path) -> Recovered:
    """Read a log, whatever state it was left in; nothing is changed.

    What is returned is durable: the files that hold it are synced, so that an engine may continue from it.
    A log that is being written can be read; the newest steps may be missing then.

    Args:
        directory: The log's directory; one that does not exist is an empty log.

    Raises:
        RunFailed: a file of another format version, or one that the system cannot read.
    """
    directory = Path(directory)
    acknowledged, damage = read_acknowledged(directory)
    of_writer: dict[tuple[str, int], list[SegmentName]] = {}
    for name in format.segments(directory):
        of_writer.setdefault(name.writer, []).append(name)
    attempts: list[Attempt] = []
    torn: list[Damage] = []
    weights: dict[int, str] = {}
    for names in of_writer.values():
        state = read_writer(directory, names)
        attempts += state.attempts.values()
        damage += state.damage
        torn += state.torn
        weights |= state.weights
    requests = merge(attempts, acknowledged, damage)
    return Recovered(requests, acknowledged, damage, torn, weights)


def read_writer(directory: Path, names: list[SegmentName]) -> WriterState:
    """What one writer wrote: `names` are its segments in their order."""
    state = WriterState(names[-1].writer)
    for name in names:
        segment = open_segment(directory, name)
        if segment is None:
            continue
        state.begin_segment()
        for record in segment:
            state.take(record)
        state.damage += segment.damage
        if segment.torn is not None:
            (state.torn if name == names[-1] else state.damage).append(segment.torn)
    return state


def open_segment(directory: Path, name: SegmentName) -> SegmentReader | None:
    """A reader of the durable bytes of a segment; None when compaction has just deleted it."""
    path = directory / str(name)
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            return SegmentReader(path, file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFailed(f"{path}: the rollout log cannot be read ({error.strerror})") from error


ACKNOWLEDGED_NAME = "acknowledged"


def read_acknowledged(directory: Path) -> tuple[dict[str, int], list[Damage]]:
    """Request → attempt of all acknowledgements in the log, and the damage to their file (its tail excepted)."""
    path = directory / ACKNOWLEDGED_NAME
    if not path.exists():
        return {}, []
    reader = SegmentReader(path, path.read_bytes())
    acknowledged: dict[str, int] = {}
    for record in reader:
        if record.kind == format.ACKNOWLEDGED:
            acknowledged.update(format.decode_acknowledged(record.payload))
    return acknowledged, reader.damage


def merge(attempts: list[Attempt], acknowledged: dict[str, int], damage: list[Damage]) -> dict[str, RecoveredRequest]:
    """Requests out of attempts, by the rules above; attempts that do not count are added to `damage`."""
    by_request: dict[str, list[Attempt]] = {}
    for attempt in sorted(attempts, key=lambda attempt: (attempt.opened.attempt, attempt.writer)):
        if attempt.opened.attempt > acknowledged.get(attempt.opened.id, -1):
            by_request.setdefault(attempt.opened.id, []).append(attempt)
    return {name: _merge_request(of_request, damage) for name, of_request in by_request.items()}


def _merge_request(attempts: list[Attempt], damage: list[Damage]) -> RecoveredRequest:
    first, latest = attempts[0].opened, attempts[-1]
    merged = RecoveredRequest(
        first.id, latest.opened.attempt, first.prompt_ids, first.sampling, first.seed, cancelled=latest.cancelled
    )
    for attempt in attempts:
        begin = attempt.opened.begin
        prefix = merged.token_ids[:begin]
        if len(prefix) < begin or format.tokens_checksum(prefix) != attempt.opened.prefix_checksum:
            file = f"{attempt.writer[0]}-{attempt.writer[1]}"
            reason = f"{first.id} continues at token {begin}, but the tokens before it are lost"
            damage.append(Damage(file, 0, 0, reason))
            continue
        _lay_over(merged, attempt)
    return merged


def _lay_over(merged: RecoveredRequest, attempt: Attempt) -> None:
    begin = attempt.opened.begin
    end = begin + len(attempt.token_ids)
    length = len(merged.token_ids)
    agree = merged.token_ids[begin:end] == attempt.token_ids[: length - begin]
    if not agree or end > length:
        merged.finish_reason = None
    for name in merged.fields.keys() | attempt.fields.keys():
        old = merged.fields.get(name, [b""] * length)
        new = attempt.fields.get(name, [b""] * len(attempt.token_ids))
        merged.fields[name] = old[:begin] + new + (old[end:] if agree else [])
    for part in ("token_ids", "logprobs", "versions"):
        old, new = getattr(merged, part), getattr(attempt, part)
        setattr(merged, part, old[:begin] + new + (old[end:] if agree else []))
    if attempt.finished is not None and attempt.finished[0] == len(merged.token_ids) == end:
        merged.finish_reason = attempt.finished[1]
