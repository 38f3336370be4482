"""Teachers in host memory within a budget of bytes, and one of them on the device."""

from __future__ import annotations

import json
import math
import mmap
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Condition, Lock

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.checkpoint_store import local_checkpoint, verify_manifest
from posttrain.errors import BadInput
from posttrain.trainers.models import load_model

ALIGNMENT = 64
"""Of tensors in memory, in bytes."""


@dataclass
class Held:
    """A model in memory."""

    model: PreTrainedModel
    path: Path
    nbytes: int
    """Of its parameters."""
    users: int = 0
    """Calls that are using it: it stays until there is none."""
    pages: Tensor | None = None
    """The page-locked memory that it lies in."""


class ModelCache:
    """Holds as many models as fit into `budget_bytes`, and drops the one not used for longest.

    One model is always held, however large. Any number of threads may use it: while one computes, another can wait
    for the next model to come into memory, which then is loaded beside the first if the budget has room for both.
    """

    def __init__(
        self,
        family: str,
        budget_bytes: int,
        cache: Path,
        on_load: Callable[[Held], None] = lambda held: None,
        on_drop: Callable[[Held], None] = lambda held: None,
    ) -> None:
        """`on_load` is told of each model that has come into memory, `on_drop` of each that is to leave it."""
        self.family = family
        self.on_load = on_load
        self.on_drop = on_drop
        self.budget_bytes = budget_bytes
        self.cache = cache
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._loading = Lock()
        self._changed = Condition()
        self._verified: set[Path] = set()

    @contextmanager
    def using(self, checkpoint: str) -> Iterator[tuple[Held, float, int]]:
        """The model of `checkpoint`, the seconds that it took to come, and the bytes that were loaded for it.

        Raises:
            BadInput: a checkpoint that cannot be fetched, verified or loaded.
        """
        began = time.perf_counter()
        held, loaded = self._acquire(checkpoint)
        try:
            yield held, time.perf_counter() - began, loaded
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    def names(self) -> list[str]:
        """The checkpoints in memory, the one used last at the end."""
        with self._changed:
            return list(self._held)

    def _acquire(self, checkpoint: str) -> tuple[Held, int]:
        with self._loading:
            with self._changed:
                if (held := self._held.get(checkpoint)) is not None:
                    self._held.move_to_end(checkpoint)
                    held.users += 1
                    return held, 0
            path = local_checkpoint(checkpoint, self.cache)
            if path not in self._verified and "://" not in checkpoint:
                verify_manifest(path)
                self._verified.add(path)
            model = self._load(checkpoint, path)
            held = Held(model, path, sum(parameter.nbytes for parameter in model.parameters()), users=1)
            self.on_load(held)
            with self._changed:
                self._held[checkpoint] = held
            return held, held.nbytes

    def _load(self, checkpoint: str, path: Path) -> PreTrainedModel:
        try:
            self._make_room(bytes_in_memory(self.family, path))
            model = load_model(self.family, path).eval().requires_grad_(False)
            for module in model.modules():
                if hasattr(module, "round_masters"):  # V4's experts, once instead of in every forward pass
                    module.round_masters()
            return model
        except BadInput:
            raise
        except Exception as error:  # each library and format has errors of its own for files that it cannot read
            raise BadInput(f"the teacher {checkpoint} cannot be loaded: {error}") from error

    def _make_room(self, needed: int) -> None:
        """Drop idle models until `needed` bytes fit; wait where those in use are in the way."""
        with self._changed:
            while self._held and sum(held.nbytes for held in self._held.values()) + needed > self.budget_bytes:
                idle = next((name for name, held in self._held.items() if not held.users), None)
                if idle is None:
                    self._changed.wait()
                else:
                    self.on_drop(self._held.pop(idle))


class Device:
    """Where teachers compute. On a GPU the weights of one model are there at a time; the host's copy stays.

    The host's copy is page-locked (`prepare`), so that the GPU fetches it itself: pageable memory comes through a
    buffer of the driver's, at a fraction of the bus's rate (`python -m benchmarks.gpu.teacher_swap`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._resident: Held | None = None
        self._host: list[Tensor] = []
        self._lock = Lock()

    def prepare(self, held: Held) -> None:
        """Bring a model that was loaded into memory that is locked, once for all swaps."""
        if self.name == "cuda":
            held.pages = moved_together(held.model)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(held.pages.data_ptr(), held.pages.nbytes, 0))

    def place(self, held: Held) -> int:
        """Bring the model's weights to the device; returns the bytes that moved."""
        with self._lock:
            if self.name == "cpu" or self._resident is held:
                return 0
            self._clear()
            tensors = list(tensors_of(held.model))
            self._host = [tensor.data for tensor in tensors]
            self._resident = held
            for tensor in tensors:
                tensor.data = tensor.data.to(self.name, non_blocking=True, copy=True)
            if self.name == "cuda":
                torch.cuda.synchronize()  # the seconds of the swap are its own, and the host's copy may be let go
            return sum(tensor.nbytes for tensor in tensors)

    def forget(self, held: Held) -> None:
        """Let the model's weights on the device go, if they are there, and the locked pages of the host's copy."""
        with self._lock:
            if self._resident is held:
                self._clear()
            if held.pages is not None:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(held.pages.data_ptr()))
                held.pages = None

    def _clear(self) -> None:
        if self._resident is not None:
            for tensor, host in zip(tensors_of(self._resident.model), self._host, strict=True):
                tensor.data = host
        self._resident, self._host = None, []


def moved_together(model: nn.Module) -> Tensor:
    """Move parameters and buffers into one piece of memory with pages of its own; returns it as bytes.

    Pages are locked once each, and two tensors would share one.
    """
    tensors = list(tensors_of(model))
    starts = list(accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))
    memory = mmap.mmap(-1, max(starts[-1], 1))
    memory.madvise(mmap.MADV_HUGEPAGE)  # the fewer pages, the sooner they are there and locked
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    for tensor, start in zip(tensors, starts, strict=False):
        place = pages[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.data)
    return pages


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once."""
    yield from model.parameters()
    yield from model.buffers()


def bytes_in_memory(family: str, path: Path) -> int:
    """What the parameters of a checkpoint will take once loaded, from the headers of its files.

    As `load_model` does it: V4 in its own precision (of bf16 matrices, 2 bytes a number), others in fp32.
    """
    itemsize = 4
    if family == "deepseek_v4" and (path / "config.json").is_file():
        precision = json.loads((path / "config.json").read_text()).get("precision") or ""
        itemsize = 2 if precision.startswith("bf16") else 4
    count = 0
    for file_path in path.glob("*.safetensors"):
        with safe_open(file_path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                # MXFP4 has two numbers in a byte
                count += math.prod(part.get_shape()) * (2 if part.get_dtype() in ("U8", "I8") else 1)
    return count * itemsize
