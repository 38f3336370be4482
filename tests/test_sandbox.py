"""The sandbox as its callers use it: what goes in, what comes out, what an execution may use."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rewards import sandbox
from rewards.sandbox.jail.plan import Report
from rewards.sandbox.launch import Protections


def run(source: str, stdin: bytes = b"", **limits) -> sandbox.Outcome:
    return sandbox.run(source, stdin, sandbox.Limits(**limits))


def test_a_program_reads_its_input_and_prints() -> None:
    outcome = run("import sys\nprint(sys.stdin.read().upper(), end='')\nprint('note', file=sys.stderr)", b"text\n")
    assert (outcome.reason, outcome.exit_code) == ("exit", 0) and outcome.succeeded
    assert (outcome.stdout, outcome.stderr) == (b"TEXT\n", b"note\n")
    assert outcome.seconds > 0 and outcome.cpu_seconds > 0 and 1 < outcome.peak_mib < 256


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("exit(4)", 4),
        ("quit()", 0),
        ("1/0", 1),
        ("def", 1),
        ("import os; os.abort()", -6),
        ("x = '\ud800'", 1),
        ("x = '\0'", 1),
        ("assert __name__ == '__main__' and __file__.endswith('main.py')", 0),
        ("import sys; assert sys.argv == [__file__]", 0),
    ],
)
def test_exit_codes(source: str, code: int) -> None:
    outcome = run(source)
    assert (outcome.reason, outcome.exit_code) == ("exit", code), outcome.stderr
    assert outcome.succeeded == (code == 0)


def test_the_standard_library_works() -> None:
    outcome = run(
        """
import asyncio, collections, concurrent.futures, ctypes, datetime, decimal, hashlib, heapq, itertools, json, math
import multiprocessing, os, random, re, sqlite3, statistics, subprocess, sys, tempfile, threading, zoneinfo

async def nap():
    await asyncio.sleep(0.01)
    return 3

if __name__ == "__main__":
    assert asyncio.run(nap()) == 3
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(abs, [-1])) == [1]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-2]) == [2]
    with tempfile.TemporaryDirectory() as directory:
        open(directory + "/x", "w").write("text")
        assert os.listdir(directory) == ["x"]
    assert subprocess.run([sys.executable, "-S", "-c", "print(5)"], capture_output=True).stdout == b"5\\n"
    assert random.SystemRandom().random() < 1 and sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
"""
    )
    assert outcome.succeeded, outcome.stderr.decode()


def test_third_party_packages_are_not_there() -> None:
    outcome = run("import importlib.util as u\nprint([n for n in ('numpy', 'torch', 'pip') if u.find_spec(n)])")
    assert outcome.stdout == b"[]\n"


def test_the_same_program_prints_the_same() -> None:
    source = "print(set('abcdefgh'), hash('x'))"
    assert run(source).stdout == run(source).stdout


def test_executions_share_nothing() -> None:
    assert run("open('/tmp/left', 'w').write('x')").succeeded
    assert run("import os; print(os.listdir('/tmp'))").stdout == b"[]\n"


def test_large_input_and_output_do_not_block_each_other() -> None:
    text = b"0123456789" * 20_000
    outcome = run("import sys\nfor line in sys.stdin.buffer: sys.stdout.buffer.write(line)", text, output_kib=1024)
    assert outcome.stdout == text


def test_input_that_nobody_reads_is_no_failure() -> None:
    assert run("pass", b"x" * 2**20).succeeded


def test_a_limit_that_is_broken_is_named() -> None:
    assert run("import time; time.sleep(60)", wall_seconds=0.5).reason == "wall time"
    assert run("while True: pass", cpu_seconds=1, wall_seconds=60).reason == "cpu time"
    printed = run("print('x' * 100_000)", output_kib=4)
    assert (printed.reason, len(printed.stdout)) == ("output", 4096) and not printed.succeeded
    assert b"MemoryError" in run("x = bytearray(100 * 2**20)", memory_mib=64).stderr


def test_the_clock_starts_with_the_program() -> None:
    outcome = run("import time; time.sleep(600)", wall_seconds=1)
    assert outcome.reason == "wall time" and outcome.seconds >= 1


def test_executions_side_by_side_from_threads() -> None:
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda number: run(f"print({number})").stdout, range(12)))
    assert outcomes == [b"%d\n" % number for number in range(12)]


def test_no_descriptor_and_no_process_is_left(tmp_path: Path) -> None:
    run("")
    # Other tests' children and descriptors may be there; they may go, but none may come.
    before, children = set(os.listdir("/proc/self/fd")), {child.pid for child in psutil.Process().children()}
    for source in ("pass", "import time; time.sleep(9)", "while True: print('x' * 10000)"):
        run(source, wall_seconds=0.3)
    sandbox.examine("def f(): pass", "assert f() is None")
    assert set(os.listdir("/proc/self/fd")) <= before
    assert {child.pid for child in psutil.Process().children()} <= children
    assert threading.active_count() == 1 or all(thread.name != "reward" for thread in threading.enumerate())


def test_descriptors_of_the_caller_do_not_reach_the_program(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = run("import os\nfor n in range(3, 200):\n    try: print(n, os.fstat(n))\n    except OSError: pass")
    assert outcome.stdout == b""


def test_a_program_whose_start_fails_is_the_sandboxes_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(sandbox.SandboxError, match="no-such-file"):
        sandbox.run_together([sandbox.Execution({"main.py": ""}, main="no-such-file.py")])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(sandbox.SandboxError, match="the jail broke"):
        run("")
    monkeypatch.setattr(sys, "executable", "/no/such/interpreter")
    with pytest.raises(sandbox.SandboxError, match=r"no process for a jail: .*No such file"):
        sandbox.examine("", "assert True")
    monkeypatch.undo()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_this_machine_isolates_programs_and_says_how() -> None:
    found = sandbox.protections()
    assert sandbox.uncovered() == []
    assert {"limits", "capabilities"} <= set(found.active)
    assert ("MISSING" in found.describe()) == bool(found.missing)


@pytest.mark.parametrize(
    ("active", "uncovered"),
    [
        (["network", "mounts", "processes", "user"], []),
        (["seccomp", "landlock"], []),
        (["seccomp"], ["files"]),
        (["landlock", "user"], ["the network", "other processes"]),
        ([], ["the network", "files", "other processes", "the caller's privileges"]),
    ],
)
def test_what_counts_as_isolated(active: list[str], uncovered: list[str]) -> None:
    assert Report(dict.fromkeys(active, "")).uncovered() == uncovered


def test_what_is_missing_is_said_with_its_reason() -> None:
    protections = Protections(
        {"limits": "x"}, {"mounts": "not allowed", "network": "not allowed", "seccomp": "no list"}
    )
    assert protections.describe() == "limits; MISSING: mounts, network (not allowed); seccomp (no list)"


def test_the_wall_clock_of_a_stopped_machine_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a jail not keep the clock, it is ended from outside."""
    monkeypatch.setattr("rewards.sandbox.launch.BACKSTOP_SECONDS", -59.0)
    with pytest.raises(sandbox.SandboxError, match="did not end in time"):
        run("import time; time.sleep(60)", wall_seconds=60)
