"""`python -m benchmarks.sandbox [--quick]`: executions a minute in the sandbox, one at a time and side by side."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rewards import sandbox

PROGRAM = """
def is_prime(number):
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
"""
TESTS = """
assert [number for number in range(30) if is_prime(number)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
assert is_prime(7919)
assert not is_prime(7917)
"""
AIM = 200
"""Executions a minute on two cores."""


def run_once() -> bool:
    """A program that does nothing: what the sandbox itself costs."""
    return sandbox.run("").succeeded


def compare_once() -> bool:
    """One case of a program that reads and prints."""
    return sandbox.compare("print(2 * int(input()))", [sandbox.Case("4\n", "8\n")]).share == 1


def examine_once() -> bool:
    """Unit tests: two jails, that of the program and that of its examiner."""
    return sandbox.examine(PROGRAM, TESTS).share == 1


def measure(once: Callable[[], bool], executions: int, workers: int) -> dict[str, float]:
    """Executions a minute, CPU seconds of an execution, and the median and longest time of one in seconds."""
    times: list[float] = []

    def timed(_: int) -> None:
        began = time.monotonic()
        if not once():
            raise RuntimeError("the program did not do what it should")
        times.append(time.monotonic() - began)

    used, began = _cpu_seconds(), time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(timed, range(executions)))
    seconds = time.monotonic() - began
    return {
        "per_minute": 60 * executions / seconds,
        "cpu_seconds": (_cpu_seconds() - used) / executions,
        "median_seconds": statistics.median(times),
        "longest_seconds": max(times),
    }


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    """Print a table; exit code 1 if two cores' worth of executions miss the aim."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few: a check, not a measurement")
    executions = 10 if parser.parse_args().quick else 200
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    print(f"{len(cores)} cores; {sandbox.protections().describe()}")
    print(f"{'':24}{'at once':>10}{'per minute':>12}{'CPU ms':>10}{'median ms':>12}{'longest ms':>12}")
    slowest = float("inf")
    for name, once in (("nothing", run_once), ("one case", compare_once), ("unit tests", examine_once)):
        for workers in (1, 2, 4):
            found = measure(once, executions, workers)
            cells = [1e3 * found[key] for key in ("cpu_seconds", "median_seconds", "longest_seconds")]
            print(f"{name:24}{workers:10}{found['per_minute']:12,.0f}{cells[0]:10.0f}{cells[1]:12.0f}{cells[2]:12.0f}")
            slowest = min(slowest, found["per_minute"]) if workers > 1 else slowest
    raise SystemExit(slowest < AIM)


if __name__ == "__main__":
    main()
