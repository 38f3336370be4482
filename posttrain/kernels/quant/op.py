"""FP8 and MXFP4 with power-of-two scales (V4 report §5.2.1): quantise, dequantise, and what training sees of it.

MXFP4: E2M1 numbers, one scale for 32 in a row, two numbers in a byte. FP8: E4M3 numbers, one scale for each
128 × 128 block of a weight or for 128 in a row of activations. Scales are UE8M0 bytes, `2^(byte - 127)`: view them
as `torch.float8_e8m0fnu` to write them into a checkpoint.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.compiled import Kernels, differentiable
from posttrain.kernels.quant import oracle
from posttrain.kernels.quant.formats import BAD_SCALE, E2M1, E4M3, FP4_GROUP, FP8_GROUP, Format

triton = Kernels(__package__, "triton")

Block = Literal["weight", "activation"]
"""`weight`: 128 × 128; `activation`: 1 × 128."""

KINDS = (torch.float32, torch.bfloat16, torch.float64)


class Quantized(NamedTuple):
    """Numbers and the scales of their groups."""

    values: Tensor
    """MXFP4: uint8 `[..., K / 2]`, two codes in a byte, the first in its low half. FP8: float8_e4m3fn `[..., K]`."""
    scales: Tensor
    """UE8M0 bytes, uint8: `[..., K / 32]`, `[..., N / 128, K / 128]` or `[..., K / 128]`, rounded up."""


def quantize_mxfp4(x: Tensor) -> Quantized:
    """E2M1 with 1 × 32 scales: to the nearest, ties to even; scales are the smallest that saturate nothing.

    Args:
        x: `[..., K]`, fp32 or bf16 (fp64 is rounded to fp32 first), K a multiple of 32.

    Raises:
        ValueError: another shape or dtype; an infinity, a NaN or a magnitude above 2^127 in `x`.
    """
    _check("quantize_mxfp4", x, FP4_GROUP)
    size, rows_NK = x.shape[-1], x.reshape(-1, x.shape[-1])
    if backend_of(x) == "triton":
        packed, scales = triton.quantize(_as_groups(rows_NK, FP4_GROUP), 1, FP4_GROUP, E2M1)
    else:
        codes, scales = oracle.quantize(rows_NK.float(), 1, FP4_GROUP, E2M1)
        packed = oracle.pack(codes)
    _refuse("quantize_mxfp4", scales)
    return Quantized(packed.view(*x.shape[:-1], size // 2), scales.view(*x.shape[:-1], size // FP4_GROUP))


def dequantize_mxfp4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers `[..., K]` from `[..., K / 2]` bytes and `[..., K / 32]` scales; exact in fp32 and in bf16.

    Raises:
        ValueError: shapes that do not belong together, another dtype than uint8, a scale that is NaN.
    """
    _check_packed("dequantize_mxfp4", packed, scales)
    _refuse("dequantize_mxfp4", scales)
    shape = *packed.shape[:-1], 2 * packed.shape[-1]
    if backend_of(packed) == "triton":
        groups = packed.reshape(-1, FP4_GROUP // 2), scales.reshape(-1, 1)
        return triton.dequantize(*groups, 1, FP4_GROUP, E2M1, dtype).view(shape)
    rows = oracle.unpack(packed.reshape(-1, packed.shape[-1])), scales.reshape(-1, scales.shape[-1])
    return oracle.dequantize(*rows, 1, FP4_GROUP, E2M1).to(dtype).view(shape)


def pack_rows_mxfp4(x: Tensor) -> Tensor:
    """What `quantize_mxfp4` gives, as one tensor: of each row codes, then scales; uint8 `[..., K / 2 + K / 32]`.

    Raises:
        ValueError: as `quantize_mxfp4`.
    """
    return torch.cat(quantize_mxfp4(x), -1)


def unpack_rows_mxfp4(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers `[..., K]` of what `pack_rows_mxfp4` made; exact in fp32 and in bf16.

    Raises:
        ValueError: another dtype than uint8, a size that no row has, a scale that is NaN.
    """
    size = packed_numbers(rows.shape[-1]) if rows.dim() else 0
    if rows.dtype is not torch.uint8 or not size or packed_bytes(size) != rows.shape[-1]:
        raise ValueError(
            f"unpack_rows_mxfp4: rows is {rows.dtype} {list(rows.shape)}; expected uint8 [..., K / 2 + K / 32]"
        )
    packed, scales = (part.contiguous() for part in rows.split([size // 2, size // FP4_GROUP], -1))
    return dequantize_mxfp4(packed, scales, dtype)


def packed_bytes(numbers: int) -> int:
    """Bytes of a row of `pack_rows_mxfp4`."""
    return numbers // 2 + numbers // FP4_GROUP


def packed_numbers(size: int) -> int:
    """Numbers in a row of so many bytes."""
    return size * FP4_GROUP // (FP4_GROUP // 2 + 1)


def pack_fp4(codes: Tensor) -> Tensor:
    """Two E2M1 codes (uint8, 0 to 15) in a byte: `[..., K]` to `[..., K / 2]`, the first in the low half."""
    if codes.dtype is not torch.uint8 or not codes.dim() or codes.shape[-1] % 2:
        raise ValueError(f"pack_fp4: codes is {codes.dtype} {list(codes.shape)}; expected uint8 of an even last size")
    return oracle.pack(codes)


def unpack_fp4(packed: Tensor) -> Tensor:
    """The inverse of `pack_fp4`."""
    if packed.dtype is not torch.uint8 or not packed.dim():
        raise ValueError(f"unpack_fp4: packed is {packed.dtype} {list(packed.shape)}; expected uint8 [..., K / 2]")
    return oracle.unpack(packed)


def quantize_fp8(x: Tensor, block: Block = "weight") -> Quantized:
    """E4M3 with 128 × 128 (`weight`) or 1 × 128 (`activation`) scales; rounding as in `quantize_mxfp4`.

    Args:
        x: `[..., N, K]` or, for activations, `[..., K]`; blocks at the edges may be smaller.

    Raises:
        ValueError: another shape or dtype; an infinity, a NaN or a magnitude above 2^127 in `x`.
    """
    rows = _check_fp8("quantize_fp8", x, block)
    source = x.reshape(-1, *x.shape[-2:]) if block == "weight" else x.reshape(1, -1, x.shape[-1])
    if backend_of(x) == "triton":
        codes, scales = triton.quantize(source.contiguous(), rows, FP8_GROUP, E4M3)
    else:
        codes, scales = oracle.quantize(source.float(), rows, FP8_GROUP, E4M3)
    _refuse("quantize_fp8", scales)
    lead = x.shape[:-2] if block == "weight" else x.shape[:-1]
    tail = scales.shape[-2:] if block == "weight" else scales.shape[-1:]
    return Quantized(codes.contiguous().view(torch.float8_e4m3fn).view(x.shape), scales.view(*lead, *tail))


def dequantize_fp8(
    values: Tensor, scales: Tensor, block: Block = "weight", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers in the shape of `values` (float8_e4m3fn); exact in fp32 and in bf16.

    Args:
        scales: UE8M0 bytes, or fp32 scales of any value (checkpoints of V3's kind).

    Raises:
        ValueError: shapes or dtypes that do not belong together, a NaN among numbers or scales.
    """
    rows = _check_fp8("dequantize_fp8", values, block, torch.float8_e4m3fn)
    source = values.reshape(-1, *values.shape[-2:]) if block == "weight" else values.reshape(1, -1, values.shape[-1])
    lead = values.shape[:-2] if block == "weight" else values.shape[:-1]
    grid = -(-source.shape[-2] // rows), -(-source.shape[-1] // FP8_GROUP)
    expected = (*lead, *grid) if block == "weight" else (*lead, grid[1])
    if scales.dtype not in (torch.uint8, torch.float32) or tuple(scales.shape) != expected:
        raise ValueError(
            f"dequantize_fp8: scales is {scales.dtype} {list(scales.shape)}; "
            f"expected uint8 or float32 {list(expected)} for values {list(values.shape)}"
        )
    _refuse("dequantize_fp8", scales)
    codes = source.contiguous().view(torch.uint8)
    if bool(((codes & 0x7F) == 0x7F).any()):
        raise ValueError("dequantize_fp8: values has a NaN; expected finite numbers")
    scales = scales.reshape(len(source), *grid)
    if backend_of(values) == "triton" and scales.dtype is torch.uint8:
        return triton.dequantize(codes, scales, rows, FP8_GROUP, E4M3, dtype).view(values.shape)
    return oracle.dequantize(codes, scales, rows, FP8_GROUP, E4M3).to(dtype).view(values.shape)


class _FakeQuantize(torch.autograd.Function):
    """Rounding in the forward pass; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, columns: int, kind: Format, op: str) -> Tensor:
        matrices = x.reshape(-1, *x.shape[-2:]) if rows > 1 else x.reshape(1, -1, x.shape[-1])
        if backend_of(x) == "triton":
            source = _as_groups(matrices[0], columns) if kind is E2M1 else matrices.contiguous()
            out, bad = triton.fake_quantize(source, rows, columns, kind)
            # While a graph is captured nothing can be asked of the device: such groups come out as NaN.
            if bad is not None and bool(bad.any()):
                _raise_not_finite(op)
        else:
            out, scales = oracle.fake_quantize(matrices.float(), rows, columns, kind)
            _refuse(op, scales)
        return out.to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None, None, None


def fake_quantize_mxfp4(x: Tensor) -> Tensor:
    """What `quantize_mxfp4`, then `dequantize_mxfp4` give, bit for bit, in `x.dtype`; the gradient passes unchanged.

    Raises:
        ValueError: as `quantize_mxfp4`.
    """
    _check("fake_quantize_mxfp4", x, FP4_GROUP)
    return differentiable(_FakeQuantize, x, 1, FP4_GROUP, E2M1, "fake_quantize_mxfp4")


def fake_quantize_fp8(x: Tensor, block: Block = "weight") -> Tensor:
    """What `quantize_fp8`, then `dequantize_fp8` give, bit for bit, in `x.dtype`; the gradient passes unchanged.

    Raises:
        ValueError: as `quantize_fp8`.
    """
    rows = _check_fp8("fake_quantize_fp8", x, block)
    return differentiable(_FakeQuantize, x, rows, FP8_GROUP, E4M3, "fake_quantize_fp8")


def mxfp4_to_fp8(packed: Tensor, scales: Tensor) -> Quantized:
    """The same numbers as FP8 with 128 × 128 scales, without any loss (V4 report §5.2.1).

    E4M3 has two more exponent bits than E2M1 and two more mantissa bits, so an FP8 block can hold FP4 groups whose
    scales differ: always when the largest is at most 2^14 times the smallest (2^11 without subnormal FP8 numbers).
    Groups of zeros do not count.

    Args:
        packed: uint8 `[..., N, K / 2]`.
        scales: UE8M0 bytes `[..., N, K / 32]`.

    Raises:
        ValueError: shapes or dtypes as in `dequantize_mxfp4`; a block that cannot hold its groups, with its place.
    """
    if packed.dim() < 2:
        raise ValueError(f"mxfp4_to_fp8: packed has shape {list(packed.shape)}; expected [..., N, K / 2]")
    _check_packed("mxfp4_to_fp8", packed, scales)
    if backend_of(packed) == "triton":
        matrices = (one.reshape(-1, *one.shape[-2:]) for one in (packed, scales))
        codes, bytes_, flags = (one.view(*packed.shape[:-2], *one.shape[-2:]) for one in triton.fp4_in_fp8(*matrices))
        lossy = flags != 0
    else:
        _refuse("mxfp4_to_fp8", scales)
        codes, bytes_, lossy = oracle.fp4_in_fp8(oracle.decode(oracle.unpack(packed), E2M1), scales)
    if bool(lossy.any()):
        _refuse("mxfp4_to_fp8", scales)
        first = tuple(lossy.nonzero()[0].tolist())
        raise ValueError(
            f"mxfp4_to_fp8: {int(lossy.sum())} of {lossy.numel()} 128 × 128 blocks cannot be held exactly, the first "
            f"at {first}: its FP4 scales are too far apart; expected a ratio of at most 2^14"
        )
    return Quantized(codes.contiguous().view(torch.float8_e4m3fn), bytes_)


def _as_groups(rows_NK: Tensor, size: int) -> Tensor:
    """Groups that fill their rows exactly lie one after another in memory."""
    return rows_NK.contiguous().view(1, -1, size)


def _check(op: str, x: Tensor, group: int) -> None:
    if x.dtype not in KINDS:
        raise ValueError(f"{op}: x is {x.dtype}; expected one of {', '.join(map(str, KINDS))}")
    if not x.dim() or not x.shape[-1] or x.shape[-1] % group:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected [..., K] with K a multiple of {group}")


def _check_fp8(op: str, x: Tensor, block: Block, *kinds: torch.dtype) -> int:
    """The rows of a block."""
    if block not in ("weight", "activation"):
        raise ValueError(f"{op}: block is {block!r}; expected 'weight' or 'activation'")
    if x.dtype not in (kinds or KINDS):
        raise ValueError(f"{op}: x is {x.dtype}; expected one of {', '.join(map(str, kinds or KINDS))}")
    sizes = x.shape[-2:] if block == "weight" else x.shape[-1:]
    if len(sizes) < (2 if block == "weight" else 1) or 0 in sizes:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected [..., {'N, ' * (block == 'weight')}K], not 0")
    return FP8_GROUP if block == "weight" else 1


def _check_packed(op: str, packed: Tensor, scales: Tensor) -> None:
    for name, tensor in (("packed", packed), ("scales", scales)):
        if tensor.dtype is not torch.uint8:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; expected torch.uint8")
    if not packed.dim() or not packed.shape[-1] or packed.shape[-1] % (FP4_GROUP // 2):
        raise ValueError(f"{op}: packed has shape {list(packed.shape)}; expected [..., K / 2] with K a multiple of 32")
    expected = [*packed.shape[:-1], packed.shape[-1] // (FP4_GROUP // 2)]
    if list(scales.shape) != expected:
        raise ValueError(f"{op}: scales has shape {list(scales.shape)}; expected {expected}")


def _refuse(op: str, scales: Tensor) -> None:
    """Raise ValueError if a group's scale says that there is no number."""
    bad = scales == BAD_SCALE if scales.dtype is torch.uint8 else ~scales.isfinite()
    if bool(bad.any()):
        _raise_not_finite(op)


def _raise_not_finite(op: str) -> None:
    raise ValueError(f"{op}: got an infinity or a NaN; expected magnitudes up to 2^127")
