"""Examples of a batch end to end, without padding between them: positions that start again at 0 keep them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.data.rows import IGNORED

Example = Mapping[str, Sequence[int]]
"""`input_ids` and `labels` of one sequence."""


@dataclass(frozen=True)
class PackedBatch:
    """Collates examples into packed rows, for models that take `position_ids` and no attention mask.

    An example is never cut. What is left of a row that is shorter than the longest is a sequence of its own without
    labels, so that no example sees it.
    """

    row_length: int | None
    """Tokens of a row at most; None: one row for all, for models whose cost does not grow with a row's length."""
    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids`, each int64 `[rows, longest row]`."""
        rows = best_fit([len(example["input_ids"]) for example in examples], self.row_length)
        width = max(sum(len(examples[index]["input_ids"]) for index in row) for row in rows)
        laid_out = [self._row([examples[index] for index in row], width) for row in rows]
        return {name: torch.tensor([row[name] for row in laid_out]) for name in ("input_ids", "labels", "position_ids")}

    def _row(self, examples: Sequence[Example], width: int) -> dict[str, list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for example in examples:
            ids += example["input_ids"]
            labels += [IGNORED, *example["labels"][1:]]  # nothing before an example predicts its first token
            positions += range(len(example["input_ids"]))
        rest = width - len(ids)
        return {
            "input_ids": ids + [self.pad_token_id] * rest,
            "labels": labels + [IGNORED] * rest,
            "position_ids": [*positions, *range(rest)],
        }


def best_fit(lengths: Sequence[int], capacity: int | None) -> list[list[int]]:
    """Numbers of the items in each row, by best-fit decreasing: the longest first, each where least room is left.

    Without a capacity all share one row, in their order. An item longer than the capacity has a row of its own.
    """
    if capacity is None:
        return [[*range(len(lengths))]]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [row for row, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            row = min(fitting, key=room.__getitem__)
            rows[row].append(index)
            room[row] -= lengths[index]
        else:
            rows.append([index])
            room.append(capacity - lengths[index])
    return rows
