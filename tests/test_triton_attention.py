"""Sparse attention's Triton kernels against the oracle in fp64, and their bits against themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import kernels
from posttrain.kernels.attention import oracle
from posttrain.kernels.attention import triton as forward
from posttrain.kernels.attention import triton_backward as backward
from tests.triton_kit import DEVICE, assert_agrees, assert_close, normal, running

examples = settings(max_examples=8, deadline=None, derandomize=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
Indices = tuple[Tensor, Tensor]
Results = tuple[Tensor, ...]


def index_rows(tokens: int, columns: int, size: int, share: float) -> Tensor:
    """Rows of a store of `size`, each place filled with probability `share`, else -1."""
    chosen = torch.randint(0, max(size, 1), (tokens, columns))
    return chosen.masked_fill(torch.rand(tokens, columns) >= (share if size else 0.0), -1).to(DEVICE)


def attention(op: Callable[..., Tensor], indices: Indices, scale: float) -> Callable[..., Tensor]:
    """The op or its oracle, of those inputs that have gradients."""
    return lambda q, a, b, sink: op(q, [(a, indices[0]), (b, indices[1])], sink, scale)


def assert_exact(indices: Indices, *inputs: Tensor, dtype: torch.dtype) -> None:
    scale = inputs[0].shape[-1] ** -0.5
    ours = attention(kernels.sparse_attention, indices, scale)
    assert_agrees(ours, attention(oracle.sparse_attention, indices, scale), *inputs, dtype=dtype)


def results(indices: Indices, q: Tensor, a: Tensor, b: Tensor, sink: Tensor, slope: Tensor) -> Results:
    """The result and the gradients by every input, on Triton."""
    inputs = [one.detach().clone().requires_grad_() for one in (q, a, b, sink)]
    with running("triton"):
        out = attention(kernels.sparse_attention, indices, 0.2)(*inputs)
        out.backward(slope)
    return out.detach(), *(one.grad for one in inputs if one.grad is not None)


def alone(indices: Indices, q: Tensor, a: Tensor, b: Tensor, sink: Tensor) -> Tensor:
    """The result on Triton, of a call that asks for no gradient."""
    with running("triton"), torch.no_grad():
        return attention(kernels.sparse_attention, indices, 0.2)(q, a, b, sink)


def some(dtype: torch.dtype, tokens: int = 9, heads: int = 3, dim: int = 24) -> tuple[Indices, Results]:
    """Index rows and inputs: lists with gaps, longer than a block of entries."""
    torch.manual_seed(3)
    indices = index_rows(tokens, 32, 30, 0.8), index_rows(tokens, 64, 50, 0.7)
    shapes = (tokens, heads, dim), (30, dim), (50, dim)
    return indices, (*(normal(*shape).to(dtype) for shape in shapes), normal(heads))


@dtypes
@examples
@given(
    *(st.integers(0, 2**31), st.integers(0, 20), st.integers(1, 6), st.integers(1, 40), st.integers(0, 30)),
    *(st.integers(0, 30), st.sampled_from([(16, 0), (0, 16), (32, 16), (16, 48)]), st.sampled_from([0.0, 0.3, 1.0])),
)
def test_agrees_with_the_oracle(
    dtype: torch.dtype,
    seed: int,
    tokens: int,
    heads: int,
    dim: int,
    first: int,
    second: int,
    columns: tuple[int, int],
    share: float,
) -> None:
    torch.manual_seed(seed)
    indices = index_rows(tokens, columns[0], first, share), index_rows(tokens, columns[1], second, share)
    inputs = normal(tokens, heads, dim), normal(first, dim), normal(second, dim), normal(heads)
    assert_exact(indices, *inputs, dtype=dtype)


@dtypes
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "columns"),
    [
        (1, 1, 16, (16, 16)),
        (3, 70, 40, (16, 16)),
        (2, 16, 64, (160, 272)),
        (2, 64, 512, (48, 144)),
        (40, 2, 16, (16, 0)),
    ],
    ids=["one token", "several head tiles", "many blocks of entries", "the width of V4-Flash", "many readers of a row"],
)
def test_agrees_with_the_oracle_at_the_edges(
    dtype: torch.dtype, tokens: int, heads: int, dim: int, columns: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    sizes = (1 if tokens == 40 else 90), 200
    indices = index_rows(tokens, columns[0], sizes[0], 0.9), index_rows(tokens, columns[1], sizes[1], 0.9)
    inputs = normal(tokens, heads, dim), normal(sizes[0], dim), normal(sizes[1], dim), normal(heads)
    assert_exact(indices, *inputs, dtype=dtype)


@dtypes
def test_one_source_reads_columns_of_a_cache(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    index = index_rows(9, 16, 50, 0.7)

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, cache, sink: op(q, [(cache[:, 5:13], index)], sink, 0.3)

    inputs = normal(9, 2, 8), normal(50, 24), normal(2)
    assert_agrees(run(kernels.sparse_attention), run(oracle.sparse_attention), *inputs, dtype=dtype)


@pytest.mark.parametrize("sink", [-200.0, 0.0, 200.0])
def test_scores_far_apart_do_not_overflow(sink: float) -> None:
    torch.manual_seed(0)
    indices = index_rows(6, 32, 20, 0.8), index_rows(6, 16, 20, 0.8)
    inputs = normal(6, 2, 16, scale=30), normal(20, 16), normal(20, 16), torch.full((2,), sink).to(DEVICE)
    # Scores of some hundreds carry rounding errors of 1e-5 in the exponent.
    ours = attention(kernels.sparse_attention, indices, 1.0)
    assert_agrees(ours, attention(oracle.sparse_attention, indices, 1.0), *inputs, bound=2e-4)


def test_a_token_without_entries_gives_zero_and_no_gradient() -> None:
    indices, (q, a, b, sink) = some(torch.float32)
    nothing = tuple(torch.full_like(index, -1) for index in indices)
    for one in results(nothing, q, a, b, sink, torch.ones_like(q)):  # type: ignore[arg-type]
        assert not one.any()


def test_log_sum_exp_is_that_of_the_scores_and_the_sink() -> None:
    indices, (q, a, b, sink) = some(torch.float32)
    _, lse_TH = forward.attend(q, sink, 0.2, forward.pack(a, b, *indices))
    entries = torch.cat([store[index.clamp(min=0)] for store, index in zip((a, b), indices, strict=True)], 1).double()
    scores = (0.2 * q.double() @ entries.transpose(1, 2)).masked_fill(
        (torch.cat(indices, 1) < 0).unsqueeze(1), -torch.inf
    )
    expected = torch.cat((scores, sink.double().expand(len(q), -1).unsqueeze(2)), 2).logsumexp(2)
    assert_close(lse_TH * torch.log(torch.tensor(2.0)), expected, 2e-5, "log-sum-exp")


def test_lists_of_readers_hold_every_entry_once_and_tokens_in_order() -> None:
    indices, (_, a, b, _) = some(torch.float32)
    order, bounds = backward.readers(forward.pack(a, b, *indices))
    assert bounds[-1] == sum(int((index >= 0).sum()) for index in indices)
    for row in range(len(a) + len(b)):
        tokens = order[bounds[row] : bounds[row + 1]] // 96
        index, number = (indices[0], row) if row < len(a) else (indices[1], row - len(a))
        assert tokens.tolist() == (index == number).nonzero()[:, 0].tolist()


@dtypes
def test_repeated_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    indices, inputs = some(dtype)
    slope = normal(*inputs[0].shape).to(dtype)
    for one, other in zip(results(indices, *inputs, slope), results(indices, *inputs, slope), strict=True):
        assert torch.equal(one, other)


@dtypes
def test_a_token_alone_has_the_bits_it_has_among_others(dtype: torch.dtype) -> None:
    indices, (q, *rest) = some(dtype)
    expected = alone(indices, q, *rest)
    for start, end in [(t, t + 1) for t in range(len(q))] + [(0, 7), (3, 9)]:
        part = indices[0][start:end], indices[1][start:end]
        assert torch.equal(alone(part, q[start:end], *rest), expected[start:end]), f"tokens {start} to {end}"


@dtypes
def test_order_of_tokens_changes_no_bit(dtype: torch.dtype) -> None:
    indices, (q, *rest) = some(dtype)
    order = torch.randperm(len(q)).to(DEVICE)
    permuted = indices[0][order], indices[1][order]
    assert torch.equal(alone(permuted, q[order], *rest), alone(indices, q, *rest)[order])


def padded(indices: Indices) -> list[Indices]:
    """The same lists with more places that hold nothing: behind, before, and inside each of the two."""
    (first, second), nothing = indices, torch.full((len(indices[0]), 48), -1).to(DEVICE)
    return [
        (torch.cat((first, nothing), 1), second),
        (torch.cat((nothing, first), 1), second),
        (first, torch.cat((second, nothing[:, :16]), 1)),
        (first, torch.cat((second[:, :8], nothing[:, :32], second[:, 8:]), 1)),
    ]


@dtypes
def test_padding_changes_no_bit(dtype: torch.dtype) -> None:
    indices, inputs = some(dtype)
    expected = alone(indices, *inputs)
    for more in padded(indices):
        assert torch.equal(alone(more, *inputs), expected)


def test_padding_changes_no_bit_of_a_gradient() -> None:
    indices, inputs = some(torch.bfloat16)
    slope = normal(*inputs[0].shape).bfloat16()
    for one, other in zip(results(padded(indices)[1], *inputs, slope), results(indices, *inputs, slope), strict=True):
        assert torch.equal(one, other)


@dtypes
def test_where_an_entry_is_stored_changes_no_bit(dtype: torch.dtype) -> None:
    indices, (q, a, b, sink) = some(dtype)
    order = torch.randperm(70)[:30].to(DEVICE)
    cache = normal(70, 50).to(dtype)
    cache[order, 11:35] = a
    moved = torch.where(indices[0] >= 0, order[indices[0].clamp(min=0)], -1)
    assert torch.equal(alone((moved, indices[1]), q, cache[:, 11:35], b, sink), alone(indices, q, a, b, sink))


def test_stores_in_fp32_give_narrow_queries_the_same_bits() -> None:
    indices, (q, a, b, sink) = some(torch.bfloat16)
    expected = alone(indices, q, a, b, sink)
    assert torch.equal(alone(indices, q, a.float(), b.float(), sink), expected)
    assert torch.equal(alone(indices, q, a.float(), b, sink), expected)


@dtypes
def test_asking_for_gradients_changes_no_bit(dtype: torch.dtype) -> None:
    indices, inputs = some(dtype)
    assert torch.equal(results(indices, *inputs, torch.ones_like(inputs[0]))[0], alone(indices, *inputs))


@dtypes
def test_scratch_in_chunks_of_tokens_gives_the_same_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    indices, inputs = some(dtype)
    slope = normal(*inputs[0].shape).to(dtype)
    expected = results(indices, *inputs, slope)
    monkeypatch.setattr(backward, "CHUNK_BYTES", 50_000)
    monkeypatch.setattr(backward, "MANY_ROWS", 4)
    assert 1 < backward.chunk_tokens(9, 96, 3, 24, dtype) < 8
    out, dq, *stores_and_sink = results(indices, *inputs, slope)
    assert torch.equal(out, expected[0])
    assert torch.equal(dq, expected[1])
    for one, other in zip(stores_and_sink, expected[2:], strict=True):
        assert_close(one, other, 1e-6 if dtype is torch.float32 else 2**-7, "gradient")  # one rounding of the result


def test_gradients_only_where_asked_for() -> None:
    indices, (q, a, b, sink) = some(torch.float32)
    expected = results(indices, q, a, b, sink, torch.ones_like(q))
    q = q.clone().requires_grad_()
    with running("triton"):
        attention(kernels.sparse_attention, indices, 0.2)(q, a, b, sink).backward(torch.ones_like(q))
    assert q.grad is not None
    assert torch.equal(q.grad, expected[1])


def test_a_row_beyond_the_store_spoils_its_token_only() -> None:
    indices, inputs = some(torch.float32)
    expected = alone(indices, *inputs)
    indices[0][4, 7] = 30
    actual = alone(indices, *inputs)
    assert actual[4].isnan().all()
    actual[4] = expected[4]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.sparse_attention(
                normal(2, 1, 513), [(normal(5, 513), index_rows(2, 16, 5, 1))], normal(1), 1.0
            ),
            "sparse_attention: q has 513 channels; expected at most 512",
        ),
        (
            lambda: kernels.sparse_attention(normal(2, 1, 4), [(normal(5, 4), normal(2, 16))], normal(1), 1.0),
            r"sparse_attention: index of sources\[0\] is torch.float32; expected torch.int64",
        ),
        (
            lambda: kernels.sparse_attention(
                normal(2, 1, 4), [(normal(5, 4).to("meta"), index_rows(2, 16, 5, 1))], normal(1), 1.0
            ),
            r"sparse_attention: store of sources\[0\] is on meta; expected",
        ),
        (
            lambda: kernels.sparse_attention(
                normal(2, 1, 4).to(torch.float8_e4m3fn), [(normal(5, 4), index_rows(2, 16, 5, 1))], normal(1), 1.0
            ),
            "sparse_attention: q is torch.float8_e4m3fn; expected one of torch.float32, torch.bfloat16",
        ),
    ],
    ids=["head dim", "index dtype", "device", "dtype"],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with running("triton"), pytest.raises(ValueError, match=message):
        call()
