"""Hostile programs: each is contained, and ends as its header says. See tests/sandbox_programs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rewards import sandbox

PROGRAMS = Path(__file__).parent / "sandbox_programs"
HOSTILE = sorted(path.stem for path in PROGRAMS.glob("*.py") if path.stem != "prelude")
FORGERIES = sorted(path.stem for path in (PROGRAMS / "forgeries").glob("*.py"))
LIMITS = sandbox.Limits(wall_seconds=4, cpu_seconds=1, memory_mib=192, processes=12)
RUN_HOSTILE = """
import runpy, sys
sys.path.insert(0, "/program")
runpy.run_path("/program/hostile.py", run_name="__main__")
"""
ESCAPES_OUTSIDE = (
    "environment",
    "tcp",
    "unix_sockets",
    "udp",
    "read_secrets",
    "watches",
    "symbolic_links",
    "memory_file",
)
"""Programs that succeed without a sandbox and do no harm."""


@dataclass
class Outside:
    """What a program could reach if it were not contained."""

    facts: dict[str, Any]
    bystander: subprocess.Popen[bytes]
    listeners: list[socket.socket]
    directory: Path

    def check(self) -> None:
        """Nothing of it was touched."""
        assert self.bystander.poll() is None
        for listener in self.listeners:
            with pytest.raises(BlockingIOError):
                listener.recvfrom(1) if listener.type == socket.SOCK_DGRAM else listener.accept()
        assert Path(self.facts["secret"]).read_text() == "a secret"
        assert list(Path(self.facts["open"]).iterdir()) == []


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    temporary = tempfile.TemporaryDirectory()
    directory = Path(temporary.name)
    directory.chmod(0o755)  # so that it is the sandbox that keeps programs out
    secret, open_directory = directory / "secret.txt", directory / "open"
    secret.write_text("a secret")
    open_directory.mkdir()
    open_directory.chmod(0o777)
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(tcp.getsockname())
    by_path, abstract, abstract_datagrams = (
        socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_DGRAM)
    )
    by_path.bind(str(directory / "socket"))
    (directory / "socket").chmod(0o777)
    name = f"posttrain-test-{os.getpid()}"
    abstract.bind(f"\0{name}")
    abstract_datagrams.bind(f"\0{name}-datagrams")
    for listener in (by_path, abstract):
        listener.listen()
    listeners = [tcp, udp, by_path, abstract, abstract_datagrams]
    for listener in listeners:
        listener.setblocking(False)
    bystander = subprocess.Popen(["sleep", "600"])
    os.environ["POSTTRAIN_TEST_SECRET"] = "secret"
    facts = {
        "caller": os.getpid(), "bystander": bystander.pid, "port": tcp.getsockname()[1],
        "unix": str(directory / "socket"), "abstract": name, "secret": str(secret), "open": str(open_directory),
        "harness": str(Path(sandbox.__file__).parent),
    }  # fmt: skip
    yield Outside(facts, bystander, listeners, directory)
    del os.environ["POSTTRAIN_TEST_SECRET"]
    bystander.kill()
    bystander.wait()
    for listener in listeners:
        listener.close()
    temporary.cleanup()


def processes_of(outcome: sandbox.Outcome, mark: str) -> list[str]:
    """What is left of a program: processes of its user, or with its mark on their command line."""
    uid = re.fullmatch(r"uid (\d+)", outcome.protections.active.get("user", ""))
    left = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            command = (status.parent / "cmdline").read_bytes()
            if mark.encode() in command or (uid and f"\nUid:\t{uid[1]}\t" in status.read_text()):
                left.append(f"{status.parent.name} {command!r}")
        except OSError:
            continue
    return left


def header(path: Path) -> str:
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ") and first.endswith("."), f"{path.name} does not say what must hold"
    assert second.startswith("# ends: "), path.name
    return second.removeprefix("# ends: ")


def test_there_are_at_least_forty() -> None:
    assert len(HOSTILE) >= 40 and len(FORGERIES) >= 20


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name: str, outside: Outside) -> None:
    path = PROGRAMS / f"{name}.py"
    expected = header(path)
    prelude = (PROGRAMS / "prelude.py").read_text()
    files = {"main.py": RUN_HOSTILE, "hostile.py": path.read_text(), "prelude.py": prelude}
    # Where other programs have the processors, a second of them takes long.
    limits = replace(LIMITS, wall_seconds=60) if expected == "cpu time" else LIMITS
    mark = f"mark-{os.getpid()}-{name}"
    execution = sandbox.Execution(
        files, arguments=[mark], stdin=json.dumps(outside.facts).encode() + b"\n", limits=limits
    )
    (outcome,) = sandbox.run_together([execution])
    printed = outcome.stdout.decode(errors="replace") + outcome.stderr.decode(errors="replace")
    assert "ESCAPED" not in printed
    ended = f"exit {outcome.exit_code}" if outcome.reason == "exit" else outcome.reason
    assert expected in ("any", ended), (ended, printed[-2000:])
    if expected == "exit 0":
        assert "contained" in printed, "it ended before it did anything"
    assert len(outcome.stdout) <= LIMITS.output_kib * 1024
    assert processes_of(outcome, mark) == []
    outside.check()


@pytest.mark.parametrize("name", ESCAPES_OUTSIDE)
def test_the_same_program_escapes_without_a_sandbox(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """So the tests above can fail: it is the sandbox that contains these programs."""
    directory = tmp_path_factory.mktemp("without")
    (directory / "open").mkdir()
    (directory / "secret").write_text("a secret")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(directory / "socket"))
        unix.listen()
        facts = {
            "caller": 0, "bystander": 0, "port": tcp.getsockname()[1], "unix": str(directory / "socket"),
            "abstract": "x",
            "secret": str(directory / "secret"), "open": str(directory / "open"), "harness": str(directory),
        }  # fmt: skip
        text = (PROGRAMS / f"{name}.py").read_text().replace("/tmp/", f"{directory}/")
        done = subprocess.run(
            [sys.executable, "-c", text],
            input=json.dumps(facts).encode() + b"\n",
            capture_output=True,
            timeout=60,
            env={"PYTHONPATH": str(PROGRAMS), "A_SECRET": "1"},
        )
    assert b"ESCAPED" in done.stdout, (done.stdout, done.stderr)


HONEST = """
def f(x):
    if x < 0:
        raise ValueError("negative")
    return 2 * x + 1
"""
TESTS = """
import math
import unittest

assert f(3) == 7
assert abs(f(4) - 9) < 0.1
assert math.isclose(f(5), 11)
assert f(6) in (13,)
assert len([one for one in range(3) if f(one) == 2 * one + 1]) == 3
assert set(map(f, [1, 2])) == {3, 5}
assert sorted([f(2), f(1)]) == [3, 5]
assert [f(1), f(2)] == [3, 5]


def test_function():
    assert not f(3) != 7


class Tests(unittest.TestCase):
    def test_equal(self):
        self.assertEqual(f(3), 7)

    def test_less(self):
        self.assertTrue(6.5 < f(3) < 7.5)

    def test_negative(self):
        with self.assertRaisesRegex(ValueError, "negative"):
            f(-1)
"""


def test_an_honest_program_passes_the_tests_of_the_forgeries() -> None:
    verdict = sandbox.examine(HONEST, TESTS, limits=LIMITS)
    assert verdict.passed == verdict.tests == 12


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name: str, outside: Outside) -> None:
    program = (PROGRAMS / "forgeries" / f"{name}.py").read_text()
    assert program.startswith("# ")
    verdict = sandbox.examine(program, TESTS, limits=sandbox.Limits(wall_seconds=3, cpu_seconds=1, memory_mib=192))
    assert verdict.tests == 12
    assert verdict.passed == 0, verdict
    outside.check()


@pytest.mark.parametrize("name", FORGERIES)
def test_an_output_cannot_be_forged(name: str) -> None:
    program = (PROGRAMS / "forgeries" / f"{name}.py").read_text()
    limits = sandbox.Limits(wall_seconds=3, cpu_seconds=1, memory_mib=192)
    verdict = sandbox.compare(program, [sandbox.Case("3\n", "7\n")], limits)
    assert verdict.passed == 0


def test_a_killed_caller_takes_the_program_along() -> None:
    """The caller dies without a chance to clean up: what it had running ends."""
    code = "from rewards import sandbox as s\ns.run('import time; time.sleep(60)', limits=s.Limits(wall_seconds=60))"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 60
    while not (jails := jails_below(caller.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(jails) >= 1
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in jails) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in jails)


def jails_below(pid: int) -> set[int]:
    """Processes that run a program for `pid`: the third generation and later ones."""
    found: set[int] = set()
    generation = {pid}
    for depth in range(4):
        below: set[int] = set()
        for one in generation:
            try:
                below |= set(map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split()))
            except OSError:
                continue
        if depth >= 2:
            found |= below
        generation = below
    return found
