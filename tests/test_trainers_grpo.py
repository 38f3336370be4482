"""GRPO: exact prompts, the loss and its gradient, and learning from a reward."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posttrain.errors import RunFailed
from posttrain.observe.metrics import MetricsLog, read_metrics
from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import GrpoStage, OptimizerConfig
from posttrain.trainers.grpo import train_grpo
from posttrain.trainers.jobs import GrpoJob
from posttrain.trainers.mismatch import LogprobDifference
from posttrain.trainers.progress import Progress
from posttrain.trainers.settings import cycle
from posttrain.trainers.trl_seam import GroupRelativeTrainer, GRPOTrainer
from rollouts.types import Completion, FinishedGroup, GroupRequest, VersionSpan
from tests.trainers_kit import LETTERS, LocalClient, Recorder, prompts, tiny_model, tiny_tokenizer, tokens

TARGET = tokens("e")[0]
TEXTS = ["what?", "say something", "a", "hello 1234", "b=", "why not?"]


def share_of_target(
    problem_ids: Sequence[str], completion_ids: Sequence[Sequence[int]], finish_reasons: Sequence[str]
) -> tuple[list[float], list[dict[str, float]]]:
    rewards = [sum(token == TARGET for token in tokens) / len(tokens) for tokens in completion_ids]
    return rewards, [{"share": reward} for reward in rewards]


class Gradients(Progress):
    """Keeps the gradient of the first update."""

    gradient: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.gradient is None:
            self.gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def train(
    model: torch.nn.Module,
    client: LocalClient | None = None,
    reward=share_of_target,
    max_new_tokens: int = 6,
    rollout: RolloutConfig | None = None,
    **config,
):  # type: ignore[no-untyped-def]
    settings = {"kind": "grpo", "steps": 1, "prompts_per_step": 4, "group_size": 4} | config
    stage = GrpoStage(**settings)
    recorder = Recorder()
    progress = Gradients(recorder, "expert/d/grpo", stage.steps, stage.updates_per_batch)
    client = client or LocalClient(copy.deepcopy(model))
    job = GrpoJob(
        "expert/d/grpo", stage, "", "", prompts("d", TEXTS), max_new_tokens, reward, rollout or RolloutConfig()
    )
    sampled = train_grpo(model, tiny_tokenizer(), job, client, 5, progress)
    return recorder, progress, client, sampled


def test_the_sampler_gets_every_prompt_once_with_its_exact_tokens() -> None:
    _, _, client, _ = train(tiny_model(0), steps=2, temperature=0.7)
    first, second = client.batches
    assert [request.prompt_ids for request in first] == [list(tokens(text)) for text in TEXTS[:4]]
    # then the list starts again, in another order
    assert [request.prompt_ids for request in second[:2]] == [list(tokens(text)) for text in TEXTS[4:]]
    sampling = first[0].sampling
    assert (sampling.n, sampling.temperature, sampling.max_tokens) == (4, 0.7, 6)
    assert sampling.seed != second[0].sampling.seed
    assert [(request.id, request.index) for request in first] == [(f"expert/d/grpo/0/{row}", row) for row in range(4)]
    assert client.consumed == [request.id for request in [*first, *second]]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "group", "dr_grpo"])
@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_the_gradient_is_the_one_computed_by_hand(loss_type: str, scale_rewards: str) -> None:
    model = tiny_model(0)
    start, client = copy.deepcopy(model), LocalClient(copy.deepcopy(model))
    sampled: list[Completion] = []
    original = client.answer

    def answer(request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
        sampled.extend(completions)
        return original(request, completions)

    client.answer = answer  # type: ignore[method-assign]
    optimizer = OptimizerConfig(lr=1e-6, max_grad_norm=1e9)
    recorder, progress, _, _ = train(
        model, client, loss_type=loss_type, scale_rewards=scale_rewards, optimizer=optimizer
    )

    rewards = torch.tensor(share_of_target([], [sample.token_ids for sample in sampled], [])[0]).view(4, 4)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    terms = []
    for index, (sample, advantage) in enumerate(zip(sampled, advantages.flatten(), strict=True)):
        prompt = list(tokens(TEXTS[index // 4]))
        input_ids = torch.tensor([prompt + sample.token_ids])
        logits = start(input_ids=input_ids).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, dim=-1)[range(len(sample.token_ids)), sample.token_ids]
        terms.append(-advantage * torch.exp(logps - logps.detach()))
    count = sum(map(len, terms))
    loss = {
        "grpo": torch.stack([term.mean() for term in terms]).mean(),
        "dapo": torch.cat(terms).sum() / count,
        "bnpo": torch.cat(terms).sum() / count,
        "group": torch.stack([torch.cat(terms[first : first + 4]).mean() for first in range(0, 16, 4)]).mean(),
        "dr_grpo": torch.cat(terms).sum() / (len(terms) * 6),
    }[loss_type]
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in start.parameters()])
    assert expected.norm() > 1e-3
    assert (progress.gradient - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
    assert recorder.lines[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
def test_leaving_out_the_second_forward_pass_changes_nothing(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tiny_model(0), tiny_model(0)
    optimizer = OptimizerConfig(lr=1e-3)
    train(ours, steps=2, updates_per_batch=updates, beta=0.1, optimizer=optimizer)
    monkeypatch.setattr(
        GroupRelativeTrainer, "_get_per_token_logps_and_entropies", GRPOTrainer._get_per_token_logps_and_entropies
    )
    train(theirs, steps=2, updates_per_batch=updates, beta=0.1, optimizer=optimizer)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(left, right, atol=2e-6)


def test_the_reward_rises() -> None:
    recorder, progress, _, sampled = train(
        tiny_model(0), steps=25, prompts_per_step=4, group_size=8, optimizer=OptimizerConfig(lr=1e-2)
    )
    rewards = [line["reward"] for line in recorder.lines]
    assert sum(rewards[-5:]) / 5 > 0.5 > 0.1 > sum(rewards[:2]) / 2
    assert recorder.lines[-1]["reward/share"] == pytest.approx(rewards[-1])
    assert sampled.difference.largest < 1e-4
    assert len(sampled.publish_seconds) == 25
    assert progress.tokens == sampled.difference.tokens
    for name in ("entropy", "zero_std_groups", "clip_fraction", "completion_length", "logprob_k3", "tokens_per_second"):
        assert name in recorder.lines[0]


def test_several_updates_on_a_batch_count_as_one_step() -> None:
    recorder, _, client, sampled = train(tiny_model(0), steps=3, updates_per_batch=2)
    assert [line["step"] for line in recorder.lines] == [1, 2, 3]
    assert len(client.batches) == len(sampled.publish_seconds) == 3


def test_the_penalty_is_measured_against_the_initial_policy() -> None:
    optimizer = OptimizerConfig(lr=1e-2)
    strict, _, _, _ = train(tiny_model(0), steps=12, beta=1.0, optimizer=optimizer)
    loose, _, _, _ = train(tiny_model(0), steps=12, beta=1e-6, optimizer=optimizer)
    assert strict.lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < strict.lines[-1]["kl"] < loose.lines[-1]["kl"] / 2


def test_rewards_belong_to_the_right_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    # These samples are made up, and so are their log-probabilities.
    monkeypatch.setattr("posttrain.trainers.mismatch.LARGEST_MEAN_DIFFERENCE", float("inf"))

    class Echo(LocalClient):
        def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
            made_up = Completion.of_version([request.prompt_ids[0], 1], [-1.0, -1.0], "stop", self.version or 0)
            return FinishedGroup(request, [made_up] * request.sampling.n)

    seen = []

    def reward(problem_ids, completion_ids, finish_reasons):  # type: ignore[no-untyped-def]
        seen.extend(zip(problem_ids, completion_ids, finish_reasons, strict=True))
        return [0.0] * len(problem_ids), [{}] * len(problem_ids)

    model = tiny_model(0)
    train(model, Echo(copy.deepcopy(model)), reward)
    assert len(seen) == 16
    for problem_id, completion, finish_reason in seen:
        assert completion == [tokens(TEXTS[int(problem_id.removeprefix("d/"))])[0], 1]
        assert finish_reason == "stop"


class Changed(LocalClient):
    """Returns completions with some fields replaced."""

    def __init__(self, model: torch.nn.Module, **fields: object) -> None:
        super().__init__(model)
        self.fields = fields

    def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
        return FinishedGroup(request, [replace(sample, **self.fields) for sample in completions])


def test_a_sample_from_stale_weights_stops_the_stage() -> None:
    model = tiny_model(0)
    with pytest.raises(RunFailed, match="weight version 0; when it was asked for, the trainer had published 1"):
        train(model, Changed(copy.deepcopy(model), spans=(VersionSpan(0, 8, 0),)))


def test_an_empty_completion_stops_the_stage() -> None:
    model = tiny_model(0)
    with pytest.raises(RunFailed, match="sample 0 of group expert/d/grpo/0/0 has 0 tokens"):
        train(model, Changed(copy.deepcopy(model), token_ids=[], logprobs=[]))


def test_a_sampler_that_disagrees_is_measured() -> None:
    class Shifted(LocalClient):
        def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
            shifted = [replace(sample, logprobs=[value - 0.01 for value in sample.logprobs]) for sample in completions]
            return FinishedGroup(request, shifted)

    model = tiny_model(0)
    recorder, _, _, sampled = train(model, Shifted(copy.deepcopy(model)))
    difference = sampled.difference
    assert difference.largest == pytest.approx(0.01, abs=1e-4)
    assert recorder.lines[0]["logprob_diff_max"] == pytest.approx(0.01, abs=1e-4)
    assert difference.k3 == pytest.approx(torch.expm1(torch.tensor(0.01)).item() - 0.01, rel=0.05)


def test_the_k3_estimate_is_the_mean_over_all_tokens() -> None:
    difference = LogprobDifference()
    difference.add(torch.tensor([0.5]), torch.tensor([0.0]))
    difference.add(torch.tensor([0.0, -1.0, 0.0]), torch.tensor([0.0, 0.0, 0.0]))
    expected = (torch.expm1(torch.tensor([0.5, -1.0])) - torch.tensor([0.5, -1.0])).sum() / 4
    assert difference.k3 == pytest.approx(expected.item())
    assert (difference.largest, difference.tokens) == (1.0, 4)


def test_prompts_are_used_in_order_and_then_reshuffled() -> None:
    taken = cycle(LETTERS, 3 * len(LETTERS), seed=0)
    rounds = [taken[i : i + len(LETTERS)] for i in range(0, len(taken), len(LETTERS))]
    assert rounds[0] == list(LETTERS)
    assert all(sorted(one) == sorted(LETTERS) for one in rounds)
    assert rounds[1] != rounds[0] != rounds[2]


def test_a_sampler_of_another_model_ends_the_run() -> None:
    difference = LogprobDifference()
    difference.add(torch.full((8,), -1.0), torch.full((8,), -1.1))
    with pytest.raises(RunFailed, match="nats from the trainer's"):
        difference.add(torch.full((8,), -1.0), torch.full((8,), -2.0))
    with pytest.raises(RunFailed, match="nats from the trainer's"):
        difference.add(torch.full((8,), float("nan")), torch.full((8,), -2.0))


def test_the_best_and_the_worst_answer_of_a_group_are_written_down_token_by_token(tmp_path: Path) -> None:
    def reward(problem_ids, completion_ids, finish_reasons):  # type: ignore[no-untyped-def]
        values = [float(sum(tokens) % 5) for tokens in completion_ids]
        return values, [{"sum": value} for value in values]

    stage = GrpoStage(
        kind="grpo", steps=2, prompts_per_step=2, group_size=4, beta=0.1, optimizer=OptimizerConfig(lr=1e-3)
    )
    progress = Progress(Recorder(), "expert/d/grpo", 2, 1, MetricsLog(tmp_path / "traces.jsonl"))
    model = tiny_model(0)
    job = GrpoJob("expert/d/grpo", stage, "", "", prompts("d", TEXTS), 6, reward)
    train_grpo(model, tiny_tokenizer(), job, LocalClient(copy.deepcopy(model)), 5, progress)
    traces = read_metrics(tmp_path / "traces.jsonl")
    assert sorted({trace["step"] for trace in traces}) == [1, 2]
    best, worst = [trace for trace in traces if trace["step"] == 1]
    assert best["prompt"] == worst["prompt"] == TEXTS[0]
    assert (best["reward"], worst["reward"]) == (max(best["group_rewards"]), min(best["group_rewards"]))
    assert best["advantage"] > 0 > worst["advantage"] and best["reward_parts"] == {"sum": best["reward"]}
    for trace in traces:
        assert trace["length"] == len(trace["tokens"]) == len(trace["trainer"]) == len(trace["sampled"])
        assert trace["sampler"] == pytest.approx(trace["trainer"], abs=1e-4)
    assert best["kl"] == [0.0] * best["length"], "the first step's policy is the reference"
    later = next(trace for trace in traces if trace["step"] == 2)
    assert all(value >= 0 for value in later["kl"]) and max(later["kl"]) > 0
