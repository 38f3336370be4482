"""Where tokens stand in paged caches, and writing them there, on the CPU. Tensors come as addresses."""

from __future__ import annotations

from posttrain.kernels.compiled import compiled
from posttrain.kernels.simd import get_integer, load, put_integer, store


@compiled
def rows(
    positions: int, requests: int, tokens: int, first: int, columns: int, used: int, table: int, tables: int,
    pages_each: int, page_tokens: int, page_rows: int, row_tokens: int, absent: bool, out: int,
) -> None:  # fmt: skip
    """Rows of the `columns` positions from `positions[t] + first` on to `out[T, columns]`.

    Before the sequence's start stands -1 if `absent`, else the row of position 0; -1 from column `used` on.
    """
    for t in range(tokens):
        request, position = get_integer(requests, t), get_integer(positions, t) + first
        for column in range(columns):
            at, row = max(position + column, 0), -1
            if column < used and (position + column >= 0 or not absent):
                page = at // page_tokens
                if not 0 <= request < tables or page >= pages_each:
                    raise IndexError("paged caches: a position has no page")
                row = get_integer(table, request * pages_each + page) * page_rows + at % page_tokens // row_tokens
            put_integer(out, t * columns + column, row)


@compiled
def write(values: int, places: int, count: int, width: int, target: int, size: int, stride: int) -> None:
    """`values[count, width]` to the rows `places` of a store of `size` rows that are `stride` floats apart."""
    for number in range(count):
        place = get_integer(places, number)
        if not 0 <= place < size:
            raise IndexError("paged caches: there is no such row")
        at = place * stride
        for d in range(0, width, 16):
            store(target, at + d, load(values, number * width + d, width - d), width - d)
