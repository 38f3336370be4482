"""MXFP4 and FP8 on the GPU: bytes a second against a copy, at the shapes of V4-Flash's experts and activations."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import copy_ceiling, peak_bytes, seconds
from posttrain.kernels.quant import op, oracle
from posttrain.kernels.quant.formats import E2M1, E4M3

HIDDEN, INNER = 4096, 2048
ITEM = {torch.float32: 4, torch.bfloat16: 2}


def measure(quick: bool) -> dict[str, Any]:
    """Time, counted bytes a second and their share of the measured copy; plain torch beside it.

    Args:
        quick: fewer experts and tokens.
    """
    experts, tokens = (8, 4096) if quick else (64, 32768)
    results: dict[str, Any] = {"copy_bytes_per_s": copy_ceiling()}
    for dtype in (torch.float32, torch.bfloat16):
        name, item = str(dtype).removeprefix("torch."), ITEM[dtype]
        weights = torch.randn(experts, 2 * INNER, HIDDEN, device="cuda", dtype=dtype)
        results[f"fake_quantize_mxfp4/w13[{experts}]/{name}"] = _entry(
            partial(op.fake_quantize_mxfp4, weights), weights.numel(), 2 * item
        ) | _peer(lambda x: oracle.fake_quantize(x.float().view(-1, HIDDEN), 1, 32, E2M1), weights[:8])
        results[f"fake_quantize_fp8/w13[{experts}]/{name}"] = _entry(
            partial(op.fake_quantize_fp8, weights), weights.numel(), 2 * item
        ) | _peer(lambda x: oracle.fake_quantize(x.float(), 128, 128, E4M3), weights[:8])
        results[f"quantize_mxfp4/w13[{experts}]/{name}"] = _entry(
            partial(op.quantize_mxfp4, weights), weights.numel(), item + 0.5 + 1 / 32
        )
        packed, scales = op.quantize_mxfp4(weights)
        results[f"dequantize_mxfp4/w13[{experts}]/{name}"] = _entry(
            partial(op.dequantize_mxfp4, packed, scales, dtype), weights.numel(), item + 0.5 + 1 / 32
        )
        activations = torch.randn(tokens, HIDDEN, device="cuda", dtype=dtype)
        results[f"quantize_fp8/activations[{tokens}]/{name}"] = _entry(
            partial(op.quantize_fp8, activations, "activation"), activations.numel(), item + 1 + 1 / 128
        )
    small = torch.randn(1, 2 * INNER, HIDDEN, device="cuda")
    packed = op.quantize_mxfp4(small)
    results["mxfp4_to_fp8/w13[1]"] = _entry(lambda: op.mxfp4_to_fp8(*packed), small.numel(), 1.5 + 1 / 32)
    return results


def _entry(call: Callable[[], object], numbers: int, bytes_each: float) -> dict[str, float]:
    """Refusing what is no number waits for the device once: that is part of the time."""
    time = seconds(call)
    speed = numbers * bytes_each / time
    return {
        "seconds": time,
        "bytes_per_s": speed,
        "of_copy": speed / copy_ceiling(),
        "peak_bytes_per_number": peak_bytes(call) / numbers,
    }


def _peer(call: Callable[[Tensor], object], weights: Tensor) -> dict[str, float]:
    """The same in torch operations, for one number, from few experts."""
    return {"torch_seconds_per_gigabyte": seconds(lambda: call(weights), repeats=5) / weights.nbytes * 1e9}


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2))
