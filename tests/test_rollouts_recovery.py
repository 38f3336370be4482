"""What is read of the rollout log when a worker has died."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollouts import recovery
from rollouts.log import LogWriter
from rollouts.log.format import SegmentName, segments
from tests.log_kit import new_tokens, request_of, token_at


def test_of_a_dead_worker_only_the_segments_of_its_last_samples_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage's log may be long; how long a worker's samples wait for it must not grow with it."""
    with LogWriter(tmp_path, "w", 0, segment_bytes=1000) as writer:
        for number in range(40):
            name = f"a/{number}#0"
            writer.open(request_of(name))
            for position in range(30):
                last = position == 29 and number < 38
                writer.append([new_tokens(name, position, 1, 1, "stop" if last else None)])
    assert len(segments(tmp_path)) > 15
    read: list[int] = []
    original = recovery.open_segment

    def open_segment(directory: Path, name: SegmentName) -> Any:
        read.append(name.number)
        return original(directory, name)

    monkeypatch.setattr(recovery, "open_segment", open_segment)
    found = recovery.read_attempts(tmp_path, ("w", 0), {"a/38#0", "a/39#0"})
    assert {name: attempt.token_ids for name, attempt in found.items()} == {
        name: [token_at(name, position)[0] for position in range(30)] for name in ("a/38#0", "a/39#0")
    }
    assert min(read) > 10
    everything = recovery.read_attempts(tmp_path, ("w", 0), {"a/0#0", "nobody#0"})
    assert list(everything) == ["a/0#0"] and everything["a/0#0"].finished == (30, "stop")
