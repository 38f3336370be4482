"""Where attention finds earlier tokens: in the packed call itself (training), or in a cache (rollout).

The model's layers are the same in both; they ask an `AttentionContext` for stores and row numbers and give
them to the op table. `PackedContext` below serves whole sequences; `rollouts.plugin.paged` serves vLLM's
paged caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from posttrain.kernels import BLOCK, Candidates
from posttrain.kernels.blocks import round_up


@dataclass
class Windows:
    """Blocks of tokens that are complete and to be compressed into one entry each (`E` of them)."""

    state_EMC: Tensor
    """Projected tokens of each block, for CSA those of the block before it first (`M` = 2·rate)."""
    valid_EM: Tensor
    """False where the block before does not exist."""
    first_position_E: Tensor
    """Position of the block's own first token, where its entry is rotated."""


class AttentionContext(Protocol):
    """What a layer needs to know of the tokens around the ones it is given."""

    positions_T: Tensor
    """int64 position of each token in its sequence."""

    def window(self, name: str, kv_TD: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Store `[S, D]` and rows `[T, W]` of the last `width` tokens, oldest first, -1 for none; W is n * BLOCK."""

    def windows(self, name: str, state_TC: Tensor, rate: int, overlap: bool) -> Windows:
        """The blocks of `rate` tokens that these tokens complete."""

    def entries(self, name: str, entries_ED: Tensor, rate: int) -> Tensor:
        """Put the entries of those blocks into their store, and return the store `[S, D]`."""

    def candidates(self, name: str, rate: int) -> Candidates:
        """All entries complete at each token, and where the store has them."""


class PackedContext:
    """Whole sequences packed one after another; nothing is cached, everything has a gradient.

    Args:
        cu_seqlens: int64 `[B + 1]`, starts of the sequences and the total; rising from 0. Empty sequences
            are allowed. On the host if possible: otherwise the host waits for it, once.
        device: of the tokens; default: that of `cu_seqlens`.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | None = None) -> None:
        self.device = cu_seqlens.device if device is None else device
        bounds = cu_seqlens.tolist()
        self._lengths = [end - start for start, end in pairwise(bounds)]
        if bounds[0] != 0 or min(self._lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens must rise from 0; got {bounds[:20]}")
        self.total, self.longest = bounds[-1], max(self._lengths, default=0)
        cu_seqlens = cu_seqlens.to(self.device, non_blocking=True)
        self.lengths_B, self.starts_B = cu_seqlens.diff(), cu_seqlens[:-1]
        self.sequence_T = torch.repeat_interleave(self.lengths_B, output_size=self.total)
        self.start_T = self.starts_B[self.sequence_T]
        self.positions_T = torch.arange(self.total, device=self.device) - self.start_T
        self._window_rows: dict[int, Tensor] = {}
        self._blocks: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor]] = {}
        self._candidates: dict[int, Candidates] = {}

    def window(self, name: str, kv_TD: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The call's own tokens are the store."""
        if width not in self._window_rows:
            padded = round_up(width)
            offsets_W = torch.arange(padded, device=self.device) - (width - 1)
            rows_TW = torch.arange(self.total, device=self.device).unsqueeze(1) + offsets_W
            inside = (rows_TW >= self.start_T.unsqueeze(1)) & (offsets_W <= 0)
            self._window_rows[width] = torch.where(inside, rows_TW, -1)
        return kv_TD, self._window_rows[width]

    def windows(self, name: str, state_TC: Tensor, rate: int, overlap: bool) -> Windows:
        """All complete blocks of all sequences, in order."""
        if (rate, overlap) not in self._blocks:
            counts_B = self.lengths_B // rate
            entries = sum(length // rate for length in self._lengths)
            sequence_E = torch.repeat_interleave(counts_B, output_size=entries)
            first_entry_B = counts_B.cumsum(0) - counts_B
            number_E = torch.arange(len(sequence_E), device=self.device) - first_entry_B[sequence_E]
            first_E = number_E * rate
            span = torch.arange(-rate if overlap else 0, rate, device=self.device)
            position_EM = first_E.unsqueeze(1) + span
            rows_EM = (self.starts_B[sequence_E].unsqueeze(1) + position_EM).clamp(min=0)
            self._blocks[rate, overlap] = rows_EM, position_EM >= 0, first_E
        rows_EM, valid_EM, first_E = self._blocks[rate, overlap]
        state_EMC = state_TC.index_select(0, rows_EM.flatten()).view(*rows_EM.shape, state_TC.shape[-1])
        return Windows(state_EMC, valid_EM, first_E)

    def entries(self, name: str, entries_ED: Tensor, rate: int) -> Tensor:
        """The call's own entries are the store."""
        return entries_ED

    def candidates(self, name: str, rate: int) -> Candidates:
        """Entries of the token's own sequence whose block has ended: one page for each sequence."""
        if rate not in self._candidates:
            counts_B = self.lengths_B // rate
            first_entry_B1 = (counts_B.cumsum(0) - counts_B).unsqueeze(1)
            complete_T = (self.positions_T + 1) // rate
            longest = self.longest // rate
            columns = round_up(longest, BLOCK)
            self._candidates[rate] = Candidates(complete_T, self.sequence_T, first_entry_B1, max(longest, 1), columns)
        return self._candidates[rate]
