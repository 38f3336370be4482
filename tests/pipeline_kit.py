"""The command line as a process of its own, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.recipe_kit import ROOT

MARK = "POSTTRAIN_TEST_MARK"


class Command:
    """`posttrain ARGUMENTS` in a session of its own, so that a signal to its group is what Ctrl-C is."""

    def __init__(self, *arguments: str, directory: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.lines: list[str] = []
        self.began = time.monotonic()
        known = os.environ.get("PYTHONPATH", "")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "posttrain", *arguments],
            cwd=directory,
            env={**os.environ, MARK: self.mark, "PYTHONPATH": f"{ROOT}{os.pathsep}{known}".rstrip(os.pathsep)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait(self, seconds: float = 400) -> int:
        """The exit code; the process and all that it started are killed when it does not end in time."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for process in self.left_over():
                process.kill()
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None
        self._reader.join(10)
        return code

    def wait_until(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output
            if time.monotonic() > deadline:
                self.process.send_signal(signal.SIGTERM)
                self.wait(60)
                raise AssertionError(f"waited {seconds} s in vain:\n{self.output}")
            time.sleep(0.1)

    def press_ctrl_c(self) -> None:
        """SIGINT to every process of the session's first group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def listens_on(self) -> set[str]:
        """Addresses on which its processes wait for connections."""
        processes = {process.pid for process in self.left_over()}
        found = [one for one in psutil.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        return {one.laddr.ip.removeprefix("::ffff:") for one in found if one.pid in processes}

    def left_over(self) -> list[psutil.Process]:
        """Processes that this command started, directly or not, and that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue
        return found


def posttrain(*arguments: str, directory: Path) -> Command:
    """Run a command to its end."""
    command = Command(*arguments, directory=directory)
    command.wait()
    return command


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as far as it is written; a last line may be under way."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_of(run: Path, stage: str) -> int:
    """The last step that a stage recorded, 0 before the first."""
    own = [record for record in records(run) if record.get("stage") == stage]
    return max((record["step"] for record in own if "step" in record), default=0)


def contents(directory: Path) -> dict[str, str]:
    """A hash of each file below `directory`."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }
