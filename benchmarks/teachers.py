"""`python -m benchmarks.teachers [--quick]`: what more teachers cost, with one pool worker that has room for two.

Every step has the same number of samples, shared out among 2, 4 or 10 teachers: they are sent, and the divergence of
random student states is taken from what comes back, one head at a time. A worker of its own for each number.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Spread
from distill.teacher import TeacherWorker
from posttrain.files import atomic_write

if TYPE_CHECKING:
    from distill.pool import TeacherPool

COUNTS = (2, 4, 10)
RESIDENT = 2
"""Teachers that the worker's memory holds."""
SAMPLES = 40
"""In a step; divided by every count."""


class Measured(TeacherWorker):
    """A worker that knows how much memory it has taken."""

    def peak(self) -> int:
        """Bytes, the largest resident size since the last call."""
        return peak_bytes()


def peak_bytes() -> int:
    """The largest resident size of this process since the last call."""
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def main() -> None:
    """Print a table, write teachers.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teachers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps of short samples: a check, not a measurement")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of teachers.json")
    arguments = parser.parse_args()
    steps, tokens = (2, 24) if arguments.quick else (10, 512)
    os.environ.update({"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    import ray
    import torch

    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as directory:
            checkpoints = write_teachers(Path(directory), max(COUNTS))
            found = [measure(checkpoints[:count], steps, tokens) for count in COUNTS]
    finally:
        ray.shutdown()
    results = {"samples": SAMPLES, "tokens": tokens, "steps": steps, "resident": RESIDENT, "counts": found}
    atomic_write(arguments.output / "teachers.json", json.dumps(results, indent=2) + "\n")
    show(results)


def write_teachers(directory: Path, count: int) -> list[str]:
    """Random tiny models."""
    import torch

    from benchmarks.models import v4_config
    from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM

    paths = [directory / str(number) for number in range(count)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        DeepseekV4ForCausalLM(v4_config()).save_pretrained(path)
    return [str(path) for path in paths]


def measure(checkpoints: list[str], steps: int, tokens: int) -> dict[str, Any]:
    """Some steps with these teachers; the first, in which everything is loaded and compiled, is not counted."""
    import ray

    from distill.model_cache import bytes_in_memory
    from distill.pool import TeacherPool

    budget = int((RESIDENT + 0.5) * bytes_in_memory("deepseek_v4", Path(checkpoints[0])))
    actor = ray.remote(Measured).options(num_cpus=0.01, max_concurrency=2)
    worker = actor.remote("deepseek_v4", budget, 1)
    pool = TeacherPool([worker])
    try:
        step(pool, checkpoints, tokens, 0)
        ray.get(worker.peak.remote())
        peak_bytes()
        found = [step(pool, checkpoints, tokens, seed + 1) for seed in range(steps)]
        peaks = {"worker": ray.get(worker.peak.remote()), "trainer": peak_bytes()}
    finally:
        ray.kill(worker)
    return {
        "teachers": len(checkpoints),
        "seconds_per_sample": Spread.of([one["seconds"] / SAMPLES for one in found]).as_dict(),
        "busy": Spread.of([one["compute"] / one["seconds"] for one in found]).as_dict(),
        "loading": Spread.of([one["load"] / one["seconds"] for one in found]).as_dict(),
        "bytes_loaded": found[-1]["loaded"],
        "bytes_returned": found[-1]["returned"],
        "peak_bytes": peaks,
    }


def step(pool: TeacherPool, checkpoints: list[str], tokens: int, seed: int) -> dict[str, float]:
    """Samples to all teachers, and the divergence from each; seconds and bytes."""
    import torch

    from benchmarks.models import v4_config
    from distill.divergence import TeacherRows, one_head_at_a_time
    from distill.objective import Objective

    config, each = v4_config(), SAMPLES // len(checkpoints)
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(SAMPLES * tokens, config.hidden_size, generator=generator)
    head_VH = torch.randn(config.vocab_size, config.hidden_size, generator=generator) * 0.02
    began = time.perf_counter()
    rows = []
    for number, checkpoint in enumerate(checkpoints):
        sequences = torch.randint(config.vocab_size, (each, 2 * tokens), generator=generator).tolist()
        states = pool.hidden_states(checkpoint, sequences, [tokens] * each)
        span = slice(number * each * tokens, (number + 1) * each * tokens)
        rows.append(TeacherRows(checkpoint, span, 1 / len(checkpoints), states, pool.head(checkpoint)))
    one_head_at_a_time(Objective(), hidden_NH.requires_grad_(), head_VH.requires_grad_(), rows)[0].backward()
    seconds = time.perf_counter() - began
    work = list(pool.take_work().values())
    return {
        "seconds": seconds,
        "compute": sum(one.seconds_compute for one in work),
        "load": sum(one.seconds_load for one in work),
        "loaded": sum(one.bytes_loaded for one in work),
        "returned": sum(one.bytes_returned for one in work),
    }


def show(results: dict[str, Any]) -> None:
    """A row for each number of teachers."""
    print(f"{results['samples']} samples of {results['tokens']} tokens a step, {results['steps']} steps")
    print("teachers  ms/sample (lowest, highest)  busy  loading  MiB loaded  peak MiB: worker  trainer")
    for one in results["counts"]:
        spread, peaks = one["seconds_per_sample"], one["peak_bytes"]
        print(
            f"{one['teachers']:8}  {1e3 * spread['median']:8.2f} ({1e3 * spread['lowest']:.2f}, "
            f"{1e3 * spread['highest']:.2f})  {one['busy']['median']:14.1%}  {one['loading']['median']:7.1%}  "
            f"{one['bytes_loaded'] / 2**20:10.1f}  {peaks['worker'] / 2**20:16.0f}  {peaks['trainer'] / 2**20:7.0f}"
        )


if __name__ == "__main__":
    main()
