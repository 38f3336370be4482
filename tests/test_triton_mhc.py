"""mHC on Triton: against the oracle in fp64, and bit by bit against itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import kernels
from posttrain.kernels.mhc import oracle
from posttrain.kernels.mhc import triton as triton_mhc
from tests.triton_kit import DEVICE, assert_agrees, assert_close, normal, running

PRE = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-3}
HEAD = {"eps": 1e-6, "norm_eps": 1e-3}
TOKENS = 200 if DEVICE.type == "cuda" else 40
"""Two tiles, the second of which is not full: for fp32 on the CPU, where every token is slow, for bf16 too on a GPU."""

LONG_SUMS = 1e-4
"""Bound for sums of some thousand terms that nearly cancel, in fp32."""

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
examples = settings(max_examples=7, deadline=None, derandomize=True)
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def pre_inputs(tokens: int, n: int, dim: int) -> tuple[Tensor, ...]:
    """Streams, fn, base and scale of a site."""
    width = (2 + n) * n
    return normal(tokens, n, dim), normal(width, n * dim, scale=0.3), normal(width), normal(3)


def head_inputs(tokens: int, n: int, dim: int) -> tuple[Tensor, ...]:
    """The same of the head."""
    return normal(tokens, n, dim), normal(n, n * dim, scale=0.3), normal(n), normal(1)


def post_inputs(tokens: int, n: int, dim: int) -> tuple[Tensor, ...]:
    """Streams, the sub-layer's output, post and comb."""
    return normal(tokens, n, dim), normal(tokens, dim), normal(tokens, n), normal(tokens, n, n)


def pre(*inputs: Tensor) -> tuple[Tensor, ...]:
    return kernels.mhc_pre(*inputs, **PRE)


def head(*inputs: Tensor) -> Tensor:
    return kernels.mhc_head(*inputs, **HEAD)


OPS: dict[str, tuple[Op, Callable[..., tuple[Tensor, ...]], int]] = {
    "mhc_pre": (pre, pre_inputs, 1),
    "mhc_head": (head, head_inputs, 1),
    "mhc_post": (kernels.mhc_post, post_inputs, 4),
}
"""Op, its inputs, and how many of these have a row for each token."""


@examples
@given(seeds, st.integers(0, 50), st.integers(1, 5), st.integers(1, 40), st.integers(1, 20), dtypes)
def test_mhc_site(seed: int, tokens: int, n: int, dim: int, iterations: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    constants = PRE | {"iterations": iterations}
    assert_agrees(
        lambda *inputs: kernels.mhc_site(*inputs, **constants),
        lambda streams, *others: (*oracle.mhc_pre(streams, *others, **constants), streams),
        *pre_inputs(tokens, n, dim),
        dtype=dtype,
    )


@examples
@given(seeds, st.integers(0, 50), st.integers(1, 5), st.integers(1, 40), dtypes)
def test_mhc_head(seed: int, tokens: int, n: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    assert_agrees(head, lambda *inputs: oracle.mhc_head(*inputs, **HEAD), *head_inputs(tokens, n, dim), dtype=dtype)


@examples
@given(seeds, st.integers(0, 40), st.integers(1, 5), st.integers(1, 70), dtypes)
def test_mhc_post(seed: int, tokens: int, n: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    assert_agrees(kernels.mhc_post, oracle.mhc_post, *post_inputs(tokens, n, dim), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_that_do_not_fit_one_program(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bound = LONG_SUMS if dtype is torch.float32 else None
    inputs = pre_inputs(2, 4, 1100)
    assert_agrees(pre, lambda *inputs: oracle.mhc_pre(*inputs, **PRE), *inputs, dtype=dtype, bound=bound)
    assert_agrees(kernels.mhc_post, oracle.mhc_post, *post_inputs(2, 4, 1100), dtype=dtype, bound=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_do_not_fit_one_group(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_mhc, "GROUP_TOKENS", 50)
    torch.manual_seed(0)
    inputs = pre_inputs(130, 4, 8)
    assert_agrees(pre, lambda *inputs: oracle.mhc_pre(*inputs, **PRE), *inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_many_sums_a_program_adds_up_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    streams, *parameters = pre_inputs(2, 4, 1100)
    found = []
    for many in (10**9, 0):
        monkeypatch.setattr(triton_mhc, "MANY_TOKENS", many)
        with running("triton"):
            found.append(pre(streams.to(dtype), *parameters))
    assert same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_pass_a_site_and_take_their_gradient_along(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaves = [one.to(dtype).requires_grad_() for one in pre_inputs(9, 4, 20)]
    slopes = [normal(9, 20).to(dtype), normal(9, 4), normal(9, 4, 4)]
    passing = normal(9, 4, 20).to(dtype)
    with running("triton"):
        results, (*others, streams) = pre(*leaves), kernels.mhc_site(*leaves, **PRE)
        assert streams.data_ptr() == leaves[0].data_ptr()
        assert same(results, tuple(others))
        own, *parameters = torch.autograd.grad(results, leaves, slopes)
        both, *same_parameters = torch.autograd.grad((*others, streams), leaves, [*slopes, passing])
    assert same(tuple(parameters), tuple(same_parameters))
    assert_close(both, own.float() + passing.float(), 1e-6 if dtype is torch.float32 else 1e-2, "streams")


def test_mixing_weights_of_bf16_streams_are_as_exact_as_fp32() -> None:
    torch.manual_seed(0)
    streams, *parameters = pre_inputs(40, 4, 64)
    streams = streams.bfloat16()
    with running("triton"), torch.no_grad():
        _, *found = kernels.mhc_pre(streams, *parameters, **PRE)
    _, *expected = oracle.mhc_pre(streams.double(), *(one.double() for one in parameters), **PRE)
    for name, actual, wanted in zip(("post", "comb"), found, expected, strict=True):
        assert actual.dtype is torch.float32
        assert_close(actual, wanted, 2e-5, name)


def test_mixing_matrices_are_doubly_stochastic() -> None:
    torch.manual_seed(0)
    streams, fn, base, scale = pre_inputs(50, 4, 64)
    with running("triton"):
        *_, comb = pre(streams, fn, base, 0.3 * scale)
    assert (comb > 0).all()
    assert (comb.sum(1) - 1).abs().max() < 1e-5  # columns are normalised last
    assert (comb.sum(2) - 1).abs().max() < 1e-3


def test_extreme_logits_and_zero_streams_stay_finite() -> None:
    torch.manual_seed(0)
    streams, fn, base, scale = pre_inputs(6, 4, 16)
    streams[3] = 0
    leaves = [one.requires_grad_() for one in (streams, 100 * fn, 100 * base, 10 * scale)]
    with running("triton"):
        results = pre(*leaves)
        slopes = torch.autograd.grad(results, leaves, [torch.ones_like(one) for one in results])
    assert all(one.isfinite().all() for one in (*results, *slopes))


def results(name: str, inputs: tuple[Tensor, ...], rows: Tensor | slice = slice(None)) -> tuple[Tensor, ...]:
    """The op on these tokens."""
    op, _, ragged = OPS[name]
    with running("triton"):
        found = op(*(one[rows] for one in inputs[:ragged]), *inputs[ragged:])
    return (found,) if isinstance(found, Tensor) else found


@pytest.fixture(params=[(name, dtype) for name in OPS for dtype in (torch.float32, torch.bfloat16)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[str, tuple[Tensor, ...]]:
    """An op and its inputs."""
    name, dtype = request.param
    torch.manual_seed(0)
    return name, tuple(one.to(dtype) for one in OPS[name][1](TOKENS, 4, 48))


def same(some: tuple[Tensor, ...], others: tuple[Tensor, ...], rows: Tensor | slice = slice(None)) -> bool:
    return all(torch.equal(one, other[rows]) for one, other in zip(some, others, strict=True))


def test_a_token_is_the_same_alone_in_any_chunk_and_in_any_order(case: tuple[str, tuple[Tensor, ...]]) -> None:
    name, inputs = case
    together = results(name, inputs)
    order = torch.randperm(TOKENS).to(DEVICE)
    assert same(results(name, inputs, order), together, order)
    last = TOKENS - 1
    for rows in (slice(0, 1), slice(33, 34), slice(last, None), slice(0, 31), slice(31, None), slice(5, last)):
        assert same(results(name, inputs, rows), together, rows)


def test_where_streams_begin_in_memory_changes_no_bit() -> None:
    torch.manual_seed(0)
    streams, *parameters = pre_inputs(9, 4, 15)
    store = streams.new_zeros(streams.numel() + 1).bfloat16()
    store[1:] = streams.flatten()
    moved = store[1:].view_as(streams)
    with running("triton"):
        assert same(pre(moved, *parameters), pre(moved.clone(), *parameters))


def test_asking_for_gradients_changes_no_bit(case: tuple[str, tuple[Tensor, ...]]) -> None:
    name, inputs = case
    tracked = tuple(one.clone().requires_grad_() for one in inputs)
    assert same(results(name, inputs), results(name, tracked))


def test_the_same_call_gives_the_same_bits(case: tuple[str, tuple[Tensor, ...]]) -> None:
    name, inputs = case
    leaves = tuple(one.clone().requires_grad_() for one in inputs)
    found = []
    for _ in range(2):
        outputs = results(name, leaves)
        slopes = [torch.ones_like(one) for one in outputs]
        found.append((*outputs, *torch.autograd.grad(outputs, leaves, slopes)))
    assert same(*found)


def test_gradients_may_have_gaps() -> None:
    torch.manual_seed(0)
    leaves = [one.requires_grad_() for one in pre_inputs(9, 4, 20)]
    slope = normal(9, 40)
    found = []
    for gradient in (slope[:, ::2], slope[:, ::2].contiguous()):
        with running("triton"):
            found.append(torch.autograd.grad(pre(*leaves)[0], leaves, gradient))
    assert same(*found)


BAD: list[tuple[Callable[[], object], str]] = [
    (
        lambda: pre(pre_inputs(2, 4, 8)[0].half(), *pre_inputs(2, 4, 8)[1:]),
        r"mhc_pre: streams is torch.float16; expected torch.float32 or torch.bfloat16",
    ),
    (
        lambda: head(head_inputs(2, 4, 8)[0], head_inputs(2, 4, 8)[1].to("meta"), *head_inputs(2, 4, 8)[2:]),
        r"mhc_head: fn is on meta; expected \w+(:0)?, as streams",
    ),
    (
        lambda: kernels.mhc_post(post_inputs(2, 4, 8)[0].bfloat16(), *post_inputs(2, 4, 8)[1:]),
        r"mhc_post: out is torch.float32; expected torch.bfloat16, as streams",
    ),
    (
        lambda: kernels.mhc_post(normal(2, 4, 8), normal(2, 8), normal(2, 4), normal(2, 4)),
        r"mhc_post: comb has shape \[2, 4\]; expected \[2, 4, 4\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with running("triton"), pytest.raises(ValueError, match=message):
        call()
