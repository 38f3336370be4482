"""Checkpoints in the released layout: written, read back, exchanged with transformers, refused when broken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM as TransformersV4

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, checkpoint
from posttrain.models.deepseek_v4.checkpoint import CheckpointError
from tests.v4_models import VOCABULARY, our_model, saved_twin, transformers_model


@pytest.fixture
def saved(tmp_path):
    model = our_model(0)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_saved_model_comes_back_bit_by_bit(saved) -> None:
    model, directory = saved
    again = DeepseekV4ForCausalLM.from_pretrained(directory)
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_names_are_those_of_released_checkpoints(saved) -> None:
    names = set(load_file(saved[1] / "model.safetensors"))
    expected = {
        "embed.weight", "head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale",
        "layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.bias", "layers.1.ffn.experts.7.w3.weight",
        "layers.1.ffn.shared_experts.w1.weight", "layers.1.attn.attn_sink", "layers.1.attn.wq_a.weight",
        "layers.1.attn.q_norm.weight", "layers.1.attn.kv_norm.weight", "layers.1.attn.compressor.ape",
        "layers.1.attn.indexer.compressor.wgate.weight", "layers.1.attn.indexer.weights_proj.weight",
        "layers.1.hc_attn_fn", "layers.1.hc_ffn_scale", "layers.1.attn_norm.weight", "layers.1.ffn_norm.weight",
    }  # fmt: skip
    assert expected <= names
    assert not any(name.startswith("model.") for name in names)


def test_transformers_reads_what_we_write(saved) -> None:
    model, directory = saved
    theirs = TransformersV4.from_pretrained(directory).eval()
    tokens = torch.randint(0, VOCABULARY, (2, 15))
    assert (theirs(tokens, use_cache=False).logits - model(tokens).logits).abs().max() <= 1e-5


def test_we_read_what_transformers_writes(tmp_path) -> None:
    theirs = transformers_model(1)
    tokens = torch.randint(0, VOCABULARY, (2, 15))
    ours = saved_twin(theirs, tmp_path)
    assert (theirs(tokens, use_cache=False).logits - ours(tokens).logits).abs().max() <= 1e-5


def test_shards_have_an_index_and_load(saved, monkeypatch) -> None:
    model, directory = saved
    (directory / "model.safetensors").unlink()
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1 << 20)
    model.save_pretrained(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    again = DeepseekV4ForCausalLM.from_pretrained(directory)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    (directory / sorted(set(index["weight_map"].values()))[1]).unlink()
    with pytest.raises(CheckpointError, match="shards"):
        DeepseekV4ForCausalLM.from_pretrained(directory)


def test_bfloat16_keeps_the_delicate_tensors_in_float32(saved) -> None:
    model = DeepseekV4ForCausalLM.from_pretrained(saved[1], dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kinds["model.layers.1.attn.wq_a.weight"] == torch.bfloat16
    for name in ("model.layers.1.attn.attn_sink", "model.layers.1.hc_attn.fn", "model.layers.1.attn.compressor.ape",
                 "model.norm.weight", "model.layers.1.ffn.gate.bias"):  # fmt: skip
        assert kinds[name] == torch.float32, name


def _broken(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.attn.attn_sink"), "attn_sink"),
        (lambda t: t.pop("layers.2.ffn.experts.3.w1.weight"), "layers.2.ffn.experts.w13"),
        (lambda t: t.update({"layers.9.attn.wq_a.weight": torch.zeros(2)}), "layers.9.attn.wq_a.weight"),
        (lambda t: t.update({"layers.2.ffn.experts.8.w1.weight": torch.zeros(64, 64)}), "experts.8.w1"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), "norm.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor(saved, change, message: str) -> None:
    _broken(saved[1], change)
    with pytest.raises(CheckpointError, match=message):
        DeepseekV4ForCausalLM.from_pretrained(saved[1])


def test_speculative_layers_are_passed_over(saved) -> None:
    _broken(saved[1], lambda tensors: tensors.update({"mtp.0.norm.weight": torch.zeros(3)}))
    DeepseekV4ForCausalLM.from_pretrained(saved[1])


def test_a_cut_off_file_is_named(saved) -> None:
    file = saved[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        DeepseekV4ForCausalLM.from_pretrained(saved[1])


def test_missing_directories_and_foreign_configs_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        DeepseekV4ForCausalLM.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        DeepseekV4ForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="llama"):
        DeepseekV4ForCausalLM.from_pretrained(tmp_path)
