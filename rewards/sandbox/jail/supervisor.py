"""Watches the program: memory and CPU time of all its processes, the clock, the launcher. Says how it ended."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Iterator
from typing import Any

_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
_TICKS = os.sysconf("SC_CLK_TCK")
LOOK_SECONDS = 0.02
"""Between two looks at the memory."""


def wake_on_child_exit() -> int:
    """A descriptor that becomes readable when a child ends. Call it before the child is made."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def watch(program: int, limits: dict[str, Any], control: int, wake: int, processes: int | None) -> dict[str, Any]:
    """Wait until the program ends, or must end and is killed. Its children may be left.

    Args:
        program: its process id.
        control: end when the other side of it is closed.
        wake: from `wake_on_child_exit`.
        processes: descriptor of a /proc that shows the program's processes and this one; None: none is to be had.

    Returns:
        `reason`: `exit`, `wall time`, `cpu time`, `memory` or `stopped`; `exit_code` (negative: by that signal, None:
        it did not end by itself), `cpu_seconds` and `peak_mib` (of the largest process that ended).
    """
    deadline = time.monotonic() + limits["wall_seconds"]
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(wake, select.POLLIN)
    reason, code = "exit", None
    while True:
        code = _reap(program)
        if code is not None:
            break
        reason = _broken_limit(limits, processes) or ("wall time" if time.monotonic() >= deadline else "exit")
        if reason != "exit":
            break
        wait = min(LOOK_SECONDS if processes is not None else 1.0, deadline - time.monotonic())
        events = poller.poll(max(0.0, wait) * 1000)
        if any(descriptor == control for descriptor, _ in events):
            reason = "stopped"
            break
        if any(descriptor == wake for descriptor, _ in events):
            os.read(wake, 4096)
    if code is None:
        os.kill(program, signal.SIGKILL)
    used = _used()
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and used["cpu_seconds"] >= limits["cpu_seconds"]):
        reason = "cpu time"
    return {"reason": reason, "exit_code": code if reason == "exit" else None, **used}


def _reap(program: int) -> int | None:
    """Collect whoever ended; the exit code of the program if it is among them."""
    code = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if ended == 0:
            return code
        if ended == program:
            code = os.waitstatus_to_exitcode(status)


def _used() -> dict[str, float]:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


def _broken_limit(limits: dict[str, Any], processes: int | None) -> str | None:
    """Sums over the living processes; pages that they share count for each of them."""
    if processes is None:
        return None
    pages = ticks = 0
    for numbers in _numbers(processes):
        pages += numbers[0]
        ticks += numbers[1]
    if pages * _PAGE_MIB > limits["memory_mib"]:
        return "memory"
    return "cpu time" if ticks / _TICKS + _used()["cpu_seconds"] > limits["cpu_seconds"] else None


def _numbers(processes: int) -> Iterator[tuple[int, int]]:
    """Resident pages and CPU ticks, its former children's included, of every process but this one."""
    own = str(os.getpid())
    for name in os.listdir(processes):
        if not name.isdigit() or name == own:
            continue
        try:
            descriptor = os.open(f"{name}/stat", os.O_RDONLY, dir_fd=processes)
            try:
                fields = os.read(descriptor, 4096).rpartition(b")")[2].split()  # a name may have any character
            finally:
                os.close(descriptor)
        except OSError:  # it ended just now
            continue
        yield int(fields[21]), sum(map(int, fields[11:15]))
