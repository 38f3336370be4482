"""How CPU kernels are compiled, and how tensors get into them.

numba comes with vLLM. It is imported at the first call of a kernel, never with a module of the op table: vLLM 0.32
walks every loaded module when a CPU worker starts and fails on an object of llvmlite's
(`vllm.triton_utils.dispatcher._rebind_kernels`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_of
from posttrain.kernels.tape import recording

Kernel = Callable[..., Any]

SHARED = (Path(__file__), Path(__file__).with_name("simd.py"))
"""What every kernel is made with and of."""


def compiled(function: Kernel) -> Kernel:
    """Compile at the first call, to run without the GIL; the machine code is kept on disk where that is possible."""
    import numba

    options = {"nogil": True, "error_model": "numpy"}  # a division by zero gives inf or NaN
    try:
        kernel = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no directory that it may write to
        return numba.njit(**options)(function)
    # numba compiles again when the kernel's own file has changed; it must when these have.
    index, stamps = kernel._cache._cache_file, [file.stat() for file in SHARED]
    index._source_stamp = (index._source_stamp, *((stamp.st_mtime, stamp.st_size) for stamp in stamps))
    return kernel


class Kernels:
    """The kernels of an op family: a module beside the op, imported when the first of them is asked for."""

    def __init__(self, package: str, module: str = "cpu") -> None:
        self._module = f"{package}.{module}"

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_"):
            raise AttributeError(name)
        kernel = getattr(importlib.import_module(self._module), name)
        setattr(self, name, kernel)
        return kernel


def has_kernels(tensor: Tensor) -> bool:
    """Whether an op runs its compiled kernel on this tensor (in fp32, whatever narrower dtype comes)."""
    return backend_of(tensor) == "compiled"


def narrow(result: Tensor, like: Tensor) -> Tensor:
    """The result in the input's dtype."""
    return result if result.dtype is like.dtype else result.to(like.dtype)


def dense(tensor: Tensor) -> Tensor:
    """fp32, without gaps."""
    return tensor.float().contiguous()


def float_rows(store_SD: Tensor) -> Tensor:
    """fp32; rows may stand apart (a column of a cache), channels may not."""
    store_SD = store_SD.float()
    return store_SD if store_SD.stride(1) == 1 else store_SD.contiguous()


PLAIN = frozenset((int, float, bool, tuple))
"""Types of arguments that a kernel gets as they are."""

ADDRESSABLE = frozenset((torch.float32, torch.int64, torch.bool))
"""What kernels read and write through an address; anything else there would be taken for one of these."""


def run(kernel: Kernel, *args: Any) -> Any:
    """Call a kernel with the addresses of tensors, which stay alive meanwhile; None becomes the address 0."""
    plain = [arg if arg.__class__ in PLAIN else 0 if arg is None else _address(arg) for arg in args]
    if (tape := recording()) is not None:
        tape.add_kernel(kernel, plain)
    return kernel(*plain)


def _address(tensor: Tensor) -> int:
    if tensor.dtype in ADDRESSABLE and tensor.is_contiguous():
        return tensor.data_ptr()
    if tensor.dtype not in ADDRESSABLE:
        raise ValueError(f"a kernel takes tensors of {', '.join(sorted(map(str, ADDRESSABLE)))}; got {tensor.dtype}")
    raise ValueError(f"a kernel needs contiguous memory; got shape {list(tensor.shape)}, strides {tensor.stride()}")


class _NoGradient:
    """Stands in for autograd's context where nothing will be differentiated."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Nothing is kept."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Nothing is differentiable."""


def differentiable(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply`, or its forward alone where no gradient is asked for: much cheaper on a few tokens."""
    if torch.is_autocast_enabled("cpu"):  # it would narrow the products inside, whose results kernels read as fp32
        with torch.autocast("cpu", enabled=False):
            return differentiable(function, *inputs)
    if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in inputs):
        return function.apply(*inputs)
    return function.forward(_NoGradient(), *inputs)
