"""RMSNorm, rotation and compression on the GPU: against fp64, and bit by bit against themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import kernels
from posttrain.kernels import backend
from posttrain.kernels.compress import oracle as compress_oracle
from posttrain.kernels.norm import oracle as norm_oracle
from posttrain.kernels.norm import triton as norm
from posttrain.kernels.rope import oracle as rope_oracle
from tests.triton_kit import DEVICE, assert_agrees, assert_close, normal

DTYPES = [torch.float32, torch.bfloat16]
seeds, rows = st.integers(0, 2**31), st.integers(0, 40)
examples = settings(max_examples=15, deadline=None, derandomize=True)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    backend.use("triton")
    yield
    backend.use(None)


def equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def outcome(op: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients of a fixed linear function of it."""
    inputs = tuple(one.detach().clone().requires_grad_() for one in inputs)
    out = op(*inputs)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return out.detach(), *torch.autograd.grad(out, inputs, slope)


# --- norm ---


@dtypes
@examples
@given(seeds, rows, st.sampled_from([1, 3, 4]), st.integers(1, 70), st.booleans())
def test_rms_norm(dtype: torch.dtype, seed: int, tokens: int, heads: int, dim: int, weighted: bool) -> None:
    torch.manual_seed(seed)
    inputs = (normal(tokens, heads, dim), normal(dim)) if weighted else (normal(tokens, heads, dim),)
    assert_agrees(
        lambda x, weight=None: kernels.rms_norm(x, weight, 1e-3),
        lambda x, weight=None: norm_oracle.rms_norm(x, weight, 1e-3),
        *inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("dim", [512, 1023, 4096, 7168])
def test_rms_norm_of_wide_rows(dim: int) -> None:
    torch.manual_seed(dim)
    inputs = normal(5, dim), normal(dim)
    assert_agrees(
        lambda x, weight: kernels.rms_norm(x, weight), lambda x, weight: norm_oracle.rms_norm(x, weight, 1e-6), *inputs
    )


@dtypes
def test_more_rows_than_programs_that_sum_the_weights_gradient(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program goes through several tiles; the last of them is not full."""
    torch.manual_seed(0)
    monkeypatch.setattr(norm, "TILE", 64)
    monkeypatch.setattr(norm, "PROGRAMS", 3)
    inputs = normal(45, 20), normal(20)
    assert_agrees(
        lambda x, weight: kernels.rms_norm(x, weight, 1e-3),
        lambda x, weight: norm_oracle.rms_norm(x, weight, 1e-3),
        *inputs,
        dtype=dtype,
        bound=2e-2 if dtype is torch.bfloat16 else 2e-5,
    )


def test_rms_norm_without_eps_takes_no_infinity_from_rows_that_do_not_exist() -> None:
    torch.manual_seed(1)
    assert_agrees(
        lambda x, weight: kernels.rms_norm(x, weight, 0.0),
        lambda x, weight: norm_oracle.rms_norm(x, weight, 0.0),
        *(normal(3, 16), normal(16)),
    )


def test_a_weight_in_fp32_serves_narrow_rows_and_keeps_its_dtype() -> None:
    torch.manual_seed(2)
    x, weight = normal(9, 48).bfloat16(), normal(48)
    out, dx, dweight = outcome(kernels.rms_norm, x, weight)
    assert (out.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert_close(out, norm_oracle.rms_norm(x.double(), weight.double(), 1e-6), 1e-2, "out")


# --- rope ---


def turned(x: Tensor, angles: Tensor, inverse: bool = False) -> Tensor:
    return kernels.apply_rope(x, angles.cos(), angles.sin(), inverse)


@dtypes
@examples
@given(seeds, rows, st.integers(0, 3), st.integers(0, 20), st.integers(1, 20), st.booleans())
def test_apply_rope(
    dtype: torch.dtype, seed: int, tokens: int, heads: int, rest: int, half: int, inverse: bool
) -> None:
    torch.manual_seed(seed)
    angles = normal(tokens, half, scale=3)
    cos, sin = angles.cos().double(), angles.sin().double()
    shape = (tokens, heads, rest + 2 * half) if heads else (tokens, rest + 2 * half)
    assert_agrees(
        lambda x: turned(x, angles, inverse),
        lambda x: rope_oracle.apply_rope(x, cos, -sin if inverse else sin),
        normal(*shape),
        dtype=dtype,
    )


@dtypes
def test_rope_copies_what_it_does_not_turn_and_comes_back(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, angles = normal(20, 3, 24).to(dtype), normal(20, 8)
    there = turned(x, angles)
    assert torch.equal(there[..., :8], x[..., :8])
    assert_close(turned(there, angles, inverse=True), x, 2e-2 if dtype is torch.bfloat16 else 2e-6, "x")
    assert torch.equal(turned(x, torch.zeros_like(angles)), x)


# --- compress ---


@dtypes
@examples
@given(seeds, st.integers(0, 12), st.integers(1, 16), st.integers(1, 40))
def test_compress(dtype: torch.dtype, seed: int, entries: int, members: int, dim: int) -> None:
    torch.manual_seed(seed)
    valid = torch.rand(entries, members) < 0.7
    valid[:, -1] = True
    valid = valid.to(DEVICE)
    assert_agrees(
        lambda kv, gate: kernels.compress(kv, gate, valid),
        lambda kv, gate: compress_oracle.compress(kv, gate, valid),
        *(normal(entries, members, dim), normal(entries, members, dim, scale=3)),
        dtype=dtype,
    )


@pytest.mark.parametrize(("members", "dim"), [(128, 70), (200, 33)])
def test_compress_of_long_windows(members: int, dim: int) -> None:
    """V4's HCA has 128 members: several programs for each entry, the last of them not full."""
    torch.manual_seed(members)
    valid = torch.ones(2, members, dtype=torch.bool, device=DEVICE)
    assert_agrees(
        lambda kv, gate: kernels.compress(kv, gate, valid),
        lambda kv, gate: compress_oracle.compress(kv, gate, valid),
        *(normal(2, members, dim), normal(2, members, dim, scale=3)),
    )


def test_what_stands_in_a_place_that_is_not_valid_does_not_matter() -> None:
    torch.manual_seed(4)
    kv, gate, valid = normal(3, 8, 16), normal(3, 8, 16), torch.ones(3, 8, dtype=torch.bool, device=DEVICE)
    valid[0, :4] = False
    expected = outcome(lambda kv, gate: kernels.compress(kv, gate, valid), kv, gate)
    kv[0, :4], gate[0, :4] = float("nan"), float("inf")
    assert equal(outcome(lambda kv, gate: kernels.compress(kv, gate, valid), kv, gate), expected)
    assert not expected[1][0, :4].any()


def test_large_gates_and_equal_gates() -> None:
    kv = normal(1, 4, 16)
    valid = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    gate = torch.full_like(kv, 3e4)
    assert_close(kernels.compress(kv, gate, valid), kv.mean(1), 2e-6, "mean")
    gate[:, 2] = 6e4
    assert torch.equal(kernels.compress(kv, gate, valid), kv[:, 2])


@dtypes
@pytest.mark.parametrize("dim", [7, 8, 24, 32])
def test_channels_of_a_wider_state_give_the_bits_of_a_copy(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(dim)
    state, gate = normal(6, 8, 2 * dim).to(dtype), normal(6, 8, dim)
    valid = torch.ones(6, 8, dtype=torch.bool, device=DEVICE)
    for kv in state.chunk(2, -1):
        expected = kernels.compress(kv.contiguous(), gate, valid)
        assert torch.equal(kernels.compress(kv, gate, valid), expected)
        assert torch.equal(kernels.compress(kv[3:4], gate[3:4], valid[3:4]), expected[3:4])


# --- all three, bit by bit ---

TOKENS = 60
ANGLES = normal(TOKENS, 8)
VALID = torch.rand(TOKENS, 8, generator=torch.Generator().manual_seed(0)) < 0.7
VALID[:, -1] = True
VALID = VALID.to(DEVICE)
OPS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "rms_norm": (lambda x, at: kernels.rms_norm(x, torch.arange(1.0, x.shape[-1] + 1, device=DEVICE)), (64,)),
    "rms_norm, odd width": (lambda x, at: kernels.rms_norm(x), (50,)),
    "rms_norm, wide": (lambda x, at: kernels.rms_norm(x), (4096,)),
    "rms_norm of heads": (lambda x, at: kernels.rms_norm(x), (4, 32)),
    "apply_rope": (lambda x, at: turned(x, ANGLES[at]), (3, 24)),
    "apply_rope, odd width": (lambda x, at: turned(x, ANGLES[at]), (2, 19)),
    "compress": (lambda x, at: kernels.compress(*x.unbind(1), VALID[at]), (2, 8, 32)),
    "compress, odd width": (lambda x, at: kernels.compress(*x.unbind(1), VALID[at]), (2, 8, 21)),
}


@dtypes
@pytest.mark.parametrize("name", OPS)
def test_a_token_alone_is_the_token_among_others(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    op, shape = OPS[name]
    x, places = normal(TOKENS, *shape).to(dtype), torch.arange(TOKENS)
    together = op(x, places)
    for place in (0, 1, 31, TOKENS - 1):
        assert torch.equal(op(x[place : place + 1], places[place : place + 1])[0], together[place]), place
    for start, end in ((0, 17), (3, 20), (7, 60)):  # rows of odd width do not start where wide loads do
        assert torch.equal(op(x[start:end], places[start:end]), together[start:end]), (start, end)
    order = torch.randperm(TOKENS)
    assert torch.equal(op(x[order.to(DEVICE)], order), together[order.to(DEVICE)])


@dtypes
def test_repeated_runs_are_equal_in_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    places = torch.arange(TOKENS)
    for op, shape in OPS.values():
        x = normal(TOKENS, *shape).to(dtype)
        assert equal(outcome(lambda x, op=op: op(x, places), x), outcome(lambda x, op=op: op(x, places), x))
    inputs = normal(TOKENS, 48).to(dtype), normal(48).to(dtype)
    assert equal(outcome(kernels.rms_norm, *inputs), outcome(kernels.rms_norm, *inputs))
