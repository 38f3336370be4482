"""The attention context of the rollout: earlier tokens come from vLLM's paged caches.

All sizes come from what vLLM knows on the host, so that no layer and no step waits for the GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.kernels import BLOCK, Candidates
from posttrain.kernels.blocks import round_up
from posttrain.models.deepseek_v4.context import Windows
from rollouts.plugin.caches import CacheLayer, PagedMetadata


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

    def _rows(self, cache: CacheLayer, positions: Tensor, request: Tensor) -> Tensor:
        """Rows of a cache that hold these positions, of any shape led by `request`'s; negative ones: row 0's page."""
        pages = self._metadata[cache.name]
        positions = positions.clamp(min=0)
        request = request.view(-1, *(1,) * (positions.dim() - 1)).expand_as(positions)
        blocks = pages.block_table_RB[request, positions // pages.block_size]
        return blocks * cache.rows_per_block + positions % pages.block_size // cache.tokens_per_row

    def _own(self, cache: CacheLayer, key: tuple) -> Tensor:
        """Rows of the new tokens themselves."""
        if ("own", key) not in self._memo:
            self._memo["own", key] = self._rows(cache, self.positions_T, self._request_T)
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
        return self._rows(cache, self.positions_T[ending_E], self._request_T[ending_E])

    def window(self, name: str, kv_TD: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Write the new tokens' KV, and point at the last `width` tokens of each."""
        cache, key = self._cache(name, "recent")
        store = cache.part(name)
        store[self._own(cache, key)] = kv_TD.to(store.dtype)
        memo = ("window", width, key)
        if memo not in self._memo:
            offsets_W = torch.arange(round_up(width), device=store.device) - (width - 1)
            positions_TW = self.positions_T.unsqueeze(1) + offsets_W
            rows_TW = self._rows(cache, positions_TW, self._request_T)
            self._memo[memo] = torch.where((positions_TW >= 0) & (offsets_W <= 0), rows_TW, -1)
        return store, self._memo[memo]

    def windows(self, name: str, state_TC: Tensor, rate: int, overlap: bool) -> Windows:
        """Write the new tokens' state, and gather the blocks that end in this call."""
        cache, key = self._cache(name, "recent")
        store = cache.part(name)
        store[self._own(cache, key)] = state_TC.to(store.dtype)
        memo = (rate, overlap, key)
        if memo not in self._blocks:
            ending_E = self._ending(rate)
            first_E = self.positions_T[ending_E] - (rate - 1)
            position_EM = first_E.unsqueeze(1) + torch.arange(-rate if overlap else 0, rate, device=store.device)
            rows_EM = self._rows(cache, position_EM, self._request_T[ending_E])
            self._blocks[memo] = rows_EM, position_EM >= 0, first_E
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
        store[self._memo[memo]] = entries_ED.to(store.dtype)
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
