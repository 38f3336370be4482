"""Quantisation in vectorised torch: what CPUs run, and what the Triton kernels are compared with.

Everything is done on the bits of fp32 numbers or by exact products with powers of two, so that two implementations
either agree in every bit or one of them is wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.quant.formats import BAD_SCALE, E4M3, LARGEST, ONE_SCALE, Format

MAGNITUDE, EXPONENT, FRACTION = 0x7FFFFFFF, 0x7F800000, 0x007FFFFF


def blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """`[..., N, K]` as `[..., N / rows, rows, K / columns, columns]`, filled up with zeros."""
    x = F.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    return x.unflatten(-2, (-1, rows)).unflatten(-1, (-1, columns))


def flat(blocks_: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `blocks`, cut to `rows` and `columns` in all."""
    return blocks_.flatten(-2).flatten(-3, -2)[..., :rows, :columns]


def scale_bytes(largest: Tensor, kind: Format) -> Tensor:
    """UE8M0 bytes for groups whose largest magnitudes (fp32) these are; groups of zeros get the scale 1."""
    bits = largest.view(torch.int32)
    exponents = (bits >> 23) - kind.reach + ((bits & FRACTION) > kind.edge)
    found = exponents.clamp_min(kind.floor + ONE_SCALE)
    found = found.masked_fill(bits == 0, ONE_SCALE)
    return found.masked_fill(bits > LARGEST, BAD_SCALE).to(torch.uint8)


def power(bytes_: Tensor) -> Tensor:
    """The scales themselves, fp32."""
    bits = bytes_.int() << 23
    bits = bits.masked_fill(bytes_ == 0, 1 << 22)  # 2^-127 is subnormal in fp32
    return bits.masked_fill(bytes_ == BAD_SCALE, 0x7FC00000).view(torch.float32)


def inverse_power(bytes_: Tensor) -> Tensor:
    """1 / scale for scales that `scale_bytes` made."""
    return ((2 * ONE_SCALE - bytes_.int()).clamp_min(0) << 23).view(torch.float32)


def encode(scaled: Tensor, kind: Format) -> Tensor:
    """Codes (uint8) of fp32 numbers, to the nearest, ties to the even code; larger ones become the largest."""
    bits = scaled.view(torch.int32)
    magnitude, shift = bits & MAGNITUDE, 23 - kind.mantissa
    up = (1 << (shift - 1)) - 1 + ((magnitude >> shift) & 1)
    normal = ((magnitude + up) >> shift) - ((127 - kind.bias) << kind.mantissa)
    small = (scaled.abs() * 2.0 ** (kind.bias - 1 + kind.mantissa)).clamp_max(64).round().int()
    code = torch.where(magnitude < (128 - kind.bias) << 23, small, normal).clamp_max(kind.top)
    return (code | ((bits >> 31) & 1) << kind.sign).to(torch.uint8)


def decode(codes: Tensor, kind: Format) -> Tensor:
    """The numbers, fp32, that codes stand for."""
    code = codes.int()
    magnitude = code & ((1 << kind.sign) - 1)
    normal = ((magnitude + ((127 - kind.bias) << kind.mantissa)) << (23 - kind.mantissa)).view(torch.float32)
    small = magnitude * 2.0 ** (1 - kind.bias - kind.mantissa)
    value = torch.where(magnitude < 1 << kind.mantissa, small, normal)
    return torch.where(code >> kind.sign == 1, -value, value)


def rounded(scaled: Tensor, kind: Format) -> Tensor:
    """`decode(encode(scaled))` in fewer steps, for numbers within the format."""
    # 1.5 · 2^23 times the distance between codes around a number: adding it rounds to such multiples, ties to even.
    step = (scaled.view(torch.int32) & EXPONENT).clamp_min_((128 - kind.bias) << 23)
    step = (step.add_(((23 - kind.mantissa) << 23) + (1 << 22))).view(torch.float32)
    return torch.copysign((scaled + step).sub_(step), scaled)


def quantize(x_: Tensor, rows: int, columns: int, kind: Format) -> tuple[Tensor, Tensor]:
    """Codes `[..., N, K]` and scale bytes `[..., N / rows, K / columns]` of fp32 `[..., N, K]`."""
    parts = blocks(x_, rows, columns)
    scales = scale_bytes(parts.abs().amax((-3, -1)), kind)
    codes = encode(parts * _spread(inverse_power(scales)), kind)
    return flat(codes, *x_.shape[-2:]), scales


def dequantize(codes: Tensor, scales: Tensor, rows: int, columns: int, kind: Format) -> Tensor:
    """fp32 `[..., N, K]`; scales as bytes, or as fp32 numbers of any value."""
    numbers = power(scales) if scales.dtype is torch.uint8 else scales
    parts = blocks(decode(codes, kind), rows, columns)
    return flat(parts * _spread(numbers), *codes.shape[-2:])


def fake_quantize(x_: Tensor, rows: int, columns: int, kind: Format) -> tuple[Tensor, Tensor]:
    """`dequantize(*quantize(x))`, bit for bit, and the scales."""
    parts = blocks(x_, rows, columns)
    scales = scale_bytes(parts.abs().amax((-3, -1)), kind)
    numbers = rounded(parts * _spread(inverse_power(scales)), kind).mul_(_spread(power(scales)))
    return flat(numbers, *x_.shape[-2:]), scales


def pack(codes: Tensor) -> Tensor:
    """Two FP4 codes in a byte, the first in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def fp4_in_fp8(numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 numbers (without their scales) as FP8 codes, scale bytes of 128 × 128 blocks, and which blocks lose a bit.

    A block's scale is its largest FP4 scale over 2^6, so that 6 · 2^6 = 384 is the largest number that can occur.
    """
    shifts = scales.int()
    used = (numbers.unflatten(-1, (-1, 32)) != 0).any(-1)
    largest = blocks(torch.where(used, shifts, -1), 128, 4).amax((-3, -1))
    found = torch.where(largest < 0, ONE_SCALE, (largest - 6).clamp_min(0))
    parts = blocks(numbers, 128, 128)
    shift = (blocks(shifts, 128, 4) - _spread(found)).clamp(-126, 6)
    shifted = parts * ((shift + 127) << 23).view(torch.float32).repeat_interleave(32, -1)
    codes = encode(shifted, E4M3)
    lossy = (decode(codes, E4M3) != shifted).any(-1).any(-2)
    return flat(codes, *numbers.shape[-2:]), found.to(torch.uint8), lossy


def _spread(per_block: Tensor) -> Tensor:
    """`[..., A, B]` to the shape in which it meets `[..., A, rows, B, columns]`."""
    return per_block.unsqueeze(-2).unsqueeze(-1)
