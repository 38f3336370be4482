"""The bytes of the rollout log: segment names, header, framed records, and what each kind of record holds.

All numbers are little-endian. A segment is a header and records:

    header   "PTROLLOG", format version u16, 0 u16, CRC-32 of these u32                            16 bytes
    record   mark u16, kind u8, 0 u8, length of payload u32, sequence number u32, CRC-32 u32       16 bytes, payload

Sequence numbers count from 0 in every segment. A record's CRC covers its frame and payload and begins with the CRC of
the segment's name, so a record is only ever valid in the file it was written to.

One engine step over R rows is one record: `TOKENS` names the rows (request handle, position) and costs 16 bytes a
token; while the same rows go on, `NEXT` refers to it and costs 8 (token and log-probability).
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollouts.types import SampleRequest, Sampling

FORMAT_VERSION = 1
HEADER = struct.Struct("<8sHHI")
HEADER_MAGIC = b"PTROLLOG"
FRAME = struct.Struct("<HBBIII")
MARK = 0xC3A5
MARK_BYTES = struct.pack("<H", MARK)

# Kinds of records.
OPENED, TOKENS, NEXT, FIELDS, FINISHED, CANCELLED, WEIGHTS, ACKNOWLEDGED = range(1, 9)

SEGMENT_NAME = re.compile(r"(?P<worker>.+)-(?P<incarnation>\d+)-(?P<number>\d+)\.log")

_OPENED = struct.Struct("<IIIIQHII")
_TOKENS = struct.Struct("<III")
_NEXT = struct.Struct("<III")
_FIELDS = struct.Struct("<IIIIH")
_FINISHED = struct.Struct("<II")
_CANCELLED = struct.Struct("<I")
_WEIGHTS = struct.Struct("<Q")
_ACKNOWLEDGED = struct.Struct("<IH")


@dataclass(frozen=True, order=True)
class SegmentName:
    """`<worker>-<incarnation>-<number>.log`. A worker that starts again is a new incarnation with its own segments."""

    worker: str
    incarnation: int
    number: int

    def __str__(self) -> str:
        return f"{self.worker}-{self.incarnation}-{self.number:06d}.log"

    @property
    def writer(self) -> tuple[str, int]:
        """Whose handles its records use."""
        return self.worker, self.incarnation

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        """None for a file that is not a segment."""
        found = SEGMENT_NAME.fullmatch(name)
        return cls(found["worker"], int(found["incarnation"]), int(found["number"])) if found else None


def segments(directory: Path) -> list[SegmentName]:
    """The segments of a log directory, by worker, incarnation and number; none when there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(name for path in directory.iterdir() if (name := SegmentName.parse(path.name)) is not None)


def next_incarnation(directory: str | Path, worker: str) -> int:
    """A number that no segment of this worker has."""
    return max((name.incarnation + 1 for name in segments(Path(directory)) if name.worker == worker), default=0)


def header() -> bytes:
    """The first bytes of every segment."""
    start = HEADER.pack(HEADER_MAGIC, FORMAT_VERSION, 0, 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(start))


def salt(name: str) -> int:
    """Where the CRCs of a file's records begin."""
    return zlib.crc32(name.encode())


def frame(kind: int, sequence: int, payload: bytes, start: int) -> bytes:
    """A whole record; `start` is the file's `salt`."""
    head = FRAME.pack(MARK, kind, 0, len(payload), sequence, 0)[:-4]
    return b"".join((head, struct.pack("<I", zlib.crc32(payload, zlib.crc32(head, start))), payload))


def parse_frame(data: memoryview, offset: int, start: int) -> tuple[int, int, memoryview] | None:
    """Kind, sequence number and payload of the record at `offset`; None when no whole and sound record is there."""
    if len(data) - offset < FRAME.size:
        return None
    mark, kind, _, length, sequence, checksum = FRAME.unpack_from(data, offset)
    begin = offset + FRAME.size
    if mark != MARK or len(data) - begin < length:
        return None
    payload = data[begin : begin + length]
    if zlib.crc32(payload, zlib.crc32(data[offset : begin - 4], start)) != checksum:
        return None
    return kind, sequence, payload


def tokens_checksum(token_ids: Sequence[int]) -> int:
    """CRC-32 of token ids: an attempt names by it the prefix that it continues."""
    return zlib.crc32(_int32(token_ids))


@dataclass(frozen=True)
class Opened:
    """An engine begins to work on a sample, from its start or after tokens that are logged elsewhere."""

    handle: int
    id: str
    attempt: int
    begin: int
    """Tokens sampled before."""
    prefix_checksum: int
    """`tokens_checksum` of those."""
    prompt_ids: list[int]
    sampling: Sampling
    seed: int


def encode_opened(handle: int, request: SampleRequest) -> bytes:
    """The payload of `OPENED`."""
    name = request.id.encode()
    sampling = json.dumps(asdict(request.sampling), separators=(",", ":")).encode()
    head = _OPENED.pack(
        handle,
        request.attempt,
        len(request.token_ids),
        tokens_checksum(request.token_ids),
        request.seed,
        len(name),
        len(sampling),
        len(request.prompt_ids),
    )
    return b"".join((head, name, sampling, _int32(request.prompt_ids)))


def decode_opened(payload: memoryview) -> Opened:
    """The inverse of `encode_opened`."""
    handle, attempt, begin, checksum, seed, name_length, sampling_length, prompt_length = _OPENED.unpack_from(payload)
    name_end = _OPENED.size + name_length
    sampling_end = name_end + sampling_length
    prompt_ids = np.frombuffer(payload, "<i4", prompt_length, sampling_end).tolist()
    name = str(payload[_OPENED.size : name_end], "utf-8")
    sampling = _sampling(json.loads(bytes(payload[name_end:sampling_end])))
    return Opened(handle, name, attempt, begin, checksum, prompt_ids, sampling, seed)


@dataclass
class Rows:
    """New tokens of some requests, sampled from one version of the weights."""

    version: int
    handles: list[int]
    positions: list[int]
    """Of the first new token of each."""
    counts: list[int]
    token_ids: list[int]
    """Of all rows, one after another."""
    logprobs: list[float]

    def pieces(self) -> Iterator[tuple[int, int, list[int], list[float]]]:
        """Handle, position, tokens and log-probabilities of each row."""
        begin = 0
        for handle, position, count in zip(self.handles, self.positions, self.counts, strict=True):
            yield handle, position, self.token_ids[begin : begin + count], self.logprobs[begin : begin + count]
            begin += count

    def only(self, handles: Set[int]) -> Rows:
        """The rows of these requests."""
        kept = [piece for piece in self.pieces() if piece[0] in handles]
        return Rows(
            version=self.version,
            handles=[handle for handle, *_ in kept],
            positions=[position for _, position, *_ in kept],
            counts=[len(token_ids) for _, _, token_ids, _ in kept],
            token_ids=[token for _, _, token_ids, _ in kept for token in token_ids],
            logprobs=[logprob for *_, logprobs in kept for logprob in logprobs],
        )


def encode_rows(rows: Rows) -> bytes:
    """The payload of `TOKENS`."""
    same = rows.counts[0] if len(set(rows.counts)) == 1 else 0
    counts = b"" if same else np.array(rows.counts, "<u4").tobytes()
    names = np.array([rows.handles, rows.positions], "<u4").tobytes()
    head = _TOKENS.pack(rows.version, len(rows.handles), same)
    return b"".join((head, names, counts, _int32(rows.token_ids), _float32(rows.logprobs)))


def decode_rows(payload: memoryview) -> Rows:
    """The inverse of `encode_rows`."""
    version, number, same = _TOKENS.unpack_from(payload)
    names = np.frombuffer(payload, "<u4", 2 * number, _TOKENS.size).tolist()
    offset = _TOKENS.size + 8 * number
    if same:
        counts = [same] * number
    else:
        counts = np.frombuffer(payload, "<u4", number, offset).tolist()
        offset += 4 * number
    token_ids, logprobs = _tokens_at(payload, sum(counts), offset)
    return Rows(version, names[:number], names[number:], counts, token_ids, logprobs)


def encode_next(version: int, rows_sequence: int, steps: int, token_ids: list[int], logprobs: list[float]) -> bytes:
    """The payload of `NEXT`: one token for each row of the `TOKENS` record `rows_sequence`, `steps` positions on."""
    return b"".join((_NEXT.pack(version, rows_sequence, steps), _int32(token_ids), _float32(logprobs)))


def row_handles(payload: memoryview) -> list[int]:
    """The handles of a `TOKENS` record."""
    _, number, _ = _TOKENS.unpack_from(payload)
    return np.frombuffer(payload, "<u4", number, _TOKENS.size).tolist()


def referred(payload: memoryview) -> int:
    """The sequence number of the `TOKENS` record that a `NEXT` record goes on from."""
    return _NEXT.unpack_from(payload)[1]


def decode_next(payload: memoryview, rows_sequence: int, rows: Rows | None) -> Rows | None:
    """The rows of a `NEXT` record, given the latest `TOKENS` record; None when it refers to another one."""
    version, sequence, steps = _NEXT.unpack_from(payload)
    if rows is None or sequence != rows_sequence:
        return None
    token_ids, logprobs = _tokens_at(payload, len(rows.handles), _NEXT.size)
    positions = [position + steps for position in rows.positions]
    return Rows(version, rows.handles, positions, rows.counts, token_ids, logprobs)


def encode_fields(handle: int, piece: Rows, fields: Mapping[str, Sequence[bytes]]) -> bytes:
    """The payload of `FIELDS`: tokens of one request (`piece` has one row) with blobs for each token, by name."""
    head = _FIELDS.pack(handle, piece.positions[0], piece.counts[0], piece.version, len(fields))
    parts = [head, _int32(piece.token_ids), _float32(piece.logprobs)]
    for name, blobs in fields.items():
        lengths = np.array([len(blob) for blob in blobs], "<u4").tobytes()
        parts += [struct.pack("<B", len(name.encode())), name.encode(), lengths, *blobs]
    return b"".join(parts)


def decode_fields(payload: memoryview) -> tuple[Rows, dict[str, list[bytes]]]:
    """The inverse of `encode_fields`."""
    handle, position, count, version, number = _FIELDS.unpack_from(payload)
    token_ids, logprobs = _tokens_at(payload, count, _FIELDS.size)
    offset = _FIELDS.size + 8 * count
    fields: dict[str, list[bytes]] = {}
    for _ in range(number):
        begin = offset + 1
        offset = begin + payload[offset]
        name = str(payload[begin:offset], "utf-8")
        lengths = np.frombuffer(payload, "<u4", count, offset).tolist()
        offset += 4 * count
        fields[name] = []
        for length in lengths:
            fields[name].append(bytes(payload[offset : offset + length]))
            offset += length
    return Rows(version, [handle], [position], [count], token_ids, logprobs), fields


def encode_finished(handle: int, length: int, reason: str) -> bytes:
    """The payload of `FINISHED`; `length` counts all tokens of the completion."""
    return _FINISHED.pack(handle, length) + reason.encode()


def decode_finished(payload: memoryview) -> tuple[int, int, str]:
    """Handle, length and reason."""
    return *_FINISHED.unpack_from(payload), str(payload[_FINISHED.size :], "utf-8")


def encode_cancelled(handle: int) -> bytes:
    """The payload of `CANCELLED`."""
    return _CANCELLED.pack(handle)


def decode_handle(payload: memoryview) -> int:
    """The handle of an `OPENED`, `FIELDS`, `FINISHED` or `CANCELLED` record: all begin with it."""
    return _CANCELLED.unpack_from(payload)[0]


def encode_weights(version: int, checksum: str) -> bytes:
    """The payload of `WEIGHTS`."""
    return _WEIGHTS.pack(version) + checksum.encode()


def decode_weights(payload: memoryview) -> tuple[int, str]:
    """Version and checksum."""
    return _WEIGHTS.unpack_from(payload)[0], str(payload[_WEIGHTS.size :], "utf-8")


def encode_acknowledged(attempts: Mapping[str, int]) -> bytes:
    """The payload of `ACKNOWLEDGED`: request id → its attempt."""
    named = [(name.encode(), attempt) for name, attempt in attempts.items()]
    return b"".join(part for name, attempt in named for part in (_ACKNOWLEDGED.pack(attempt, len(name)), name))


def decode_acknowledged(payload: memoryview) -> dict[str, int]:
    """The inverse of `encode_acknowledged`."""
    attempts, offset = {}, 0
    while offset < len(payload):
        attempt, length = _ACKNOWLEDGED.unpack_from(payload, offset)
        begin = offset + _ACKNOWLEDGED.size
        offset = begin + length
        attempts[str(payload[begin:offset], "utf-8")] = attempt
    return attempts


def _int32(values: Sequence[int]) -> bytes:
    return np.array(values, "<i4").tobytes()


def _float32(values: Sequence[float]) -> bytes:
    return np.array(values, "<f4").tobytes()


def _tokens_at(payload: memoryview, count: int, offset: int) -> tuple[list[int], list[float]]:
    token_ids = np.frombuffer(payload, "<i4", count, offset).tolist()
    return token_ids, np.frombuffer(payload, "<f4", count, offset + 4 * count).tolist()


def _sampling(values: dict[str, Any]) -> Sampling:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Sampling(**fields)
