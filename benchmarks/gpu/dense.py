"""Speed of matrix products, RMSNorm, rotation and compression at V4-Flash's shapes, on one GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import copy_ceiling, matmul_ceiling, seconds
from posttrain import kernels
from posttrain.kernels.linear import triton as linear

HIDDEN, HEADS, HEAD_DIM, ROPE, GROUPS = 4096, 64, 512, 64, 8
PRODUCTS = {
    "4096 to 4096": (HIDDEN, 4096),
    "1024 to 32768, wq_b": (1024, HEADS * HEAD_DIM),
    "8192 to 4096, wo_b": (8192, HIDDEN),
    "4096 to 512, wkv": (HIDDEN, HEAD_DIM),
}
LARGE = linear.Tiles(128, 256, 64, warps=8, stages=3)
CANDIDATES = [
    LARGE,
    replace(LARGE, persistent=True),
    replace(LARGE, stages=4),
    replace(LARGE, stages=4, persistent=True),
    linear.Tiles(128, 128, 64, warps=8, stages=3),
    linear.Tiles(128, 128, 64, warps=8, stages=4, persistent=True),
    linear.Tiles(256, 128, 64, warps=8, stages=3, persistent=True),
]


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


def tile_choices(rows: int, inner: int, outer: int) -> dict[str, float]:
    """TFLOP/s of the candidates for large products, by both ways of loading; the first line's bits are everybody's."""
    x, weight = random(rows, 1, inner), random(1, outer, inner)
    expected, found = linear.product(x, weight, LARGE, descriptors=False), {}
    for tiles in CANDIDATES:
        for descriptors in (False, True):
            name = f"{tiles.rows}x{tiles.outer}x{tiles.inner} warps {tiles.warps} stages {tiles.stages}"
            name += (" persistent" if tiles.persistent else "") + (" descriptors" if descriptors else "")
            try:
                same = torch.equal(linear.product(x, weight, tiles, descriptors), expected)
                taken = seconds(lambda tiles=tiles, by=descriptors: linear.product(x, weight, tiles, by))  # type: ignore[misc]
            except Exception as error:  # a candidate that this Triton or GPU cannot run says so in the table
                found[name + f" ({type(error).__name__})"] = 0.0
                continue
            found[name + ("" if same else " OTHER BITS")] = 2.0 * rows * inner * outer / taken / 1e12
    return found


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
        for rows in (32, 256, tokens)
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
        "grouped_linear": {rows: grouped(rows) for rows in (32, tokens)},
        "tiles, 4096 to 4096": tile_choices(tokens, HIDDEN, 4096),
        "tiles, 1024 to 32768": {} if quick else tile_choices(tokens, 1024, HEADS * HEAD_DIM),
        "rms_norm of 4096": norm,
        "rms_norm of 64 heads of 512": heads,
        "apply_rope of 64 heads of 512": rope(tokens // 4, HEADS, HEAD_DIM),
        "apply_rope of 1 head of 512": rope(4 * tokens, 1, HEAD_DIM),
        "compress, CSA": compression(tokens, 8, HEAD_DIM),
        "compress, HCA": compression(tokens // 16, 128, HEAD_DIM),
    }


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2))
