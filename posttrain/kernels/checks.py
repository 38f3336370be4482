"""Shapes at the entry of an op, checked before any work."""

from __future__ import annotations

from torch import Tensor


def expect(op: str, name: str, tensor: Tensor, *shape: int | str) -> tuple[int, ...]:
    """The tensor's shape, once it is known to be `shape`; a letter stands for any size.

    Raises:
        ValueError: names the op, the argument, the shape that came and the one that is allowed.
    """
    actual = tensor.shape
    fits = len(actual) == len(shape)
    for size, wanted in zip(actual, shape, strict=False):
        if size != wanted and wanted.__class__ is int:
            fits = False
    if not fits:
        raise ValueError(f"{op}: {name} has shape {list(actual)}; expected [{', '.join(map(str, shape))}]")
    return actual


def expect_kind(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Nothing, once the tensor is known to have the dtype and the device of another.

    Raises:
        ValueError: names the op, the argument, the kind that came and the one that is allowed.
    """
    if tensor.dtype is not like.dtype or tensor.device != like.device:
        kinds = f"is {tensor.dtype} on {tensor.device}; expected {like.dtype} on {like.device}"
        raise ValueError(f"{op}: {name} {kinds}")
