"""The plugin's parts without an engine: vLLM's interfaces, whatever version is installed; caches in the model's dtype.

Engines themselves: tests/test_native_engine.py, and benchmarks/gpu/agreement.py on a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from posttrain.kernels.backend import Backend
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.checkpoint import FLOAT32
from posttrain.models.deepseek_v4.context import PackedContext
from rollouts.logprobs import sampler_logprobs
from rollouts.plugin import compat
from rollouts.plugin.caches import CacheLayer, PagedBackend, PagedMetadata, PagedMetadataBuilder, cache_layers
from rollouts.plugin.graphs import UNTAPED_STEPS, DecodeGraphs, DecodeTapes
from rollouts.plugin.paged import PagedContext
from tests.triton_kit import running
from tests.v4_models import VOCABULARY, our_model

ROOT = Path(__file__).parents[1]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two fp32 or bf16 tensors have the same content, NaN included."""
    whole = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def caches_of(model: DeepseekV4ForCausalLM, dtype: torch.dtype) -> nn.ModuleDict:
    with set_current_vllm_config(VllmConfig()):
        return cache_layers(model.config, dtype)


# --- vLLM's interfaces -------------------------------------------------------------------------------------------


def test_one_branch_is_live_and_it_is_the_installed_versions() -> None:
    fields = {field.name for field in dataclasses.fields(MLAAttentionSpec)}
    assert compat.RATE_FIELD in fields
    assert len({"tokens_per_state", "compress_ratio"} & fields) == 1
    has_layouts = importlib.util.find_spec("vllm.v1.kv_cache_layout") is not None
    assert bool(compat.LAYOUTS) == has_layouts == (not compat.WINDOW_PAGES_ARE_BOUND)


def test_what_the_plugin_reads_of_a_batch_is_there() -> None:
    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert fields >= {"query_start_loc", "query_start_loc_cpu", "seq_lens_cpu_upper_bound", "block_table_tensor"}


def test_pages_of_entries_hold_one_row_for_each_rate() -> None:
    fields = {"block_size": 64, "num_kv_heads": 1, "head_size": 48, "dtype": torch.bfloat16}
    assert compat.entries_spec(4, **fields).page_size_bytes == 64 // 4 * 48 * 2
    assert PagedBackend.get_kv_cache_shape(7, 16, 1, 48) == (7, 16, 48)
    assert PagedBackend.supported_kv_cache_layouts() == compat.LAYOUTS


@given(st.integers(0, 6), st.integers(1, 4096), st.integers(1, 1 << 16))
@settings(max_examples=50, deadline=None)
def test_bound_window_pages_fit_into_those_of_entries(power: int, width: int, row_bytes: int) -> None:
    unit = 16 << power
    bound = compat.WINDOW_PAGES_ARE_BOUND
    try:
        compat.WINDOW_PAGES_ARE_BOUND = True
        entries, window = compat.block_sizes(unit, lambda block: block // 4 * width, row_bytes)
    finally:
        compat.WINDOW_PAGES_ARE_BOUND = bound
    assert entries % unit == 0 and entries % window == 0
    assert window >= compat.LEAST_WINDOW_ROWS and window * row_bytes <= entries // 4 * width


def test_free_window_pages_are_small_unless_prefixes_would_be_found_in_long_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "WINDOW_PAGES_ARE_BOUND", False)
    v4_flash = 640 * 2, 3072 * 2  # bytes of a C4 entry with its key, and of a window's token
    assert compat.block_sizes(128, lambda block: block // 4 * v4_flash[0], v4_flash[1]) == (256, 8)
    assert compat.block_sizes(16, lambda block: block // 4 * 48, 224) == (16, 16)
    assert compat.block_sizes(16, lambda block: 0, 224) == (16, 16)


@pytest.mark.parametrize("bound", [False, True], ids=["free pages", "bound pages"])
def test_rows_divide_every_page(monkeypatch: pytest.MonkeyPatch, bound: bool) -> None:
    monkeypatch.setattr(compat, "WINDOW_PAGES_ARE_BOUND", bound)
    caches = caches_of(our_model(0), torch.bfloat16).values()
    specs = [cache.get_kv_cache_spec(VllmConfig()) for cache in caches]
    for cache, spec in zip(caches, specs, strict=True):
        assert all(spec.page_size_bytes % (2 * other.width) == 0 for other in caches), cache.name
    windows = [spec.page_size_bytes for spec in specs if isinstance(spec, SlidingWindowMLASpec)]
    assert len(windows) == 4 and len(set(windows)) == 1
    if bound:
        assert max(windows) <= max(spec.page_size_bytes for spec in specs if isinstance(spec, MLAAttentionSpec))


@pytest.mark.parametrize("assigned", [False, True], ids=["bound", "assigned"])
def test_a_cache_takes_pages_in_either_way(assigned: bool) -> None:
    cache: CacheLayer = caches_of(our_model(0), torch.bfloat16)["1/entries"]
    memory = torch.zeros(5, 6 * cache.width, dtype=torch.bfloat16)
    pages = memory[:, : 4 * cache.width].view(5, 4, cache.width)  # two more rows lie between pages
    if assigned:
        cache.kv_cache = pages
    else:
        cache.bind_kv_cache(pages.unsqueeze(1))
    assert cache.rows_per_block == 6 and cache.rows.shape == (28, cache.width)
    cache.part("layers.1.attn.indexer.compressor")[13] = 1
    assert pages[2, 1].sum() == 16 and memory.sum() == 16
    cache.kv_cache = torch.tensor([])  # as vLLM does at its end
    assert len(cache.rows) == 0


def test_a_cache_refuses_pages_that_rows_do_not_divide() -> None:
    cache: CacheLayer = caches_of(our_model(0), torch.float32)["0/recent"]
    with pytest.raises(ValueError, match=r"layers\.0\.recent"):
        cache.bind_kv_cache(torch.zeros(3, 5 * cache.width + 1)[:, :-1].view(3, 5, cache.width))


# --- A batch, without waiting for the device -----------------------------------------------------------------------


class OnDevice:
    """A tensor that must not be brought to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def long(self) -> Tensor:
        return self.tensor.long()


def test_lengths_come_from_the_host() -> None:
    common = SimpleNamespace(
        query_start_loc=OnDevice(torch.tensor([0, 3, 4], dtype=torch.int32)),
        query_start_loc_cpu=torch.tensor([0, 3, 4], dtype=torch.int32),
        seq_lens=OnDevice(torch.tensor([3, 9], dtype=torch.int32)),
        seq_lens_cpu_upper_bound=torch.tensor([3, 9], dtype=torch.int32),
        block_table_tensor=OnDevice(torch.tensor([[1], [2]], dtype=torch.int32)),
    )
    builder = PagedMetadataBuilder(SimpleNamespace(block_size=16), [], None, torch.device("cpu"))  # type: ignore[arg-type]
    metadata = builder.build(0, common)  # type: ignore[arg-type]
    assert metadata.scheduled == 4 and metadata.counts_R.tolist() == [3, 1] and metadata.seq_lens_R.tolist() == [3, 9]
    assert metadata.query_start_R.dtype == metadata.block_table_RB.dtype == torch.int64


# --- Caches against whole sequences --------------------------------------------------------------------------------


class Pages:
    """Memory for all caches, in pages that stand in no order, and the requests' tables."""

    def __init__(self, caches: nn.ModuleDict, requests: int, longest: int) -> None:
        self.caches, self.tables, self.blocks = caches, {}, {}
        for cache in caches.values():
            spec = cache.get_kv_cache_spec(VllmConfig())
            count = -(-longest // spec.block_size)
            rows = spec.block_size // cache.tokens_per_row
            memory = torch.full((1 + requests * count, rows + 1, cache.width), torch.nan, dtype=spec.dtype)
            cache.bind_kv_cache(memory[:, :rows].unsqueeze(1))
            generator = torch.Generator().manual_seed(count)
            order = torch.randperm(requests * count, generator=generator)
            self.tables[cache.name] = 1 + order.view(requests, count)  # block 0 is nobody's, as in vLLM
            self.blocks[cache.name] = spec.block_size

    def metadata(self, counts: list[int], lengths: list[int]) -> dict[str, PagedMetadata]:
        starts = torch.tensor([0, *counts]).cumsum(0)
        host = np.array(counts), np.array(lengths)
        return {name: PagedMetadata(starts, *host, table, self.blocks[name]) for name, table in self.tables.items()}


def paged_hidden(model: DeepseekV4ForCausalLM, pages: Pages, sequences: list[Tensor], step: Callable) -> list[Tensor]:
    """Hidden states of all tokens, given to the model in chunks of `step(request, done)` tokens."""
    done = [0] * len(sequences)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        counts = [min(step(r, done[r]), len(s) - done[r]) for r, s in enumerate(sequences)]
        spans = [slice(d, d + count) for d, count in zip(done, counts, strict=True)]
        done = [span.stop for span in spans]
        positions_T = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        tokens_T = torch.cat([sequence[span] for sequence, span in zip(sequences, spans, strict=True)])
        context = PagedContext(positions_T, pages.metadata(counts, done), pages.caches)
        with torch.inference_mode():
            hidden_TH = model.model.forward_packed(tokens_T, context)
        for part, hidden in zip(parts, hidden_TH.split(counts), strict=True):
            part.append(hidden)
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("bound", [False, True], ids=["free pages", "bound pages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_over_caches_in_the_models_dtype_are_the_whole_sequences_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bound: bool
) -> None:
    monkeypatch.setattr(compat, "WINDOW_PAGES_ARE_BOUND", bound)
    model = our_model(3)
    for name, parameter in model.named_parameters():
        if not FLOAT32.search(name):
            parameter.data = parameter.data.to(dtype)
    torch.manual_seed(5)
    sequences = [torch.randint(2, VOCABULARY, (length,)) for length in (1, 33, 70, 129)]
    bounds = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0)
    with torch.no_grad():
        whole_TH = model.model.forward_packed(torch.cat(sequences), PackedContext(bounds))
    pages = Pages(caches_of(model, dtype), len(sequences), 129)
    assert pages.caches["1/recent"].rows.dtype is dtype
    chunked = paged_hidden(model, pages, sequences, lambda request, done: 1 if done > 40 else 7 + 5 * request)
    assert whole_TH.dtype is dtype
    assert same_bits(torch.cat(chunked), whole_TH)


class Repeated(DecodeGraphs):
    """Steps are run again where a GPU would replay them: in the same memory, which holds what the last one left."""

    def _capture(self, step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
        hidden_RH = step()
        return lambda: hidden_RH.copy_(step()), hidden_RH


def fixed_shape_steps(
    model: DeepseekV4ForCausalLM, make: type[DecodeGraphs], lengths: tuple[int, ...], prompt: int
) -> tuple[DecodeGraphs, int]:
    """Checks each step of sequences against the whole of them; the graphs, and how many steps they took."""
    torch.manual_seed(6)
    sequences = [torch.randint(2, VOCABULARY, (length,)) for length in lengths]
    with torch.no_grad():
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        whole = model.model.forward_packed(torch.cat(sequences), PackedContext(bounds)).split(lengths)
    pages = Pages(caches_of(model, torch.float32), len(sequences), max(lengths))
    paged_hidden(model, pages, [sequence[:prompt] for sequence in sequences], lambda request, done: prompt)
    graphs, taken = make(model.model.forward_packed, pages.caches), 0
    for position in range(prompt, max(lengths)):
        rows = [row for row, length in enumerate(lengths) if position < length]
        metadata = pages.metadata([1] * len(rows), [position + 1] * len(rows))
        metadata = {
            name: dataclasses.replace(one, block_table_RB=one.block_table_RB[rows]) for name, one in metadata.items()
        }
        tokens_R = torch.stack([sequences[row][position] for row in rows])
        positions_R = torch.full_like(tokens_R, position)
        with torch.inference_mode():
            hidden_RH = graphs.run(tokens_R, positions_R, metadata)
            taken += hidden_RH is not None
            if hidden_RH is None:
                hidden_RH = model.model.forward_packed(tokens_R, PagedContext(positions_R, metadata, pages.caches))
        assert same_bits(hidden_RH, torch.stack([whole[row][position] for row in rows])), position
    return graphs, taken


def test_steps_of_fixed_shape_are_the_whole_sequences_to_the_bit() -> None:
    """As CUDA graphs need them: every token is compressed, and there are requests that own no page."""
    graphs, taken = fixed_shape_steps(our_model(3), Repeated, (133, 259, 60, 90, 133), 40)
    assert taken == 259 - 40
    assert set(graphs._graphs) == {(8, 256), (4, 256), (1, 256), (1, 512)}


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"precision": "fp4_experts", "indexer_precision": "fp4", "index_head_dim": 32}, torch.float32),
    ],
    ids=["fp32", "bf16", "fp4"],
)
def test_steps_from_a_tape_are_the_whole_sequences_to_the_bit(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = our_model(3, **changes)
    for name, parameter in model.named_parameters():
        if not FLOAT32.search(name):
            parameter.data = parameter.data.to(dtype)
    graphs, taken = fixed_shape_steps(model, DecodeTapes, (60, 90, 50, 60, 70), 40)
    assert taken == 50 - 4 * UNTAPED_STEPS, "a size gets a tape when it has come a few times"
    assert set(graphs._graphs) == {(8, 256), (4, 256), (2, 256), (1, 256)}


def test_tapes_keep_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollouts.plugin.graphs.UNTAPED_STEPS", 0)
    whole, _ = fixed_shape_steps(our_model(3), DecodeTapes, (50, 60), 40)
    one, _ = fixed_shape_steps(our_model(3), DecodeTapes, (50, 50), 40)
    assert isinstance(whole, DecodeTapes) and isinstance(one, DecodeTapes) and 0 < one._kept < whole._kept
    for limit, kept, steps in [(whole._kept, 2, 20), (whole._kept - 1, 1, 10), (one._kept - 1, 0, 0)]:
        monkeypatch.setattr("rollouts.plugin.graphs.TAPES_BYTES", limit)
        limited, taken = fixed_shape_steps(our_model(3), DecodeTapes, (50, 60), 40)
        assert (len(limited._graphs), taken) == (kept, steps)


def test_other_kernels_than_the_compiled_ones_get_no_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollouts.plugin.graphs.UNTAPED_STEPS", 0)
    with running("oracle"):
        _, taken = fixed_shape_steps(our_model(3), DecodeTapes, (42,), 40)
    assert taken == 0


@pytest.mark.parametrize("used", [None, 3])
def test_rows_of_caches_are_the_same_by_kernel_and_by_torch(used: int | None) -> None:
    pages = Pages(caches_of(our_model(3), torch.float32), 3, 64)
    metadata = pages.metadata([1, 3, 2], [1, 9, 40])
    positions_T = torch.tensor([0, 6, 7, 8, 38, 39])
    found: list[list[Tensor]] = []
    context = PagedContext(positions_T, metadata, pages.caches)
    for backend in ("compiled", "oracle"):
        with running(backend):
            rows = [
                context._rows(cache, positions_T, context._request_T, (-4, 1), used) for cache in pages.caches.values()
            ]
        found.append(rows)
    for kernel_TC, torch_TC in zip(*found, strict=True):
        assert torch.equal(kernel_TC, torch_TC)
        assert kernel_TC[0].tolist()[:2] == ([-1, -1] if used else [kernel_TC[0, 4]] * 2)


@pytest.mark.parametrize("backend", ["compiled", "oracle"])
def test_a_token_without_a_page_is_refused(backend: Backend) -> None:
    pages = Pages(caches_of(our_model(3), torch.float32), 1, 64)
    beyond = 64 * max(table.shape[1] for table in pages.tables.values())
    context = PagedContext(torch.tensor([beyond]), pages.metadata([1], [beyond + 1]), pages.caches)
    with running(backend), pytest.raises(IndexError):
        context.window("layers.0.attn", torch.zeros(1, 32), 16)


def test_steps_with_more_than_a_token_of_a_request_have_no_graph() -> None:
    pages = Pages(caches_of(our_model(3), torch.float32), 2, 64)
    metadata = pages.metadata([1, 2], [5, 9])
    assert Repeated(None, pages.caches).run(torch.zeros(3), torch.zeros(3), metadata) is None  # type: ignore[arg-type]


# --- Log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trainers_log_probability_is_the_samplers_to_the_bit(temperature: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, vocabulary = 19, 1000
    logits_NV = (3 * torch.randn(rows, vocabulary)).to(dtype)
    nothing = torch.zeros(rows)
    metadata = SamplingMetadata(
        temperature=torch.full((rows,), temperature),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={row: torch.Generator().manual_seed(row) for row in range(rows)},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    tokens_N, reported_NV = Sampler("processed_logprobs").sample(logits_NV.float().clone(), metadata)
    reported_N = reported_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    for part in (slice(None), slice(4, 9), slice(18, 19)):
        ours_N = sampler_logprobs(logits_NV[part], tokens_N[part], temperature)
        assert same_bits(ours_N, reported_N[part])


def test_equal_bits_are_not_equal_values() -> None:
    assert same_bits(torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 1.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(3))


def test_the_agreement_benchmark_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.agreement", "--size", "tiny", "--cpu", "--out", tmp_path / "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out").read_text())
    found = [results["before"], results["temperature 0.7"], results["long"]["chunked"], results["long"]["cached"]]
    for result in found + results["updates"]["each"]:
        assert result["finite"] and result["largest"] <= 1e-5
    assert results["long"]["decode_against_prefill"] <= 1e-5 and results["long"]["cached"]["same_answers"]
    assert max(results["long"]["cached_tokens"]) > 0
    assert results["updates"]["largest_without_publishing"] > 0.1
