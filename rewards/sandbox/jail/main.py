"""Start of the jail: `main` runs in a fresh interpreter, builds the jail and starts supervisor and program in it."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from . import kernel, namespaces, supervisor
from .confine import become_program, unprivileged_user
from .plan import Plan, Report


def main() -> None:
    """Read a plan from the descriptor that the last argument names, carry it out, write what happened."""
    with os.fdopen(int(sys.argv[-1]), "rb") as file:
        plan = Plan(**json.load(file))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should the machine's memory run out, this goes first
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 of a namespace ignores what it has no handler for
    outcome = run(plan)
    os.write(plan.status, json.dumps(outcome).encode())


def run(plan: Plan) -> dict[str, Any]:
    """Carry out a plan; what happened: `supervisor.watch`'s words and the protections, or `error`, or `uncovered`."""
    report = Report()
    uid = unprivileged_user() if os.getuid() == 0 else None
    entered = namespaces.enter(report)
    root = namespaces.build_root(plan, report) if entered else None
    if root is not None:
        return _run_in_namespaces(plan, namespaces.PROGRAM, root, uid, report)
    import tempfile  # seldom needed, slow

    with tempfile.TemporaryDirectory(prefix="posttrain-program-") as directory:
        os.chmod(directory, 0o755)
        namespaces.write_program(directory, plan.files)
        if entered:
            return _run_in_namespaces(plan, directory, None, uid, report)
        return _run_without_namespaces(plan, directory, uid, report)


def _run_in_namespaces(plan: Plan, directory: str, root: str | None, uid: int | None, report: Report) -> dict[str, Any]:
    """Process 1 of the pid namespace supervises; when it ends, the kernel kills all others."""
    reader, writer = os.pipe()
    first = os.fork()
    if first == 0:
        os.close(reader)
        try:
            processes = namespaces.change_root(root, report) if root is not None else None
            outcome = _supervise(plan, directory, uid, report, processes)
        except BaseException as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(outcome).encode())
        os._exit(0)
    for descriptor in (writer, plan.control, *plan.channels):
        os.close(descriptor)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    os.waitpid(first, 0)  # not before every process of the namespace is gone
    return json.loads(said) if said else {"error": "the first process of the jail was killed"}


def _run_without_namespaces(plan: Plan, directory: str, uid: int | None, report: Report) -> dict[str, Any]:
    """Another user, Landlock, seccomp and limits have to do; there is no place to write."""
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    try:
        return _supervise(plan, directory, uid, report, None)
    finally:
        _kill_all(uid)


def _supervise(plan: Plan, directory: str, uid: int | None, report: Report, processes: int | None) -> dict[str, Any]:
    """Start the program, wait for its end; afterwards only its main process is sure to be gone."""
    wake = supervisor.wake_on_child_exit()
    reader, writer = os.pipe()
    program = os.fork()
    if program == 0:
        become_program(plan, directory, uid, report, writer)
    for descriptor in (writer, 0, 1, 2, *plan.channels):  # who reads must see the end when the program closes its side
        os.close(descriptor)
    with os.fdopen(reader, "rb") as file:
        said = [json.loads(line) for line in file.read().splitlines() if line]
    for one in said:
        if "error" in one:
            return one
        if one["uncovered"]:
            return one
        report.add(one)
    if processes is not None:
        report.active["memory watch"] = "of all processes together"
    outcome = supervisor.watch(program, plan.limits, plan.control, wake, processes)
    return {**outcome, "active": report.active, "missing": report.missing}


def _kill_all(uid: int | None) -> None:
    """Kill every process of the program's user and collect all; a program without a user of its own has one process."""
    while True:
        if uid is not None:
            helper = os.fork()
            if helper == 0:
                os.setresuid(uid, uid, uid)
                try:
                    os.kill(-1, signal.SIGKILL)
                finally:
                    os._exit(0)
            os.waitpid(helper, 0)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
