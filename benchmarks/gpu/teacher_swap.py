"""What it costs to change the teacher on a GPU: seconds from the store, from memory, and what the machine could do.

`python -m benchmarks.gpu.teacher_swap [--quick]`. Three teachers of V4-Flash's width (a CSA layer, an HCA layer, 32
experts, the whole vocabulary), one worker with memory for two. In turn they score packed samples: two of them, so
that only the weights on the GPU change, then all three, so that each also comes from the store. Beside it the same with
pageable memory, and the bandwidths that the seconds are held against, measured in the same process.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.engines import Place, random_model
from benchmarks.gpu.train_step import slice_config
from distill.model_cache import Device, bytes_in_memory
from distill.store import TeacherWork
from distill.teacher import TeacherWorker

EXPERTS = 32
SAMPLES, TOKENS = 16, 512
"""Of a request: packed into one forward pass."""
COPIED = 1 << 30
"""Bytes of the copies that bandwidths are taken from."""


def write_teachers(directory: Path, count: int) -> list[str]:
    """Random checkpoints in bf16."""
    config = slice_config()
    config.n_routed_experts, config.precision = EXPERTS, "bf16"
    paths = [str(directory / str(seed)) for seed in range(count)]
    for seed, path in enumerate(paths):
        random_model(config, Place(), seed).save_pretrained(path)
    torch.cuda.empty_cache()
    return paths


class Pageable(Device):
    """A device whose teachers lie in memory as it was allocated."""

    def prepare(self, held: object) -> None:
        """Leaves it so."""


def turns(worker: TeacherWorker, paths: list[str], rounds: int) -> dict[str, float]:
    """Medians over requests to the teachers in turn, after one round that does not count."""
    sequences = torch.randint(129_280, (SAMPLES, TOKENS)).tolist()
    works: list[TeacherWork] = []
    for number in range(rounds + 1):
        for path in paths:
            work, *_ = worker.hidden_states(path, sequences, [TOKENS // 2] * SAMPLES, "bfloat16")
            assert isinstance(work, TeacherWork)
            if number:
                works.append(work)
    names = ("seconds_swap", "seconds_load", "seconds_compute")
    return {name: median(getattr(work, name) for work in works) for name in names}


def bandwidths(path: Path) -> dict[str, float]:
    """Bytes a second of large copies, the median of five: what a swap or a load could take at best."""
    device = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    pageable = torch.ones(COPIED, dtype=torch.uint8)
    pinned, other = pageable.pin_memory(), torch.empty_like(pageable)

    def timed(copy: Callable[[], object], count: int = COPIED) -> float:
        taken = []
        for _ in range(6):
            begin = time.perf_counter()
            copy()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
        return count / median(taken[1:])

    file = max(path.glob("*.safetensors"), key=lambda one: one.stat().st_size)
    part = min(COPIED, file.stat().st_size)

    def read() -> None:
        with file.open("rb", buffering=0) as stream:
            stream.readinto(memoryview(other.numpy())[:part])

    return {
        "host_to_device_pinned": timed(lambda: device.copy_(pinned, non_blocking=True)),
        "host_to_device_pageable": timed(lambda: device.copy_(pageable)),
        "host_to_host": timed(lambda: other.copy_(pageable)),
        "file_in_page_cache": timed(read, part),
    }


def measure(quick: bool) -> dict[str, Any]:
    """Every reading, with the bytes that were moved."""
    rounds = 1 if quick else 4
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "tokens": SAMPLES * TOKENS, "turns": {}}
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_teachers(Path(scratch), 3)
        each = bytes_in_memory("deepseek_v4", Path(paths[0]))
        results |= {"bytes_of_a_teacher": each, "bytes_per_second": bandwidths(Path(paths[0]))}
        for name, device in (("page-locked", Device("cuda")), ("pageable", Pageable("cuda"))):
            worker = TeacherWorker("deepseek_v4", int(2.5 * each), cache=Path(scratch) / "cache", device=device)
            results["turns"][name] = {
                "from memory": turns(worker, paths[:2], rounds),
                "from the store": turns(worker, paths, max(1, rounds // 2)),
            }
            del worker
    pinned = results["bytes_per_second"]["host_to_device_pinned"]
    results["swap_over_bandwidth"] = {
        name: found["from memory"]["seconds_swap"] / (each / pinned) for name, found in results["turns"].items()
    }
    return results


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2))
