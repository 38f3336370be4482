"""The indexer at V4-Flash's shapes: 64 heads of 128, the 512 best of the entries of 4 tokens each, bf16.

python -m benchmarks.gpu.indexer [--quick]
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import copy_ceiling, matmul_ceiling, peak_bytes, seconds
from posttrain import kernels
from posttrain.kernels import Candidates
from posttrain.kernels.indexer import triton as indexer
from posttrain.kernels.indexer.triton_topk import select

HEADS, DIM, TOPK, RATE, PAGE = 64, 128, 512, 4, 64
Inputs = tuple[Tensor, Tensor, Tensor, Candidates]


def prefill(tokens: int) -> Inputs:
    """Queries, weights, keys and candidates of one sequence."""
    positions_T = torch.arange(tokens, device="cuda")
    entries = tokens // RATE
    pages = positions_T.new_zeros(1, 1)
    candidates = Candidates((positions_T + 1) // RATE, torch.zeros_like(positions_T), pages, entries, entries)
    return *operands(tokens, entries), candidates


def decode(sequences: int, context: int) -> Inputs:
    """One new token of each sequence, over a paged cache in random order."""
    entries = context // RATE
    numbers_T = torch.arange(sequences, device="cuda")
    pages_RP = torch.randperm(sequences * entries // PAGE, device="cuda").view(sequences, -1) * PAGE
    candidates = Candidates(torch.full_like(numbers_T, entries), numbers_T, pages_RP, PAGE, entries)
    return *operands(sequences, sequences * entries), candidates


def operands(tokens: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, weights and keys."""
    q_THD = torch.randn(tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    weights_TH = torch.randn(tokens, HEADS, device="cuda") * (HEADS * DIM) ** -0.5
    return q_THD, weights_TH, torch.randn(rows, DIM, device="cuda", dtype=torch.bfloat16)


def operations(candidates: Candidates, chosen: int = 0) -> int:
    """Of one product of queries and keys, over the tokens that have more than `chosen` candidates."""
    counts_T = candidates.count_T
    return 2 * HEADS * DIM * int(counts_T[counts_T > chosen].sum())


def torch_scores(q_THD: Tensor, weights_TH: Tensor, keys_SD: Tensor, candidates: Candidates) -> Tensor:
    """The scores of one sequence in plain torch, 256 tokens at once: products by the vendor's library."""
    out_TE = torch.empty(len(q_THD), len(keys_SD), device="cuda")
    for first in range(0, len(q_THD), 256):
        part = slice(first, first + 256)
        dots_THE = (q_THD[part].flatten(0, 1) @ keys_SD.t()).relu_().view(-1, HEADS, len(keys_SD))
        out_TE[part] = torch.einsum("the,th->te", dots_THE.float(), weights_TH[part])
    numbers_E = torch.arange(len(keys_SD), device="cuda")
    return out_TE.masked_fill_(numbers_E >= candidates.count_T.unsqueeze(1), float("-inf"))


def composite_topk(scores_TE: Tensor, k: int) -> Tensor:
    """Exact and stable through `torch.topk`: unique int64 keys made of the value, then of the place."""
    bits_TE = scores_TE.view(torch.int32)
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE).long()
    places_E = torch.arange(scores_TE.shape[1], device=scores_TE.device)
    return ((ordered_TE << 32) | (2**32 - 1 - places_E)).topk(k, 1).indices


def measure_topk(tokens: int, entries: int) -> dict[str, Any]:
    """The selection alone, against what torch offers, in ms."""
    torch.manual_seed(0)
    scores_TE = torch.randn(tokens, entries, device="cuda")
    chosen_TK = torch.empty(tokens, TOPK, dtype=torch.int64, device="cuda")
    ways = {
        "select": lambda: select(scores_TE, None, 0, chosen_TK),
        "topk_stable (select and sort)": lambda: kernels.topk_stable(scores_TE, TOPK),
        "torch.topk of composite int64 keys": lambda: composite_topk(scores_TE, TOPK),
        "torch.topk (not stable)": lambda: scores_TE.topk(TOPK, 1),
        "torch.sort (stable)": lambda: torch.sort(scores_TE, dim=1, descending=True, stable=True),
    }
    times = {name: seconds(way, repeats=7, warm_up=2) for name, way in ways.items()}
    floor = scores_TE.numel() * 4 / copy_ceiling()
    equal = torch.equal(kernels.topk_stable(scores_TE, TOPK), composite_topk(scores_TE, TOPK))
    found = {name: round(time * 1e3, 3) for name, time in times.items()}
    return {**found, "share_of_copy_ceiling": round(floor / times["select"], 3), "same_choice": equal}


def measure_choice(inputs: Inputs) -> dict[str, Any]:
    """Scores and selection together, as the model calls them."""
    time = seconds(lambda: kernels.index_topk(*inputs, TOPK), repeats=7, warm_up=2)
    rate = operations(inputs[3], TOPK) / time
    memory = peak_bytes(lambda: kernels.index_topk(*inputs, TOPK))
    result = {"ms": round(time * 1e3, 3), "tflops": round(rate / 1e12, 1), "peak_mib": memory >> 20}
    result["share_of_matmul_ceiling"] = round(rate / matmul_ceiling(), 3)
    if len(inputs[0]) == len(inputs[3].pages_RP):  # Decoding reads every key once.
        moved = int(inputs[3].count_T.sum()) * DIM * 2
        result["share_of_copy_ceiling"] = round(moved / time / copy_ceiling(), 3)
    return result


def measure_scores(tokens: int) -> dict[str, Any]:
    """Scores alone, forward and both ways, over all entries and over the chosen ones."""
    q, weights, keys, candidates = prefill(tokens)
    scores_TE = q.new_empty(tokens, candidates.columns, dtype=torch.float32)

    def forward() -> None:
        indexer._score(q, weights, keys, candidates, scores_TE, 0, tokens)

    rows_TK = candidates.rows_of(kernels.index_topk(q, weights, keys, candidates, TOPK))
    leaves = [tensor.requires_grad_() for tensor in (q, weights, keys)]
    found: dict[str, Any] = {}
    pairs = {"all entries": (candidates, int(candidates.count_T.sum())), "chosen rows": (rows_TK, rows_TK.numel())}
    for name, (which, entries) in pairs.items():
        out_TE = kernels.index_scores(leaves[0], leaves[1], leaves[2], which)
        slopes_TE = torch.randn_like(out_TE).masked_fill(out_TE.isinf(), 0)
        once = 2 * HEADS * DIM * entries
        there = seconds(lambda which=which: kernels.index_scores(q, weights, keys, which), 7, 2)  # type: ignore[misc]
        back = seconds(
            lambda out=out_TE, slopes=slopes_TE: torch.autograd.grad(out, leaves, slopes, retain_graph=True),  # type: ignore[misc]
            repeats=5,
            warm_up=2,
        )
        again = [torch.autograd.grad(out_TE, leaves, slopes_TE, retain_graph=True) for _ in range(2)]
        found[name] = {
            "forward_ms": round(there * 1e3, 3),
            "forward_share_of_matmul_ceiling": round(once / there / matmul_ceiling(), 3),
            "backward_ms": round(back * 1e3, 3),
            # The dots again, and a product each for queries and keys.
            "backward_share_of_matmul_ceiling": round(3 * once / back / matmul_ceiling(), 3),
            "backward_repeats_bit_for_bit": all(map(torch.equal, *again)),
        }
    with torch.no_grad():
        kernel = seconds(forward, 7, 2)
        found["kernel_ms"] = round(kernel * 1e3, 3)
        found["kernel_share_of_matmul_ceiling"] = round(operations(candidates) / kernel / matmul_ceiling(), 3)
        found["torch_ms"] = round(seconds(lambda: torch_scores(q, weights, keys, candidates), 5, 2) * 1e3, 3)
        ours, theirs = kernels.index_scores(q, weights, keys, candidates), torch_scores(q, weights, keys, candidates)
        exists = theirs > float("-inf")
        found["difference_from_torch"] = float((ours - theirs)[exists].norm() / theirs[exists].norm())
    return found


def measure_divergence(tokens: int, entries: int) -> dict[str, Any]:
    """The training objective forward and backward; its floor reads scores and targets once each way."""
    scores_TE = torch.randn(tokens, entries, device="cuda", requires_grad=True)
    target_TE = torch.rand(tokens, entries, device="cuda")

    def both() -> None:
        torch.autograd.grad(kernels.index_divergence(scores_TE, target_TE).sum(), scores_TE)

    time = seconds(both, repeats=7, warm_up=2)
    return {"ms": round(time * 1e3, 3), "share_of_copy_ceiling": round(5 * target_TE.nbytes / time / copy_ceiling(), 3)}


def measure_bits() -> dict[str, bool]:
    """A prefill whole, in chunks and token by token over pages, on this GPU."""
    torch.manual_seed(1)
    q, weights, keys, candidates = prefill(4096)
    whole = kernels.index_scores(q, weights, keys, candidates)
    chosen = kernels.index_topk(q, weights, keys, candidates, TOPK)
    cuts = [0, 1, 700, 2049, 4095, 4096]
    parts = [slice(first, stop) for first, stop in itertools.pairwise(cuts)]
    tables = [candidates.of_tokens(part.start, part.stop) for part in parts]
    chunks = [kernels.index_scores(q[p], weights[p], keys, table) for p, table in zip(parts, tables, strict=True)]
    choices = [kernels.index_topk(q[p], weights[p], keys, table, TOPK) for p, table in zip(parts, tables, strict=True)]
    pages = torch.randperm(len(keys) // PAGE, device="cuda").view(1, -1) * PAGE
    paged = Candidates(candidates.count_T, candidates.sequence_T, pages, PAGE, candidates.columns)
    cache = torch.empty_like(keys)
    cache[paged.rows_TE[-1]] = keys
    steps = [4095, 3000, 2048]
    decoded = [kernels.index_scores(q[t:][:1], weights[t:][:1], cache, paged.of_tokens(t, t + 1))[0] for t in steps]
    return {
        "chunks": torch.equal(torch.cat(chunks), whole) and torch.equal(torch.cat(choices), chosen),
        "single tokens over pages": torch.equal(torch.stack(decoded), whole[steps]),
        "fp32 cache": torch.equal(kernels.index_scores(q, weights, cache.float(), paged), whole),
    }


def measure(quick: bool) -> dict[str, Any]:
    """Times in ms, and shares of the ceilings that are measured in the same process."""
    torch.manual_seed(0)
    lengths = [8192, 32768] if quick else [8192, 32768, 131072]
    return {
        "same_bits": measure_bits(),
        "topk_1024x2048": measure_topk(1024, 2048),
        "topk_1024x32768": measure_topk(1024, 32768),
        "scores_8192": measure_scores(8192),
        "index_topk_prefill": {str(tokens): measure_choice(prefill(tokens)) for tokens in lengths},
        "index_topk_decode": {
            f"{sequences} sequences at {context}": measure_choice(decode(sequences, context))
            for sequences, context in [(64, 8192), (256, 8192), (64, 32768)]
        },
        "divergence_8192x512": measure_divergence(8192, 512),
        "divergence_8192x2048": measure_divergence(8192, 2048),
    }


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv), indent=2))
