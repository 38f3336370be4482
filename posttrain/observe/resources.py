"""Memory and processor time of a run: the driver with everything it has started, Ray's processes included.

Ray started by `ray.init()` is part of the driver's process tree: gcs_server, raylet, the log monitor and the dashboard
are the driver's children, workers and agents the raylet's. Processes once seen in the tree stay counted when their
parent dies and they are given to another.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain.observe.metrics import MetricsLog
from posttrain.observe.periodic import Periodic

PROC = Path("/proc")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PSS_SECONDS = 60.0
"""PSS is read from the kernel's page tables (milliseconds a process), so it is taken this often..."""
PSS_GROWTH = 1.05
"""...and whenever the summed RSS passes its largest value at a PSS reading by this factor."""
SHARE = 0.003
"""Of a core, that sampling may take."""

ProcessKey = tuple[int, int]
"""(pid, start time in clock ticks): the kernel uses pids again."""


@dataclass(frozen=True)
class ProcessSample:
    """What /proc/<pid>/stat says of one process."""

    key: ProcessKey
    parent: int
    rss_bytes: int
    cpu_seconds: float


class ResourceMonitor:
    """Samples the process tree under `root_pid` every `seconds`, or less often, from a thread, as a context manager.

    `peak_bytes` is the largest *summed RSS* (resident set sizes added up): pages that several processes share, such as
    the object store's or a forked interpreter's, count once for each, so it never reads too low. `peak_pss_bytes` is
    the largest summed PSS, where a shared page counts once in all; it is taken less often, because it costs more.
    With a `log`, a `resources` event is appended at every PSS reading and at the end. Where there is no /proc (not
    Linux) nothing is measured and the peaks stay 0.
    """

    def __init__(self, root_pid: int | None = None, log: MetricsLog | None = None, seconds: float = 1.0) -> None:
        self.root_pid = root_pid or os.getpid()
        self.peak_bytes = 0
        self.peak_pss_bytes = 0
        self.peak_by_process_kind: dict[str, int] = {}
        """Peak summed RSS of each kind of process: `driver`, `actor <class>`, `Ray`, ... (`kind_of_command`)."""
        self._log = log
        self._cpu: dict[ProcessKey, float] = {}
        self._kinds: dict[ProcessKey, str] = {}
        self._rss_bytes = 0
        self._pss_bytes = 0
        self._rss_at_pss = 0
        self._next_pss = 0.0
        self._thread = Periodic("resource-monitor", seconds, self.sample, share=SHARE)

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all processes seen, dead ones up to their last sample."""
        return sum(self._cpu.values())

    @property
    def cpu_seconds_by_process_kind(self) -> dict[str, float]:
        """The same for each kind of process; one that has changed its name counts under its last."""
        found: dict[str, float] = {}
        for key, seconds in self._cpu.items():
            kind = self._kinds[key]
            found[kind] = round(found.get(kind, 0.0) + seconds, 2)
        return found

    def __enter__(self) -> ResourceMonitor:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.stop()
        self._next_pss = 0.0
        self.sample()

    def sample(self) -> None:
        """Take one sample now."""
        processes = self._tree()
        by_kind: dict[str, int] = {}
        for process in processes:
            kind = process_kind(process.key[0], self.root_pid)
            by_kind[kind] = by_kind.get(kind, 0) + process.rss_bytes
            self._cpu[process.key] = process.cpu_seconds
            self._kinds[process.key] = kind
        self._rss_bytes = sum(by_kind.values())
        self.peak_bytes = max(self.peak_bytes, self._rss_bytes)
        for kind, rss in by_kind.items():
            self.peak_by_process_kind[kind] = max(rss, self.peak_by_process_kind.get(kind, 0))
        if time.monotonic() >= self._next_pss or self._rss_bytes > PSS_GROWTH * self._rss_at_pss:
            self._read_pss(processes)

    def _read_pss(self, processes: list[ProcessSample]) -> None:
        self._next_pss = time.monotonic() + PSS_SECONDS
        self._rss_at_pss = max(self._rss_at_pss, self._rss_bytes)
        self._pss_bytes = sum(_pss_bytes(process) for process in processes)
        self.peak_pss_bytes = max(self.peak_pss_bytes, self._pss_bytes)
        if self._log is not None and processes:
            self._log.event("resources", **self.fields())

    def fields(self) -> dict[str, Any]:
        """What a `resources` event holds: bytes and seconds."""
        return {
            "rss_bytes": self._rss_bytes,
            "pss_bytes": self._pss_bytes,
            "peak_rss_bytes": self.peak_bytes,
            "peak_pss_bytes": self.peak_pss_bytes,
            "peak_by_process_kind": dict(self.peak_by_process_kind),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "cpu_seconds_by_process_kind": self.cpu_seconds_by_process_kind,
        }

    def _tree(self) -> list[ProcessSample]:
        """The root, its descendants, and what was among them once, with their descendants."""
        everything = {sample.key[0]: sample for sample in map(_read_stat, _process_ids()) if sample is not None}
        inside: dict[int, bool] = {}

        def belongs(pid: int) -> bool:
            path = []
            while pid not in inside and pid in everything:
                if pid == self.root_pid or everything[pid].key in self._cpu:
                    inside[pid] = True
                    break
                path.append(pid)
                inside[pid] = False
                pid = everything[pid].parent
            answer = inside.get(pid, False)
            inside.update(dict.fromkeys(path, answer))
            return answer

        return [sample for pid, sample in everything.items() if belongs(pid)]


def _process_ids() -> list[int]:
    try:
        return [int(name) for name in os.listdir(PROC) if name.isdigit()]
    except FileNotFoundError:
        return []


def _read_stat(pid: int) -> ProcessSample | None:
    """`pid`'s line of numbers (proc(5)); None when it has ended, or is a zombie without memory."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything; [0] is field 3, the state
    if fields[0] in "ZX":
        return None
    cpu_seconds = (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
    return ProcessSample((pid, int(fields[19])), int(fields[1]), int(fields[21]) * PAGE_BYTES, cpu_seconds)


def _pss_bytes(process: ProcessSample) -> int:
    """Proportional set size; the RSS where the kernel does not tell (another user's process)."""
    try:
        text = (PROC / str(process.key[0]) / "smaps_rollup").read_text()
    except OSError:
        return process.rss_bytes
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else process.rss_bytes


def process_kind(pid: int, root_pid: int) -> str:
    """What a process is for, from its command line."""
    if pid == root_pid:
        return "driver"
    try:
        command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "other"
    return kind_of_command(command)


def kind_of_command(command: str) -> str:
    """The kind of process that `command` (a command line, or the title a process gave itself) stands for."""
    # DashboardAgent, in spite of its name, is on every node, with the dashboard or without.
    if command.startswith(("ray::RuntimeEnvAgent", "ray::DashboardAgent")):
        return "Ray"
    if "dashboard" in command.lower() or re.search(r"forkserver.*'ray\.dashb", command):
        return "Ray dashboard"
    if command.startswith("ray::IDLE"):
        return "Ray idle workers"
    if re.search(r"/ray/(core/src/ray|_private|autoscaler)/", command):
        return "Ray"
    if command.startswith("ray::"):
        return "actor " + re.split(r"[.\s(]", command.removeprefix("ray::"), maxsplit=1)[0]
    return "vLLM" if command.startswith(("VLLM::", "vllm")) else "other"
