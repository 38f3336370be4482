"""The three rules of the op table, bit by bit: no other token, no padding and no order of ties changes a result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain import kernels

COUNTS = [*range(1, 101), 128, 257, 600]
"""Rows in a call; the first are the ones that are compared with calls of one row each."""

ALONE = 100


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def index_rows(tokens: int, columns: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + columns)
    rows = torch.randint(0, size, (tokens, columns), generator=generator)
    return rows.masked_fill(torch.rand(tokens, columns, generator=generator) < 0.4, -1)


Op = Callable[..., Tensor | tuple[Tensor, ...]]
TOKENS = max(COUNTS)
STORE, OTHER = normal(700, 24), normal(300, 24)
INDEX, CHOSEN = index_rows(TOKENS, 32, 700), index_rows(TOKENS, 16, 300)
ANGLES = normal(TOKENS, 8)
CONSTANTS = {"eps": 1e-6, "norm_eps": 1e-6}
TABLE = torch.rand(13, 8, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :2]

OPS: dict[str, tuple[Op, tuple[Tensor, ...]]] = {
    "linear": (lambda x: kernels.linear(x, normal(97, 64)), (normal(TOKENS, 64),)),
    "linear, odd width": (lambda x: kernels.linear(x, normal(7, 33)), (normal(TOKENS, 33),)),
    "linear, one output": (lambda x: kernels.linear(x, normal(1, 64)), (normal(TOKENS, 64),)),
    "grouped_linear": (lambda x: kernels.grouped_linear(x, normal(2, 32, 64)), (normal(TOKENS, 2, 64),)),
    "grouped_linear, small": (lambda x: kernels.grouped_linear(x, normal(3, 4, 3)), (normal(TOKENS, 3, 3),)),
    "rms_norm": (lambda x: kernels.rms_norm(x, normal(50)), (normal(TOKENS, 50),)),
    "rms_norm of heads": (kernels.rms_norm, (normal(TOKENS, 4, 32),)),
    "apply_rope": (kernels.apply_rope, (normal(TOKENS, 3, 24), ANGLES.cos(), ANGLES.sin())),
    "compress": (
        lambda kv, gate: kernels.compress(kv, gate, torch.ones(kv.shape[:2], dtype=torch.bool)),
        (normal(TOKENS, 8, 20), normal(TOKENS, 8, 20)),
    ),
    "sparse_attention": (
        lambda q, index, chosen: kernels.sparse_attention(q, [(STORE, index), (OTHER, chosen)], normal(4), 0.2),
        (normal(TOKENS, 4, 24), INDEX, CHOSEN),
    ),
    "index_scores": (
        lambda q, weights, index: kernels.index_scores(q, weights, STORE, index),
        (normal(TOKENS, 4, 24), normal(TOKENS, 4), INDEX),
    ),
    "topk_stable": (lambda scores: kernels.topk_stable(scores.round(), 5), (normal(TOKENS, 32),)),
    "mhc_pre": (
        lambda x: kernels.mhc_pre(x, normal(24, 256), normal(24), normal(3), iterations=20, **CONSTANTS),
        (normal(TOKENS, 4, 64),),
    ),
    "mhc_post": (
        kernels.mhc_post,
        (normal(TOKENS, 4, 40), normal(TOKENS, 40), normal(TOKENS, 4), normal(TOKENS, 4, 4)),
    ),
    "mhc_head": (
        lambda x: kernels.mhc_head(x, normal(4, 80), normal(4), normal(1), **CONSTANTS),
        (normal(TOKENS, 4, 20),),
    ),
    "route_topk": (lambda x: kernels.route_topk(x, normal(8, 64), normal(8), 2, 1.5), (normal(TOKENS, 64),)),
    "route_hash": (
        lambda x, ids: kernels.route_hash(x, normal(8, 64), TABLE, ids, 1.5),
        (normal(TOKENS, 64), torch.arange(TOKENS) % 13),
    ),
    "moe_experts": (
        lambda x, experts, weights: kernels.moe_experts(x, experts, weights, normal(8, 64, 64), normal(8, 64, 32), 1.0),
        (normal(TOKENS, 64), TABLE[torch.arange(TOKENS) % 13], normal(TOKENS, 2)),
    ),
    "moe_experts, odd width": (
        lambda x, experts, weights: kernels.moe_experts(x, experts, weights, normal(8, 14, 9), normal(8, 9, 7), 1.0),
        (normal(TOKENS, 9), TABLE[torch.arange(TOKENS) % 13], normal(TOKENS, 2)),
    ),
    "swiglu_mlp": (lambda x: kernels.swiglu_mlp(x, normal(96, 64), normal(64, 48), 1.0), (normal(TOKENS, 64),)),
}


def results(op: Op, inputs: tuple[Tensor, ...], start: int, end: int) -> tuple[Tensor, ...]:
    found = op(*(tensor[start:end] for tensor in inputs))
    return (found,) if isinstance(found, Tensor) else found


@pytest.mark.parametrize("name", OPS)
def test_a_row_alone_is_the_row_among_others(name: str) -> None:
    op, inputs = OPS[name]
    alone = [
        torch.cat(parts) for parts in zip(*(results(op, inputs, row, row + 1) for row in range(ALONE)), strict=True)
    ]
    for start in (0, 3):
        for count in COUNTS:
            rows = min(count, ALONE - start)
            for together, single in zip(results(op, inputs, start, start + count), alone, strict=True):
                assert torch.equal(together[:rows], single[start : start + rows]), f"{count} rows from {start}"


@pytest.mark.parametrize("name", ["rms_norm", "apply_rope", "compress", "sparse_attention", "index_scores"])
def test_bfloat16_is_invariant_too(name: str) -> None:
    op, inputs = OPS[name]
    narrow = tuple(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in inputs)
    single, together = results(op, narrow, 7, 8), results(op, narrow, 0, 60)
    assert all(torch.equal(one[0], other[7]) for one, other in zip(single, together, strict=True))


def test_padding_of_candidates_changes_no_bit() -> None:
    q, sink = normal(40, 4, 24), normal(4)
    index, chosen = INDEX[:40], CHOSEN[:40]
    expected = kernels.sparse_attention(q, [(STORE, index), (OTHER, chosen)], sink, 0.2)
    nothing = torch.full((40, 48), -1)
    for padded in (
        torch.cat((index, nothing), 1),
        torch.cat((nothing, index), 1),
        torch.cat((index, nothing[:, :16]), 1),
    ):
        assert torch.equal(kernels.sparse_attention(q, [(STORE, padded), (OTHER, chosen)], sink, 0.2), expected)
    scores = kernels.index_scores(q, normal(40, 4), STORE, index)
    more = kernels.index_scores(q, normal(40, 4), STORE, torch.cat((index, nothing), 1))
    assert torch.equal(more[:, :32], scores)
    assert bool(more[:, 32:].isinf().all())
    assert torch.equal(kernels.topk_stable(more, 8), kernels.topk_stable(scores, 8))


def test_where_an_entry_is_stored_changes_no_bit() -> None:
    """The trainer's store is its call's tokens; the engine's is a column of a paged cache."""
    q, sink, index = normal(40, 4, 24), normal(4), INDEX[:40]
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    cache = normal(1000, 77)
    cache[order, 11:35] = STORE
    moved = torch.where(index >= 0, order[index.clamp(min=0)], -1)
    expected = kernels.sparse_attention(q, [(STORE, index)], sink, 0.2)
    assert torch.equal(kernels.sparse_attention(q, [(cache[:, 11:35], moved)], sink, 0.2), expected)
    weights = normal(40, 4)
    scores = kernels.index_scores(q, weights, cache[:, 11:35], moved)
    assert torch.equal(scores, kernels.index_scores(q, weights, STORE, index))


@pytest.mark.parametrize("name", OPS)
def test_asking_for_gradients_changes_no_bit(name: str) -> None:
    op, inputs = OPS[name]
    plain = results(op, inputs, 0, 30)
    tracked = tuple(tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain, results(op, tracked, 0, 30), strict=True))


def test_mixing_matrices_are_doubly_stochastic() -> None:
    x = normal(50, 4, 64)
    *_, comb = kernels.mhc_pre(x, normal(24, 256), normal(24), 0.3 * normal(3), iterations=20, **CONSTANTS)
    assert (comb > 0).all()
    assert (comb.sum(1) - 1).abs().max() < 1e-5  # columns are normalised last
    assert (comb.sum(2) - 1).abs().max() < 1e-3


def test_threads_change_no_bit() -> None:
    """A trainer with two threads and an engine with one, on a machine that has them."""
    op, inputs = OPS["linear"]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([results(op, inputs, 0, rows)[0] for rows in (1, 20, 600)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
