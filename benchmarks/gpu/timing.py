"""Times on the GPU, and the ceilings that kernels are held against: both measured in the same process."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

AHEAD_CYCLES = 4_000_000
"""How long the GPU is kept busy before a call, about 2 ms, so that the call's launches are queued when it begins."""


def seconds(call: Callable[[], object], repeats: int = 20, warm_up: int = 5) -> float:
    """Median time of one call on the GPU, by CUDA events, with the L2 cache flushed before each call.

    The time that Python needs to launch kernels does not count unless the GPU waits for more than 2 ms of it.
    """
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD_CYCLES)
        cache.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory that a call needs beside what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def matmul_ceiling() -> float:
    """bf16 FLOP/s of a large square matrix product by the vendor's library."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b)


@functools.cache
def copy_ceiling() -> float:
    """Bytes/s, read and written, of a large copy."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))
