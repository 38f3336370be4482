"""Vectors of 16 floats for kernels compiled by numba.

Left to itself, LLVM decides by loop length and aliasing what it vectorises, and rarely does so for the short loops of a
small head or block. Here a kernel says it: a `Vector` is one AVX-512 register (or two or four narrower ones), and
every sum has the order that the source gives it, so that equal inputs give equal bits in every call.

`memory` below is a float32 array of numba's (scratch), or the address of a tensor's memory as an int64, which costs
a call much less than an array. Nothing checks bounds. Imported by kernels only, at their first call (see
`posttrain.kernels.compiled`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
_FLOAT, _INTEGER, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(8)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_ALIGNMENT = ir.Constant(ir.IntType(32), 4)


class VectorType(types.Type):
    """numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


Vector = VectorType()
register_model(VectorType)(lambda manager, kind: models.PrimitiveModel(manager, kind, _FLOATS))


def _broadcast(builder: Any, scalar: Any, kind: ir.VectorType = _FLOATS) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def _define_operator(symbol: Callable, instruction: str) -> None:
    """`vector ∘ vector`, and with a float32 on either side."""
    operands = [(Vector, Vector), (Vector, types.float32), (types.float32, Vector)]
    cases = [signature(Vector, *pair) for pair in operands]
    infer_global(symbol)(type(f"Vector_{symbol.__name__}", (ConcreteTemplate,), {"cases": cases}))

    for pair in operands:

        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values = [
                value if kind == Vector else _broadcast(builder, value)
                for value, kind in zip(args, sig.args, strict=True)
            ]
            return getattr(builder, instruction)(*values)

        lower_builtin(symbol, *pair)(lower)


for _symbol, _instruction in {
    operator.add: "fadd",
    operator.sub: "fsub",
    operator.mul: "fmul",
    operator.truediv: "fdiv",
}.items():
    _define_operator(_symbol, _instruction)


def _call(builder: Any, name: str, returns: Any, *args: Any) -> Any:
    kind = ir.FunctionType(returns, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _address(context: Any, builder: Any, kind: Any, value: Any, start: Any, element: Any = _FLOAT) -> Any:
    if isinstance(kind, types.Array):
        pointer = cgutils.create_struct_proxy(kind)(context, builder, value=value).data
    else:
        pointer = builder.inttoptr(value, ir.PointerType())
    return builder.gep(pointer, [start], source_etype=element)


def _kind(memory: Any) -> Any:
    """The type of a `memory` argument."""
    return memory if isinstance(memory, types.Array) else types.int64


def _lanes_below(builder: Any, count: Any) -> Any:
    numbers = ir.Constant(_INTEGERS, list(range(LANES)))
    return builder.icmp_signed("<", numbers, _broadcast(builder, builder.trunc(count, ir.IntType(32)), _INTEGERS))


@intrinsic
def load(typing: Any, memory: Any, start: Any, count: Any) -> Any:
    """`memory[start : start + 16]`; lanes from `count` on are not read and hold 0."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], args[0], args[1])
        mask, zeros = _lanes_below(builder, args[2]), ir.Constant(_FLOATS, [0.0] * LANES)
        return _call(builder, "llvm.masked.load.v16f32.p0", _FLOATS, address, _ALIGNMENT, mask, zeros)

    return Vector(_kind(memory), types.int64, types.int64), generate


@intrinsic
def store(typing: Any, memory: Any, start: Any, vector: Any, count: Any) -> Any:
    """`memory[start : start + 16] = vector`; lanes from `count` on are not written."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], args[0], args[1])
        mask = _lanes_below(builder, args[3])
        _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), args[2], address, _ALIGNMENT, mask)
        return context.get_dummy_value()

    return types.void(_kind(memory), types.int64, Vector, types.int64), generate


def _reader(name: str, element: Any, result: Any, meaning: str) -> Callable:
    def read(typing: Any, memory: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(_address(context, builder, sig.args[0], args[0], args[1], element), typ=element)
            return builder.icmp_signed("!=", value, ir.Constant(element, 0)) if result == types.boolean else value

        return result(_kind(memory), types.int64), generate

    read.__name__, read.__doc__ = name, meaning
    return intrinsic(read)


get = _reader("get", _FLOAT, types.float32, "The float at `memory[index]`.")
get_integer = _reader("get_integer", _INTEGER, types.int64, "The int64 at an address plus `index`.")
get_flag = _reader("get_flag", _BYTE, types.boolean, "The bool at an address plus `index`.")


def _writer(name: str, kind: Any, element: Any, meaning: str) -> Callable:
    def write(typing: Any, memory: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.store(args[2], _address(context, builder, sig.args[0], args[0], args[1], element))
            return context.get_dummy_value()

        return types.void(_kind(memory), types.int64, kind), generate

    write.__name__, write.__doc__ = name, meaning
    return intrinsic(write)


put = _writer("put", types.float32, _FLOAT, "`memory[index] = value`, a float.")
put_integer = _writer("put_integer", types.int64, _INTEGER, "The same for an int64 at an address.")


@intrinsic
def fill(typing: Any, value: Any) -> Any:
    """A vector of one value."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _broadcast(builder, args[0])

    return Vector(types.float32), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """`a · b + c`, rounded once; `a` may be a float32."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first = args[0] if sig.args[0] == Vector else _broadcast(builder, args[0])
        return _call(builder, "llvm.fma.v16f32", _FLOATS, first, args[1], args[2])

    return Vector(a if a == Vector else types.float32, Vector, Vector), generate


def _halve(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine upper with lower half until one lane is left."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(first, first + width))),
            )
            for first in (0, width)
        ]
        vector = combine(*halves)
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """The sum of all lanes, as a tree."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _halve(builder, args[0], builder.fadd)

    return types.float32(Vector), generate


@intrinsic
def largest(typing: Any, vector: Any) -> Any:
    """The largest lane."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def combine(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return _halve(builder, args[0], combine)

    return types.float32(Vector), generate


@intrinsic
def choose(typing: Any, a: Any, b: Any, where: Any, otherwise: Any) -> Any:
    """Lane by lane: `where` if `a <= b`, else `otherwise` (also if one of them is NaN)."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<=", args[0], args[1]), args[2], args[3])

    return Vector(Vector, Vector, Vector, Vector), generate


@intrinsic
def keep(typing: Any, count: Any, vector: Any, otherwise: Any) -> Any:
    """The lanes below `count`, and `otherwise` in the rest."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_lanes_below(builder, args[0]), args[1], _broadcast(builder, args[2]))

    return Vector(types.int64, Vector, types.float32), generate


@intrinsic
def first(typing: Any, vector: Any) -> Any:
    """Lane 0."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(ir.IntType(32), 0))

    return types.float32(Vector), generate


@intrinsic
def _round(typing: Any, vector: Any) -> Any:
    """The nearest integers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "llvm.rint.v16f32", _FLOATS, args[0])

    return Vector(Vector), generate


@intrinsic
def _power_of_two(typing: Any, exponent: Any) -> Any:
    """`2 ** exponent` of integers from -126 to 127, put together from bits."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], _INTEGERS), ir.Constant(_INTEGERS, [127] * LANES))
        return builder.bitcast(builder.shl(biased, ir.Constant(_INTEGERS, [23] * LANES)), _FLOATS)

    return Vector(Vector), generate


@numba.njit
def exp(x: Any) -> Any:
    """`e ** x` to 2 units in the last place, the argument kept to ±87 (Cephes' polynomial). NaN stays NaN."""
    f = np.float32
    x = choose(fill(f(-87)), x, x, choose(x, x, fill(f(-87)), x))
    x = choose(fill(f(87)), x, fill(f(87)), x)
    n = _round(x * f(1.44269504088896341))
    r = fma(n, fill(f(-0.693359375)), x)
    r = fma(n, fill(f(2.12194440e-4)), r)
    p = fma(r, fill(f(1.9875691500e-4)), fill(f(1.3981999507e-3)))
    p = fma(p, r, fill(f(8.3334519073e-3)))
    p = fma(p, r, fill(f(4.1665795894e-2)))
    p = fma(p, r, fill(f(1.6666665459e-1)))
    p = fma(p, r, fill(f(5.0000001201e-1)))
    p = fma(p, r * r, r) + f(1)
    return p * _power_of_two(n)
