"""The trainers on this project's own V4: padding, names of weights, Muon's matrices, teachers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.models.deepseek_v4.layers import Gate
from posttrain.optim import build_optimizer
from posttrain.optim.build import is_muon_matrix, stacked_matrices
from posttrain.recipe.stages import GrpoStage, OpdStage, OptimizerConfig, SftStage
from posttrain.trainers.grpo import train_grpo
from posttrain.trainers.jobs import GrpoJob, OpdJob
from posttrain.trainers.masked import masked_logprob
from posttrain.trainers.models import load_model, load_tokenizer, save_checkpoint
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import train_sft
from rollouts.masks import encode_kept
from rollouts.types import Completion, FinishedGroup, GroupRequest
from tests.test_trainers_grpo import share_of_target
from tests.test_trainers_opd import LocalTeachers
from tests.test_trainers_sft import row
from tests.trainers_kit import EOS, PAD, VOCABULARY, LocalClient, Recorder, Running, prompts, tiny_tokenizer

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


class Routed(LocalClient):
    """Returns routes: those of the engine's model, or of other experts."""

    def __init__(self, model: DeepseekV4ForCausalLM, shift: int = 0) -> None:
        super().__init__(model)
        self.shift = shift
        self.routes: dict[tuple[int, ...], torch.Tensor] = {}
        """By the tokens that they belong to."""

    def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
        assert request.sampling.routes
        return FinishedGroup(
            request, [replace(one, routes=self._routes([*request.prompt_ids, *one.token_ids])) for one in completions]
        )

    def _routes(self, tokens: list[int]) -> np.ndarray:
        with chosen_experts(self.model) as chosen, torch.no_grad():
            self.model(torch.tensor([tokens[:-1]]))
        routes_TLK = (torch.stack(chosen, 1) + self.shift) % self.model.config.n_routed_experts
        self.routes[tuple(tokens)] = routes_TLK
        return routes_TLK.numpy().astype(np.uint8)


@contextmanager
def chosen_experts(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the routers return while the context is open, layer by layer: `[tokens, k]`."""
    chosen: list[torch.Tensor] = []
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    hooks = [gate.register_forward_hook(lambda *call: chosen.append(call[2][0])) for gate in gates]
    yield chosen
    for hook in hooks:
        hook.remove()


def train_routed(model: DeepseekV4ForCausalLM, client: LocalClient, **options: Any) -> list[dict[str, float]]:
    optimizer = OptimizerConfig(lr=5e-3)
    config = GrpoStage(**{"kind": "grpo", "prompts_per_step": 4, "group_size": 2, "optimizer": optimizer} | options)
    job, recorder = GrpoJob("expert/d/grpo", config, "", "", prompts("d", TEXTS), 6, share_of_target), Recorder()
    progress = Progress(recorder, job.stage, config.steps, config.updates_per_batch)
    train_grpo(model, tiny_tokenizer(), job, client, 1, progress)
    return recorder.lines


def test_under_keep_routing_the_trainer_uses_the_samplers_experts(model: DeepseekV4ForCausalLM) -> None:
    """In every update on a batch, whose rows are shuffled; of the last token of an answer nothing is known."""
    client, passes = Routed(copy.deepcopy(model), shift=1), []
    hook = model.model.register_forward_pre_hook(lambda _, arguments: passes.append(arguments))
    with chosen_experts(model) as chosen:
        train_routed(model, client, steps=1, updates_per_batch=2, keep_routing=True)
    hook.remove()
    layers = [number for number, layer in enumerate(model.model.layers) if not layer.ffn.gate.hashed]
    assert len(passes) == 2 and len(client.routes) == 8
    for number, (ids_BS, mask_BS) in enumerate(passes):
        each = len(model.model.layers)
        used_TLK = torch.stack(chosen[number * each : (number + 1) * each], 1)
        lengths = mask_BS.sum(dim=1).tolist()
        for ids_S, mask_S, used in zip(ids_BS, mask_BS.bool(), used_TLK.split(lengths), strict=True):
            assert torch.equal(used[:-1, layers], client.routes[tuple(ids_S[mask_S].tolist())][:, layers])


def test_keeping_the_routing_that_the_model_would_choose_changes_no_bit(model: DeepseekV4ForCausalLM) -> None:
    plain = copy.deepcopy(model)
    lines = train_routed(model, Routed(copy.deepcopy(model)), steps=2, keep_routing=True)
    expected = train_routed(plain, LocalClient(copy.deepcopy(plain)), steps=2)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


class Nucleus(LocalClient):
    """Samples under top-p, and says which tokens that left."""

    def __init__(self, model: DeepseekV4ForCausalLM) -> None:
        super().__init__(model)
        self.kept: dict[tuple[str, int], list[bytes]] = {}

    def _next_logits(self, samples: Sequence[Running]) -> torch.Tensor:
        logits_BV = super()._next_logits(samples)
        for logits_V, sample in zip(logits_BV, samples, strict=True):
            assert sample.request.sampling.masks
            order = logits_V.argsort(descending=True)
            mass = logits_V[order].softmax(-1).cumsum(-1)
            logits_V[order[1:][mass[:-1] > sample.request.sampling.top_p]] = -torch.inf
            kept = encode_kept((logits_V > -torch.inf).numpy())
            self.kept.setdefault((sample.request.id, sample.number), []).append(kept)
        return logits_BV

    def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
        masked = [replace(one, masks=tuple(self.kept[request.id, at])) for at, one in enumerate(completions)]
        return FinishedGroup(request, masked)


def test_under_top_p_the_trainer_compares_probabilities_of_the_same_tokens(model: DeepseekV4ForCausalLM) -> None:
    """In every update on a batch: a row's mask with another row's tokens would make an infinite loss."""
    lines = train_routed(model, Nucleus(copy.deepcopy(model)), steps=2, updates_per_batch=3, top_p=0.5, beta=0.01)
    assert max(line["logprob_diff_max"] for line in lines) < 1e-5
    assert all(0 < line["entropy"] < 3 for line in lines)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masked_logprobs_have_the_gradient_of_a_softmax_over_what_is_kept(temperature: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1000, 8, requires_grad=True)
    head, tokens = torch.randn(11, 8, requires_grad=True), torch.randint(0, 11, (1000,))
    kept = torch.rand(1000, 11) < 0.5
    kept[range(1000), tokens] = True
    masks, slope = [encode_kept(row) for row in kept.numpy()], torch.randn(1000)
    logits = (hidden @ head.T / temperature).masked_fill(~kept, -torch.inf)
    expected = torch.distributions.Categorical(logits=logits)
    found = masked_logprob(hidden, head, tokens, temperature, masks)
    torch.testing.assert_close(found[0], expected.log_prob(tokens), atol=1e-5, rtol=0)
    by_hand = torch.stack([-(p[p > 0] * p[p > 0].log()).sum() for p in expected.probs.detach()])
    torch.testing.assert_close(found[1], by_hand, atol=1e-5, rtol=0)
    ours = torch.autograd.grad((found[0] * slope).sum(), (hidden, head))
    theirs = torch.autograd.grad((torch.log_softmax(logits, -1)[range(1000), tokens] * slope).sum(), (hidden, head))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


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
