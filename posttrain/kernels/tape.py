"""A computation on the CPU, written down while it runs, to be done again on the same memory.

With a few rows of a small model most of a forward pass is Python: modules, checks of shapes, views. A tape holds what
is left of it: calls of compiled kernels with their addresses, and torch's operations with the tensors that they write
to. Replayed, it does the same operations in the same order, so the bits are those of the computation itself. What it
was given must be filled in where it was. Sizes stay as they were; a part of which the host decides the course by
looking at numbers is marked with `whole`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")

_UNWRITTEN = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))
"""Operations that give memory and no numbers."""

_COPIES = frozenset(("clone", "contiguous", "flatten", "reshape", "to", "_to_copy"))
"""Operations that copy numbers, where they do not give a view."""

_BOUND = frozenset(("add", "cat", "index_select", "mm", "mul", "stack", "sub"))
"""Operations whose form in `torch` is called with fewer microseconds than that in `torch.ops`."""

_current: Tape | None = None


class TapeFull(RuntimeError):
    """More memory than a tape may keep."""


class Tape(TorchDispatchMode):
    """Writes down what its thread computes, without gradients, while it is entered.

    Args:
        limit: bytes that it may keep; what computes more of them gets a `TapeFull`.

    Attributes:
        nbytes: memory that it keeps beside what it was given.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.nbytes, self._limit = 0, limit
        self._steps: list[Callable[[], object]] = []
        self._kept: list[Any] = []
        self._known: set[int] = set()
        self._constant: set[int] = set()
        self._thread = threading.get_ident()
        self._paused = False

    def __enter__(self) -> Tape:
        global _current
        if _current is not None:
            raise RuntimeError("one tape at a time")
        if torch.is_grad_enabled():
            raise RuntimeError("a tape is for computations without gradients: see torch.no_grad")
        super().__enter__()
        _current = self
        return self

    def __exit__(self, *error: Any) -> None:
        global _current
        _current = None
        super().__exit__(*error)

    def replay(self) -> None:
        """Compute all of it again."""
        for step in self._steps:
            step()

    @property
    def listens(self) -> bool:
        """Whether what the calling thread does now belongs on it."""
        return not self._paused and self._thread == threading.get_ident()

    def add_kernel(self, kernel: Callable[..., object], plain: list[Any]) -> None:
        """A compiled kernel, and its arguments with addresses in place of tensors (which are all kept)."""
        self._steps.append(partial(kernel, *plain))

    def add_whole(self, function: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        """See `whole`."""
        self._paused = True
        try:
            result = function(*args)
        finally:
            self._paused = False
        self._keep((args, result), set(map(_memory, _tensors(args))), [result])
        self._steps.append(lambda: result.copy_(function(*args)))
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operation, and write it down."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused:
            self._note(func, args, kwargs, result)
        return result

    def _keep(self, values: Any, given: set[int], made: list[Tensor]) -> None:
        """Keep what an operation took and gave alive, and count the memory that is new."""
        self._kept.append(values)
        self._known |= given
        for tensor in made:
            if _memory(tensor) not in self._known:
                self._known.add(_memory(tensor))
                self.nbytes += tensor.untyped_storage().nbytes()
        if self.nbytes > self._limit:
            raise TapeFull(f"a tape of more than {self._limit} bytes")

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        given, made, name = set(map(_memory, _tensors((args, kwargs)))), _tensors(result), func.overloadpacket.__name__
        self._keep((args, kwargs, result), given, made)
        if _looks(func, args):
            raise RuntimeError(f"{func} looks at numbers: a tape cannot repeat it (see posttrain.kernels.tape.whole)")
        if func._schema.is_mutable:
            if self._constant & given:
                raise RuntimeError(f"{func} is given numbers that a tape makes once; it may write to them")
            self._steps.append(partial(func, *args, **kwargs))
            return
        if all(_memory(tensor) in given for tensor in made) or name in _UNWRITTEN:
            return  # views need no second making
        if name == "arange":
            self._constant.update(map(_memory, made))
        elif func is torch.ops.aten.linear.default and len(args) == 2 and args[0].dim() == 2:
            self._steps.append(partial(torch.mm, args[0], args[1].t(), out=made[0]))  # what it does itself
        elif name in _COPIES and made[0].is_contiguous():
            self._steps.append(partial(made[0].view(args[0].shape).copy_, args[0]))
        elif len(made) == 1 and (writing := _writing(func)) is not None:
            self._steps.append(partial(writing, *args, **kwargs, out=made[0]))
        else:
            self._steps.append(partial(_again, func, args, kwargs, made))


def _looks(func: Any, args: tuple) -> bool:
    """Whether the host is told a number, or a shape that follows from numbers."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func is torch.ops.aten.index.Tensor:  # by a mask it does
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _writing(func: Any) -> Any:
    """The form of an operation that writes to a given tensor; None if there is none."""
    arguments = [(one.name, str(one.type)) for one in func._schema.arguments]
    packet = func.overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        others = [(one.name, str(one.type)) for one in other._schema.arguments]
        if others == [*arguments, ("out", "Tensor")]:
            return getattr(torch, packet.__name__) if packet.__name__ in _BOUND else other
    return None


def _again(func: Any, args: tuple, kwargs: dict[str, Any], made: list[Tensor]) -> None:
    for old, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
        old.copy_(new)


def recording() -> Tape | None:
    """The tape that what this thread does now belongs on."""
    return _current if _current is not None and _current.listens else None


def whole(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, which may look at numbers and decide: on a tape it is one step, called again as it is."""
    tape = recording()
    return function(*args) if tape is None else tape.add_whole(function, args)
