"""The trainers on this project's own V4: padding, names of weights, Muon's matrices, teachers."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.optim import build_optimizer
from posttrain.optim.build import is_muon_matrix, stacked_matrices
from posttrain.recipe.schema import GrpoStage, OpdStage, OptimizerConfig, SftStage
from posttrain.trainers.grpo import train_grpo
from posttrain.trainers.jobs import GrpoJob, OpdJob
from posttrain.trainers.models import load_model, load_tokenizer, save_checkpoint
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import train_sft
from tests.test_trainers_grpo import share_of_target
from tests.test_trainers_opd import LocalTeachers
from tests.test_trainers_sft import row
from tests.trainers_kit import EOS, PAD, VOCABULARY, LocalClient, Recorder, prompts, tiny_tokenizer

TEXTS = ["a?", "hello world", "what is 12 + 30?", "b"]


@pytest.fixture
def model() -> DeepseekV4ForCausalLM:
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    return DeepseekV4ForCausalLM(make_config("tiny", **tokens))


def test_muon_takes_apart_what_v4_stacks(model: DeepseekV4ForCausalLM) -> None:
    stacked = {
        name: stacked_matrices(model, name)
        for name, parameter in model.named_parameters()
        if is_muon_matrix(model, name, parameter)
    }
    assert stacked["model.layers.1.ffn.experts.w13"] == 2
    assert stacked["model.layers.1.ffn.shared_experts.w13"] == 2
    assert stacked["model.layers.1.ffn.experts.w2"] == 1
    assert stacked["model.layers.1.attn.wo_a.weight"] == model.config.o_groups == 2
    assert stacked["model.layers.1.hc_attn.fn"] == 1
    others = {name for name, _ in model.named_parameters()} - set(stacked)
    for name in ("embed.weight", "layers.1.attn.compressor.ape", "layers.1.hc_attn.base", "layers.1.attn.attn_sink"):
        assert f"model.{name}" in others
    assert "lm_head.weight" in others


def test_adamw_keeps_what_the_report_gives_it_and_tables_over_positions(model: DeepseekV4ForCausalLM) -> None:
    """Embedding, head, norms, mHC's static biases and gates (report §5.5); beyond these, sinks and position biases."""
    ends = {
        re.sub(r"^.*?(attn_sink|norm\.weight|ape|(hc_head_|hc_(attn|ffn)\.)(base|scale))$", r"\1", name)
        for name, parameter in model.named_parameters()
        if not is_muon_matrix(model, name, parameter)
    }
    sites = {f"hc_{site}{part}" for site in ("head_", "attn.", "ffn.") for part in ("base", "scale")}
    assert ends == {"model.embed.weight", "lm_head.weight", "norm.weight", "attn_sink", "ape", *sites}


def test_muon_trains_it(model: DeepseekV4ForCausalLM) -> None:
    recorder = Recorder()
    config = SftStage(steps=12, batch_size=4, optimizer=OptimizerConfig(name="muon", lr=5e-3))
    rows = [row("say a", "aaa"), row("b", "bb"), row("what is c?", "c"), row("d d d", "dd")]
    train_sft(model, tiny_tokenizer(), rows, config, 0, Progress(recorder, "base", 12))
    assert recorder.lines[-1]["loss"] < recorder.lines[0]["loss"] / 2


def test_the_indexer_gets_no_gradient_and_no_update(model: DeepseekV4ForCausalLM) -> None:
    optimizer, _ = build_optimizer(model, OptimizerConfig(name="muon"), steps=1)
    before = copy.deepcopy(model.model.layers[1].attn.indexer.state_dict())
    tokens = torch.randint(2, VOCABULARY, (2, 24))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    after = model.model.layers[1].attn.indexer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_padded_batches_give_the_samplers_logprobs(model: DeepseekV4ForCausalLM) -> None:
    config = GrpoStage(kind="grpo", steps=3, prompts_per_step=4, group_size=2, optimizer=OptimizerConfig(lr=5e-3))
    job = GrpoJob("expert/d/grpo", config, "", "", prompts("d", TEXTS), 6, share_of_target)
    client = LocalClient(copy.deepcopy(model))
    start = copy.deepcopy(model)
    difference = train_grpo(model, tiny_tokenizer(), job, client, 1, Progress(None, job.stage, 3)).difference
    assert difference.tokens > 0
    assert difference.largest < 1e-5
    assert not torch.equal(start.lm_head.weight, client.model.lm_head.weight)  # the sampler follows the updates


def test_a_v4_teacher_equal_to_the_student_teaches_nothing(model: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "expert")
    assert load_tokenizer(tmp_path / "expert").eos_token_id == EOS
    assert type(load_model("deepseek_v4", tmp_path / "expert")) is DeepseekV4ForCausalLM
    teachers, recorder = LocalTeachers("deepseek_v4"), Recorder()
    config = OpdStage(steps=1, batch_size=4)
    job = OpdJob(
        *("student", config, "", "", {"d": prompts("d", TEXTS)}),
        *({"d": str(tmp_path / "expert")}, {"d": 6}),
    )
    progress = Progress(recorder, "student", 1)
    train_opd(model, tiny_tokenizer(), job, LocalClient(copy.deepcopy(model)), teachers, 1, progress)
    assert abs(recorder.lines[0]["kl/d"]) < 1e-6
    assert recorder.lines[0]["top1_agreement/d"] == 1
