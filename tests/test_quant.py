"""FP8 and MXFP4 against a slow obvious reference: every number of the format is tried, the nearest is taken."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.kernels.quant import op, oracle
from posttrain.kernels.quant.formats import E2M1, E4M3, Format
from posttrain.kernels.quant.op import Block

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FP8 = [(code / 8) * 2**-6 if code < 8 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) for code in range(127)]

seeds = st.integers(0, 2**31)
styles = st.sampled_from(["normal", "ties", "spread", "tiny", "huge", "zeros"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
examples = settings(max_examples=30, deadline=None, derandomize=True)


def numbers(seed: int, style: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of one kind; `ties` lie half-way between numbers of a format, or on them."""
    torch.manual_seed(seed)
    x = torch.randn(shape)
    if style == "ties":
        x = torch.randint(-64, 65, shape) / 8 * 2.0 ** torch.randint(-6, 7, (*shape[:-1], 1))
    elif style == "spread":
        x = x * 2.0 ** torch.randint(-20, 20, shape)
    elif style == "tiny":
        x = x * 2.0 ** torch.randint(-149, -100, shape)
    elif style == "huge":
        x = (x * 1e38).clamp(-1.6e38, 1.6e38)
    elif style == "zeros":
        x = x.masked_fill(torch.rand(*shape[:-1], 1) < 0.7, 0) * torch.where(torch.rand(shape) < 0.5, 1, -0.0)
    return x.to(dtype)


def reference(group: np.ndarray, table: list[float], lowest: int) -> tuple[np.ndarray, int]:
    """Codes, without their signs, and the exponent of the scale, of one group."""
    largest = np.abs(group).max()
    exponent = 0 if largest == 0 else lowest
    while largest > table[-1] * 2.0**exponent:
        exponent += 1
    order = [*range(0, len(table), 2), *range(1, len(table), 2)]  # the even code first: it wins a tie
    distances = np.abs(np.abs(group)[:, None] / 2.0**exponent - np.array(table)[order])
    return np.array(order)[distances.argmin(1)], exponent


def assert_reference(
    x: Tensor, codes: Tensor, scales: Tensor, kind: Format, table: list[float], rows: int, columns: int
) -> None:
    """Every block of one matrix is as the reference has it."""
    sign_bit = 1 << kind.sign
    for first in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            part = x[first : first + rows, left : left + columns].double().numpy()
            expected, exponent = reference(part.reshape(-1), table, kind.floor)
            found = codes[first : first + rows, left : left + columns].numpy().astype(int).reshape(-1)
            assert (found % sign_bit == expected).all()
            assert ((found >= sign_bit) == np.signbit(part.reshape(-1))).all()
            assert scales[first // rows, left // columns] == exponent + 127


def same_bits(one: Tensor, other: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.dtype is other.dtype and torch.equal(one.view(integers), other.view(integers))


def test_the_formats_are_the_published_ones() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert oracle.decode(codes[:16], E2M1).tolist() == [*FP4, *(-value for value in FP4)]
    finite = (codes & 0x7F) != 0x7F
    assert same_bits(oracle.decode(codes, E4M3)[finite], codes.view(torch.float8_e4m3fn).float()[finite])
    assert oracle.decode(codes[:127], E4M3).tolist() == FP8


@pytest.mark.parametrize(("kind", "table"), [(E2M1, FP4), (E4M3, FP8)])
def test_rounding_is_to_the_nearest_ties_to_even_and_saturates(kind: Format, table: list[float]) -> None:
    exact = torch.tensor(table)
    middles = (exact[1:] + exact[:-1]) / 2
    values = torch.cat((exact, middles, middles.nextafter(exact[1:]), middles.nextafter(exact[:-1])))
    for signed in (values, -values):
        codes = oracle.encode(signed, kind)
        nearest = (signed.abs().double().unsqueeze(1) - exact.double()).abs()
        nearest[:, 1::2] += 1e-12  # odd codes lose ties; other distances differ by more
        assert torch.equal(codes & ((1 << kind.sign) - 1), nearest.argmin(1).to(torch.uint8))
        if kind is E4M3:
            assert torch.equal(codes, signed.to(torch.float8_e4m3fn).view(torch.uint8))
    assert oracle.encode(torch.tensor([table[-1] * 1.4, 1e30, -1e30]), kind).tolist() == [
        kind.top, kind.top, kind.top | 1 << kind.sign,
    ]  # fmt: skip


@examples
@given(seeds, styles, dtypes, st.integers(0, 5), st.integers(1, 3))
def test_mxfp4_is_the_nearest_in_each_group(seed: int, style: str, dtype: torch.dtype, rows: int, groups: int) -> None:
    x = numbers(seed, style, rows, 32 * groups, dtype=dtype)
    packed, scales = op.quantize_mxfp4(x)
    assert packed.shape == (rows, 16 * groups) and scales.shape == (rows, groups)
    assert_reference(x, op.unpack_fp4(packed), scales, E2M1, FP4, 1, 32)


@examples
@given(seeds, styles, dtypes, st.integers(1, 140), st.integers(1, 140), st.sampled_from(["weight", "activation"]))
def test_fp8_is_the_nearest_in_each_block(
    seed: int, style: str, dtype: torch.dtype, rows: int, columns: int, block: Block
) -> None:
    x = numbers(seed, style, min(rows, 12) if block == "activation" else rows, columns, dtype=dtype)
    values, scales = op.quantize_fp8(x, block)
    assert_reference(x, values.view(torch.uint8), scales, E4M3, FP8, 128 if block == "weight" else 1, 128)


def fakes() -> list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Fake quantisation, and the long way: quantise, pack, unpack, dequantise."""

    def long_mxfp4(x: Tensor) -> Tensor:
        packed, scales = op.quantize_mxfp4(x)
        return op.dequantize_mxfp4(op.pack_fp4(op.unpack_fp4(packed)), scales, x.dtype)

    def long_fp8(block: Block) -> Callable[[Tensor], Tensor]:
        return lambda x: op.dequantize_fp8(*op.quantize_fp8(x, block), block, x.dtype)

    pairs = [(op.fake_quantize_mxfp4, long_mxfp4)]
    for block in ("weight", "activation"):
        pairs.append((lambda x, block=block: op.fake_quantize_fp8(x, block), long_fp8(block)))
    return pairs


@examples
@given(seeds, styles, dtypes, st.integers(1, 3), st.integers(1, 40), st.integers(1, 5))
def test_fake_quantisation_is_the_long_way_bit_for_bit(
    seed: int, style: str, dtype: torch.dtype, matrices: int, rows: int, groups: int
) -> None:
    x = numbers(seed, style, matrices, rows, 32 * groups, dtype=dtype)
    for fake, long in fakes():
        rounded = fake(x)
        assert rounded.dtype is dtype
        assert same_bits(rounded, long(x))
        assert same_bits(fake(rounded), rounded), "rounding twice is rounding once"
        assert same_bits(rounded.float(), fake(x.float())), "bf16 holds every number of the formats"


def test_the_gradient_goes_straight_through() -> None:
    for fake, _ in fakes():
        x = torch.randn(2, 20, 96, requires_grad=True)
        slope = torch.randn(2, 20, 96)
        fake(x).backward(slope)
        assert torch.equal(x.grad, slope)


def test_the_first_of_two_numbers_is_in_the_low_half_of_a_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(op.pack_fp4(op.unpack_fp4(every)), every)
    assert op.unpack_fp4(torch.tensor([0xA3], dtype=torch.uint8)).tolist() == [0x3, 0xA]


def test_a_packed_row_has_its_codes_and_then_its_scales() -> None:
    x = torch.randn(2, 3, 96)
    rows, (packed, scales) = op.pack_rows_mxfp4(x), op.quantize_mxfp4(x)
    assert rows.shape == (2, 3, op.packed_bytes(96)) == (2, 3, 51)
    assert op.packed_numbers(51) == 96
    assert torch.equal(rows[..., :48], packed)
    assert torch.equal(rows[..., 48:], scales)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(op.unpack_rows_mxfp4(rows, dtype), op.fake_quantize_mxfp4(x).to(dtype))


def test_leading_dimensions_are_kept() -> None:
    x = torch.randn(2, 3, 130, 64)
    assert [list(one.shape) for one in op.quantize_mxfp4(x)] == [[2, 3, 130, 32], [2, 3, 130, 2]]
    assert [list(one.shape) for one in op.quantize_fp8(x)] == [[2, 3, 130, 64], [2, 3, 2, 1]]
    assert [list(one.shape) for one in op.quantize_fp8(x, "activation")] == [[2, 3, 130, 64], [2, 3, 130, 1]]
    one = op.dequantize_mxfp4(*op.quantize_mxfp4(x))
    assert torch.equal(one[1, 2], op.dequantize_mxfp4(*op.quantize_mxfp4(x[1, 2])))


@examples
@given(seeds, st.integers(1, 150), st.integers(1, 6), st.integers(0, 14), st.booleans())
def test_fp4_becomes_fp8_without_loss(seed: int, rows: int, groups: int, span: int, zeros: bool) -> None:
    """Whatever the numbers, when the scales of a block lie within a factor of 2^14."""
    torch.manual_seed(seed)
    packed = torch.randint(0, 256, (rows, 16 * groups), dtype=torch.uint8)
    scales = torch.randint(100, 101 + span, (rows, groups), dtype=torch.uint8)
    if zeros:  # groups of zeros do not count, whatever their scales
        empty = torch.rand(rows, groups) < 0.3
        packed = packed.view(rows, groups, 16).masked_fill(empty.unsqueeze(-1), 0).view(rows, -1)
        scales = torch.where(empty, torch.randint(0, 255, (rows, groups)), scales).to(torch.uint8)
    wide = op.mxfp4_to_fp8(packed, scales)
    assert torch.equal(op.dequantize_fp8(*wide), op.dequantize_mxfp4(packed, scales))


def test_fp4_that_fp8_cannot_hold_is_refused_by_block() -> None:
    packed = torch.full((256, 128), 0x11, dtype=torch.uint8)
    scales = torch.full((256, 8), 127, dtype=torch.uint8)
    scales[200, 7] = 127 - 15
    with pytest.raises(ValueError, match=r"1 of 4 128 × 128 blocks.* the first at \(1, 1\)"):
        op.mxfp4_to_fp8(packed, scales)
    packed[200, 112:] = 0x22  # 1 instead of 0.5: one more power of two
    op.mxfp4_to_fp8(packed, scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.8e38])
def test_what_is_no_number_is_refused(bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 40] = bad
    for call in (op.quantize_mxfp4, op.quantize_fp8, op.fake_quantize_mxfp4, op.fake_quantize_fp8):
        with pytest.raises(ValueError, match=f"{call.__name__}: got an infinity or a NaN"):
            call(x)


def byte(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: op.quantize_mxfp4(torch.zeros(4, 40)), r"quantize_mxfp4: x has shape \[4, 40\].*multiple of 32"),
        (lambda: op.quantize_mxfp4(torch.zeros(4, 32, dtype=torch.int32)), "quantize_mxfp4: x is torch.int32"),
        (lambda: op.fake_quantize_mxfp4(torch.zeros(4, 32, dtype=torch.float16)), "x is torch.float16"),
        (lambda: op.quantize_fp8(torch.zeros(4)), r"quantize_fp8: x has shape \[4\]; expected \[..., N, K\]"),
        (lambda: op.quantize_fp8(torch.zeros(4, 4), "rows"), "block is 'rows'"),  # type: ignore[arg-type]
        (lambda: op.dequantize_mxfp4(byte(2, 32), byte(2, 1)), r"scales has shape \[2, 1\]; expected \[2, 2\]"),
        (lambda: op.dequantize_mxfp4(byte(2, 32).float(), byte(2, 2)), "packed is torch.float32"),
        (lambda: op.dequantize_mxfp4(byte(2, 32), byte(2, 2) + 255), "dequantize_mxfp4: got an infinity or a NaN"),
        (
            lambda: op.dequantize_fp8(byte(130, 5).view(torch.float8_e4m3fn), byte(1, 1)),
            r"scales is torch.uint8 \[1, 1\]; expected uint8 or float32 \[2, 1\]",
        ),
        (
            lambda: op.dequantize_fp8((byte(2, 2) + 127).view(torch.float8_e4m3fn), byte(1, 1)),
            "dequantize_fp8: values has a NaN",
        ),
        (lambda: op.mxfp4_to_fp8(byte(32), byte(2)), "mxfp4_to_fp8: packed has shape"),
        (lambda: op.pack_fp4(byte(3)), "pack_fp4: codes"),
        (
            lambda: op.unpack_rows_mxfp4(byte(2, 16)),
            r"rows is torch.uint8 \[2, 16\]; expected uint8 \[..., K / 2 \+ K / 32\]",
        ),
        (lambda: op.unpack_rows_mxfp4(byte(2, 17).float()), "rows is torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_scales_of_any_value_are_read() -> None:
    """Checkpoints of V3's kind have fp32 scales."""
    values = torch.randn(130, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2)
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :200]
    assert torch.equal(op.dequantize_fp8(values, scales), values.float() * spread)
