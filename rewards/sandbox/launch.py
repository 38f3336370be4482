"""Runs programs in jails: starts them, feeds them, collects what they say, ends them."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BACKSTOP_SECONDS = 60.0
"""The jail keeps the clock; should it fail to, it is killed from outside so much later."""
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from jail.main import main; main()"
_CHUNK = 65536


class SandboxError(Exception):
    """The sandbox itself failed; this says nothing of the program."""


class NotIsolated(SandboxError):
    """The system lacks what it takes to isolate a program, and isolation was demanded; the program was not started."""


@dataclass(frozen=True)
class Limits:
    """What one execution may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    """Of all processes together."""
    memory_mib: int = 256
    """Address space of each process, and resident memory of all together."""
    processes: int = 16
    """And threads."""
    open_files: int = 64
    scratch_mib: int = 16
    """Size of the private /tmp."""
    output_kib: int = 256
    """Of standard output, and as much of standard error."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Protections:
    """What stands between a program and the rest of the machine."""

    active: Mapping[str, str]
    """Name and how."""
    missing: Mapping[str, str]
    """Name and why."""

    def describe(self) -> str:
        """One line for people."""
        line = ", ".join(self.active)
        if not self.missing:
            return line
        by_reason: dict[str, list[str]] = {}
        for name, why in self.missing.items():
            by_reason.setdefault(why, []).append(name)
        lost = [f"{', '.join(names)} ({why})" for why, names in by_reason.items()]
        return f"{line}; MISSING: {'; '.join(lost)}"


@dataclass(frozen=True)
class Outcome:
    """How an execution ended."""

    reason: str
    """`exit`: by itself; `wall time`, `cpu time`, `memory`, `output`: over that limit; `stopped`: no longer needed."""
    exit_code: int | None
    """Negative: killed by that signal. None: it did not end by itself."""
    stdout: bytes
    stderr: bytes
    seconds: float
    """From the request to the end, start of the jail included."""
    cpu_seconds: float
    peak_mib: float
    """Resident memory of the largest process."""
    protections: Protections

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself and well."""
        return self.reason == "exit" and self.exit_code == 0


@dataclass
class Execution:
    """One program to be run."""

    files: Mapping[str, str]
    """Its files' text, by name; they lie in `/program`."""
    main: str = "main.py"
    arguments: Sequence[str] = ()
    stdin: bytes = b""
    limits: Limits = Limits()
    isolated: bool = True
    """Do not run it unless the system can isolate it."""
    channels: Sequence[int] = ()
    """Descriptors that become 3, 4, ...; closed here when it has started."""
    stops_when_done: Execution | None = field(default=None, repr=False)
    """Another execution, which has no purpose after the end of this one."""


def run(source: str, stdin: bytes = b"", limits: Limits = DEFAULT_LIMITS, isolated: bool = True) -> Outcome:
    """Run a Python program.

    Raises:
        NotIsolated: the system cannot isolate it, and `isolated` demands it.
        SandboxError: the sandbox failed.
    """
    return run_together([Execution({"main.py": source}, stdin=stdin, limits=limits, isolated=isolated)])[0]


def run_together(executions: Sequence[Execution], sinks: Mapping[int, bytearray] | None = None) -> list[Outcome]:
    """Run programs side by side, until all have ended.

    Args:
        sinks: descriptors to read while they run, and where to put what comes, at most `output_kib` of the first.

    Raises:
        NotIsolated, SandboxError: as `run`; nothing is left running.
    """
    jails: list[_Jail] = []
    waiting, readers = list(executions), dict(sinks or {})
    with selectors.DefaultSelector() as selector:
        try:
            while waiting:
                jails.append(_Jail(waiting.pop(0), selector))
            while readers:
                descriptor, sink = readers.popitem()
                _collect(selector, descriptor, sink, executions[0].limits.output_kib * 1024, lambda: None)
            _serve(selector, jails)
            return [jail.outcome() for jail in jails]
        finally:
            never_used = [channel for execution in waiting for channel in execution.channels]
            for descriptor in (*(key.fd for key in selector.get_map().values()), *readers, *never_used):
                os.close(descriptor)
            for jail in jails:
                jail.close()


def _serve(selector: selectors.BaseSelector, jails: Sequence[_Jail]) -> None:
    by_execution = {id(jail.execution): jail for jail in jails}
    latest = max(jail.execution.limits.wall_seconds for jail in jails) + BACKSTOP_SECONDS + time.monotonic()
    while selector.get_map():
        for key, _ in selector.select(1.0):
            key.data()
        for jail in jails:
            if jail.ended and jail.execution.stops_when_done is not None:
                by_execution[id(jail.execution.stops_when_done)].stop()
        if time.monotonic() > latest:
            raise SandboxError("a jail did not end in time")


class _Jail:
    """A running jail."""

    def __init__(self, execution: Execution, selector: selectors.BaseSelector) -> None:
        self.execution = execution
        self.stdout, self.stderr, self.said = bytearray(), bytearray(), bytearray()
        self.ended = self.overflowed = False
        self.seconds = 0.0
        self.began = time.monotonic()
        plan_reader, plan_writer = os.pipe()
        control_reader, self.control = os.pipe()
        status_reader, status_writer = os.pipe()
        channels = list(execution.channels)
        executable = os.path.realpath(sys.executable)
        plan = {
            "files": dict(execution.files), "main": execution.main, "arguments": list(execution.arguments),
            "executable": executable, "prefix": os.path.realpath(sys.base_prefix),
            "limits": asdict(execution.limits), "demand": execution.isolated, "control": control_reader,
            "status": status_writer, "channels": channels,
        }  # fmt: skip
        inherited = [plan_reader, control_reader, status_writer, *channels]
        command = [executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).parent), str(plan_reader)]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
                pass_fds=inherited, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            for descriptor in (plan_writer, self.control, status_reader):
                os.close(descriptor)
            raise SandboxError(f"no process for a jail: {error}") from error
        finally:
            for descriptor in inherited:
                os.close(descriptor)
        assert self.process.stdin and self.process.stdout and self.process.stderr
        limit = execution.limits.output_kib * 1024
        _feed(selector, plan_writer, json.dumps(plan).encode())
        _feed(selector, os.dup(self.process.stdin.fileno()), execution.stdin)
        self.process.stdin.close()
        _collect(selector, os.dup(self.process.stdout.fileno()), self.stdout, limit, self._too_much)
        _collect(selector, os.dup(self.process.stderr.fileno()), self.stderr, limit, self._too_much)
        self.process.stdout.close()
        self.process.stderr.close()
        _collect(selector, status_reader, self.said, 2**20, self.stop, self._mark_end)

    def _too_much(self) -> None:
        self.overflowed = True
        self.stop()

    def _mark_end(self) -> None:
        self.ended = True
        self.seconds = time.monotonic() - self.began

    def stop(self) -> None:
        """Ask the jail to end the program."""
        if self.control >= 0:
            os.close(self.control)
            self.control = -1

    def outcome(self) -> Outcome:
        """What happened; call it when nothing is left to be read."""
        self.process.wait()
        try:
            said: dict[str, Any] = json.loads(self.said)
        except ValueError:
            raise SandboxError(f"the jail broke: {self.stderr.decode(errors='replace')[-2000:]}") from None
        if said.get("uncovered"):
            have = Protections(said["active"], said["missing"]).describe()
            raise NotIsolated(f"nothing keeps programs from {', '.join(said['uncovered'])}: {have}")
        if "error" in said:
            raise SandboxError(said["error"])
        return Outcome(
            "output" if self.overflowed else said["reason"],
            None if self.overflowed else said["exit_code"],
            bytes(self.stdout),
            bytes(self.stderr),
            self.seconds,
            said["cpu_seconds"],
            said["peak_mib"],
            Protections(said["active"], said["missing"]),
        )

    def close(self) -> None:
        """End the jail, whatever state it is in."""
        self.stop()
        if self.process.poll() is None:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def _feed(selector: selectors.BaseSelector, descriptor: int, data: bytes) -> None:
    """Write data to a descriptor whenever it takes some; then, or when nobody reads any more, close it."""
    rest = memoryview(data)
    os.set_blocking(descriptor, False)

    def write() -> None:
        nonlocal rest
        try:
            rest = rest[os.write(descriptor, rest[:_CHUNK]) :] if rest else rest
        except BlockingIOError:
            return
        except OSError:
            rest = rest[len(rest) :]
        if not rest:
            selector.unregister(descriptor)
            os.close(descriptor)

    selector.register(descriptor, selectors.EVENT_WRITE, write)


def _collect(
    selector: selectors.BaseSelector,
    descriptor: int,
    sink: bytearray,
    limit: int,
    on_overflow: Callable[[], None],
    on_end: Callable[[], None] = lambda: None,
) -> None:
    """Read a descriptor whenever it has something, until its end; keep what fits."""
    os.set_blocking(descriptor, False)

    def read() -> None:
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            selector.unregister(descriptor)
            os.close(descriptor)
            on_end()
            return
        room = limit - len(sink)
        sink.extend(data[: max(0, room)])
        if len(data) > room:
            on_overflow()

    selector.register(descriptor, selectors.EVENT_READ, read)
