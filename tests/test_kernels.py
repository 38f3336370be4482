"""Every op of the table against plain torch in fp64: results and all gradients, over shapes that hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import kernels
from posttrain.kernels.attention import oracle as attention_oracle
from posttrain.kernels.compress import oracle as compress_oracle
from posttrain.kernels.indexer import oracle as indexer_oracle
from posttrain.kernels.mhc import oracle as mhc_oracle
from posttrain.kernels.moe import oracle as moe_oracle
from posttrain.kernels.norm import oracle as norm_oracle
from posttrain.kernels.rope import oracle as rope_oracle

BOUND = 2e-5
"""Of the error, relative to the largest value: fp32 sums of some hundred terms."""

seeds = st.integers(0, 2**31)
rows = st.integers(0, 40)
examples = settings(max_examples=40, deadline=None, derandomize=True)
MHC = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape)


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel():
        infinite = expected.isinf()
        assert torch.equal(actual.isinf(), infinite), what
        error = (actual.double() - expected).masked_fill(infinite, 0).abs().max()
        size = expected.masked_fill(infinite, 0).abs().max()
        assert error <= BOUND * max(1.0, size), f"{what}: {error:.2e}"


def assert_agrees(
    op: Callable[..., Tensor | tuple[Tensor, ...]], oracle: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
) -> None:
    """`op` in fp32 gives what `oracle` gives in fp64, and so do the gradients of a random linear function of both."""
    single = [tensor.clone().requires_grad_() for tensor in inputs]
    double = [tensor.double().requires_grad_() for tensor in inputs]
    results, expected = op(*single), oracle(*double)
    results, expected = ((one,) if isinstance(one, Tensor) else one for one in (results, expected))
    for number, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_close(actual, wanted, f"result {number}")
    slopes = [torch.randn_like(one).masked_fill(one.isinf(), 0) for one in results]
    torch.autograd.backward(results, slopes)
    torch.autograd.backward(expected, [slope.double() for slope in slopes])
    for number, (one, other) in enumerate(zip(single, double, strict=True)):
        assert_close(one.grad, torch.zeros_like(other) if other.grad is None else other.grad, f"gradient {number}")


def index_rows(tokens: int, columns: int, size: int, share: float) -> Tensor:
    """Rows of a store of `size`, each place filled with probability `share`, else -1."""
    chosen = torch.randint(0, max(size, 1), (tokens, columns))
    return chosen.masked_fill(torch.rand(tokens, columns) >= (share if size else 0.0), -1)


@examples
@given(
    *(seeds, rows, st.integers(1, 6), st.integers(1, 40), st.integers(0, 30), st.integers(0, 30)),
    *(st.sampled_from([(16, 0), (0, 16), (32, 16), (16, 48)]), st.sampled_from([0.0, 0.3, 1.0])),
)
def test_sparse_attention(
    seed: int, tokens: int, heads: int, dim: int, first: int, second: int, columns: tuple[int, int], share: float
) -> None:
    torch.manual_seed(seed)
    indices = [index_rows(tokens, columns[0], first, share), index_rows(tokens, columns[1], second, share)]

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, a, b, sink: op(q, [(a, indices[0]), (b, indices[1])], sink, dim**-0.5)

    inputs = normal(tokens, heads, dim), normal(first, dim), normal(second, dim), normal(heads)
    assert_agrees(run(kernels.sparse_attention), run(attention_oracle.sparse_attention), *inputs)


def test_sparse_attention_with_one_source_reads_columns_of_a_cache() -> None:
    torch.manual_seed(0)
    cache, q, sink, index = normal(50, 24), normal(9, 2, 8), normal(2), index_rows(9, 16, 50, 0.7)

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, cache, sink: op(q, [(cache[:, 5:13], index)], sink, 0.3)

    assert_agrees(run(kernels.sparse_attention), run(attention_oracle.sparse_attention), q, cache, sink)


@examples
@given(seeds, rows, st.integers(1, 5), st.integers(1, 40), st.integers(0, 20), st.sampled_from([0, 16, 32]))
def test_index_scores(seed: int, tokens: int, heads: int, dim: int, size: int, columns: int) -> None:
    torch.manual_seed(seed)
    candidates = index_rows(tokens, columns, size, 0.6)

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, weights, keys: op(q, weights, keys, candidates)

    inputs = normal(tokens, heads, dim), normal(tokens, heads), normal(size, dim)
    assert_agrees(run(kernels.index_scores), run(indexer_oracle.index_scores), *inputs)


@examples
@given(seeds, st.integers(0, 12), st.integers(1, 16), st.integers(1, 40))
def test_compress(seed: int, entries: int, members: int, dim: int) -> None:
    torch.manual_seed(seed)
    valid = torch.rand(entries, members) < 0.7
    valid[:, -1] = True

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda kv, gate: op(kv, gate, valid)

    inputs = normal(entries, members, dim), normal(entries, members, dim, scale=3)
    assert_agrees(run(kernels.compress), run(compress_oracle.compress), *inputs)


@examples
@given(seeds, rows, st.sampled_from([1, 3, 4]), st.integers(1, 70), st.booleans())
def test_rms_norm(seed: int, tokens: int, heads: int, dim: int, weighted: bool) -> None:
    torch.manual_seed(seed)
    inputs = (normal(tokens, heads, dim), normal(dim)) if weighted else (normal(tokens, heads, dim),)

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight=None: op(x, weight, 1e-3)

    assert_agrees(run(kernels.rms_norm), run(norm_oracle.rms_norm), *inputs)


@examples
@given(seeds, rows, st.integers(0, 3), st.integers(0, 20), st.integers(1, 20), st.booleans())
def test_apply_rope(seed: int, tokens: int, heads: int, rest: int, half: int, inverse: bool) -> None:
    torch.manual_seed(seed)
    angles = torch.rand(tokens, half) * 6
    cos, sin = angles.cos(), angles.sin()
    shape = (tokens, heads, rest + 2 * half) if heads else (tokens, rest + 2 * half)
    assert_agrees(
        lambda x: kernels.apply_rope(x, cos, sin, inverse),
        lambda x: rope_oracle.apply_rope(x, cos.double(), (-sin if inverse else sin).double()),
        normal(*shape),
    )


def test_apply_rope_and_back_is_nothing() -> None:
    torch.manual_seed(0)
    x, angles = normal(20, 3, 24), torch.rand(20, 8) * 6
    there = kernels.apply_rope(x, angles.cos(), angles.sin())
    assert_close(kernels.apply_rope(there, angles.cos(), angles.sin(), inverse=True), x.double(), "x")
    assert torch.equal(there[..., :8], x[..., :8])


@examples
@given(seeds, rows, st.integers(1, 5), st.integers(1, 40), st.integers(1, 20))
def test_mhc_pre(seed: int, tokens: int, n: int, dim: int, iterations: int) -> None:
    torch.manual_seed(seed)
    width = (2 + n) * n
    inputs = normal(tokens, n, dim), normal(width, n * dim, scale=0.3), normal(width), normal(3)

    def run(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *tensors: op(*tensors, iterations=iterations, eps=1e-6, norm_eps=1e-3)

    assert_agrees(run(kernels.mhc_pre), run(mhc_oracle.mhc_pre), *inputs)


@examples
@given(seeds, rows, st.integers(1, 5), st.integers(1, 40))
def test_mhc_post(seed: int, tokens: int, n: int, dim: int) -> None:
    torch.manual_seed(seed)
    inputs = normal(tokens, n, dim), normal(tokens, dim), normal(tokens, n), normal(tokens, n, n)
    assert_agrees(kernels.mhc_post, mhc_oracle.mhc_post, *inputs)


@examples
@given(seeds, rows, st.integers(1, 5), st.integers(1, 40))
def test_mhc_head(seed: int, tokens: int, n: int, dim: int) -> None:
    torch.manual_seed(seed)

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: op(*tensors, eps=1e-6, norm_eps=1e-3)

    inputs = normal(tokens, n, dim), normal(n, n * dim, scale=0.3), normal(n), normal(1)
    assert_agrees(run(kernels.mhc_head), run(mhc_oracle.mhc_head), *inputs)


@examples
@given(seeds, rows, st.integers(1, 20), st.integers(1, 9), st.data())
def test_routers(seed: int, tokens: int, hidden: int, experts: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, experts))
    x, weight, bias = normal(tokens, hidden), normal(experts, hidden), normal(experts)
    chosen, weights = kernels.route_topk(x, weight, bias, k, 1.5)
    expected, _ = moe_oracle.route_topk(x.double(), weight.double(), bias.double(), k, 1.5)
    assert torch.equal(chosen, expected)
    assert_close(weights.sum(1), torch.full((tokens,), 1.5).double(), "sum of weights")
    assert_agrees(
        lambda x, weight: kernels.route_topk(x, weight, bias, k, 1.5)[1],
        lambda x, weight: moe_oracle.route_topk(x, weight, bias.double(), k, 1.5)[1],
        *(x, weight),
    )
    table = torch.rand(11, experts).argsort(1)[:, :k]
    ids = torch.randint(0, 11, (tokens,))
    assert torch.equal(kernels.route_hash(x, weight, table, ids, 2.5)[0], table[ids])
    assert_agrees(
        lambda x, weight: kernels.route_hash(x, weight, table, ids, 2.5)[1],
        lambda x, weight: moe_oracle.route_hash(x, weight, table, ids, 2.5)[1],
        *(x, weight),
    )


def test_routers_bear_extreme_logits() -> None:
    x, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[200.0], [0.0], [-200.0]]).requires_grad_()
    chosen, weights = kernels.route_topk(x, weight, torch.zeros(3), 2, 1.0)
    assert chosen.tolist() == [[0, 1], [2, 1]]
    weights.sum().backward()
    assert torch.isfinite(weights).all()
    assert torch.isfinite(weight.grad).all()


@examples
@given(
    *(seeds, rows, st.integers(1, 24), st.integers(1, 20), st.integers(1, 7)),
    st.sampled_from([0.1, 1.0, 10.0]),
    st.data(),
)
def test_moe_experts(
    seed: int, tokens: int, hidden: int, inner: int, experts: int, limit: float, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    k, used = data.draw(st.integers(1, experts)), data.draw(st.integers(1, experts))
    # Some experts get nothing; a token may choose one twice (the hash table of a bad checkpoint).
    chosen = torch.randint(0, used, (tokens, k))

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weights, w13, w2: op(x, chosen, weights, w13, w2, limit)

    inputs = (
        normal(tokens, hidden),
        normal(tokens, k),
        normal(experts, 2 * inner, hidden),
        normal(experts, hidden, inner),
    )
    assert_agrees(run(kernels.moe_experts), run(moe_oracle.moe_experts), *inputs)


@examples
@given(seeds, rows, st.integers(1, 24), st.integers(1, 40), st.sampled_from([0.1, 1.0, 10.0]))
def test_swiglu_mlp(seed: int, tokens: int, hidden: int, inner: int, limit: float) -> None:
    torch.manual_seed(seed)

    def oracle(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        return moe_oracle.swiglu(x @ w13.t(), limit) @ w2.t()

    inputs = normal(tokens, hidden), normal(2 * inner, hidden), normal(hidden, inner)
    assert_agrees(lambda *tensors: kernels.swiglu_mlp(*tensors, limit), oracle, *inputs)


@examples
@given(seeds, rows, st.integers(1, 3), st.integers(1, 40), st.integers(1, 20))
def test_products(seed: int, tokens: int, groups: int, inner: int, outer: int) -> None:
    torch.manual_seed(seed)
    x, weight = normal(tokens, groups, inner), normal(groups, outer, inner)
    assert_agrees(kernels.linear, lambda x, w: x @ w.t(), x[:, 0], weight[0])
    assert_agrees(kernels.grouped_linear, lambda x, w: torch.einsum("tgi,goi->tgo", x, w), x, weight)


@examples
@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=12, max_size=12), max_size=6), st.integers(0, 14)
)
def test_topk_stable_gives_ties_to_the_lowest_index(values: list[list[float]], k: int) -> None:
    chosen = kernels.topk_stable(torch.tensor(values).view(-1, 12), k)
    assert chosen.tolist() == [sorted(range(12), key=lambda index: -row[index])[:k] for row in values]


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_route_topk_gives_ties_to_the_lowest_expert(bias: float) -> None:
    chosen, _ = kernels.route_topk(torch.zeros(5, 8), normal(6, 8), torch.full((6,), bias), 3, 1.0)
    assert chosen.tolist() == [[0, 1, 2]] * 5


SHAPES: Sequence[tuple[Callable[[], object], str]] = [
    (
        lambda: kernels.sparse_attention(normal(2, 3), [], normal(3), 1.0),
        r"sparse_attention: q has shape \[2, 3\]; expected \[T, H, D\]",
    ),
    (
        lambda: kernels.sparse_attention(normal(2, 3, 4), [], normal(3), 1.0),
        "sparse_attention: 0 sources; expected 1 or 2",
    ),
    (
        lambda: kernels.sparse_attention(normal(2, 3, 4), [(normal(5, 4), index_rows(2, 10, 5, 1))], normal(3), 1.0),
        r"index of sources\[0\] has 10 columns; expected a multiple of 16",
    ),
    (
        lambda: kernels.sparse_attention(normal(2, 3, 4), [(normal(5, 6), index_rows(2, 16, 5, 1))], normal(3), 1.0),
        r"store of sources\[0\] has shape \[5, 6\]; expected \[S, 4\]",
    ),
    (
        lambda: kernels.sparse_attention(normal(2, 3, 4), [(normal(5, 4), index_rows(2, 16, 5, 1))], normal(4), 1.0),
        r"sparse_attention: sink has shape \[4\]; expected \[3\]",
    ),
    (
        lambda: kernels.index_scores(normal(2, 3, 4), normal(2, 4), normal(5, 4), index_rows(2, 16, 5, 1)),
        r"index_scores: weights has shape \[2, 4\]; expected \[2, 3\]",
    ),
    (
        lambda: kernels.compress(normal(2, 3, 4), normal(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)),
        r"compress: valid has shape \[2, 4\]; expected \[2, 3\]",
    ),
    (lambda: kernels.rms_norm(normal(2, 3), normal(2)), r"rms_norm: weight has shape \[2\]; expected \[3\]"),
    (
        lambda: kernels.apply_rope(normal(2, 6), normal(2, 4), normal(2, 4)),
        r"apply_rope: x has shape \[2, 6\]; expected \[T, ..., at least 8\]",
    ),
    (
        lambda: kernels.apply_rope(normal(2, 6), normal(3, 2), normal(3, 2)),
        r"apply_rope: cos has shape \[3, 2\]; expected \[2, R\]",
    ),
    (
        lambda: kernels.mhc_pre(normal(2, 4, 8), normal(24, 30), normal(24), normal(3), **MHC),
        r"mhc_pre: fn has shape \[24, 30\]; expected \[24, 32\]",
    ),
    (
        lambda: kernels.mhc_post(normal(2, 4, 8), normal(2, 8), normal(2, 4), normal(2, 4)),
        r"mhc_post: comb has shape \[2, 4\]; expected \[2, 4, 4\]",
    ),
    (
        lambda: kernels.mhc_head(normal(2, 4, 8), normal(4, 32), normal(4), normal(3), eps=1e-6, norm_eps=1e-6),
        r"mhc_head: scale has shape \[3\]; expected \[1\]",
    ),
    (
        lambda: kernels.route_topk(normal(2, 4), normal(6, 4), normal(6), 7, 1.0),
        "route_topk: k is 7; expected 1 to 6",
    ),
    (
        lambda: kernels.route_hash(normal(2, 4), normal(6, 4), torch.zeros(9, 2).long(), torch.zeros(3).long(), 1.0),
        r"route_hash: tokens has shape \[3\]; expected \[2\]",
    ),
    (
        lambda: kernels.moe_experts(
            *(normal(2, 4), torch.zeros(2, 1).long(), normal(2, 1), normal(3, 8, 4), normal(3, 4, 5), 1.0)
        ),
        r"moe_experts: w13 has shape \[3, 8, 4\]; expected \[3, 10, 4\]",
    ),
    (
        lambda: kernels.swiglu_mlp(normal(2, 4), normal(6, 4), normal(4, 6), 1.0),
        r"swiglu_mlp: down has shape \[4, 6\]; expected \[4, 3\]",
    ),
    (lambda: kernels.linear(normal(2, 4), normal(3, 5)), r"linear: weight has shape \[3, 5\]; expected \[O, 4\]"),
    (
        lambda: kernels.grouped_linear(normal(2, 3, 4), normal(2, 5, 4)),
        r"grouped_linear: weight has shape \[2, 5, 4\]; expected \[3, O, 4\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), SHAPES, ids=[message[:40] for _, message in SHAPES])
def test_a_bad_shape_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: kernels.sparse_attention(normal(2, 1, 4), [(normal(5, 4), torch.full((2, 16), 5))], normal(1), 1.0),
        lambda: kernels.index_scores(normal(2, 1, 4), normal(2, 1), normal(5, 4), torch.full((2, 16), 5)),
        lambda: kernels.moe_experts(
            *(normal(2, 4), torch.tensor([[0], [3]]), normal(2, 1), normal(3, 8, 4), normal(3, 4, 4), 1.0)
        ),
    ],
    ids=["sparse_attention", "index_scores", "moe_experts"],
)
def test_a_row_that_does_not_exist_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(IndexError):
        call()
