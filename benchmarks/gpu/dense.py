"""Speed of matrix products, RMSNorm, rotation and compression at V4-Flash's shapes, on one GPU."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import copy_ceiling, matmul_ceiling, seconds
from posttrain import kernels
from posttrain.kernels.linear import triton as linear
from posttrain.kernels.norm import triton as norm

HIDDEN, HEADS, HEAD_DIM, ROPE, GROUPS = 4096, 64, 512, 64, 8
PRODUCTS = {
    "4096 to 4096": (HIDDEN, 4096),
    "1024 to 32768, wq_b": (1024, HEADS * HEAD_DIM),
    "8192 to 4096, wo_b": (8192, HIDDEN),
    "4096 to 512, wkv": (HIDDEN, HEAD_DIM),
}
CANDIDATES = [
    *linear.NARROW.values(),
    *(tiles._replace(descriptors=not tiles.descriptors) for tiles in linear.NARROW.values()),
    linear.NARROW["large"]._replace(persistent=False),
    linear.Tiles(128, 128, 64, warps=8, stages=5, descriptors=False),
    linear.Tiles(64, 128, 64, warps=4, stages=6, descriptors=False),
    linear.Tiles(64, 64, 64, warps=4, stages=4, descriptors=False),
    linear.Tiles(64, 16, 64, warps=4, stages=8, descriptors=False),
]
DECODE = {  # rows, inner, outer
    "64 rows, 4096 to 1024": (64, 4096, 1024),
    "64 rows, 4096 to 4096": (64, 4096, 4096),
    "64 rows, 8192 to 4096": (64, 8192, 4096),
    "64 rows, 1024 to 32768": (64, 1024, 32768),
    "128 rows, 4096 to 4096": (128, 4096, 4096),
    "256 rows, 4096 to 1024": (256, 4096, 1024),
    "256 rows, 4096 to 4096": (256, 4096, 4096),
    "256 rows, 1024 to 32768": (256, 1024, 32768),
}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def with_gradients(op: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """A call that runs the op and all its gradients."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    slope = torch.randn_like(op(*leaves))
    return lambda: torch.autograd.grad(op(*leaves), leaves, slope)


def floor(operations: float, moved: float) -> float:
    """Seconds that the work takes at the ceilings: whichever of arithmetic and memory is slower."""
    return max(operations / matmul_ceiling(), moved / copy_ceiling())


def product(rows: int, inner: int, outer: int) -> dict[str, float]:
    """Forward, and forward with both gradients, beside the vendor's."""
    x, weight = random(rows, inner), random(outer, inner)
    least = floor(2.0 * rows * inner * outer, 2.0 * (rows * inner + outer * inner + rows * outer))
    ours, peer = seconds(lambda: kernels.linear(x, weight)), seconds(lambda: F.linear(x, weight))
    result = {"seconds": ours, "torch_seconds": peer, "fraction_of_ceiling": least / ours}
    if rows > 256:
        result["train_seconds"] = seconds(with_gradients(kernels.linear, x, weight))
        result["torch_train_seconds"] = seconds(with_gradients(F.linear, x, weight))
    return result


def fp32_product(rows: int, inner: int, outer: int) -> dict[str, float]:
    """The router's product; bytes are counted, the tensor cores have no fp32."""
    x, weight = random(rows, inner, dtype=torch.float32), random(outer, inner, dtype=torch.float32)
    ours, peer = seconds(lambda: kernels.linear(x, weight)), seconds(lambda: F.linear(x, weight))
    rate = 2.0 * rows * inner * outer / ours
    return {"seconds": ours, "torch_seconds": peer, "teraflops": rate / 1e12}


def grouped(rows: int) -> dict[str, float]:
    """V4's output projection: 8 groups of 4096 to 1024."""
    x, weight = random(rows, GROUPS, 4096), random(GROUPS, 1024, 4096)
    least = floor(2.0 * rows * weight.numel(), 2.0 * (x.numel() + weight.numel() + rows * GROUPS * 1024))
    ours = seconds(lambda: kernels.grouped_linear(x, weight))
    peer = seconds(lambda: torch.einsum("tgi,goi->tgo", x, weight))
    return {"seconds": ours, "torch_seconds": peer, "fraction_of_ceiling": least / ours}


def tile_name(tiles: linear.Tiles) -> str:
    """The tile in words."""
    name = f"{tiles.rows}x{tiles.outer}x{tiles.inner} warps {tiles.warps} stages {tiles.stages}"
    return name + (" persistent" if tiles.persistent else "") + (" descriptors" if tiles.descriptors else "")


def tile_choices(rows: int, inner: int, outer: int) -> dict[str, Any]:
    """Microseconds of all candidates, fastest first, beside the one that is chosen and what was expected of it.

    They take turns, so that a GPU that grows warm and slow slows all of them.
    """
    x, weight = random(rows, inner), random(outer, inner)
    chosen = linear.tiles_for(rows, inner, outer, 1, x.dtype)
    expected, names, times = linear.product(x, weight, chosen), {}, {}
    for tiles in CANDIDATES:
        if tiles.rows <= max(rows, 64):
            try:
                same = torch.equal(linear.product(x, weight, tiles), expected)
            except Exception as error:  # a candidate that this Triton or GPU cannot run says so in the table
                names[f"{tile_name(tiles)}: {type(error).__name__}"] = tiles
                continue
            names[tile_name(tiles) + ("" if same else " OTHER BITS")] = tiles
            times[tile_name(tiles) + ("" if same else " OTHER BITS")] = float("inf")
    for _ in range(2):
        for name in times:
            taken = seconds(lambda tiles=names[name]: linear.product(x, weight, tiles), repeats=5, warm_up=1)  # type: ignore[misc]
            times[name] = min(times[name], taken * 1e6)
    return {
        "chosen": tile_name(chosen),
        "estimate": linear.estimate(chosen, rows, inner, outer, 1) * 1e6,
        "torch": seconds(lambda: F.linear(x, weight), repeats=5) * 1e6,
        "failed": [name for name in names if name not in times],
        "microseconds": dict(sorted(times.items(), key=lambda pair: pair[1])),
    }


def norm_choices(tokens: int) -> dict[str, float]:
    """Microseconds of RMSNorm's backward pass with a weight, by warps and parts of the weight's gradient."""
    x, weight, found = random(tokens, HIDDEN).requires_grad_(), random(HIDDEN).requires_grad_(), {}
    usual = norm.BACKWARD_WARPS, norm.PROGRAMS
    out, slope = kernels.rms_norm(x, weight), random(tokens, HIDDEN)
    for norm.BACKWARD_WARPS, norm.PROGRAMS in ((1, 264), (1, 396), (2, 264), (2, 396), (4, 132), (4, 264)):
        name = f"{norm.BACKWARD_WARPS} times the warps, programs {norm.PROGRAMS}"
        found[name] = 1e6 * seconds(lambda: torch.autograd.grad(out, (x, weight), slope, retain_graph=True), repeats=9)
    norm.BACKWARD_WARPS, norm.PROGRAMS = usual
    return found


def host_seconds(call: Callable[[], object], calls: int = 200) -> float:
    """Python's own time for one call: what a step pays that is bound by launches."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return taken / calls


@torch.inference_mode()
def launches() -> dict[str, float]:
    """Microseconds of Python for one call on a few tokens, without gradients."""
    x, more, weight, gain = random(16, HIDDEN), random(128, HIDDEN), random(512, HIDDEN), random(HIDDEN)
    heads, angles = random(16, HEADS, HEAD_DIM), random(16, ROPE // 2, dtype=torch.float32)
    calls = {
        "linear": lambda: kernels.linear(x, weight),
        "torch's linear": lambda: F.linear(x, weight),
        "linear of 128 rows": lambda: kernels.linear(more, weight),
        "rms_norm": lambda: kernels.rms_norm(x, gain),
        "rms_norm of heads": lambda: kernels.rms_norm(heads),
        "apply_rope": lambda: kernels.apply_rope(heads, angles, angles),
    }
    return {name: 1e6 * host_seconds(call) for name, call in calls.items()}


def variants() -> dict[str, Any]:
    """What decides on tiles: some 20 s, most of it to compile them."""
    return {
        "launches, microseconds": launches(),
        **{name: tile_choices(*shape) for name, shape in DECODE.items()},
        "8192 rows, 4096 to 4096": tile_choices(8192, HIDDEN, HIDDEN),
        "8192 rows, 1024 to 32768": tile_choices(8192, 1024, HEADS * HEAD_DIM),
        "rms_norm backward of 8192 rows": norm_choices(8192),
    }


def memory_bound(op: Callable[..., Tensor], peer: Callable[..., Tensor] | None, *inputs: Tensor) -> dict[str, float]:
    """An op that should run at copy speed: inputs and outputs once, forward; these and their gradients, backward."""
    size = sum(one.numel() * one.element_size() for one in inputs)
    out = op(*inputs)
    written = out.numel() * out.element_size()
    forward, both = seconds(lambda: op(*inputs)), seconds(with_gradients(op, *inputs))
    result = {
        "seconds": forward,
        "fraction_of_copy": (size + written) / copy_ceiling() / forward,
        "train_seconds": both,
        "train_fraction_of_copy": (3 * size + 2 * written) / copy_ceiling() / both,
    }
    if peer is not None:
        result["torch_seconds"] = seconds(lambda: peer(*inputs))
        result["torch_train_seconds"] = seconds(with_gradients(peer, *inputs))
    return result


def rope(rows: int, heads: int, dim: int) -> dict[str, float]:
    """Heads, forward and back; the gradient needs no input, only angles."""
    x, angles = random(rows, heads, dim), random(rows, ROPE // 2, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()
    forward = seconds(lambda: kernels.apply_rope(x, cos, sin))
    both = seconds(with_gradients(lambda x: kernels.apply_rope(x, cos, sin), x))
    moved = 2 * x.numel() * x.element_size()
    return {
        "seconds": forward,
        "fraction_of_copy": moved / copy_ceiling() / forward,
        "train_seconds": both,
        "train_fraction_of_copy": 2 * moved / copy_ceiling() / both,
    }


def compression(entries: int, members: int, dim: int) -> dict[str, float]:
    """Windows in fp32, as the model gathers them."""
    valid = torch.ones(entries, members, dtype=torch.bool, device="cuda")
    kv, gate = (random(entries, members, dim, dtype=torch.float32) for _ in range(2))
    return memory_bound(
        lambda kv, gate: kernels.compress(kv, gate, valid), lambda kv, gate: (kv * gate.softmax(1)).sum(1), kv, gate
    )


def measure(quick: bool = False) -> dict[str, Any]:
    """All of it; `quick` leaves out most shapes."""
    tokens = 8192
    products = {
        f"{name}, {rows} rows": product(rows, *shape)
        for name, shape in list(PRODUCTS.items())[: 2 if quick else None]
        for rows in (64, 256, tokens)
    }
    norm = memory_bound(
        kernels.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w), random(tokens, HIDDEN), random(HIDDEN)
    )
    heads = memory_bound(kernels.rms_norm, lambda x: F.rms_norm(x, x.shape[-1:]), random(tokens // 4, HEADS, HEAD_DIM))
    return {
        "matmul_ceiling_teraflops": matmul_ceiling() / 1e12,
        "copy_ceiling_gigabytes": copy_ceiling() / 1e9,
        "linear": products,
        "linear in fp32, router": {rows: fp32_product(rows, HIDDEN, 256) for rows in (32, 256, tokens)},
        "linear in fp32, mHC": {rows: fp32_product(rows, 4 * HIDDEN, 24) for rows in (32, tokens)},
        "grouped_linear": {rows: grouped(rows) for rows in (64, tokens)},
        "launches, microseconds": launches(),
        "rms_norm of 4096": norm,
        "rms_norm of 64 heads of 512": heads,
        "apply_rope of 64 heads of 512": rope(tokens // 4, HEADS, HEAD_DIM),
        "apply_rope of 1 head of 512": rope(4 * tokens, 1, HEAD_DIM),
        "compress, CSA": compression(tokens, 8, HEAD_DIM),
        "compress, HCA": compression(tokens // 16, 128, HEAD_DIM),
    }


if __name__ == "__main__":
    print(json.dumps(variants() if "--variants" in sys.argv else measure(quick="--quick" in sys.argv), indent=2))
