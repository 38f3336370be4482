"""The Triton kernels of FP8 and MXFP4: the oracle's bits, whatever is beside a group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.kernels.quant import op
from tests.test_quant import dtypes, fakes, numbers, same_bits, seeds, styles
from tests.triton_kit import DEVICE, running

examples = settings(max_examples=20, deadline=None, derandomize=True)


def assert_oracles(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    """Every bit of the results is the oracle's."""
    results = []
    for which in ("triton", "oracle"):
        with running(which):
            one = call()
        results.append((one,) if isinstance(one, Tensor) else tuple(one))
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape and mine.dtype is theirs.dtype
        assert torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@examples
@given(seeds, styles, dtypes, st.integers(0, 70), st.integers(1, 5))
def test_mxfp4(seed: int, style: str, dtype: torch.dtype, rows: int, groups: int) -> None:
    x = numbers(seed, style, rows, 32 * groups, dtype=dtype).to(DEVICE)
    assert_oracles(lambda: op.quantize_mxfp4(x))
    assert_oracles(lambda: op.fake_quantize_mxfp4(x))
    packed, scales = op.quantize_mxfp4(x)
    assert_oracles(lambda: op.dequantize_mxfp4(packed, scales, dtype))


@examples
@given(seeds, styles, dtypes, st.integers(1, 2), st.integers(1, 150), st.integers(1, 300))
def test_fp8_weights(seed: int, style: str, dtype: torch.dtype, matrices: int, rows: int, columns: int) -> None:
    x = numbers(seed, style, matrices, rows, columns, dtype=dtype).to(DEVICE)
    assert_oracles(lambda: op.quantize_fp8(x))
    assert_oracles(lambda: op.fake_quantize_fp8(x))
    values, scales = op.quantize_fp8(x)
    assert_oracles(lambda: op.dequantize_fp8(values, scales, dtype=dtype))


@examples
@given(seeds, styles, dtypes, st.integers(0, 70), st.integers(1, 300))
def test_fp8_activations(seed: int, style: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    x = numbers(seed, style, rows, columns, dtype=dtype).to(DEVICE)
    assert_oracles(lambda: op.quantize_fp8(x, "activation"))
    assert_oracles(lambda: op.fake_quantize_fp8(x, "activation"))
    values, scales = op.quantize_fp8(x, "activation")
    assert_oracles(lambda: op.dequantize_fp8(values, scales, "activation", dtype))


@examples
@given(seeds, st.integers(1, 2), st.integers(1, 150), st.integers(1, 6), st.integers(0, 14), st.booleans())
def test_fp4_in_fp8(seed: int, matrices: int, rows: int, groups: int, span: int, zeros: bool) -> None:
    torch.manual_seed(seed)
    packed = torch.randint(0, 256, (matrices, rows, 16 * groups), dtype=torch.uint8)
    scales = torch.randint(0, 241, ()) + torch.randint(0, span + 1, (matrices, rows, groups))
    if zeros:  # groups of zeros do not count, whatever their scales
        empty = torch.rand(matrices, rows, groups) < 0.3
        packed = packed.unflatten(-1, (groups, 16)).masked_fill(empty.unsqueeze(-1), 0x80).flatten(-2)
        scales = torch.where(empty, torch.randint(0, 255, scales.shape), scales)
    assert_oracles(lambda: op.mxfp4_to_fp8(packed.to(DEVICE), scales.to(torch.uint8).to(DEVICE)))


def test_fp4_that_fp8_cannot_hold_is_refused_with_its_block() -> None:
    packed = torch.full((2, 256, 128), 0x11, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((2, 256, 8), 127, dtype=torch.uint8, device=DEVICE)
    with running("triton"):
        for far in (112, 0):
            scales[1, 200, 7] = far
            with pytest.raises(ValueError, match=r"1 of 8 128 × 128 blocks.* the first at \(1, 1, 1\)"):
                op.mxfp4_to_fp8(packed, scales)
        scales[1, 200, 7] = 255
        with pytest.raises(ValueError, match="mxfp4_to_fp8: got an infinity or a NaN"):
            op.mxfp4_to_fp8(packed, scales)


def test_every_code_and_every_scale_is_read_as_the_oracle_reads_it() -> None:
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8, device=DEVICE).view(255, 1, 1).repeat(1, 16, 1)
    assert_oracles(lambda: op.dequantize_mxfp4(packed, scales))
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(255, 1)
    codes[(codes & 0x7F) == 0x7F] = 0
    assert_oracles(
        lambda: op.dequantize_fp8(codes.view(torch.float8_e4m3fn), scales[:, :2, 0].contiguous(), "activation")
    )


def test_a_row_has_the_same_bits_alone_in_any_batch_and_in_any_order() -> None:
    x = numbers(3, "spread", 200, 160).to(DEVICE)
    order = torch.randperm(200)
    with running("triton"):
        for fake in (op.fake_quantize_mxfp4, lambda rows: op.fake_quantize_fp8(rows, "activation")):
            together = fake(x)
            assert same_bits(together, fake(x)), "a second run"
            assert same_bits(together[order], fake(x[order]))
            assert same_bits(together[77:78], fake(x[77:78]))


def test_the_gradient_goes_straight_through_and_strides_do_not_matter() -> None:
    with running("triton"):
        for fake, _ in fakes():
            x = numbers(0, "normal", 64, 40, 2).to(DEVICE).permute(2, 1, 0).detach().requires_grad_()
            slope = torch.randn(2, 40, 64, device=DEVICE)
            rounded = fake(x)
            rounded.backward(slope)
            assert torch.equal(x.grad, slope)
            assert same_bits(rounded.detach(), fake(x.detach().contiguous()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.8e38])
def test_what_is_no_number_is_refused(bad: float) -> None:
    x = torch.randn(3, 70, 64, device=DEVICE)
    x[2, 69, 63] = bad
    with running("triton"):
        for call in (op.quantize_mxfp4, op.quantize_fp8, op.fake_quantize_mxfp4, op.fake_quantize_fp8):
            with pytest.raises(ValueError, match=f"{call.__name__}: got an infinity or a NaN"):
                call(x)
