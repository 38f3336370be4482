"""The attention context of the rollout: earlier tokens come from vLLM's paged caches.

All sizes come from what vLLM knows on the host, so that no layer and no step waits for the GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.kernels import BLOCK, Candidates
from posttrain.kernels.blocks import round_up
from posttrain.kernels.compiled import Kernels, dense, has_kernels, run
from posttrain.models.deepseek_v4.context import Windows
from rollouts.plugin.caches import CacheLayer, PagedMetadata

cpu = Kernels("rollouts.plugin")


class PagedContext:
    """Serves one forward of mixed prefill chunks and decode steps.

    Args:
        positions_T: position of each new token in its request.
        metadata: for each cache layer's name, its group's pages.
        caches: what `cache_layers` returned.
    """

    def __init__(self, positions_T: Tensor, metadata: dict[str, PagedMetadata], caches: nn.ModuleDict) -> None:
        self.positions_T = positions_T
        self._metadata, self._caches = metadata, caches
        group = next(iter(metadata.values()))
        self._request_T = torch.repeat_interleave(group.query_start_R.diff(), output_size=len(positions_T))
        self._longest = int(group.seq_lens_R.max())
        first_R = np.cumsum(group.counts_R) - group.counts_R
        offset_R = group.seq_lens_R - group.counts_R - first_R
        self._host_positions_T = np.arange(len(positions_T)) + np.repeat(offset_R, group.counts_R)
        self._ending_E: dict[int, Tensor] = {}
        self._memo: dict[tuple, Tensor] = {}
        self._blocks: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}
        self._candidates: dict[tuple, Candidates] = {}

    def _cache(self, name: str, kind: str) -> tuple[CacheLayer, tuple]:
        """The cache that holds `name`, and a key that it shares with caches of the same pages and geometry."""
        cache = self._caches[f"{name.split('.')[1]}/{kind}"]
        pages = self._metadata[cache.name].block_table_RB
        return cache, (cache.tokens_per_row, cache.rows_per_block, pages.data_ptr())

    def _rows(
        self,
        cache: CacheLayer,
        positions_T: Tensor,
        request_T: Tensor,
        span: tuple[int, int] = (0, 1),
        used: int | None = None,
    ) -> Tensor:
        """Rows of a cache that hold, for each token, the positions from the first of `span` to before its second.

        Args:
            span: relative to the token's position.
            used: None: what would be before the sequence's start is the row of position 0. Else that is -1, and so is
                everything from this column on.

        Returns:
            int64 `[T, columns]`.
        """
        pages, columns = self._metadata[cache.name], span[1] - span[0]
        table_RB, geometry = pages.block_table_RB, (pages.block_size, cache.rows_per_block, cache.tokens_per_row)
        if has_kernels(positions_T):
            out_TC = positions_T.new_empty(len(positions_T), columns)
            tokens = positions_T.contiguous(), request_T.contiguous(), len(positions_T)
            kept, absent = columns if used is None else used, used is not None
            table = table_RB.contiguous(), *table_RB.shape
            run(cpu.rows, *tokens, span[0], columns, kept, *table, *geometry, absent, out_TC)
            return out_TC
        block_size, rows_per_block, tokens_per_row = geometry
        offsets_C = torch.arange(*span, device=positions_T.device)
        positions_TC = positions_T.unsqueeze(1) + offsets_C
        inside_TC = positions_TC.clamp(min=0)
        blocks_TC = table_RB[request_T.unsqueeze(1), inside_TC // block_size]
        rows_TC = blocks_TC * rows_per_block + inside_TC % block_size // tokens_per_row
        if used is None:
            return rows_TC
        return torch.where((positions_TC >= 0) & (offsets_C < span[0] + used), rows_TC, -1)

    def _own(self, cache: CacheLayer, key: tuple) -> Tensor:
        """Rows of the new tokens themselves."""
        if ("own", key) not in self._memo:
            self._memo["own", key] = self._rows(cache, self.positions_T, self._request_T).squeeze(1)
        return self._memo["own", key]

    def _ending(self, rate: int) -> Tensor:
        """New tokens that complete a block."""
        if rate not in self._ending_E:
            ending_E = torch.from_numpy(np.flatnonzero((self._host_positions_T + 1) % rate == 0))
            if self.positions_T.is_cuda:
                ending_E = ending_E.pin_memory()
            self._ending_E[rate] = ending_E.to(self.positions_T.device, non_blocking=True)
        return self._ending_E[rate]

    def _entry_rows(self, cache: CacheLayer, rate: int) -> Tensor:
        """Where the entries of these blocks belong."""
        ending_E = self._ending(rate)
        return self._rows(cache, self.positions_T[ending_E], self._request_T[ending_E]).squeeze(1)

    def window(self, name: str, kv_TD: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Write the new tokens' KV, and point at the last `width` tokens of each."""
        cache, key = self._cache(name, "recent")
        store = cache.part(name)
        _write(store, self._own(cache, key), kv_TD)
        memo = ("window", width, key)
        if memo not in self._memo:
            span = 1 - width, 1 - width + round_up(width)
            self._memo[memo] = self._rows(cache, self.positions_T, self._request_T, span, width)
        return store, self._memo[memo]

    def windows(self, name: str, state_TC: Tensor, rate: int, overlap: bool) -> Windows:
        """Write the new tokens' state, and gather the blocks that end in this call."""
        cache, key = self._cache(name, "recent")
        store = cache.part(name)
        _write(store, self._own(cache, key), state_TC)
        memo = (rate, overlap, key)
        if memo not in self._blocks:
            ending_E = self._ending(rate)
            positions_E = self.positions_T[ending_E]
            span = 1 - rate * (2 if overlap else 1), 1
            rows_EM = self._rows(cache, positions_E, self._request_T[ending_E], span)
            valid_EM = positions_E.unsqueeze(1) + torch.arange(*span, device=store.device) >= 0
            self._blocks[memo] = rows_EM, valid_EM, positions_E - (rate - 1)
        rows_EM, valid_EM, first_E = self._blocks[memo]
        state_EMC = store.index_select(0, rows_EM.flatten()).view(*rows_EM.shape, store.shape[1])
        return Windows(state_EMC.to(state_TC.dtype), valid_EM, first_E)

    def entries(self, name: str, entries_ED: Tensor, rate: int) -> Tensor:
        """Write the new entries where their blocks belong; the store is the whole cache."""
        cache, key = self._cache(name, "entries")
        memo = ("entries", rate, key)
        if memo not in self._memo:
            self._memo[memo] = self._entry_rows(cache, rate)
        store = cache.part(name)
        _write(store, self._memo[memo], entries_ED)
        return store

    def candidates(self, name: str, rate: int) -> Candidates:
        """Each token's complete entries, by the pages of its request."""
        cache, key = self._cache(name, "entries")
        memo = (rate, key)
        if memo not in self._candidates:
            pages = self._metadata[cache.name]
            first_rows_RB = pages.block_table_RB * cache.rows_per_block
            columns = round_up(self._longest // rate, BLOCK)
            complete_T = (self.positions_T + 1) // rate
            page = pages.block_size // rate
            self._candidates[memo] = Candidates(complete_T, self._request_T, first_rows_RB, page, columns)
        return self._candidates[memo]


class DecodeContext(PagedContext):
    """One new token of each request, with shapes that depend on nothing but their number and a bound on lengths.

    Every token is treated as one that ends a block: what comes of it goes to the null page (vLLM's block 0, which no
    request has) unless it does. So the launches of a step are always the same ones, as a CUDA graph has to have them.

    Args:
        positions_R: position of each request's token.
        metadata: as for `PagedContext`; only the pages are looked at.
        longest: no request has more tokens.
    """

    def __init__(
        self, positions_R: Tensor, metadata: dict[str, PagedMetadata], caches: nn.ModuleDict, longest: int
    ) -> None:
        self.positions_T = positions_R
        self._metadata, self._caches, self._longest = metadata, caches, longest
        self._request_T = torch.arange(len(positions_R), device=positions_R.device)
        self._memo, self._blocks, self._candidates = {}, {}, {}

    def _ending(self, rate: int) -> Tensor:
        return self._request_T

    def _entry_rows(self, cache: CacheLayer, rate: int) -> Tensor:
        rows_R = super()._entry_rows(cache, rate)
        return torch.where((self.positions_T + 1) % rate == 0, rows_R, 0)


def _write(store: Tensor, rows_N: Tensor, values_ND: Tensor) -> None:
    """Values into these rows of a store."""
    if has_kernels(values_ND) and store.dtype is torch.float32:
        place = *values_ND.shape, store.data_ptr(), len(store), store.stride(0)
        run(cpu.write, dense(values_ND), rows_N.contiguous(), *place)
    else:
        store[rows_N] = values_ND.to(store.dtype)
