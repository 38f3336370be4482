"""Launching a Triton kernel again without asking everything again.

At each launch Triton looks at every argument to find out which of the compiled kernels is meant: about 25 µs of Python,
more than many kernels take on a few tokens, and a decode step is hundreds of launches. Here the caller names the
compiled kernel by a key; the first launch under a key goes through Triton, later ones go straight to what it compiled.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from triton.compiler import CompiledKernel

Grid = tuple[int, int, int]


class Launcher:
    """Launches one kernel."""

    def __init__(self, kernel: Any) -> None:
        """`kernel`: what `triton.jit` made; its constants (`tl.constexpr`) are its last parameters."""
        self._kernel = kernel
        self._compiled: dict[Hashable, CompiledKernel] = {}

    def __call__(
        self, grid: Grid, key: Hashable, arguments: tuple[Any, ...], constants: dict[str, Any], **options: int
    ) -> None:
        """Launch.

        Args:
            key: names the compiled kernel: equal keys promise equal devices, dtypes, constants and options, equal
                integers (but for those that the kernel does not specialise on, all below 2^31), and tensors None
                in the same places. Tensors begin on 16 bytes.
            arguments: for the kernel's first parameters, in order.
            constants: for the others, by name and in order.
            options: warps and stages.
        """
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *constants.values())
            return
        if (*self._kernel.arg_names[len(arguments) :],) != (*constants,):
            raise ValueError(f"launch: constants are {[*constants]}; expected {self._kernel.arg_names}'s last ones")
        launched = self._kernel[grid](*arguments, **constants, **options)
        if isinstance(launched, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[key] = launched
