"""Speed of mHC at V4-Flash's shapes on one GPU, against what a copy of the counted bytes takes."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import copy_ceiling, peak_bytes, seconds
from posttrain import kernels
from posttrain.kernels.mhc import oracle
from posttrain.kernels.mhc import triton as mhc

STREAMS, HIDDEN = 4, 4096
PRE: dict[str, Any] = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
HEAD = {"eps": 1e-6, "norm_eps": 1e-6}

UNITS = {"pre": (4 + 1, 4 + 1 + 4), "head": (4 + 1, 4 + 1 + 4), "post": (4 + 1 + 4, 4 + 4 + 1 + 4 + 1)}
"""Rows of HIDDEN channels that a token reads and writes at least once, forward and backward (docs/kernels/mhc.md)."""

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the GPU."""
    return scale * torch.randn(shape, device="cuda", dtype=dtype)


def inputs_of(name: str, tokens: int) -> tuple[Tensor, ...]:
    """bf16 streams, everything small in fp32."""
    streams = random(tokens, STREAMS, HIDDEN, dtype=torch.bfloat16)
    if name == "post":
        inner = random(tokens, HIDDEN, dtype=torch.bfloat16)
        return streams, inner, random(tokens, STREAMS), random(tokens, STREAMS, STREAMS)
    width = STREAMS if name == "head" else (2 + STREAMS) * STREAMS
    return streams, random(width, STREAMS * HIDDEN, scale=0.01), random(width), random(1 if name == "head" else 3)


def op_of(name: str, table: Any) -> Op:
    """The op in the table (`kernels` or the oracle), with V4's constants."""
    if name == "post":
        return table.mhc_post
    if name == "head":
        return lambda *inputs: table.mhc_head(*inputs, **HEAD)
    return lambda *inputs: table.mhc_pre(*inputs, **PRE)


def training(op: Op, inputs: Sequence[Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """A call that runs the op and all its gradients, and one that runs the gradients alone."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    results = op(*leaves)
    slopes = [torch.randn_like(one) for one in ((results,) if isinstance(results, Tensor) else results)]
    return (
        lambda: torch.autograd.grad(op(*leaves), leaves, slopes),
        lambda: torch.autograd.grad(results, leaves, slopes, retain_graph=True),
    )


def measure_op(name: str, tokens: int, peer: bool) -> dict[str, float]:
    """Seconds, shares of the copy's speed by counted bytes, and memory; plain torch beside them."""
    inputs, op = inputs_of(name, tokens), op_of(name, kernels)
    both_call, backward_call = training(op, inputs)
    forward, both, backward = seconds(lambda: op(*inputs)), seconds(both_call), seconds(backward_call)
    units_forward, units_backward = (units * tokens * HIDDEN * 2 for units in UNITS[name])
    result = {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "train_seconds": both,
        "forward_fraction_of_copy": units_forward / copy_ceiling() / forward,
        "backward_fraction_of_copy": units_backward / copy_ceiling() / backward,
        "train_fraction_of_copy": (units_forward + units_backward) / copy_ceiling() / both,
        "train_peak_bytes": peak_bytes(both_call),
    }
    if peer:
        plain_call, _ = training(op_of(name, oracle), inputs)
        result["torch_train_seconds"] = seconds(plain_call, repeats=5, warm_up=2)
        result["torch_train_peak_bytes"] = peak_bytes(plain_call)
    return result


def both_alone(tokens: int) -> dict[str, float]:
    """pre and post, each on its own: the figure that is held against 70 % of the copy."""
    found = [training(op_of(name, kernels), inputs_of(name, tokens))[0] for name in ("pre", "post")]
    taken = seconds(lambda: [call() for call in found])
    moved = sum(sum(UNITS[name]) for name in ("pre", "post")) * tokens * HIDDEN * 2
    return {"train_seconds": taken, "counted_bytes": moved, "train_fraction_of_copy": moved / copy_ceiling() / taken}


def site_call(tokens: int) -> Callable[[], object]:
    """Forward and backward of a site as the model runs it, around a sub-layer that gives back its input."""

    def op(*inputs: Tensor) -> Tensor:
        x, post, comb, streams = kernels.mhc_site(*inputs, **PRE)
        return kernels.mhc_post(streams, x, post, comb)

    return training(op, inputs_of("pre", tokens))[0]


def site(tokens: int) -> dict[str, float]:
    """A whole site; pre's backward reads the gradient of the streams that went past the sub-layer, 4 units more."""
    call = site_call(tokens)
    taken, moved = seconds(call), (sum(UNITS["pre"]) + sum(UNITS["post"]) + 4) * tokens * HIDDEN * 2
    return {
        "train_seconds": taken,
        "counted_bytes": moved,
        "train_fraction_of_copy": moved / copy_ceiling() / taken,
        "train_peak_bytes": peak_bytes(call),
    }


def kernel_seconds(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of each kernel in one call, by the profiler."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return {event.key[:60]: event.device_time_total / 5e6 for event in events if event.device_time_total > 5}


VARIANTS: dict[str, dict[str, int]] = {
    "as it is": {},
    "64 tokens, pieces of 2048; 8 warps; 8 warps": {
        "tokens": 64,
        "warps": 4,
        "piece": 2048,
        "back_warps": 8,
        "post_warps": 8,
    },
    "4 warps; 128 channels and 8 warps; 128 channels": {
        "warps": 4,
        "back_channels": 128,
        "back_warps": 8,
        "post_channels": 128,
    },
    "128 channels; 4 stages; 512 channels and 8 warps": {
        "channels": 128,
        "stages": 3,
        "back_stages": 4,
        "post_channels": 512,
        "post_warps": 8,
    },
    "pieces of 2048; 32 tokens of 128 channels; as it is": {
        "stages": 3,
        "piece": 2048,
        "back_tokens": 32,
        "back_channels": 128,
    },
}
"""Other tiles of `project`, `streams_backward` and `post_backward`, one of each in a run."""


def variants(tokens: int) -> dict[str, dict[str, float]]:
    """Seconds of the kernels whose tiles differ."""
    kept, found = mhc.NARROW, {}
    try:
        for name, changes in VARIANTS.items():
            mhc.NARROW = dataclasses.replace(kept, **changes)
            times = kernel_seconds(site_call(tokens))
            found[name] = {
                kernel: times[kernel] for kernel in times if kernel.startswith(("project", "streams", "post_b"))
            }
    finally:
        mhc.NARROW = kept
    return found


def launch_seconds(call: Callable[[], object], repeats: int = 100) -> float:
    """Time that Python takes for a call; the GPU, with little to do, follows."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def decode(tokens: int) -> dict[str, float]:
    """One site of a decode step: on the GPU, and in Python."""
    found = {}
    with torch.no_grad():
        for name in ("pre", "post"):
            op, inputs = op_of(name, kernels), inputs_of(name, tokens)
            found[f"{name}_seconds"] = seconds(partial(op, *inputs))
            found[f"{name}_python_seconds"] = launch_seconds(partial(op, *inputs))
    return found


def measure(quick: bool) -> dict[str, Any]:
    """All numbers; `quick` leaves out long calls and plain torch."""
    result: dict[str, Any] = {"copy_bytes_per_second": copy_ceiling()}
    for tokens in (8192,) if quick else (8192, 32768):
        result[f"{tokens} tokens"] = {
            "pre and post": both_alone(tokens),
            "site": site(tokens),
            **{name: measure_op(name, tokens, peer=not quick and tokens == 8192) for name in UNITS},
        }
    result["kernels, 8192 tokens"] = kernel_seconds(site_call(8192))
    result["variants, 8192 tokens"] = variants(8192)
    result["decode"] = {f"{tokens} tokens": decode(tokens) for tokens in ((64,) if quick else (1, 64, 256))}
    return result


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2))
