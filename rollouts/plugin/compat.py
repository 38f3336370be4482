"""What differs between the versions of vLLM that the plugin runs on: 0.25.1 and 0.32.0.

Each difference is told by what the installed vLLM has, not by its version number, so that releases in between fall on
the right side. File names are vLLM's.

| matter | 0.25.1 | 0.32.0 |
| --- | --- | --- |
| tokens in a compressed row (`v1/kv_cache_interface.py`, `MLAAttentionSpec`) | `compress_ratio` | `tokens_per_state` |
| memory of a cache (`v1/attention/backend.py`) | the backend's `get_kv_cache_shape` | `v1/kv_cache_layout.py`: the backend's `supported_kv_cache_layouts` |
| giving it to the layer (`v1/worker/utils.py`) | assigns `layer.kv_cache`, `[blocks, rows, width]` | calls `layer.bind_kv_cache`, `[blocks, 1, rows, width]` |
| pages of a window (`v1/core/kv_cache_utils.py`) | no larger than the largest page of full attention, and padded to one of its sizes | free, but all of one size; more groups the larger they are |
| runner on GPUs (`config/vllm.py`) | V2 by default for dense models | V2 by default |

Both versions have, under the same names, what else the plugin reads: `CommonAttentionMetadata` with `query_start_loc`,
`query_start_loc_cpu`, `seq_lens_cpu_upper_bound` (exact without speculative decoding) and `block_table_tensor`;
`get_forward_context().attn_metadata` by layer name; `SlidingWindowMLASpec`; `ModelRegistry`; `logprobs_mode`.
The runner is V1 on both (`rollouts.settings.engine_environment`): it is the one that vLLM runs on CPUs too, and its
sampler is torch code.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.v1.kv_cache_interface import MLAAttentionSpec

_SPEC_FIELDS = {field.name for field in dataclasses.fields(MLAAttentionSpec)}

RATE_FIELD = "tokens_per_state" if "tokens_per_state" in _SPEC_FIELDS else "compress_ratio"

try:
    from vllm.v1.kv_cache_layout import KVCacheLayout
except ImportError:
    LAYOUTS: tuple[Any, ...] = ()
    """The memory layouts that the plugin can take; empty where backends give shapes instead."""
else:
    LAYOUTS = (KVCacheLayout.BLHNC,)  # pages of all layers side by side in a block: the one for pages of many sizes

WINDOW_PAGES_ARE_BOUND = not LAYOUTS
"""Whether pages of a window may not be larger than those of full attention
(0.25.1: `_get_kv_cache_groups_uniform_groups` asserts it)."""

LEAST_WINDOW_ROWS = 8
"""A page of fewer tokens would cost the scheduler more than it saves memory."""

LONGER_STEP = 2
"""How much longer the blocks of full attention may become for it. Small window pages are worth something in 0.32.0 too:
V4-Flash's 43 windows are two groups then instead of 22, and each group's tables are made anew at every step."""


def entries_spec(rate: int, **fields: Any) -> MLAAttentionSpec:
    """Full attention with a row for each `rate` tokens."""
    return MLAAttentionSpec(**{RATE_FIELD: rate}, **fields)


def block_sizes(unit: int, largest_page: Callable[[int], int], row_bytes: int) -> tuple[int, int]:
    """Tokens in a block of full attention, and in one of the windows, whose pages are the smaller ones.

    The first is also the step in which cached prefixes are found. Where vLLM leaves it free and small pages would make
    that step much longer, as with tiny models, both are `unit`.

    Args:
        unit: the least block of full attention.
        largest_page: bytes of full attention's largest page, by the tokens in a block; 0 if there are none.
        row_bytes: of a window's token.
    """
    if not largest_page(unit):
        return unit, unit
    block = unit
    while (rows := largest_page(block) // row_bytes) < LEAST_WINDOW_ROWS:
        block *= 2
    if block > LONGER_STEP * unit and not WINDOW_PAGES_ARE_BOUND:
        return unit, unit
    return block, min(1 << rows.bit_length() - 1, block & -block)


def pages(kv_cache: Tensor) -> Tensor:
    """A cache's memory as `[blocks, rows, width]`."""
    return kv_cache.squeeze(1) if kv_cache.dim() == 4 else kv_cache


class CacheShape:
    """What a backend says of its memory, in the words of either version."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """0.25.1: one vector for each row."""
        return num_blocks, block_size, head_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """0.32.0."""
        return LAYOUTS
