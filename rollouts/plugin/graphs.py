"""Decoding steps as graphs, without the Python that a few tokens spend most of their time in.

On a GPU they are CUDA graphs: one launch for all kernels of a step. On the CPU they are tapes
(`posttrain.kernels.tape`). A graph is a step of so many requests, none longer than a bound; both are rounded up, and
what is missing is filled with requests that own no pages (they write to vLLM's null block). Kernels, their order and
their shapes by token are those of a step without a graph, so the bits are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from posttrain.kernels.compiled import has_kernels
from posttrain.kernels.tape import Tape, TapeFull
from rollouts.plugin.caches import PagedMetadata
from rollouts.plugin.paged import DecodeContext

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Requests of a step; more go without a graph."""
SHORTEST = 256
"""The smallest bound on lengths; the others are its doubles."""

UNTAPED_STEPS = 8
"""Steps of a size on the CPU before it gets a tape: one that comes a few times is not worth it."""
TAPES_BYTES = 256 << 20
"""What the tapes of an engine on the CPU may keep together."""

Step = Callable[[Tensor, DecodeContext], Tensor]
"""Token ids and their context to hidden states."""


@dataclass
class _Graph:
    """A step that was recorded, and the memory that it reads and writes."""

    tokens_R: Tensor
    positions_R: Tensor
    tables_RB: dict[str, Tensor]
    """The pages of each group of caches, under the name of one of them."""
    replay: Callable[[], object]
    hidden_RH: Tensor


class DecodeGraphs:
    """Takes over steps with one new token for each request.

    Args:
        step: the model, run without a graph.
        caches: what `cache_layers` returned.
    """

    def __init__(self, step: Step, caches: nn.ModuleDict) -> None:
        self._step, self._caches = step, caches
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool: tuple[int, int] | None = None

    def _wanted(self, size: int, longest: int) -> bool:
        """Whether steps of this size, which has no graph yet, are to have one."""
        return True

    def run(self, tokens_T: Tensor, positions_T: Tensor, metadata: dict[str, PagedMetadata]) -> Tensor | None:
        """Hidden states `[T, hidden]`, until the next step; None for one that is not of single tokens, or too large."""
        group = next(iter(metadata.values()))
        count = len(group.counts_R)
        if count != group.scheduled or count > SIZES[-1]:
            return None
        size = next(size for size in SIZES if size >= count)
        longest = SHORTEST
        while longest < group.seq_lens_R.max():
            longest *= 2
        if (size, longest) not in self._graphs:
            if not self._wanted(size, longest):
                return None
            self._graphs[size, longest] = self._record(size, longest, metadata)
        graph = self._graphs[size, longest]
        _fill(graph.tokens_R, tokens_T)
        _fill(graph.positions_R, positions_T)
        for name, table_RB in graph.tables_RB.items():
            _fill(table_RB, metadata[name].block_table_RB[:count])
        graph.replay()
        return graph.hidden_RH[:count]

    def _record(self, size: int, longest: int, metadata: dict[str, PagedMetadata]) -> _Graph:
        """A step of requests that own no pages."""
        device = next(iter(metadata.values())).block_table_RB.device
        tokens_R, positions_R = torch.zeros(2, size, dtype=torch.int64, device=device).unbind(0)
        tables_RB: dict[str, Tensor] = {}
        static: dict[int, PagedMetadata] = {}
        for name, one in metadata.items():
            if id(one) not in static:  # the caches of a group share it
                tables_RB[name] = one.block_table_RB.new_zeros(size, one.block_table_RB.shape[1])
                static[id(one)] = replace(one, block_table_RB=tables_RB[name])
        named = {name: static[id(one)] for name, one in metadata.items()}

        def step() -> Tensor:
            return self._step(tokens_R, DecodeContext(positions_R, named, self._caches, longest))

        return _Graph(tokens_R, positions_R, tables_RB, *self._capture(step, device))

    def _capture(self, step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
        """A step run once, so that its kernels are compiled, and then recorded; how to repeat it, and its result."""
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may allocate meanwhile: theirs is not recorded, and must not fail.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_RH = step()
        return graph.replay, hidden_RH


class DecodeTapes(DecodeGraphs):
    """The same on the CPU. A tape takes a few steps' time to write and keeps all that a step computes.

    Args:
        step, caches: as for `DecodeGraphs`.
    """

    def __init__(self, step: Step, caches: nn.ModuleDict) -> None:
        super().__init__(step, caches)
        self._seen: Counter[tuple[int, int]] = Counter()
        self._kept, self._full = 0, False

    def _wanted(self, size: int, longest: int) -> bool:
        self._seen[size, longest] += 1
        return self._seen[size, longest] > UNTAPED_STEPS and not self._full

    def run(self, tokens_T: Tensor, positions_T: Tensor, metadata: dict[str, PagedMetadata]) -> Tensor | None:
        """As on a GPU; None with other kernels than the compiled ones, too, which leave no trace on a tape."""
        if not has_kernels(tokens_T):
            return None
        try:
            return super().run(tokens_T, positions_T, metadata)
        except TapeFull:  # there will be no more of them
            self._full = True
            return None

    def _capture(self, step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
        with Tape(TAPES_BYTES - self._kept) as tape:
            hidden_RH = step()
        self._kept += tape.nbytes
        return tape.replay, hidden_RH


def _fill(static: Tensor, values: Tensor) -> None:
    """Values, then zeros: position 0 of a request whose pages are all the null page."""
    static[: len(values)].copy_(values)
    static[len(values) :].zero_()
