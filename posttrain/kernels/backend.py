"""Which implementation of the op table runs on a tensor.

    compiled    numba kernels: the CPU, in fp32 whatever narrower dtype comes
    triton      Triton kernels: GPUs; on the CPU in Triton's interpreter, for tests (`TRITON_INTERPRET=1`)
    oracle      plain torch: fp64, and whatever device has no kernels

`use("oracle")` chooses for the whole process, `use(None)` goes back to the table above. A process begins with what the
environment variable `POSTTRAIN_KERNELS` names, which a recipe's `model.kernels` sets in all of a run's processes.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["compiled", "triton", "oracle"]

_chosen: Backend | None = None


def use(backend: Backend | None) -> None:
    """Run this implementation from now on, in this process; None for the device's own.

    Raises:
        ValueError: there is no such implementation.
    """
    global _chosen
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}; expected one of {', '.join(get_args(Backend))}, or None")
    _chosen = backend


def backend_of(tensor: Tensor) -> Backend:
    """The implementation that an op uses for this tensor.

    Raises:
        ValueError: `compiled` was chosen and the tensor is not on the CPU.
    """
    if tensor.dtype is torch.float64:
        return "oracle"
    if _chosen == "compiled" and not tensor.is_cpu:
        raise ValueError(f"backend: the compiled kernels run on the CPU; got a tensor on {tensor.device}")
    if _chosen is not None:
        return _chosen
    return "compiled" if tensor.is_cpu else "triton" if tensor.is_cuda else "oracle"


use(os.environ.get("POSTTRAIN_KERNELS") or None)  # type: ignore[arg-type]
