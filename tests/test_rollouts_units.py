"""The parts of the rollout service that need neither Ray nor vLLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import BadInput, RunFailed
from posttrain.recipe.schema import RolloutConfig
from rollouts.engine import request_seed
from rollouts.loading import checkpoint_shapes, load_native
from rollouts.pool import split_evenly
from rollouts.settings import check_prompts, engine_kind, read_eos_token_ids, write_description
from rollouts.weights import PackedTensor, WeightUpdate, check_coverage, combined_checksum, iterate_safetensors
from tests.tiny_models import save_tiny_qwen3


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_a_packed_tensor_comes_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    packed = PackedTensor.of(tensor)
    packed.bits.flags.writeable = False  # as Ray's object store hands it out
    back = packed.tensor()
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert torch.equal(back.float(), tensor.float())
    assert PackedTensor.of(back).checksum() == PackedTensor.of(tensor).checksum()


def test_views_and_arrays_pack_like_their_contents() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert PackedTensor.of(tensor.T).checksum() == PackedTensor.of(tensor.T.contiguous()).checksum()
    assert PackedTensor.of(tensor.numpy().T).checksum() == PackedTensor.of(tensor.T).checksum()


def test_a_checksum_sees_every_bit_the_shape_and_the_type() -> None:
    tensor = torch.zeros(4, 6)
    changed = tensor.clone()
    changed[3, 5] = -0.0
    others = [changed, tensor.reshape(6, 4), tensor.int(), torch.zeros(4, 5)]
    sums = {PackedTensor.of(value).checksum() for value in [tensor, *others]}
    assert len(sums) == 5


def test_the_combined_checksum_ignores_order_and_sees_names() -> None:
    assert combined_checksum({"a": "1", "b": "2"}) == combined_checksum({"b": "2", "a": "1"})
    assert combined_checksum({"a": "1", "b": "2"}) != combined_checksum({"a": "2", "b": "1"})


def test_an_update_with_a_changed_or_lost_tensor_is_refused() -> None:
    weights = {"a": torch.ones(3), "b": torch.ones(2)}
    update = WeightUpdate.pack(weights, 1)
    assert update.checked_tensors().keys() == weights.keys()
    update.tensors["b"].bits[1] = 2
    with pytest.raises(RunFailed, match="damaged on the way: checksums of b"):
        update.checked_tensors()
    del update.tensors["b"]
    with pytest.raises(RunFailed, match="b arrived without tensor or checksum"):
        update.checked_tensors()


def test_coverage_names_what_is_missing_unknown_or_misshapen() -> None:
    expected = {"a": (2,), "b": (3,), "tied": (2,)}
    check_coverage(expected, {"tied"}, {"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(RunFailed) as error:
        check_coverage(expected, set(), {"a": torch.ones(5), "c": torch.ones(1)})
    for words in ("missing: b, tied", "unknown to the engine: c", "a has shape [5], the engine's has [2]"):
        assert words in str(error.value)


class Plain(torch.nn.Module):
    """Stands for our own model in the engine: parameters and a buffer, loaded by name."""

    def __init__(self, forgetful: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("bias", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.forgetful = forgetful

    def load_weights(self, pairs: object) -> None:
        own = self.state_dict()
        for name, tensor in pairs:  # type: ignore[attr-defined]
            if not (self.forgetful and name == "bias"):
                own[name].copy_(tensor)


def test_a_native_model_is_compared_tensor_by_tensor_after_loading() -> None:
    weights = {"weight": torch.randn(2, 3), "bias": torch.randn(3)}
    model = Plain()
    assert load_native(model, weights).verified == 2
    assert torch.equal(model.weight, weights["weight"])
    assert torch.equal(model.bias, weights["bias"].bfloat16())
    with pytest.raises(RunFailed, match="not the ones it was sent: bias"):
        load_native(Plain(forgetful=True), weights)
    with pytest.raises(RunFailed, match="missing: bias"):
        load_native(model, {"weight": weights["weight"]})


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


def test_vllm_still_needs_the_seed_safe_worker() -> None:
    """Fails when the defect is gone: then delete `rollouts/cpu_worker.py` and `worker_cls` in `rollouts/engine.py`."""
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator(device="cpu").get_offset()
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.submodule_search_locations
    runner = Path(vllm.submodule_search_locations[0]) / "v1" / "worker" / "gpu_model_runner.py"
    assert "gen.set_offset(gen.get_offset() - 4)" in runner.read_text()


def test_numpy_arrays_are_accepted_as_weights() -> None:
    update = WeightUpdate.pack({"a": np.ones((2, 2), dtype=np.float32)}, 3)
    assert torch.equal(update.checked_tensors()["a"], torch.ones(2, 2))
