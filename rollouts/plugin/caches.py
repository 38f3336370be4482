"""V4's caches as vLLM KV-cache layers, two for each attention layer.

*Recent* is a sliding-window cache with a row for each token: the window's KV, and the projected tokens that
are still to be compressed (compressor state, and the indexer's). *Entries* is a full-attention cache with a row for
each `rate` tokens: the compressed KV and the indexer's key. Both are addressed by token position, which is
what lets chunked prefill, prefix caching and preemption work unchanged.

All recent rows of a model have one width: vLLM 0.32 loses layers of a sliding-window group whose pages differ in
size (`vllm.v1.core.kv_cache_utils._get_packed_kv_cache_groups` splits such a bucket with `zip`).

On a GPU all rows are in the model's dtype. That loses nothing: KV, entries, keys and the compressors' states are
results of operations in that dtype, the states too, which are widened to fp32 only afterwards. On the CPU they are
fp32, which its kernels compute in.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowMLASpec

from posttrain.models.deepseek_v4.presets import SLIDING, SPARSE
from rollouts.plugin import compat


@dataclass
class PagedMetadata:
    """What a cache group knows of a batch: the requests' lengths and the pages they own."""

    query_start_R: Tensor
    """int64 `[R + 1]`: first new token of each request, and the total."""
    counts_R: np.ndarray
    """New tokens of each request; on the host, like the lengths: nothing need wait for the GPU."""
    seq_lens_R: np.ndarray
    """Tokens of each request, the new ones included."""
    block_table_RB: Tensor
    block_size: int

    @property
    def scheduled(self) -> int:
        """New tokens of all requests."""
        return int(self.counts_R.sum())


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata]):
    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedMetadata:
        """Keep references to what vLLM prepared for this group."""
        common = common_attn_metadata
        lengths = common.seq_lens_cpu_upper_bound  # the lengths themselves, as there is no speculative decoding
        if lengths is None:  # not in a step of the engine: only vLLM's own trial runs leave it out
            lengths = common.seq_lens.cpu()
        return PagedMetadata(
            query_start_R=common.query_start_loc.long(),
            counts_R=np.diff(common.query_start_loc_cpu.numpy().astype(np.int64)),
            seq_lens_R=lengths.numpy().astype(np.int64),
            block_table_RB=common.block_table_tensor.long(),
            block_size=self.block_size,
        )


class PagedBackend(compat.CacheShape, AttentionBackend):
    """Says how our caches are laid out; the attention itself is the op table's."""

    accept_output_buffer = True

    @staticmethod
    def get_name() -> str:
        return "POSTTRAIN_V4"

    @staticmethod
    def get_impl_cls() -> Any:
        return None

    @staticmethod
    def get_builder_cls() -> type[PagedMetadataBuilder]:
        return PagedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []


class CacheLayer(nn.Module, AttentionLayerBase):
    """One cache. `rows` is its memory as `[row, width]`, whatever else vLLM packs between its pages.

    Args:
        name: unique in the engine.
        columns: what a row holds, in order: names and widths.
        tokens_per_row: 1, or the compression rate.
        window: tokens that a row is kept for; None: all.
        spec: further fields of the vLLM spec.
    """

    def __init__(
        self,
        name: str,
        columns: dict[str, int],
        width: int,
        tokens_per_row: int,
        window: int | None,
        spec: dict[str, Any],
    ) -> None:
        super().__init__()
        self.name, self.width, self.tokens_per_row, self.window, self.spec = name, width, tokens_per_row, window, spec
        ends = list(itertools.accumulate(columns.values()))
        self.columns = {key: slice(end - size, end) for (key, size), end in zip(columns.items(), ends, strict=True)}
        self.rows = torch.empty(0, width)
        self.rows_per_block = 0
        context = get_current_vllm_config().compilation_config.static_forward_context
        if name in context:
            raise ValueError(f"duplicate cache layer {name}")
        context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend that prepares our metadata."""
        return PagedBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Full attention for compressed entries, a sliding window for the rest."""
        if self.window is None:
            return compat.entries_spec(self.tokens_per_row, head_size=self.width, **self.spec)
        return SlidingWindowMLASpec(head_size=self.width, sliding_window=self.window, **self.spec)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the pages; the distance between pages is a whole number of rows."""
        pages = compat.pages(kv_cache)
        if pages.stride(-1) != 1 or pages.stride(-2) != self.width or pages.stride(0) % self.width:
            raise ValueError(f"cache {self.name}: unexpected strides {pages.stride()} for rows of {self.width}")
        self.rows_per_block = pages.stride(0) // self.width
        count = (pages.shape[0] - 1) * self.rows_per_block + pages.shape[1]
        self.rows = pages.as_strided((count, self.width), (self.width, 1))

    @property
    def kv_cache(self) -> Tensor:
        """The rows. What vLLM assigns are pages (0.25.1), or nothing, when it ends."""
        return self.rows

    @kv_cache.setter
    def kv_cache(self, kv_cache: Tensor) -> None:
        if kv_cache.numel():
            self.bind_kv_cache(kv_cache)
        else:
            self.rows = self.rows[:0]

    def part(self, column: str) -> Tensor:
        """The cache's column as a store `[rows, size]` (a view)."""
        return self.rows[:, self.columns[column]]


def cache_layers(config: DeepseekV4Config, dtype: torch.dtype) -> nn.ModuleDict:
    """All caches of a model, keyed `<layer>/recent` and `<layer>/entries`, with rows in `dtype`."""
    recent: dict[int, dict[str, int]] = {}
    entries: dict[int, dict[str, int]] = {}
    rate_of = {kind: config.compress_rates[kind] for kind in set(config.layer_types) - {SLIDING}}
    for layer, kind in enumerate(config.layer_types):
        name = f"layers.{layer}.attn"
        recent[layer] = {name: config.head_dim}
        series = 2 if kind == SPARSE else 1
        compressors = {} if kind == SLIDING else {f"{name}.compressor": config.head_dim}
        if kind == SPARSE:
            compressors[f"{name}.indexer.compressor"] = config.index_head_dim
        recent[layer] |= {key: 2 * series * size for key, size in compressors.items()}
        if compressors:
            entries[layer] = compressors
    reach = max([rate * (2 if kind == SPARSE else 1) for kind, rate in rate_of.items()], default=1)
    recent_width = max(sum(columns.values()) for columns in recent.values())
    widths = {layer: sum(columns.values()) for layer, columns in entries.items()}
    rates = {layer: rate_of[config.layer_types[layer]] for layer in entries}

    def largest_page(block: int) -> int:
        return max((block // rates[layer] * widths[layer] * dtype.itemsize for layer in entries), default=0)

    unit = math.lcm(16, *rate_of.values())
    entries_block, recent_block = compat.block_sizes(unit, largest_page, recent_width * dtype.itemsize)
    # Every row width divides the distance between pages, so that rows can be numbered through.
    alignment = math.lcm(*(dtype.itemsize * width for width in {recent_width, *widths.values()}))
    spec = {"num_kv_heads": 1, "dtype": dtype, "alignment": alignment}
    window = max(config.sliding_window, reach)
    caches: dict[str, nn.Module] = {}
    for layer in recent:
        own = recent[layer], recent_width, 1, window, {**spec, "block_size": recent_block}
        caches[f"{layer}/recent"] = CacheLayer(f"layers.{layer}.recent", *own)
        if layer in entries:
            own = entries[layer], widths[layer], rates[layer], None, {**spec, "block_size": entries_block}
            caches[f"{layer}/entries"] = CacheLayer(f"layers.{layer}.entries", *own)
    return nn.ModuleDict(caches)
