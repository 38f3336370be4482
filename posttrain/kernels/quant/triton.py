"""Quantisation on GPUs: each program reads a tile of whole groups once and writes its result once.

The arithmetic is that of `oracle`: integer operations on the bits of fp32 numbers, products with powers of two, one
rounding. The largest magnitude of a group is found among bits as integers, where a NaN is larger than everything.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.quant.formats import E2M1, E4M3, FP8_GROUP, Format

TILE = 4096
"""Elements of a program where groups are rows; a 128 × 128 block is a program of its own."""


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _scale_bytes(largest, REACH: tl.constexpr, EDGE: tl.constexpr, FLOOR: tl.constexpr):
    """UE8M0 bytes (int32) from the bits of largest magnitudes; 127 for zeros, 255 where there is no number."""
    found = (largest >> 23) - REACH + tl.where((largest & 0x7FFFFF) > EDGE, 1, 0)
    found = tl.maximum(found, FLOOR + 127)
    found = tl.where(largest == 0, 127, found)
    return tl.where(largest > 0x7F000000, 255, found)


@triton.jit
def power(byte):
    bits = tl.where(byte == 0, 0x400000, byte << 23)
    return _float(tl.where(byte == 255, 0x7FC00000, bits))


@triton.jit
def _inverse_power(byte):
    return _float(tl.maximum(254 - byte, 0) << 23)


@triton.jit
def _encode(scaled, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr, SIGN: tl.constexpr):
    bits = _bits(scaled)
    magnitude = bits & 0x7FFFFFFF
    up = (1 << (22 - MANTISSA)) - 1 + ((magnitude >> (23 - MANTISSA)) & 1)
    normal = ((magnitude + up) >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number: adding 1.5 · 2^23 leaves the nearest integer in the lowest bits.
    multiple = _float(magnitude) * (1 << (BIAS - 1 + MANTISSA)) + 12582912.0
    code = tl.where(magnitude < ((128 - BIAS) << 23), _bits(multiple) - 0x4B400000, normal)
    return tl.minimum(code, TOP) | (((bits >> 31) & 1) << SIGN)


@triton.jit
def decode(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr, SIGN: tl.constexpr):
    magnitude = code & ((1 << SIGN) - 1)
    normal = _float((magnitude + ((127 - BIAS) << MANTISSA)) << (23 - MANTISSA))
    small = magnitude.to(tl.float32) * (1.0 / (1 << (BIAS - 1 + MANTISSA)))
    value = tl.where(magnitude < (1 << MANTISSA), small, normal)
    return _float(_bits(value) | ((code >> SIGN) << 31))


@triton.jit
def _round(scaled, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """`decode(_encode(scaled))` in fewer steps: see `oracle.rounded`."""
    bits = _bits(scaled)
    step = tl.maximum(bits & 0x7F800000, (128 - BIAS) << 23) + (((23 - MANTISSA) << 23) + (1 << 22))
    near = (scaled + _float(step)) - _float(step)
    return _float((_bits(near) & 0x7FFFFFFF) | ((bits >> 31) << 31))


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row of the tile's matrix stack (int64 `[ROWS, 1]`), column (`[1, COLUMNS]`), and which of both exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    stacked = tl.program_id(2).to(tl.int64) * rows + row
    return stacked[:, None], column[None, :], inside


@triton.jit
def _largest(x, ONE_SCALE: tl.constexpr):
    """Largest magnitude's bits of each row, or of the whole tile, `[ROWS, 1]` or `[1, 1]`."""
    largest = tl.max(_bits(x) & 0x7FFFFFFF, axis=1, keep_dims=True)
    if ONE_SCALE:
        largest = tl.max(largest, axis=0, keep_dims=True)
    return largest


@triton.jit
def _scale_place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONE_SCALE: tl.constexpr):
    """Where a tile's scales are: offsets `[ROWS, 1]` or `[1, 1]`, and which exist."""
    across = tl.cdiv(columns, COLUMNS)
    if ONE_SCALE:
        row = tl.program_id(0) + tl.arange(0, 1)
        down = tl.cdiv(rows, ROWS)
    else:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        down = rows
    place = (tl.program_id(2).to(tl.int64) * down + row) * across + tl.program_id(1)
    return place[:, None], (row < down)[:, None]


@triton.jit
def _quantize_kernel(
    x_pointer,
    codes_pointer,
    scales_pointer,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    PACKED: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP: tl.constexpr,
    REACH: tl.constexpr,
    EDGE: tl.constexpr,
    FLOOR: tl.constexpr,
    SIGN: tl.constexpr,
):
    row, column, inside = _tile(rows, columns, ROWS, COLUMNS)
    x = tl.load(x_pointer + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    byte = _scale_bytes(_largest(x, ONE_SCALE), REACH, EDGE, FLOOR)
    place, exists = _scale_place(rows, columns, ROWS, COLUMNS, ONE_SCALE)
    tl.store(scales_pointer + place, byte.to(tl.uint8), mask=exists)
    codes = _encode(x * _inverse_power(byte), MANTISSA, BIAS, TOP, SIGN)
    if PACKED:  # groups fill their rows: one column of tiles
        low, high = tl.split(tl.reshape(codes, (ROWS, COLUMNS // 2, 2)))
        half = tl.arange(0, COLUMNS // 2)[None, :]
        tl.store(codes_pointer + row * (COLUMNS // 2) + half, (low | (high << 4)).to(tl.uint8), mask=exists)
    else:
        tl.store(codes_pointer + row * columns + column, codes.to(tl.uint8), mask=inside)


@triton.jit
def _dequantize_kernel(
    codes_pointer,
    scales_pointer,
    out_pointer,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    PACKED: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SIGN: tl.constexpr,
):
    row, column, inside = _tile(rows, columns, ROWS, COLUMNS)
    place, exists = _scale_place(rows, columns, ROWS, COLUMNS, ONE_SCALE)
    scale = power(tl.load(scales_pointer + place, mask=exists, other=127).to(tl.int32))
    if PACKED:
        half = tl.arange(0, COLUMNS // 2)[None, :]
        pair = tl.load(codes_pointer + row * (COLUMNS // 2) + half, mask=exists, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(pair & 15, pair >> 4), (ROWS, COLUMNS))
    else:
        codes = tl.load(codes_pointer + row * columns + column, mask=inside, other=0).to(tl.int32)
    value = decode(codes, MANTISSA, BIAS, SIGN) * scale
    tl.store(out_pointer + row * columns + column, value.to(out_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _fake_kernel(
    x_pointer,
    out_pointer,
    bad_pointer,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    REACH: tl.constexpr,
    EDGE: tl.constexpr,
    FLOOR: tl.constexpr,
):
    row, column, inside = _tile(rows, columns, ROWS, COLUMNS)
    x = tl.load(x_pointer + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    byte = _scale_bytes(_largest(x, ONE_SCALE), REACH, EDGE, FLOOR)
    value = _round(x * _inverse_power(byte), MANTISSA, BIAS) * power(byte)
    tl.store(out_pointer + row * columns + column, value.to(out_pointer.dtype.element_ty), mask=inside)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0)
    bad = tl.max(tl.max(tl.where(byte == 255, 1, 0), axis=1), axis=0)
    tl.store(bad_pointer + program + tl.program_id(0), bad.to(tl.uint8))


@triton.jit
def _fp4_in_fp8_kernel(
    packed_pointer,
    scales_pointer,
    codes_pointer,
    bytes_pointer,
    flags_pointer,
    rows,
    groups,
    FP4_MANTISSA: tl.constexpr,
    FP4_BIAS: tl.constexpr,
    FP4_SIGN: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP: tl.constexpr,
    SIGN: tl.constexpr,
):
    """One 128 × 128 block: 512 groups of 32 numbers, four in a row. Flags: 1 if a bit is lost, 2 if a scale is NaN."""
    group = tl.arange(0, 512)
    row, across = tl.program_id(0) * 128 + group // 4, tl.program_id(1) * 4 + group % 4
    exists = (row < rows) & (across < groups)
    at = (tl.program_id(2).to(tl.int64) * rows + row) * groups + across
    scale = tl.load(scales_pointer + at, mask=exists, other=0).to(tl.int32)
    half = tl.arange(0, 16)[None, :]
    pair = tl.load(packed_pointer + at[:, None] * 16 + half, mask=exists[:, None], other=0).to(tl.int32)
    used = tl.max(pair & 0x77, axis=1) > 0
    largest = tl.max(tl.where(used, scale, -1), axis=0)
    found = tl.where(largest < 0, 127, tl.maximum(largest - 6, 0))
    # Whatever is moved down by more than 15 places is lost, so the bound below changes nothing.
    shift = tl.minimum(tl.maximum(scale - found, -60), 6)
    fp4 = tl.reshape(tl.join(pair & 15, pair >> 4), (512, 32))
    shifted = decode(fp4, FP4_MANTISSA, FP4_BIAS, FP4_SIGN) * _float((shift + 127) << 23)[:, None]
    codes = _encode(shifted, MANTISSA, BIAS, TOP, SIGN)
    lost = tl.max(tl.where(decode(codes, MANTISSA, BIAS, SIGN) != shifted, 1, 0), axis=1)
    place = at[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(codes_pointer + place, codes.to(tl.uint8), mask=exists[:, None])
    block = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    block = block * tl.num_programs(1) + tl.program_id(1)
    tl.store(bytes_pointer + block, found.to(tl.uint8))
    flags = tl.max(lost | tl.where(scale == 255, 2, 0), axis=0)  # of both, 2 or 3 is the larger
    tl.store(flags_pointer + block, flags.to(tl.uint8))


def _plan(matrices: int, rows: int, columns: int, block_rows: int, block_columns: int) -> tuple[tuple, dict]:
    """Grid and tile: blocks are tiles; groups that are rows are taken many at a time."""
    tile_rows = block_rows if block_rows > 1 else TILE // block_columns
    grid = triton.cdiv(rows, tile_rows), triton.cdiv(columns, block_columns), matrices
    tile = {"ROWS": tile_rows, "COLUMNS": block_columns, "ONE_SCALE": block_rows > 1}
    return grid, {**tile, "num_warps": 8 if block_rows > 1 else 4}


def quantize(x: Tensor, block_rows: int, block_columns: int, kind: Format) -> tuple[Tensor, Tensor]:
    """Codes of contiguous `[M, N, K]`, packed where a code has 4 bits, and scale bytes `[M, N / rows, K / columns]`."""
    matrices, rows, columns = x.shape
    packed = kind.sign == 3
    grid, tile = _plan(matrices, rows, columns, block_rows, block_columns)
    codes = torch.empty((matrices, rows, columns // 2 if packed else columns), dtype=torch.uint8, device=x.device)
    shape = matrices, triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)
    scales = torch.empty(shape, dtype=torch.uint8, device=x.device)
    if x.numel():
        numbers = {"MANTISSA": kind.mantissa, "BIAS": kind.bias, "TOP": kind.top, "SIGN": kind.sign}
        limits = {"REACH": kind.reach, "EDGE": kind.edge, "FLOOR": kind.floor}
        _quantize_kernel[grid](x, codes, scales, rows, columns, PACKED=packed, **numbers, **limits, **tile)
    return codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, block_rows: int, block_columns: int, kind: Format, dtype: torch.dtype
) -> Tensor:
    """Numbers `[M, N, K]` from contiguous codes and scales; packed groups come as `[N, 16]`, scales as `[N, 1]`."""
    packed = kind.sign == 3
    codes, scales = codes.contiguous(), scales.contiguous()
    matrices, rows, columns = (1, len(codes), block_columns) if packed else codes.shape
    grid, tile = _plan(matrices, rows, columns, block_rows, block_columns)
    out = torch.empty((matrices, rows, columns), dtype=dtype, device=codes.device)
    if out.numel():
        numbers = {"MANTISSA": kind.mantissa, "BIAS": kind.bias, "SIGN": kind.sign}
        _dequantize_kernel[grid](codes, scales, out, rows, columns, PACKED=packed, **numbers, **tile)
    return out


def fake_quantize(x: Tensor, block_rows: int, block_columns: int, kind: Format) -> tuple[Tensor, Tensor | None]:
    """Rounded numbers in the shape and dtype of contiguous `[M, N, K]`, and a flag of each program that met no number.

    The flags are None while a CUDA graph is captured, when they could not be looked at.
    """
    matrices, rows, columns = x.shape
    grid, tile = _plan(matrices, rows, columns, block_rows, block_columns)
    out = torch.empty_like(x)
    bad = torch.empty(grid[0] * grid[1] * grid[2], dtype=torch.uint8, device=x.device)
    if x.numel():
        numbers = {"MANTISSA": kind.mantissa, "BIAS": kind.bias}
        limits = {"REACH": kind.reach, "EDGE": kind.edge, "FLOOR": kind.floor}
        _fake_kernel[grid](x, out, bad, rows, columns, **numbers, **limits, **tile)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return out, None if capturing else bad


def fp4_in_fp8(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 codes `[M, N, K]`, and for each 128 × 128 block its scale byte and flags: 1 lossy, 2 or 3 a scale is NaN."""
    packed, scales = packed.contiguous(), scales.contiguous()
    matrices, rows, half = packed.shape
    grid = triton.cdiv(rows, FP8_GROUP), triton.cdiv(2 * half, FP8_GROUP), matrices
    codes = packed.new_empty(matrices, rows, 2 * half)
    bytes_, flags = (packed.new_empty(matrices, *grid[:2]) for _ in range(2))
    if codes.numel():
        numbers = {"FP4_MANTISSA": E2M1.mantissa, "FP4_BIAS": E2M1.bias, "FP4_SIGN": E2M1.sign}
        numbers |= {"MANTISSA": E4M3.mantissa, "BIAS": E4M3.bias, "TOP": E4M3.top, "SIGN": E4M3.sign}
        tensors = packed, scales, codes, bytes_, flags
        _fp4_in_fp8_kernel[grid](*tensors, rows, half // 16, **numbers, num_warps=8)
    return codes, bytes_, flags
