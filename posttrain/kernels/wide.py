"""What ops compute in, whatever surrounds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where the input is: nothing inside an op is narrower."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(op: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """An op whose fp32 products stay fp32 under autocast: V4's routers choose by them."""

    @functools.wraps(op)
    def call(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return op(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(x, *args, **kwargs)

    return call
