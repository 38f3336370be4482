"""`python -m benchmarks [--quick] [--output DIRECTORY]`: prints a table, writes results.json."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from posttrain.files import atomic_write
from rollouts.settings import engine_environment

THREADS = 1
"""A trainer or an engine of the tiny recipes has one thread."""


def main() -> None:
    """Run everything; well under a minute with `--quick`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and few: a check, not a measurement")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of results.json")
    arguments = parser.parse_args()
    os.environ.update(engine_environment(THREADS))  # before torch and vLLM are imported
    from benchmarks.table import show

    results = run(arguments.quick)
    atomic_write(arguments.output / "results.json", json.dumps(results, indent=2) + "\n")
    show(results)
    print(f"{arguments.output / 'results.json'} · {results['wall_seconds']:.0f} s")
    code = gpu_part(arguments.quick, arguments.output) if Path("/dev/nvidiactl").exists() else 0
    sys.stdout.flush()
    os._exit(code)  # vLLM's own clean-up at exit waits for processes that were never started


def gpu_part(quick: bool, output: Path) -> int:
    """The Triton kernels on the machine's GPU: gpu.json beside results.json. Returns the exit code."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(output / "gpu.json")]
    return subprocess.run([*command, *(["--quick"] if quick else [])], check=False).returncode


def run(quick: bool) -> dict[str, Any]:
    """All measurements, as in results.json."""
    import torch

    from benchmarks import rollout
    from benchmarks.models import make_pair
    from benchmarks.training import training
    from posttrain.observe.environment import describe_environment

    begin = time.monotonic()
    torch.set_num_threads(THREADS)
    engine = rollout.start_engine(THREADS)  # before our kernels run: see posttrain.kernels.compiled
    ours, theirs = make_pair()
    repeats = 2 if quick else 9
    published = rollout.publish(engine, ours, repeats)
    return {
        "schema": 1,
        "quick": quick,
        "threads": THREADS,
        "environment": describe_environment(),
        "training": training(ours, theirs, 32 if quick else 128, 32, repeats),
        "rollout": [
            rollout.rollout(engine, theirs, requests, 8 if quick else 16, repeats)
            for requests in ((16,) if quick else (64, 128))
        ],
        "publish": published,
        "logprob_difference": rollout.logprob_difference(engine, ours, 16 if quick else 64, 16),
        "wall_seconds": time.monotonic() - begin,
    }


if __name__ == "__main__":
    main()
