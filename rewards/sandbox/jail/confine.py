"""The program's process, from its birth to the moment in which it becomes the program."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal

from . import kernel, landlock, seccomp
from .namespaces import DEVICES, SCRATCH, python_files
from .plan import Plan, Report

HIGH_UID, LOW_UID = 0x70000000, 20_000
START = """
import builtins, sys
builtins.exit = builtins.quit = sys.exit
del sys.argv[0], builtins
__file__ = sys.argv[0]
del sys
exec(compile(open(__file__, "rb").read(), __file__, "exec"))
"""
"""Runs the program as `python program.py` would, without the time that `site` takes."""

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": SCRATCH,
    "TMPDIR": SCRATCH,
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",  # the same program gets the same reward
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONSAFEPATH": "1",
}


def become_program(plan: Plan, directory: str, uid: int | None, report: Report, tell: int) -> None:
    """Give up everything and execute the program; returns never.

    Args:
        directory: of the program's files.
        uid: an unprivileged user to become; None: we are no privileged user.
        report: protections so far.
        tell: descriptor for the full report, and for why the program was not started; closed by starting it.
    """
    try:
        tell = _keep_only(plan.channels, tell)
        own_root = "mounts" in report.active
        alone = uid is None and "user" not in report.active
        os.setsid()
        os.chdir(SCRATCH if own_root else "/")
        _limit(plan.limits, 2 if uid is None else 0)
        _drop_privileges(uid, report)
        _restrict_files(plan, directory, own_root, report)
        _restrict_calls(alone, report)
        uncovered = report.uncovered() if plan.demand else []
        os.write(
            tell, json.dumps({"active": report.active, "missing": report.missing, "uncovered": uncovered}).encode()
        )
        if not uncovered:
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):  # what Python and the supervisor changed
                signal.signal(number, signal.SIG_DFL)
            for path in (plan.executable, os.__file__, f"{directory}/{plan.main}"):
                if not os.access(path, os.R_OK):
                    raise PermissionError(f"{path} cannot be read by the unprivileged user that programs run as")
            command = [plan.executable, "-S", "-c", START, f"{directory}/{plan.main}", *plan.arguments]
            os.execve(plan.executable, command, ENVIRONMENT)
    except BaseException as error:
        os.write(tell, b"\n" + json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
    finally:
        os._exit(127)


def _keep_only(channels: list[int], tell: int) -> int:
    """Standard streams stay, channels become 3, 4, ..., then comes `tell`, all else is closed; returns its number."""
    wanted = [*channels, tell]
    copies = [fcntl.fcntl(one, fcntl.F_DUPFD, 64) for one in wanted]  # out of the way of the numbers below
    for number, copy in enumerate(copies, start=3):
        os.dup2(copy, number, inheritable=copy != copies[-1])
    os.closerange(3 + len(wanted), os.sysconf("SC_OPEN_MAX"))
    return 2 + len(wanted)


def unprivileged_user() -> int:
    """A user id that nobody else has, for this process's program; in a container that maps few ids, a low one."""
    uid = HIGH_UID + os.getpid()
    with open("/proc/self/uid_map") as file:
        for line in file:
            first, _, count = map(int, line.split())
            if first <= uid < first + count:
                return uid
    return LOW_UID + os.getpid() % 40_000


def _limit(limits: dict[str, int], others: int) -> None:
    """Resource limits of each process. `others`: processes of the jail that count as the program's."""
    mib = 2**20
    values = {
        resource.RLIMIT_AS: limits["memory_mib"] * mib,
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["scratch_mib"] * mib,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: limits["processes"] + others,
        resource.RLIMIT_STACK: 8 * mib,
        resource.RLIMIT_CORE: 1,  # unlike 0, it also keeps the kernel from piping a dump to a handler
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    for what, value in values.items():
        _, most = resource.getrlimit(what)
        hard = value + 1 if what == resource.RLIMIT_CPU else value  # a signal that says why, then the one that kills
        value, hard = (one if most == resource.RLIM_INFINITY else min(one, most) for one in (value, hard))
        resource.setrlimit(what, (value, hard))


def _drop_privileges(uid: int | None, report: Report) -> None:
    kernel.drop_bounding_set()
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        report.active["user"] = f"uid {uid}"
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    report.active["limits"] = "of every process"
    report.active["capabilities"] = "none, and no way to gain one"


def _restrict_files(plan: Plan, directory: str, own_root: bool, report: Report) -> None:
    readable = ["/"] if own_root else [*python_files(plan), directory]
    devices = [f"/dev/{name}" for name in DEVICES if os.path.exists(f"/dev/{name}")]
    try:
        version = landlock.restrict(readable, devices, [SCRATCH] if own_root else [])
        report.active["landlock"] = f"version {version}"
    except OSError as error:
        report.missing["landlock"] = str(error)


def _restrict_calls(alone: bool, report: Report) -> None:
    try:
        seccomp.install(alone)
        report.active["seccomp"] = "a list of allowed system calls"
    except (OSError, ctypes.ArgumentError) as error:
        report.missing["seccomp"] = str(error)
