"""vLLM's own V4 on a CPU: our weights reach it whole, and it cannot sample with them (yet).

These tests also watch upstream: two of them fail when a workaround, or a refusal, is no longer needed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from posttrain.errors import BadInput, RunFailed
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.models.deepseek_v4.export import export_checkpoint
from posttrain.recipe.schema import Recipe, RolloutConfig
from rollouts.engine import Engine
from rollouts.publishing import WeightStore
from rollouts.settings import write_description
from rollouts.types import Sampling
from rollouts.vllm_deepseek_v4 import released_weights
from rollouts.weights import WeightUpdate, checksum_of
from tests.engine_kit import EngineActor
from tests.recipe_kit import recipe_with
from tests.v4_models import our_model, randomise

IN_TREE = {
    "preset": "tiny",
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 8,
    "head_dim": 512,
    "q_lora_rank": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "sliding_window": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 512,
    "partial_rotary_factor": 64 / 512,
    "max_position_embeddings": 4096,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
}
"""The smallest sizes that vLLM's own V4 takes."""

ROLLOUT = RolloutConfig(
    engine="vllm", dtype="bfloat16", max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512, kv_cache_mib=64
)


def in_tree_model(seed: int) -> DeepseekV4ForCausalLM:
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(make_config(IN_TREE, vocab_size=256, eos_token_id=1)).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("kind", ["bf16", "fp8_fp4"])
def test_what_is_published_is_what_an_export_holds(kind: Any, tmp_path: Path) -> None:
    model = our_model(0, hidden_size=128, moe_intermediate_size=32)
    model.save_pretrained(tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "export", kind)
    expected = load_file(tmp_path / "export" / "model.safetensors")
    found = dict(released_weights(model.engine_state_dict(), model.config, kind))
    assert {name: checksum_of(tensor) for name, tensor in found.items()} == {
        name: checksum_of(tensor) for name, tensor in expected.items()
    }
    assert (kind == "fp8_fp4") == any(tensor.dtype == torch.float8_e4m3fn for tensor in found.values())


def test_sizes_that_vllm_does_not_know_are_refused_before_an_engine_starts(tmp_path: Path) -> None:
    our_model(0).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(BadInput, match=r"rollout\.engine: vllm cannot run this model: head_dim is .* needs 512"):
        write_description(tmp_path / "checkpoint", tmp_path / "description", "vllm")


def test_a_recipe_cannot_ask_for_vllms_v4_on_cpus() -> None:
    with pytest.raises(ValueError, match=r"does not run on CPUs .* use native, or give each worker a GPU"):
        Recipe.model_validate(recipe_with({"rollout.engine": "vllm"}))
    assert Recipe.model_validate(recipe_with({"rollout.engine": "vllm", "cluster.gpus_per_worker": 1}))


def test_vllm_still_returns_routes_with_its_second_runner_only() -> None:
    """Fails when the first one can too: then `rollouts.engine.Engine` need not refuse routes of vLLM's own models."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.submodule_search_locations
    source = (Path(vllm.submodule_search_locations[0]) / "config" / "vllm.py").read_text()
    assert "AuxOutput Connector requires Model Runner V2" in source


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineActor]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    directory = tmp_path_factory.mktemp("in-tree")
    in_tree_model(0).save_pretrained(directory / "checkpoint")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield EngineActor(directory / "checkpoint", "vllm", ROLLOUT, quantised=False)
    ray.shutdown()


def stale_sinks(engine: Engine, released: dict[str, torch.Tensor]) -> bool:
    """Whether vLLM's own reload, without our repair, leaves a sink as it was."""
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(released.items())})

    def sink(model: Any) -> torch.Tensor:
        return dict(model.named_parameters())["model.layers.1.attn.attn_sink"][:8].clone()

    return not torch.equal(engine._llm.apply_model(sink)[0], released["layers.1.attn.attn_sink"])


def sample(engine: Engine) -> None:
    engine.generate([[5, 6, 7]], Sampling(max_tokens=2))


def test_every_weight_stands_in_vllms_model_after_an_update(engine: EngineActor, tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "weights")
    for version in (1, 2):
        weights = in_tree_model(version).engine_state_dict()
        verified, unverified = engine.receive(store.put(WeightUpdate.pack(weights, version, store.checksums)))
        assert [name for name in unverified if "rotary_emb" not in name] == []
        assert verified > 60
        engine.run(Engine.audit)
    del weights["model.layers.1.attn.attn_sink"]
    with pytest.raises(RunFailed, match=r"missing: model\.layers\.1\.attn\.attn_sink"):
        engine.receive(store.put(WeightUpdate.pack(weights, 3)))


def test_vllms_reload_still_forgets_the_sinks(engine: EngineActor) -> None:
    """Fails when vLLM is repaired (0.33): then delete `rollouts.vllm_deepseek_v4.copy_sinks`."""
    model = in_tree_model(9)
    assert engine.run(stale_sinks, dict(released_weights(model.engine_state_dict(), model.config, "bf16")))


def test_vllms_v4_still_does_not_sample_on_cpus(engine: EngineActor, tmp_path: Path) -> None:
    """Fails when it does: then delete the refusal in `posttrain/recipe/schema.py`. Last: the engine dies."""
    store = WeightStore(tmp_path / "weights")
    engine.receive(store.put(WeightUpdate.pack(in_tree_model(4).engine_state_dict(), 4)))
    with pytest.raises(TypeError, match="'function' object is not subscriptable"):
        engine.run(sample)
