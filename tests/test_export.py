"""Quantisation-aware training from end to end: masters move, the engine samples from the same rounded weights, and an
exported checkpoint holds exactly these."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM as TransformersV4
from transformers import FineGrainedFP8Config
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.kernels.quant.op import fake_quantize_mxfp4, unpack_rows_mxfp4
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, checkpoint, make_config
from posttrain.models.deepseek_v4.checkpoint import CheckpointError, iterate_tensors, load_into
from posttrain.models.deepseek_v4.export import engine_obstacles, export_checkpoint
from posttrain.models.deepseek_v4.model import DeepseekV4Model
from posttrain.models.deepseek_v4.presets import HEAVY, SPARSE
from posttrain.recipe.schema import ModelConfig, Recipe, RolloutConfig
from posttrain.recipe.stages import OptimizerConfig, SftStage
from posttrain.trainers.models import load_model, publishable_weights
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import train_sft
from rollouts.plugin.config import PosttrainDeepseekV4Config, engine_fields
from rollouts.pool import RolloutClient, RolloutPool
from rollouts.settings import engine_settings, write_description
from rollouts.types import Sampling
from rollouts.vllm_deepseek_v4 import unpacked
from tests import trainers_kit
from tests.test_native_engine import BOUND, prompts, trainer_logprobs
from tests.test_trainers_sft import row
from tests.v4_models import VOCABULARY, our_model, randomise

QAT = {"precision": "fp4_experts"}
RELEASED = {"compress_rates": {SPARSE: 4, HEAVY: 128}}


def expert_matrices(model: DeepseekV4ForCausalLM) -> list[torch.Tensor]:
    """What tokens meet, in every layer."""
    return [matrix.detach() for layer in model.model.layers for matrix in layer.ffn.experts.matrices()]


def masters(model: DeepseekV4ForCausalLM) -> list[torch.Tensor]:
    return [matrix.detach() for layer in model.model.layers for matrix in (layer.ffn.experts.w13, layer.ffn.experts.w2)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_tokens_meet_rounded_experts_and_nothing_else_changes() -> None:
    trained, plain = our_model(0, **QAT), our_model(0)
    assert equal(masters(trained), masters(plain))
    for layer in plain.model.layers:
        for parameter in layer.ffn.experts.parameters():
            parameter.data = fake_quantize_mxfp4(parameter.data)
    assert equal(expert_matrices(trained), expert_matrices(plain))
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    assert torch.equal(trained(tokens).logits, plain(tokens).logits)


def test_an_sft_step_moves_the_master_weights_and_the_loss_falls() -> None:
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": trainers_kit.EOS, "pad_token_id": trainers_kit.PAD}
    config = make_config("tiny", precision="fp4_experts", vocab_size=trainers_kit.VOCABULARY, **ids)
    model = DeepseekV4ForCausalLM(config)
    before = [matrix.clone() for matrix in masters(model)]
    recorder = trainers_kit.Recorder()
    stage = SftStage(steps=15, batch_size=4, optimizer=OptimizerConfig(lr=3e-3))
    rows = [row("say a", "aaa"), row("b", "bb"), row("what is c?", "c"), row("d d d", "dd")]
    train_sft(model, trainers_kit.tiny_tokenizer(), rows, stage, 0, Progress(recorder, "base", 15))
    assert recorder.lines[-1]["loss"] < recorder.lines[0]["loss"] / 2
    for old, new in zip(before, masters(model), strict=True):
        assert not torch.equal(old, new)
        assert not torch.equal(new, fake_quantize_mxfp4(new)), "masters are not rounded themselves"


@pytest.mark.parametrize(("precision", "dtype"), [("fp4_experts", torch.float32), ("bf16_fp4_experts", torch.bfloat16)])
def test_engines_are_sent_what_tokens_meet_in_little_more_than_half_a_byte(
    precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    our_model(0, precision=precision).save_pretrained(tmp_path)
    model = load_model("deepseek_v4", tmp_path)
    weights = publishable_weights(model)
    for number, layer in enumerate(model.model.layers):
        assert layer.ffn.experts.w13.dtype is dtype
        for name, matrix in zip(("w13", "w2"), layer.ffn.experts.matrices(), strict=True):
            sent = torch.from_numpy(weights[f"model.layers.{number}.ffn.experts.{name}"])
            assert torch.equal(unpack_rows_mxfp4(sent, dtype), matrix)
            assert sent.nbytes == matrix.numel() * 17 / 32


def test_a_sampler_that_reads_a_checkpoint_holds_what_a_trainer_would_send(tmp_path: Path) -> None:
    model = our_model(0, **QAT)
    model.save_pretrained(tmp_path)
    held = {f"model.{name}": tensor for name, tensor in DeepseekV4Model(model.config, packed=True).state_dict().items()}
    held["lm_head.weight"] = torch.zeros_like(model.lm_head.weight)
    load_into(held, iterate_tensors(tmp_path), "test")
    sent = model.engine_state_dict()
    assert held.keys() == sent.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in sent.items())


def test_vllms_own_model_is_given_the_numbers_that_packed_experts_stand_for() -> None:
    model = our_model(0, **QAT)
    weights = unpacked(model.engine_state_dict())
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    found = [weights[f"model.layers.{layer}.ffn.experts.{name}"] for layer in range(4) for name in ("w13", "w2")]
    assert equal(found, expert_matrices(model))


def test_a_model_that_nobody_trains_is_rounded_once() -> None:
    model, frozen = our_model(0, **QAT), our_model(0, **QAT)
    for layer in frozen.model.layers:
        layer.ffn.experts.round_masters()
    assert equal(masters(frozen), expert_matrices(model))
    assert equal(expert_matrices(frozen), expert_matrices(model))
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    assert torch.equal(frozen(tokens).logits, model(tokens).logits)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutClient]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    directory = tmp_path_factory.mktemp("engine")
    our_model(0, **QAT).save_pretrained(directory / "checkpoint")
    write_description(directory / "checkpoint", directory / "description", "native")
    rollout = RolloutConfig(max_model_len=192, max_num_seqs=16, max_num_batched_tokens=64, kv_cache_mib=32)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with RolloutPool(engine_settings(directory / "description", "native", rollout, threads=1), workers=1) as pool:
            yield pool.client()
    finally:
        ray.shutdown()


def test_the_sampler_meets_the_trainers_weights_before_and_after_an_update(engine: RolloutClient) -> None:
    asked = prompts()[::3]
    for version, seed in ((1, 0), (2, 5)):
        model = our_model(seed, **QAT)
        engine.publish(model.engine_state_dict(), version)
        unrounded = our_model(seed)
        worst = apart = 0.0
        groups = engine.generate(asked, Sampling(max_tokens=24, temperature=1.0, seed=version))
        for prompt, (sample,) in zip(asked, groups, strict=True):
            sampled = torch.tensor(sample.logprobs)
            ours = trainer_logprobs(model, prompt, sample.token_ids, 1.0)
            worst = max(worst, (ours - sampled).abs().max().item())
            theirs = trainer_logprobs(unrounded, prompt, sample.token_ids, 1.0)
            apart = max(apart, (theirs - sampled).abs().max().item())
        assert worst <= BOUND
        assert apart > 0.05, "rounding the experts shows"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeepseekV4ForCausalLM, Path]:
    """A model with the released compression rates, its checkpoint, and a tokenizer's file beside it."""
    model, path = our_model(3, **QAT, **RELEASED), tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return model, path


def exported(saved: tuple[DeepseekV4ForCausalLM, Path], tmp_path: Path, kind: Any) -> Path:
    export_checkpoint(saved[1], tmp_path / kind, kind)
    return tmp_path / kind


@pytest.mark.parametrize("kind", ["bf16", "fp8_fp4"])
def test_the_experts_come_back_bit_by_bit(saved, tmp_path: Path, kind: str) -> None:
    model = saved[0]
    again = DeepseekV4ForCausalLM.from_pretrained(exported(saved, tmp_path, kind))
    assert equal(expert_matrices(model), expert_matrices(again))
    assert equal(expert_matrices(model), masters(again))
    assert again.config.precision == "fp4_experts"
    own, read = model.config.to_dict(), again.config.to_dict()
    assert {key: read.get(key) for key in own} == own | {"dtype": read.get("dtype")}
    assert (tmp_path / kind / "tokenizer.json").is_file()
    # A second export of what was read changes no number.
    again.save_pretrained(tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "second", kind)
    twice = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "second")
    for (name, one), other in zip(again.state_dict().items(), twice.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_the_other_linears_are_within_fp8s_rounding(saved, tmp_path: Path) -> None:
    again = DeepseekV4ForCausalLM.from_pretrained(exported(saved, tmp_path, "fp8_fp4")).state_dict()
    for name, own in saved[0].state_dict().items():
        if ".experts." in name:
            continue
        delicate = checkpoint.FLOAT32.search(name.replace(".hc_attn.", ".hc_").replace(".hc_ffn.", ".hc_"))
        if delicate or not own.is_floating_point():
            assert torch.equal(own, again[name]), name
        else:  # half a unit in the last of 3 mantissa bits, or of the smallest number: 448 is at most twice the largest
            smallest = own.abs().max() * 2 / 448 * 2**-9
            assert ((own - again[name]).abs() <= own.abs() / 16 + smallest).all(), name


def test_names_dtypes_and_config_are_those_of_released_checkpoints(saved, tmp_path: Path) -> None:
    directory = exported(saved, tmp_path, "fp8_fp4")
    tensors = load_file(directory / "model.safetensors")
    kinds = {
        "layers.1.ffn.experts.7.w1.weight": (torch.int8, [64, 32]),
        "layers.1.ffn.experts.7.w1.scale": (torch.float8_e8m0fnu, [64, 2]),
        "layers.1.ffn.experts.7.w2.scale": (torch.float8_e8m0fnu, [64, 2]),
        "layers.1.ffn.shared_experts.w3.weight": (torch.float8_e4m3fn, [64, 64]),
        "layers.1.ffn.shared_experts.w3.scale": (torch.float8_e8m0fnu, [1, 1]),
        "layers.1.attn.wq_b.weight": (torch.float8_e4m3fn, [128, 48]),
        "layers.1.attn.wo_a.scale": (torch.float8_e8m0fnu, [1, 1]),
        "layers.1.attn.indexer.wq_b.scale": (torch.float8_e8m0fnu, [1, 1]),
        "layers.1.attn.indexer.weights_proj.weight": (torch.bfloat16, [4, 64]),
        "layers.1.attn.compressor.wkv.weight": (torch.bfloat16, [64, 64]),
        "layers.1.ffn.gate.weight": (torch.bfloat16, [8, 64]),
        "layers.1.ffn.gate.bias": (torch.float32, [8]),
        "layers.1.attn.attn_sink": (torch.float32, [4]),
        "layers.0.ffn.gate.tid2eid": (torch.int64, [VOCABULARY, 2]),
        "embed.weight": (torch.bfloat16, [VOCABULARY, 64]),
        "head.weight": (torch.bfloat16, [VOCABULARY, 64]),
    }
    assert {name: (tensors[name].dtype, list(tensors[name].shape)) for name in kinds} == kinds
    quantised = {name for name, tensor in tensors.items() if tensor.dtype in checkpoint.QUANTISED}
    assert {name for name in tensors if name.endswith(".scale")} == {
        name.removesuffix("weight") + "scale" for name in quantised
    }
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    assert (config["expert_dtype"], config["compress_ratios"], config["num_hash_layers"]) == ("fp4", [0, 4, 128, 4], 1)


def test_vllms_own_classes_take_config_and_names(saved, tmp_path: Path) -> None:
    from vllm.models.deepseek_v4.quant_config import DeepseekV4FP8Config
    from vllm.transformers_utils.configs.deepseek_v4 import DeepseekV4Config

    fields = json.loads((exported(saved, tmp_path, "fp8_fp4") / "config.json").read_text())
    config = DeepseekV4Config(**fields)
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 1
    method = DeepseekV4FP8Config.override_quantization_method(fields["quantization_config"], None, config)
    assert method == "deepseek_v4_fp8"
    assert DeepseekV4FP8Config.from_config(fields["quantization_config"]).weight_block_size == [128, 128]


def test_transformers_reads_the_same_experts(saved, tmp_path: Path) -> None:
    """Its dequantisation is not ours."""
    directory = exported(saved, tmp_path, "fp8_fp4")
    ours = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    theirs = TransformersV4.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    for mine, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        assert torch.equal(mine.ffn.experts.w13, other.mlp.experts.gate_up_proj.to(torch.bfloat16))
        assert torch.equal(mine.ffn.experts.w2, other.mlp.experts.down_proj.to(torch.bfloat16))
        assert torch.equal(mine.attn.wq_a.weight, other.self_attn.q_a_proj.weight.to(torch.bfloat16))


def test_scales_are_found_in_other_shards(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = DeepseekV4ForCausalLM.from_pretrained(exported(saved, tmp_path, "fp8_fp4"))
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 3000)
    directory = tmp_path / "shards"
    export_checkpoint(saved[1], directory, "fp8_fp4")
    assert len(list(directory.glob("*.safetensors"))) > 50
    again = DeepseekV4ForCausalLM.from_pretrained(directory)
    assert equal(list(whole.state_dict().values()), list(again.state_dict().values()))


def test_a_checkpoint_without_its_scales_is_refused_by_tensor(saved, tmp_path: Path) -> None:
    directory = exported(saved, tmp_path, "fp8_fp4")
    tensors = load_file(directory / "model.safetensors")
    scales = tensors.pop("layers.2.ffn.experts.3.w1.scale")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.experts\.3\.w1\.weight is torch.int8 and there is no"):
        DeepseekV4ForCausalLM.from_pretrained(directory)
    tensors["layers.2.ffn.experts.3.w1.scale"] = scales[:, :1].contiguous()
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.3\.w1\.weight.*scales has shape \[64, 1\]"):
        DeepseekV4ForCausalLM.from_pretrained(directory)


def test_the_command_exports_and_says_what_vllm_would_refuse(saved, tmp_path: Path) -> None:
    def export(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["export", *arguments])

    done = export(str(saved[1]), str(tmp_path / "out"), "--format", "fp8_fp4")
    assert done.exit_code == 0, done.output
    assert "head_dim is 32; vLLM's own V4 needs 512" in done.output
    DeepseekV4ForCausalLM.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "routed experts in MXFP4" in card and "head_dim is 32" in card and "## Results" not in card
    assert export(str(saved[1]), str(tmp_path / "out")).exit_code == 2, "never over something that is there"
    assert export(str(tmp_path), str(tmp_path / "other")).exit_code == 2, "no checkpoint"
    assert export(str(saved[1]), str(tmp_path / "other"), "--format", "int4").exit_code == 2
    assert not (tmp_path / "other").exists()


def test_a_model_of_the_released_shape_has_no_obstacles() -> None:
    assert engine_obstacles(make_config({"num_hidden_layers": 4})) == []


def test_a_checkpoint_keeps_its_precision(tmp_path: Path) -> None:
    our_model(0, precision="bf16").save_pretrained(tmp_path)
    again = DeepseekV4ForCausalLM.from_pretrained(tmp_path)
    assert again.config.precision == "bf16" and again.lm_head.weight.dtype is torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    assert PosttrainDeepseekV4Config(v4=engine_fields(config)["v4"]).v4_config().precision == "bf16"
    (tmp_path / "config.json").write_text(json.dumps(config | {"precision": "int3"}))
    with pytest.raises(CheckpointError, match="precision is 'int3'; expected one of fp32, bf16, fp4_experts"):
        DeepseekV4ForCausalLM.from_pretrained(tmp_path)


def test_widths_that_have_no_groups_of_32_are_refused() -> None:
    with pytest.raises(ValueError, match="moe_intermediate_size is 40; precision fp4_experts needs a multiple of 32"):
        our_model(0, moe_intermediate_size=40, **QAT)


@pytest.mark.parametrize(
    ("model", "rollout", "message"),
    [
        ({"config": "tiny", "precision": "fp8"}, {}, "fp4_experts"),
        ({"config": {"model_type": "qwen3"}, "family": "hf", "precision": "fp4_experts"}, {}, "family deepseek_v4"),
        ({"config": "tiny", "precision": "bf16"}, {}, "must be bfloat16"),
    ],
)
def test_precisions_that_do_not_fit_are_refused(model: dict[str, Any], rollout: dict[str, Any], message: str) -> None:
    domain = {"d": {"source": {"jsonl": "x.jsonl"}}}
    stages = {"experts": {"per_domain": [{"kind": "sft"}]}}
    with pytest.raises(ValueError, match=message):
        Recipe(name="r", model=model, rollout=rollout, domains=domain, stages=stages)
    assert ModelConfig(config="tiny").precision is None


def test_an_engines_copy_follows_writes_in_place() -> None:
    """As `randomise` and loading do: nothing that was rounded before stays in use."""
    model = our_model(0, **QAT).requires_grad_(False)
    with torch.inference_mode():
        before = expert_matrices(model)
    randomise(model)
    with torch.inference_mode():
        assert not equal(before, expert_matrices(model))
        assert equal(expert_matrices(model), [fake_quantize_mxfp4(one) for one in masters(model)])
