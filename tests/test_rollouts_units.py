"""The parts of the rollout service that need neither Ray nor vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import BadInput
from posttrain.recipe.schema import RolloutConfig
from rollouts.engine import request_seed
from rollouts.masks import decode_kept, encode_kept
from rollouts.monitor import Average
from rollouts.service import split_evenly
from rollouts.settings import check_prompts, engine_kind, read_eos_token_ids, write_description
from rollouts.vllm_weights import checkpoint_shapes
from rollouts.weights import iterate_safetensors
from tests.tiny_models import save_tiny_qwen3


@pytest.mark.parametrize("kept", [1, 20, 90, 97])
def test_masks_come_back_and_are_short(kept: int) -> None:
    mask_V = np.zeros(97, dtype=bool)
    mask_V[np.random.default_rng(kept).permutation(97)[:kept]] = True
    blob = encode_kept(mask_V)
    assert np.array_equal(decode_kept(blob, 97), mask_V)
    assert len(blob) == {1: 5, 20: 14, 90: 14, 97: 0}[kept]


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 6))
def test_rows_are_split_in_order_without_loss_and_evenly(costs: list[int], parts: int) -> None:
    ranges = split_evenly(costs, parts)
    assert len(ranges) == parts
    assert [row for begin, end in ranges for row in range(begin, end)] == list(range(len(costs)))
    for begin, end in ranges:
        assert sum(costs[begin:end]) <= sum(costs) / parts + max(costs, default=0)


def test_request_seeds_are_stable_and_distinct() -> None:
    assert request_seed(0, 0, 0) == 1445694884619442965
    seeds = {request_seed(seed, row, sample) for seed in range(10) for row in range(50) for sample in range(10)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # CPU generators use the low 32 bits only.
    assert len({seed & 0xFFFFFFFF for seed in seeds}) > 4990


def test_prompts_are_checked_row_by_row() -> None:
    check_prompts([[1], [2] * 6], max_tokens=2, max_model_len=8, vocab_size=10)
    for prompts, words in [
        ([[1], []], "prompt 101 is empty"),
        ([[1] * 7], "prompt 100 has 7 tokens and asks for up to 2 more"),
        ([[1], [2], [10]], "prompt 102 has a token id outside"),
    ]:
        with pytest.raises(BadInput, match=words):
            check_prompts(prompts, max_tokens=2, max_model_len=8, vocab_size=10, first_index=100)


def test_only_v4_has_a_native_engine() -> None:
    assert engine_kind("deepseek_v4", RolloutConfig()) == "native"
    assert engine_kind("deepseek_v4", RolloutConfig(engine="vllm")) == "vllm"
    assert engine_kind("hf", RolloutConfig()) == "vllm"


def test_a_description_has_the_configuration_and_the_end_tokens_but_no_weights(tmp_path: Path) -> None:
    model = save_tiny_qwen3(tmp_path / "checkpoint", seed=0, tied=True)
    write_description(tmp_path / "checkpoint", tmp_path / "description", "vllm")
    assert sorted(path.name for path in (tmp_path / "description").iterdir()) == [
        "config.json",
        "generation_config.json",
    ]
    assert read_eos_token_ids(tmp_path / "description") == [model.config.eos_token_id]
    shapes, tied = checkpoint_shapes(tmp_path / "description")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}
    stored = dict(iterate_safetensors(tmp_path / "checkpoint"))
    assert stored.keys() == shapes.keys() - tied.keys()


def test_a_description_needs_a_configuration_with_an_end_token(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json is missing"):
        write_description(tmp_path / "nothing", tmp_path / "description", "vllm")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        write_description(tmp_path, tmp_path / "description", "vllm")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(BadInput, match="eos_token_id"):
        write_description(tmp_path, tmp_path / "description", "vllm")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    write_description(tmp_path, tmp_path / "description", "vllm")
    assert read_eos_token_ids(tmp_path / "description") == [3, 4]


def test_what_comes_and_goes_between_two_moments_counts_for_as_long_as_it_was_there() -> None:
    now = 100.0
    average = Average(lambda: now)
    average.set(0)
    now = 104.0
    average.set(16)
    now = 105.0
    average.set(0)
    now = 108.0
    assert average.take() == 2.0
    assert average.take() == 0.0  # no time has passed: what it is now
    now = 110.0
    average.set(3)
    now = 112.0
    assert average.take() == 1.5
    now = 113.0
    assert average.take() == 3.0
