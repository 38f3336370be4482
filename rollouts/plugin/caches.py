"""V4's caches as vLLM KV-cache layers, two for each attention layer.

*Recent* is a sliding-window cache with a row for each token: the window's KV, and the projected tokens that
are still to be compressed (compressor state, and the indexer's). *Entries* is a full-attention cache with a row for
each `rate` tokens: the compressed KV and the indexer's key. Both are addressed by token position, which is
what lets chunked prefill, prefix caching and preemption work unchanged.

All recent rows of a model have one width: vLLM 0.32 loses layers of a sliding-window group whose pages differ in
size (`vllm.v1.core.kv_cache_utils._get_packed_kv_cache_groups` splits such a bucket with `zip`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from posttrain.models.deepseek_v4.presets import SLIDING, SPARSE


@dataclass
class PagedMetadata:
    """What a cache group knows of a batch: the requests' lengths and the pages they own."""

    query_start_R: Tensor
    """int64 `[R + 1]`, on the CPU: first new token of each request, and the total."""
    seq_lens_R: Tensor
    block_table_RB: Tensor
    slot_mapping_T: Tensor
    block_size: int


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
        return PagedMetadata(
            query_start_R=common.query_start_loc_cpu.long(),
            seq_lens_R=common.seq_lens.long(),
            block_table_RB=common.block_table_tensor.long(),
            slot_mapping_T=common.slot_mapping.long(),
            block_size=self.block_size,
        )


class PagedBackend(AttentionBackend):
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

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages of all layers side by side in a block: the only layout for pages of different sizes."""
        return (KVCacheLayout.BLHNC,)


class CacheLayer(nn.Module, AttentionLayerBase):
    """One cache. `rows` is its memory as `[row, width]`, whatever else vLLM packs between its pages.

    Args:
        name: unique in the engine.
        columns: what a row holds, in order: names and widths.
        tokens_per_row: 1, or the compression rate.
        spec: the fields of the vLLM spec that all caches of the model share.
    """

    def __init__(
        self, name: str, columns: dict[str, int], width: int, tokens_per_row: int, spec: dict[str, Any]
    ) -> None:
        super().__init__()
        self.name, self.width, self.tokens_per_row, self.spec = name, width, tokens_per_row, spec
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
        shared = {key: value for key, value in self.spec.items() if key != "window"}
        if self.tokens_per_row > 1:
            return MLAAttentionSpec(head_size=self.width, tokens_per_state=self.tokens_per_row, **shared)
        return SlidingWindowMLASpec(head_size=self.width, sliding_window=self.spec["window"], **shared)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the pages `[blocks, 1, rows, width]`; the distance between pages is a whole number of rows."""
        pages = kv_cache.squeeze(1)
        if pages.stride(-1) != 1 or pages.stride(-2) != self.width or pages.stride(0) % self.width:
            raise ValueError(f"cache {self.name}: unexpected strides {pages.stride()} for rows of {self.width}")
        self.rows_per_block = pages.stride(0) // self.width
        count = (pages.shape[0] - 1) * self.rows_per_block + pages.shape[1]
        self.rows = pages.as_strided((count, self.width), (self.width, 1))

    def part(self, column: str) -> Tensor:
        """The cache's column as a store `[rows, size]` (a view)."""
        return self.rows[:, self.columns[column]]


def cache_layers(config: DeepseekV4Config) -> nn.ModuleDict:
    """All caches of a model, keyed `<layer>/recent` and `<layer>/entries`."""
    recent: dict[int, dict[str, int]] = {}
    entries: dict[int, dict[str, int]] = {}
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
    rates = {kind: config.compress_rates[kind] for kind in set(config.layer_types) - {SLIDING}}
    reach = max([rate * (2 if kind == SPARSE else 1) for kind, rate in rates.items()], default=1)
    recent_width = max(sum(columns.values()) for columns in recent.values())
    widths = {recent_width} | {sum(columns.values()) for columns in entries.values()}
    spec = {
        "block_size": math.lcm(16, *rates.values()),
        "num_kv_heads": 1,
        "dtype": torch.float32,
        # Every row width divides the distance between pages, so that rows can be numbered through.
        "alignment": math.lcm(*(4 * width for width in widths)),
        "window": max(config.sliding_window, reach),
    }
    caches: dict[str, nn.Module] = {}
    for layer, kind in enumerate(config.layer_types):
        caches[f"{layer}/recent"] = CacheLayer(f"layers.{layer}.recent", recent[layer], recent_width, 1, spec)
        if layer in entries:
            width = sum(entries[layer].values())
            caches[f"{layer}/entries"] = CacheLayer(f"layers.{layer}.entries", entries[layer], width, rates[kind], spec)
    return nn.ModuleDict(caches)
