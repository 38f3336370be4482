"""What distinguishes the two number formats, as integers that kernels are specialised on."""

from __future__ import annotations

from dataclasses import dataclass

ONE_SCALE = 127
"""UE8M0 byte of the scale 1; a byte b means 2^(b - 127)."""

BAD_SCALE = 255
"""UE8M0's NaN: what a group with an infinity, a NaN or a number above 2^127 gets, so that it can be refused."""

LARGEST = 0x7F000000
"""Bits of 2^127 in fp32: a larger number, rounded up, could be an infinity, so it counts as one."""

FP4_GROUP = 32
FP8_GROUP = 128


@dataclass(frozen=True)
class Format:
    """A sign bit, exponent bits and `mantissa` bits, with subnormals.

    A group's scale is the smallest power of two that brings its largest magnitude within the format, so nothing
    ever saturates. It is at least `2^floor`, which keeps the smallest number that is not rounded to zero a normal
    fp32 one: results do not depend on whether a device flushes subnormal numbers.
    """

    mantissa: int
    bias: int
    top: int
    """Code of the largest number, `(1 + edge / 2^23) · 2^reach`."""
    reach: int
    edge: int
    floor: int
    sign: int
    """Place of the sign bit."""


E2M1 = Format(mantissa=1, bias=1, top=0x7, reach=2, edge=0x400000, floor=-124, sign=3)
"""0, 0.5, 1, 1.5, 2, 3, 4, 6."""

E4M3 = Format(mantissa=3, bias=7, top=0x7E, reach=8, edge=0x600000, floor=-116, sign=7)
"""Up to 448, down to 2^-9, no infinity (torch.float8_e4m3fn)."""
