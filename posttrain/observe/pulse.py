"""What an actor is doing, for the watchdog to read: a small file that is written in place at each change of phase.

A file, because it is still there, and still right, when the process that wrote it does not answer any more.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from pydantic import BaseModel, ValidationError

WIDTH = 512
"""Bytes of the file: a shorter text is filled up, so that nothing of an older one is left behind it."""
PULSES = "pulses"
"""The directory of a run's pulses in its own."""
IDLE = "idle"
"""The phase in which nothing is expected of an actor."""


class Beat(BaseModel):
    """What a pulse says."""

    actor: str
    """For people: `trainer 0`."""
    pid: int
    host: str
    phase: str
    count: int
    """Grows with each sign of life."""

    @property
    def here(self) -> bool:
        """Whether the process runs on this machine."""
        return self.host == socket.gethostname()


class Pulse:
    """One actor's signs of life, in `<directory>/<name>.pulse`; on SIGUSR1 its stacks go to `<name>.stacks`."""

    def __init__(self, directory: Path, actor: str) -> None:
        """For the process that is watched; `actor` is its name for people."""
        directory.mkdir(parents=True, exist_ok=True)
        self.actor = actor
        self.path = pulse_file(directory, actor)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        # Also answers when the interpreter is stuck in a call that does not let go of it.
        self._stacks = stacks_file(directory, actor).open("w")
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        self._count = 0
        self._phases = [IDLE]
        self._lock = Lock()
        self.beat()

    def beat(self) -> None:
        """It lives."""
        with self._lock:
            self._beat()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """It is doing this in the block, and then again what it did before. Several threads may be in phases."""
        with self._lock:
            self._phases.append(name)
            self._beat()
        try:
            yield
        finally:
            with self._lock:
                self._phases.remove(name)
                self._beat()

    def _beat(self) -> None:
        self._count += 1
        beat = {"actor": self.actor, "pid": os.getpid(), "host": socket.gethostname(), "phase": self._phases[-1]}
        text = json.dumps({**beat, "count": self._count}).encode()
        os.pwrite(self._descriptor, text.ljust(WIDTH), 0)


def pulse_file(directory: Path, actor: str) -> Path:
    """Where an actor's signs of life are."""
    return directory / f"{actor.replace(' ', '')}.pulse"


def stacks_file(directory: Path, actor: str) -> Path:
    """Where an actor writes the stacks of its threads on SIGUSR1."""
    return directory / f"{actor.replace(' ', '')}.stacks"


def read_beats(directory: Path) -> list[Beat]:
    """The latest of every actor."""
    found = []
    for path in sorted(directory.glob("*.pulse")):
        try:
            found.append(Beat.model_validate_json(path.read_bytes().rstrip(b" ")))
        except (OSError, ValidationError):  # being written at this moment
            continue
    return found


def stacks_of(directory: Path, beat: Beat, patience: float = 2.0) -> str:
    """The Python stacks of an actor's threads, or why there are none."""
    if not beat.here:
        return f"(no stacks: it runs on {beat.host})"
    path = stacks_file(directory, beat.actor)
    try:
        before = path.stat().st_size
        os.kill(beat.pid, signal.SIGUSR1)
    except OSError:
        return "(no stacks: the process is gone)"
    end = time.monotonic() + patience
    while time.monotonic() < end:
        time.sleep(0.1)
        text = path.read_bytes()[before:].decode(errors="replace").strip()
        if text:
            return text
    return "(no stacks: the process does not run; was it stopped?)"
