"""Experts of V4-Flash on one GPU: ours, and torch's grouped product as transformers' `grouped_mm` experts use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.timing import copy_ceiling, matmul_ceiling, peak_bytes, seconds
from posttrain import kernels
from posttrain.kernels.moe import triton as moe
from posttrain.kernels.moe.triton_plan import make_plan
from posttrain.kernels.quant.op import pack_rows_mxfp4

HIDDEN, INNER, EXPERTS, SLOTS, LIMIT = 4096, 2048, 256, 6, 10.0
SLOT_OPERATIONS = 2 * 3 * HIDDEN * INNER
"""Of one slot's forward pass; twice that in the backward pass."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(tokens: int, w13: Tensor, w2: Tensor) -> Inputs:
    """Tokens, distinct random experts for each, weights that sum to 1.5, and the given matrices."""
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    chosen = torch.rand(tokens, EXPERTS, device="cuda").topk(SLOTS, 1).indices
    weights = torch.rand(tokens, SLOTS, device="cuda")
    return x, chosen, weights / weights.sum(1, keepdim=True) * 1.5, w13, w2


def ours(x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return kernels.moe_experts(x, chosen, weights, w13, w2, LIMIT)


def peer(x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """transformers' `grouped_mm` experts with V4's clamps: sort, gather, two grouped products, put back, add up."""
    numbers, order = torch.sort(chosen.flatten())
    ends = torch.cumsum(torch.histc(numbers.int(), bins=len(w13), min=0, max=len(w13) - 1), 0, dtype=torch.int32)
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    gate, up = product(x[order // SLOTS], w13.transpose(1, 2), offs=ends).chunk(2, -1)
    act = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
    rows = product(act, w2.transpose(1, 2), offs=ends) * weights.flatten()[order].unsqueeze(1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return rows[place].view(*chosen.shape, -1).sum(1).to(x.dtype)


def least_bytes(tokens: int, backward: bool) -> int:
    """Bytes that must move: matrices of the experts in use, tokens in and out; backward, all matrices' gradients, too.

    How many experts are in use is the expectation for random routes.
    """
    matrix, rows = 3 * HIDDEN * INNER * 2, tokens * HIDDEN * 2
    used = EXPERTS * (1 - (1 - SLOTS / EXPERTS) ** tokens)
    return round((2 * used + EXPERTS) * matrix + 5 * rows if backward else used * matrix + 2 * rows)


def rate(call: Callable[[], object], tokens: int, backward: bool) -> dict[str, float]:
    """Time, FLOP/s by counted operations, and shares of what bounds it."""
    taken = seconds(call, repeats=10, warm_up=3)
    operations = tokens * SLOTS * SLOT_OPERATIONS * (3 if backward else 1)
    bound = max(operations / matmul_ceiling(), least_bytes(tokens, backward) / copy_ceiling())
    return {
        "milliseconds": taken * 1e3,
        "teraflops": operations / taken / 1e12,
        "of_matmul_ceiling": operations / taken / matmul_ceiling(),
        "of_copy_ceiling": least_bytes(tokens, backward) / taken / copy_ceiling(),
        "of_the_nearer_bound": bound / taken,
    }


def train(call: Callable[..., Tensor], inputs: Inputs) -> Callable[[], object]:
    """Forward and backward with every gradient."""
    x, chosen, *others = inputs
    leaves = [one.detach().requires_grad_() for one in (x, *others)]
    slope = torch.randn_like(x)
    return lambda: torch.autograd.grad(call(leaves[0], chosen, *leaves[1:]), leaves, slope)


def stages(inputs: Inputs) -> dict[str, dict[str, float]]:
    """Our launches one by one: time, and FLOP/s of those that are products."""
    x, chosen, weights, w13, w2 = inputs
    rows = chosen.numel()
    tiles = moe.tiles_for(rows, EXPERTS, x.dtype)
    plan = make_plan(chosen, EXPERTS, tiles, moe.ROWS[tiles])
    act, hidden = moe.gate_up(x, w13, plan, LIMIT, True)
    dhidden, dact = torch.empty_like(hidden), torch.empty_like(act)
    sum13, sum2 = torch.zeros_like(w13), torch.zeros_like(w2)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "plan": (0, lambda: make_plan(chosen, EXPERTS, tiles, moe.ROWS[tiles])),
        "gate_up": (2, lambda: moe.gate_up(x, w13, plan, LIMIT, True)),
        "down": (1, lambda: moe.multiply(act, w2, True, plan, slice(0, HIDDEN))),
        "down_and_combine": (1, lambda: moe.multiply_and_combine(act, w2, True, plan, chosen, weights)),
        "act_gradient": (1, lambda: moe.act_gradient(x, w2, hidden, weights, plan, LIMIT, dhidden, dact)),
        "dw2": (1, lambda: moe.weight_gradient(x, dact, plan, (True, False))),
        "dw13": (2, lambda: moe.weight_gradient(dhidden, x, plan, (False, True))),
        "dw2_added": (1, lambda: moe.weight_gradient(x, dact, plan, (True, False), sum2)),
        "dw13_added": (2, lambda: moe.weight_gradient(dhidden, x, plan, (False, True), sum13)),
        "dx_and_combine": (2, lambda: moe.multiply_and_combine(dhidden, w13, False, plan, chosen, None)),
    }
    results = {}
    for name, (products, call) in calls.items():
        taken = seconds(call, repeats=10, warm_up=2)
        teraflops = rows * products * 2 * HIDDEN * INNER / taken / 1e12
        results[name] = {"milliseconds": taken * 1e3, "teraflops": teraflops}
    return results


def variants(inputs: Inputs) -> dict[str, float]:
    """Milliseconds of products with other tiles than the chosen ones, which `stages` measures."""
    x, chosen, _, w13, w2 = inputs
    plan = make_plan(chosen, EXPERTS, "large", moe.ROWS["large"])
    act, hidden = moe.gate_up(x, w13, plan, LIMIT, True)
    calls: dict[str, Callable[[], object]] = {
        "gate_up": lambda: moe.gate_up(x, w13, plan, LIMIT, False),
        "multiply": lambda: moe.multiply(act, w2, True, plan, slice(0, HIDDEN)),
        "dw2": lambda: moe.weight_gradient(x, act, plan, (True, False)),
        "dw13": lambda: moe.weight_gradient(hidden, x, plan, (False, True)),
    }
    forward = {
        "gate_up": [moe.Tiles(128, 64, 8, 4, turns) for turns in (1, 2, 4)] + [moe.Tiles(128, 128, 8, 2, 2)],
        "multiply": [moe.Tiles(256, 64, 8, 4, turns) for turns in (1, 2, 4)] + [moe.Tiles(256, 128, 8, 2, 2)],
    }
    backward = [
        (128, moe.Tiles(256, 64, 8, 5, 16)),
        (256, moe.Tiles(128, 64, 8, 5, 8)),
        (128, moe.Tiles(256, 32, 8, 7, 8)),
        (128, moe.Tiles(128, 64, 8, 3, 8)),
        (128, moe.Tiles(128, 64, 4, 3, 8)),
        (128, moe.Tiles(128, 32, 8, 5, 8)),
        (128, moe.Tiles(128, 64, 8, 3, 1)),
    ]
    results = {}

    def note(name: str, rows: int, tiles: moe.Tiles) -> None:
        shape = f"{rows}x{tiles.columns}x{tiles.inner}, {tiles.warps} warps, {tiles.stages} stages, {tiles.turns} turns"
        try:
            results[f"{name} {shape}"] = seconds(calls[name], repeats=5, warm_up=1) * 1e3
        except OutOfResources:
            results[f"{name} {shape}"] = float("nan")

    for name, choices in forward.items():
        kept = moe.TILES[name, "large"]
        for tiles in choices:
            moe.TILES[name, "large"] = tiles
            note(name, moe.ROWS["large"], tiles)
        moe.TILES[name, "large"] = kept
    kept_both = moe.WEIGHT_TILES[2]
    for number, (rows, tiles) in enumerate(backward):
        moe.WEIGHT_TILES[2] = rows, tiles
        for name in ("dw13", "dw2") if number == 3 else ("dw13",):
            note(name, rows, tiles)
    moe.WEIGHT_TILES[2] = kept_both
    return results


def router(inputs: Inputs) -> dict[str, float]:
    """Milliseconds of the router, forward, with a bf16 and with an fp32 weight."""
    x, bias = inputs[0], torch.zeros(EXPERTS, device="cuda")
    weight = torch.randn(EXPERTS, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def milliseconds(weight: Tensor) -> float:
        return seconds(lambda: kernels.route_topk(x, weight, bias, SLOTS, 1.5)) * 1e3

    return {"bf16 weight": milliseconds(weight), "fp32 weight": milliseconds(weight.float())}


def shared(inputs: Inputs) -> float:
    """Milliseconds of the shared expert, forward."""
    x, w13, w2 = inputs[0], inputs[3][0], inputs[4][0]
    return seconds(lambda: kernels.swiglu_mlp(x, w13, w2, LIMIT)) * 1e3


def measure(quick: bool) -> dict[str, Any]:
    """Training at 8192 tokens, decoding at 64 and 256; and how far ours is from torch's."""
    torch.manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16).mul_(HIDDEN**-0.5)
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16).mul_(INNER**-0.5)
    results: dict[str, Any] = {"matmul_teraflops": matmul_ceiling() / 1e12, "copy_gigabytes": copy_ceiling() / 1e9}
    for tokens in (8192,) if quick else (8192, 4096, 32768):
        inputs = make_inputs(tokens, w13, w2)
        results[f"{tokens} tokens"] = {
            name: {
                "forward": rate(torch.no_grad()(partial(call, *inputs)), tokens, False),
                "forward_and_backward": rate(train(call, inputs), tokens, True),
                "peak_gigabytes": peak_bytes(train(call, inputs)) / 1e9,
            }
            for name, call in (("ours", ours), ("peer", peer))
        }
    inputs = make_inputs(8192, w13, w2)
    with torch.no_grad():
        results["difference from peer"] = float((ours(*inputs) - peer(*inputs)).abs().max() / peer(*inputs).abs().max())
        packed = [torch.stack([pack_rows_mxfp4(one) for one in matrix]) for matrix in (w13, w2)]
        results["8192 tokens"]["ours_mxfp4_ms"] = seconds(partial(ours, *inputs[:3], *packed)) * 1e3
        results["stages"], results["variants_ms"] = stages(inputs), variants(inputs)
        results["router_ms"], results["shared_ms"] = router(inputs), shared(inputs)
        for tokens in (64, 256):
            inputs = make_inputs(tokens, w13, w2)
            results[f"decode {tokens}"] = {
                "ours": rate(partial(ours, *inputs), tokens, False),
                "ours_mxfp4_ms": seconds(partial(ours, *inputs[:3], *packed)) * 1e3,
                "peer": rate(partial(peer, *inputs), tokens, False),
                "router_ms": router(inputs),
                "shared_ms": shared(inputs),
            }
    return results


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2))
