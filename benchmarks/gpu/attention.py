"""Sparse attention at V4-Flash's shapes: window 128 and top-k 512, 64 heads of 512, bf16.

python -m benchmarks.gpu.attention [--quick | --variants]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import copy_ceiling, matmul_ceiling, peak_bytes, seconds
from posttrain import kernels
from posttrain.kernels.attention import hopper, oracle
from posttrain.kernels.attention import triton_backward as backward

HEADS, DIM, WINDOW, TOPK, RATE = 64, 512, 128, 512, 4
SCALE = DIM**-0.5
Sources = list[tuple[Tensor, Tensor]]


def window_rows(tokens: int) -> Tensor:
    """The last `WINDOW` tokens of one sequence."""
    rows = torch.arange(tokens, device="cuda").unsqueeze(1) + torch.arange(WINDOW, device="cuda") - (WINDOW - 1)
    return rows.clamp(min=-1)


def chosen_rows(tokens: int) -> Tensor:
    """The top `TOPK` of the complete entries by scores that change slowly from token to token, as an indexer's do."""
    entries = tokens // RATE
    noise = torch.randn(1, 16, tokens + 63, device="cuda")
    topics_TC = F.avg_pool1d(noise, 64, stride=1)[0].T * 8 + 0.3 * torch.randn(tokens, 16, device="cuda")
    keys_EC = torch.randn(entries, 16, device="cuda")
    parts = []
    for start in range(0, tokens, 4096):
        token = torch.arange(start, min(start + 4096, tokens), device="cuda").unsqueeze(1)
        missing = torch.arange(entries, device="cuda") >= (token + 1) // RATE
        scores, rows = (topics_TC[token[:, 0]] @ keys_EC.T).masked_fill(missing, -torch.inf).topk(TOPK, 1)
        parts.append(rows.masked_fill(scores.isinf(), entries).sort(1).values)
    rows = torch.cat(parts)
    return rows.masked_fill(rows == entries, -1)


def overlap(rows_TK: Tensor) -> float:
    """Mean share of its chosen entries that a token (the last 64 of them) has in common with the token before."""
    pairs = zip(rows_TK[-65:-1].tolist(), rows_TK[-64:].tolist(), strict=True)
    shares = [len(set(one) & set(other)) / len(other) for one, other in pairs]
    return sum(shares) / len(shares)


def prefill(tokens: int) -> tuple[Tensor, Sources, Tensor]:
    """Queries, both sources and sinks of one sequence, all with gradients."""
    q, window, compressed = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for shape in ((tokens, HEADS, DIM), (tokens, DIM), (tokens // RATE, DIM))
    )
    sink = torch.randn(HEADS, device="cuda").requires_grad_()
    return q, [(window, window_rows(tokens)), (compressed, chosen_rows(tokens))], sink


def existing(sources: Sources) -> int:
    """Entries that are read, over all tokens."""
    return sum(int((index >= 0).sum()) for _, index in sources)


def timed(tokens: int, repeats: int = 20) -> dict[str, Any]:
    """Forward and backward, by the operations of the entries that exist: two products forward, five backward."""
    q, sources, sink = prefill(tokens)
    operations = 4.0 * HEADS * DIM * existing(sources)
    inputs = [q, *(store for store, _ in sources), sink]

    def plain() -> Tensor:
        with torch.no_grad():
            return kernels.sparse_attention(q, sources, sink, SCALE)

    out = kernels.sparse_attention(q, sources, sink, SCALE)
    slope = torch.randn_like(out)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, slope, retain_graph=True)

    ahead, back = seconds(plain, repeats), seconds(gradients, repeats)
    found: dict[str, Any] = {
        "tokens": tokens,
        "common_with_token_before": overlap(sources[1][1]),
        "forward_seconds": ahead,
        "forward_flops": operations / ahead,
        "forward_fraction_of_matmul": operations / ahead / matmul_ceiling(),
        "backward_seconds": back,
        "backward_flops": 2.5 * operations / back,
        "backward_fraction_of_matmul": 2.5 * operations / back / matmul_ceiling(),
        "forward_peak_bytes": peak_bytes(plain),
        "backward_peak_bytes": peak_bytes(gradients),
        "backward_repeats_bits": all(map(torch.equal, gradients(), gradients())),
    }
    if tokens <= 8192:
        found["kernels_seconds"] = {**kernel_seconds(plain), **kernel_seconds(gradients)}
    return found


def kernel_seconds(call: Callable[[], object]) -> dict[str, float]:
    """Time of each kernel in one call, longest first."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times = {event.key[:60]: event.self_device_time_total / 1e6 for event in profile.key_averages()}
    return dict(sorted(times.items(), key=lambda one: -one[1])[:8])


def decode(requests: int, context: int = 8192) -> dict[str, Any]:
    """One new token for each of many requests, whose entries lie in pages of two caches of wider rows."""
    q = torch.randn(requests, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    sink = torch.randn(HEADS, device="cuda")
    sources: Sources = []
    for kept, read in ((WINDOW, WINDOW), (context // RATE, TOPK)):
        cache = torch.randn(requests * kept, DIM + 128, device="cuda", dtype=torch.bfloat16)
        pages = torch.randperm(len(cache) // 64, device="cuda").view(requests, -1) * 64
        own = torch.rand(requests, kept, device="cuda").topk(read, 1).indices.sort(1).values
        sources.append((cache[:, 128:], pages.gather(1, own // 64) + own % 64))
    taken = seconds(lambda: kernels.sparse_attention(q, sources, sink, SCALE))
    together = kernels.sparse_attention(q, sources, sink, SCALE)
    alone = [
        kernels.sparse_attention(q[t : t + 1], [(store, index[t : t + 1]) for store, index in sources], sink, SCALE)
        for t in range(4)
    ]
    entries = existing(sources)
    return {
        "seconds": taken,
        "fraction_of_matmul": 4.0 * HEADS * DIM * entries / taken / matmul_ceiling(),
        "fraction_of_copy": 2.0 * DIM * entries / taken / copy_ceiling(),
        "alone_has_the_same_bits": torch.equal(torch.cat(alone), together[:4]),
    }


def spot_check(tokens: int, part: int = 48) -> dict[str, float]:
    """Largest error of bf16 on the last tokens, relative to the largest value, against the oracle in fp32."""
    q, sources, sink = prefill(tokens)
    sources = [(store, index[-part:]) for store, index in sources]
    ours = [q[-part:].detach().requires_grad_(), *(store for store, _ in sources), sink]
    exact = [one.detach().float().requires_grad_() for one in ours]
    exact_sources = [(store, index) for store, (_, index) in zip(exact[1:3], sources, strict=True)]
    out = kernels.sparse_attention(ours[0], sources, sink, SCALE)
    expected = oracle.sparse_attention(exact[0], exact_sources, exact[3], SCALE)
    slope = torch.randn_like(out)
    pairs = [(out, expected)]
    pairs += zip(
        torch.autograd.grad(out, ours, slope), torch.autograd.grad(expected, exact, slope.float()), strict=True
    )
    names = ("result", "dq", "dwindow", "dcompressed", "dsink")
    return {
        name: float((one.float() - other).abs().max() / other.abs().max())
        for name, (one, other) in zip(names, pairs, strict=True)
    }


@contextmanager
def set_to(module: Any, name: str, value: object) -> Iterator[None]:
    """A module's constant, for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def variants(tokens: int) -> dict[str, float]:
    """Seconds with other tiles than those in use: what to look at when Triton or the GPU changes."""
    split = backward.NARROW
    trials: dict[str, tuple[Any, str, object]] = {
        "forward": (hopper, "WARPS", hopper.WARPS),
        "forward, Triton's pipeline": (hopper, "serves", lambda _: False),
        "backward, chunks of 4 GiB": (backward, "CHUNK_BYTES", 2**32),
        "backward": (backward, "NARROW", split),
        "backward, 64 for queries": (
            *(backward, "NARROW"),
            dataclasses.replace(split, entries_for_queries=64, stages_for_queries=3),
        ),
    }
    q, sources, sink = prefill(tokens)
    inputs = [q, *(store for store, _ in sources), sink]
    out = kernels.sparse_attention(q, sources, sink, SCALE)
    slope = torch.randn_like(out)
    found: dict[str, float] = {}
    for name, (module, constant, value) in trials.items():
        with set_to(module, constant, value):
            try:
                if module is hopper:
                    with torch.no_grad():
                        found[name] = seconds(lambda: kernels.sparse_attention(q, sources, sink, SCALE), 7, 2)
                else:
                    found[name] = seconds(lambda: torch.autograd.grad(out, inputs, slope, retain_graph=True), 7, 2)
            except Exception as error:  # tiles that this Triton or GPU cannot run say so in the table
                found[f"{name} ({type(error).__name__})"] = 0.0
    return found


def torch_seconds_per_token(tokens: int = 512) -> float:
    """Forward and backward of the same in plain torch, which copies the entries of each token."""
    q, sources, sink = prefill(8192)
    sources = [(store, index[-tokens:]) for store, index in sources]
    inputs = [q[-tokens:].detach().requires_grad_(), *(store for store, _ in sources), sink]
    slope = torch.randn_like(inputs[0])

    def both() -> None:
        torch.autograd.grad(oracle.sparse_attention(inputs[0], sources, sink, SCALE), inputs, slope)

    return seconds(both, 5, 2) / tokens


def flash_mla_seconds(tokens: int) -> float | None:
    """FlashMLA's sparse forward over the same entries, where vLLM has it."""
    try:
        from vllm.v1.attention.ops.flashmla import flash_mla_sparse_fwd, is_flashmla_sparse_supported
    except ImportError:
        return None
    if not is_flashmla_sparse_supported()[0]:
        return None
    q, sources, sink = prefill(tokens)
    (window, window_index), (compressed, chosen) = sources
    store = torch.cat((window, compressed)).detach().unsqueeze(1)
    moved = torch.where(chosen >= 0, chosen + len(window), -1)
    index = torch.cat((window_index, moved), 1).int().unsqueeze(1).contiguous()
    return seconds(
        lambda: flash_mla_sparse_fwd(q.detach(), store, index, SCALE, attn_sink=sink.detach())  # type: ignore[misc]
    )


def measure(quick: bool = False) -> dict[str, Any]:
    """All of it; `quick` leaves out the long sequences and the variants."""
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "spot_check": spot_check(8192),
        "prefill_8k": timed(8192),
        "decode_64": decode(64),
        "decode_256": decode(256),
    }
    if not quick:
        found["variants_8k"] = variants(8192)
        found["torch_seconds_per_token"] = torch_seconds_per_token()
        found["flash_mla_forward_seconds"] = flash_mla_seconds(8192)
        found["prefill_32k"] = timed(32768, repeats=5)
        found["prefill_128k"] = timed(131072, repeats=3)
    found["matmul_ceiling_flops"] = matmul_ceiling()
    return found


if __name__ == "__main__":
    found = variants(8192) if "--variants" in sys.argv else measure(quick="--quick" in sys.argv)
    print(json.dumps(found, indent=2))
