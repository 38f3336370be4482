"""The GPU's matrix products: against fp64, and bit by bit against themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import kernels
from posttrain.kernels import backend
from posttrain.kernels.linear import oracle
from posttrain.kernels.linear import triton as linear
from tests.triton_kit import DEVICE, assert_agrees, assert_close, normal

NATIVE = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.bfloat16]
TILES = [(torch.bfloat16, name) for name in linear.NARROW] + [(torch.float32, name) for name in linear.SINGLE]
INNER, OUTER = (4096, 1024) if NATIVE else (72, 40)
COUNTS = [1, 2, 16, 17, 63, 64, 65, 128, 129, 200, *([256, 300, 1000, 2049, 8192] if NATIVE else [])]
"""Rows in a call, on both sides of every change of tiles."""


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    backend.use("triton")
    yield
    backend.use(None)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 3), st.integers(1, 70), st.integers(1, 40))
def test_products_and_gradients(dtype: torch.dtype, seed: int, rows: int, groups: int, inner: int, outer: int) -> None:
    torch.manual_seed(seed)
    x, weight = normal(rows, groups, inner), normal(groups, outer, inner)
    assert_agrees(kernels.linear, oracle.linear, x[:, 0].clone(), weight[0].clone(), dtype=dtype)
    assert_agrees(kernels.grouped_linear, oracle.grouped_linear, x, weight, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [64, 128, 136])
def test_widths_at_the_edges_of_a_step(dtype: torch.dtype, inner: int) -> None:
    torch.manual_seed(inner)
    assert_agrees(kernels.grouped_linear, oracle.grouped_linear, normal(5, 2, inner), normal(2, 33, inner), dtype=dtype)


def test_a_long_sum_in_fp32_keeps_its_precision() -> None:
    """2048 terms: 2e-5 of the result is far below one rounding of a factor to tf32."""
    torch.manual_seed(0)
    assert_agrees(kernels.linear, oracle.linear, normal(3, 2048), normal(17, 2048))


@pytest.mark.parametrize(("dtype", "name"), TILES)
def test_every_tile_and_both_ways_of_loading_give_the_same_bits(dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(1)
    table = linear.SINGLE if dtype is torch.float32 else linear.NARROW
    rows, inner = (300, 4096) if NATIVE else (70, 192)
    x, weight = normal(rows, 2, inner).to(dtype), normal(2, 50, inner).to(dtype)
    expected = linear.product(x, weight, table["large"]._replace(descriptors=False))
    assert_close(expected, oracle.grouped_linear(x.double(), weight.double()), 2e-2, "product")
    for descriptors in (False, True):
        assert torch.equal(linear.product(x, weight, table[name]._replace(descriptors=descriptors)), expected)


def rows_of(x: Tensor, weight: Tensor, start: int, count: int) -> Tensor:
    return kernels.linear(x[start : start + count], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer"), [(INNER, OUTER), (33, 7), (64, 1)])
def test_a_row_alone_is_the_row_among_others(dtype: torch.dtype, inner: int, outer: int) -> None:
    torch.manual_seed(2)
    x, weight = normal(max(COUNTS) + 3, inner).to(dtype), normal(outer, inner).to(dtype)
    together = rows_of(x, weight, 0, len(x))
    for row in (0, 3, 70, len(x) - 1):
        assert torch.equal(rows_of(x, weight, row, 1)[0], together[row]), f"row {row}"
    for start in (0, 3):  # rows of odd width do not start where wide loads do
        for count in COUNTS:
            assert torch.equal(rows_of(x, weight, start, count), together[start : start + count]), f"{count} rows"
    order = torch.randperm(len(x)).to(DEVICE)
    assert torch.equal(kernels.linear(x[order], weight), together[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_have_the_bits_of_single_products(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, weight = normal(70, 3, INNER).to(dtype), normal(3, 40, INNER).to(dtype)
    together = kernels.grouped_linear(x, weight)
    for group in range(3):
        assert torch.equal(kernels.linear(x[:, group], weight[group]), together[:, group])
    assert torch.equal(kernels.grouped_linear(x[5:6], weight), together[5:6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs_are_equal_in_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    inputs = normal(130, 2, 64).to(dtype), normal(2, 48, 64).to(dtype)
    slope = normal(130, 2, 48).to(dtype)

    def run() -> list[Tensor]:
        x, weight = (one.clone().requires_grad_() for one in inputs)
        out = kernels.grouped_linear(x, weight)
        return [out.detach(), *torch.autograd.grad(out, (x, weight), slope)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    x, weight = normal(4, 16).requires_grad_(), normal(5, 16)
    kernels.linear(x, weight).sum().backward()
    assert_close(x.grad, weight.sum(0).expand(4, 16), 2e-5, "dx")
    frozen, weight = normal(4, 16), normal(5, 16).requires_grad_()
    kernels.linear(frozen, weight).sum().backward()
    assert_close(weight.grad, frozen.sum(0).expand(5, 16), 2e-5, "dweight")


def test_what_is_not_a_number_stays_in_its_row() -> None:
    torch.manual_seed(5)
    x, weight = normal(20, 40), normal(9, 40)
    expected = kernels.linear(x, weight)
    x[7, 3] = float("nan")
    spoilt = kernels.linear(x, weight)
    assert spoilt[7].isnan().all()
    assert torch.equal(torch.cat((spoilt[:7], spoilt[8:])), torch.cat((expected[:7], expected[8:])))


def test_mixed_dtypes_are_named() -> None:
    with pytest.raises(ValueError, match=r"linear: weight is torch.float32 on .*; expected torch.bfloat16 on"):
        kernels.linear(normal(2, 4).bfloat16(), normal(3, 4))
    with pytest.raises(ValueError, match=r"grouped_linear: weight is torch.bfloat16 on .*; expected torch.float32 on"):
        kernels.grouped_linear(normal(2, 1, 4), normal(1, 3, 4).bfloat16())


def test_constants_in_another_order_than_the_kernels_are_refused() -> None:
    """Later launches pass them by place."""
    with pytest.raises(ValueError, match=r"launch: constants are .*BLOCK_N.*; expected"):
        linear.launch((1, 1, 1), "key", (), {"BLOCK_N": 1, "BLOCK_M": 1})
