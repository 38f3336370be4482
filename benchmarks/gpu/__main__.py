"""`python -m benchmarks.gpu [--quick] [FAMILY ...]`: every kernel family on one GPU, one process each; prints JSON.

`make bench` runs this where there is a GPU. Without `--output` nothing is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain.files import atomic_write

FAMILIES = (
    *("attention", "indexer", "moe", "mhc", "vocabulary", "dense", "newton_schulz", "quant"),
    "train_step",
    "teacher_swap",
)


def main() -> int:
    """Exit code 0 when every family was measured, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small and few: a check, not a measurement")
    parser.add_argument("--output", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.families) - set(FAMILIES)):
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    results = {name: measure(name, arguments.quick) for name in arguments.families or FAMILIES}
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.output is not None:
        atomic_write(arguments.output, text + "\n")
    return int(any("error" in result for result in results.values()))


def measure(family: str, quick: bool) -> dict[str, Any]:
    """Results of one family from a process of its own, so that none meets another's memory; or its error."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{family}", *(["--quick"] if quick else [])]
    print(f"{family} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:] or f"exit code {done.returncode}"}
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    sys.exit(main())
