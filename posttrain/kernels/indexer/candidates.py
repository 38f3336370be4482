"""Which entries a token may attend to, told by a count and a page table instead of by a row number for each.

At 128k tokens and a rate of 4 the row numbers alone are 32 GiB; the entries of a sequence follow one another in
the store, or in pages of it, so that a few numbers for each sequence say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Candidates:
    """Entry `e < count[t]` of token `t` is row `pages[sequence[t], e // page_size] + e % page_size` of the store."""

    count_T: Tensor
    """int64 entries that are complete at each token; rising along a sequence."""
    sequence_T: Tensor
    """int64 number of each token's sequence, rising: the tokens of a sequence stand together."""
    pages_RP: Tensor
    """int64 first row of each page of each sequence. One page is enough where all entries follow one another."""
    page_size: int
    """Entries in a page."""
    columns: int
    """A multiple of `BLOCK` that no count passes."""

    @cached_property
    def starts_R(self) -> Tensor:
        """int64 `[R + 1]`: first token of each sequence, and the number of tokens."""
        numbers_R = torch.arange(len(self.pages_RP) + 1, device=self.sequence_T.device)
        return torch.searchsorted(self.sequence_T, numbers_R)

    @cached_property
    def rows_TE(self) -> Tensor:
        """int64 rows of all entries, in order, -1 after them: for layers that attend to every one. `E` is `columns`."""
        return self.rows_of(self.first(self.columns))

    def first(self, k: int) -> Tensor:
        """The entry numbers 0, 1, ... of each token, int64 `[T, k]`; -1 after the last."""
        numbers_K = torch.arange(k, device=self.count_T.device)
        return torch.where(numbers_K < self.count_T.unsqueeze(1), numbers_K, -1)

    def rows_of(self, entries_TK: Tensor) -> Tensor:
        """Rows of these entry numbers, int64 `[T, K]`; -1 stays -1."""
        if self.pages_RP.shape[1] == 1:
            rows_TK = self.pages_RP[self.sequence_T] + entries_TK
        else:
            inside_TK = entries_TK.clamp(min=0)
            rows_TK = self.pages_RP[self.sequence_T.unsqueeze(1), inside_TK // self.page_size]
            rows_TK += inside_TK % self.page_size
        return rows_TK.masked_fill_(entries_TK < 0, -1)

    def of_tokens(self, begin: int, end: int) -> Candidates:
        """The candidates of tokens `begin` to `end`, alone."""
        if (begin, end) == (0, len(self.count_T)):
            return self
        tokens = slice(begin, end)
        return Candidates(self.count_T[tokens], self.sequence_T[tokens], self.pages_RP, self.page_size, self.columns)
