"""`python -m benchmarks.teachers [--quick]`: what more teachers cost, with one pool worker that has room for two.

Every step has the same number of samples, shared out among 2, 4 or 10 teachers: they are sent, and the divergence of
random student states is taken from what comes back, one head at a time. Each number of teachers has a worker of its
own, and they take turns, step by step, so that whatever else the machine does strikes all of them. The teachers are
tiny but for their number of experts, which cost memory and no computing: ten are four times what a worker may hold.
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
from posttrain.cluster import reach_other_machines
from posttrain.files import atomic_write

if TYPE_CHECKING:
    from distill.pool import TeacherPool

COUNTS = (2, 4, 10)
RESIDENT = 2
"""Teachers that the worker's memory holds."""
EXPERTS = 256
"""Of each layer of a teacher, of which a token goes to two."""
SAMPLES = 160
"""In a step, by default. A tenth of them still fills a teacher's forward pass: smaller ones cost more, and less memory,
whatever the number of teachers."""
WARM_UP_TOKENS = 16


class Measured(TeacherWorker):
    """A worker that knows how much memory and processor time it has taken."""

    def taken(self) -> tuple[int, float]:
        """Bytes, the largest resident size since the last call; seconds of all threads since the start."""
        return peak_bytes(), time.process_time()


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
    parser.add_argument("--steps", type=int, default=8, help="for each number of teachers, after one to warm up")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in a step; to be divided by 2, 4 and 10")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="directory of teachers.json")
    arguments = parser.parse_args()
    steps, tokens = (2, 24) if arguments.quick else (arguments.steps, 512)
    os.environ.update({"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    import ray
    import torch

    torch.set_num_threads(1)
    reach_other_machines(False)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as directory:
            checkpoints = write_teachers(Path(directory), max(COUNTS))
            found = measure([checkpoints[:count] for count in COUNTS], steps, arguments.samples, tokens)
    finally:
        ray.shutdown()
    results = {"samples": arguments.samples, "tokens": tokens, "steps": steps, "resident": RESIDENT, "counts": found}
    atomic_write(arguments.output / "teachers.json", json.dumps(results, indent=2) + "\n")
    show(results)


def write_teachers(directory: Path, count: int) -> list[str]:
    """Random models."""
    import torch

    from benchmarks.models import v4_config
    from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM

    paths = [directory / str(number) for number in range(count)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        DeepseekV4ForCausalLM(v4_config(n_routed_experts=EXPERTS)).save_pretrained(path)
    return [str(path) for path in paths]


def measure(groups: list[list[str]], steps: int, samples: int, tokens: int) -> list[dict[str, Any]]:
    """Some steps with each group of teachers, the groups in turn; the first step, in which everything is loaded and
    compiled, is not counted."""
    import ray

    from distill.model_cache import bytes_in_memory
    from distill.pool import TeacherPool

    each = bytes_in_memory("deepseek_v4", Path(groups[0][0]))
    actor = ray.remote(Measured).options(num_cpus=0.01, max_concurrency=2)
    workers = [actor.remote("deepseek_v4", int((RESIDENT + 0.5) * each), 1) for _ in groups]
    pools = [TeacherPool([worker]) for worker in workers]
    found: list[list[dict[str, float]]] = [[] for _ in groups]
    try:
        for number in range(steps + 1):
            for group, worker, pool, records in zip(groups, workers, pools, found, strict=True):
                _, before = ray.get(worker.taken.remote())
                peak_bytes()
                own = time.process_time()
                one = step(pool, group, samples, tokens if number else WARM_UP_TOKENS, number)
                one |= {"trainer_peak": peak_bytes(), "cpu": time.process_time() - own}
                one["worker_peak"], after = ray.get(worker.taken.remote())
                one["cpu"] += after - before
                if number:
                    records.append(one)
    finally:
        for worker in workers:
            ray.kill(worker)
    return [_summary(len(group), each, samples, records) for group, records in zip(groups, found, strict=True)]


def _summary(teachers: int, each: int, samples: int, steps: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "teachers": teachers,
        "bytes_of_teachers": teachers * each,
        "seconds_per_sample": Spread.of([one["seconds"] / samples for one in steps]).as_dict(),
        "cpu_seconds_per_sample": Spread.of([one["cpu"] / samples for one in steps]).as_dict(),
        "busy": Spread.of([one["compute"] / one["seconds"] for one in steps]).as_dict(),
        "loading": Spread.of([one["load"] / one["seconds"] for one in steps]).as_dict(),
        "bytes_loaded": steps[-1]["loaded"],
        "bytes_returned": steps[-1]["returned"],
        "peak_bytes": {who: max(one[f"{who}_peak"] for one in steps) for who in ("worker", "trainer")},
    }


def step(pool: TeacherPool, checkpoints: list[str], samples: int, tokens: int, seed: int) -> dict[str, float]:
    """Samples to all teachers, and the divergence from each; seconds and bytes."""
    import torch

    from benchmarks.models import v4_config
    from distill.divergence import TeacherRows, one_head_at_a_time
    from distill.objective import Objective

    config, each = v4_config(), samples // len(checkpoints)
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(samples * tokens, config.hidden_size, generator=generator)
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
    columns = ["teachers", "MiB of them", "ms/sample (range)", "CPU ms/sample (range)", "busy", "loading", "MiB loaded"]
    columns += ["peak MiB: worker", "trainer"]
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for one in results["counts"]:
        peaks = one["peak_bytes"]
        cells = [
            f"{one['teachers']}",
            f"{one['bytes_of_teachers'] / 2**20:.0f}",
            _milliseconds(one["seconds_per_sample"]),
            _milliseconds(one["cpu_seconds_per_sample"]),
            f"{one['busy']['median']:.0%}",
            f"{one['loading']['median']:.0%}",
            f"{one['bytes_loaded'] / 2**20:.0f}",
            f"{peaks['worker'] / 2**20:.0f}",
            f"{peaks['trainer'] / 2**20:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def _milliseconds(spread: dict[str, float]) -> str:
    return "{median:.1f} ({lowest:.1f}–{highest:.1f})".format(**{key: 1e3 * value for key, value in spread.items()})


if __name__ == "__main__":
    main()
