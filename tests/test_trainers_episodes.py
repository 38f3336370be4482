"""Learning from episodes: what the environment wrote is read and never learned, by hand-computed cases."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.data.encoding import encode_prompt
from posttrain.data.layout import EOS
from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import GrpoStage, OpdStage, OptimizerConfig
from posttrain.trainers.generation import RolloutGeneration
from posttrain.trainers.grpo import train_grpo
from posttrain.trainers.jobs import GrpoJob, OpdJob, Prompt
from posttrain.trainers.mismatch import Ages
from posttrain.trainers.opd import train_opd
from rollouts.environments import Limits, Observation, ToolUse, calculator, function_tool
from rollouts.types import Completion, EpisodeFacts, GroupRequest, VersionSpan
from tests.episode_kit import TOKENIZER, LocalEpisodes, ScriptedService, call
from tests.test_distill import oracle
from tests.test_trainers_grpo import Gradients
from tests.test_trainers_opd import LocalTeachers
from tests.trainers_kit import Recorder, save, tiny_model

QUESTIONS = ["6*7", "12*12", "9*8", "5*5"]
LIMITS = Limits(turns=2, tokens=0, turn_tokens=200)
TOOL = function_tool(calculator)
PLAIN = OptimizerConfig(lr=1e-6, max_grad_norm=1e9)


def messages(expression: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{expression}="}]


PROMPTS = [Prompt(f"d/{row}", "d", tuple(encode_prompt(TOKENIZER, messages(one)))) for row, one in enumerate(QUESTIONS)]


class Guessing:
    """Says "more" until the answer begins with 1, and pays a half for each turn."""

    def reset(self):  # type: ignore[no-untyped-def]
        return messages("6*7")

    def step(self, turn):  # type: ignore[no-untyped-def]
        if turn.content == "crash":
            raise RuntimeError("gone")
        return Observation(() if turn.content.startswith("1") else ({"role": "user", "content": "more"},), 0.5)


def policy(request: GroupRequest, prompt: str) -> str:
    """Of four samples one calls and answers, one calls wrongly, one guesses at once, one calls and calls."""
    sample, turn = request.id.split("/")[-2:]
    if turn == "0" and sample != "2":
        return call("6*7" if sample == "0" else "6*")
    return {"0": f"42{EOS}", "1": f"is 3{EOS}", "2": f"7{EOS}"}.get(sample, call("1+1"))


def length(problem_ids: Sequence[str], completion_ids: Sequence[Sequence[int]], reasons: Sequence[str]):  # type: ignore[no-untyped-def]
    """Depends on the sampled tokens and on how the episode ended."""
    rewards = [len(tokens) % 7 + (reason == "stop") for tokens, reason in zip(completion_ids, reasons, strict=True)]
    return [float(reward) for reward in rewards], [{} for _ in rewards]


def episodes() -> LocalEpisodes:
    def environment() -> ToolUse:
        return ToolUse(messages("6*7"), [TOOL], describe=False)

    def of(expression: str):  # type: ignore[no-untyped-def]
        return lambda: ToolUse(messages(expression), [TOOL], describe=False)

    return LocalEpisodes({f"d/{row}": of(one) for row, one in enumerate(QUESTIONS)}, LIMITS)


def grpo(model: torch.nn.Module, service: ScriptedService, reward=length, rollout=None, made=None, **config):  # type: ignore[no-untyped-def]
    stage = GrpoStage(
        **{"kind": "grpo", "steps": 1, "prompts_per_step": 2, "group_size": 4, "optimizer": PLAIN} | config
    )
    recorder = Recorder()
    progress = Gradients(recorder, "expert/d/grpo", stage.steps, 1)
    job = GrpoJob(
        "expert/d/grpo", stage, "", "", PROMPTS, 500, reward, rollout or RolloutConfig(), episodes=made or episodes()
    )
    sampled = train_grpo(model, TOKENIZER, job, service, 5, progress)
    return recorder, progress, sampled


def played(
    service: ScriptedService, prompt: Prompt, sample: int, stage: str = "expert/d/grpo"
) -> tuple[list[int], list[int], str]:
    """The tokens of an episode after its prompt, their mask and how it ended, from the turns that were asked for."""
    episode = episodes().begin(prompt.problem_id, 500)
    while episode.outcome is None:
        row = prompt.problem_id[2:]
        name = f"{stage}/0/{row}/{sample}/{len(episode.turns)}"
        request = next(one for one in service.asked if one.id == name)
        assert request.prompt_ids == episode.context_ids
        ids = TOKENIZER.encode(policy(request, ""))
        episode.advance(Completion.of_version(ids, [0.0] * len(ids), "stop", 1))
    return episode.token_ids, episode.loss_mask, episode.completion().finish_reason


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("dapo", {}),
        ("grpo", {}),
        ("group", {}),
        ("dr_grpo", {}),
        ("dapo", {"mask_truncated": True}),
        ("dapo", {"importance": {"level": "token", "bound": "truncate", "max": 2.0}}),
        ("dapo", {"ratio_level": "sequence"}),
    ],
)
def test_the_gradient_is_that_of_the_models_tokens_alone(loss_type: str, options: dict[str, object]) -> None:
    model = tiny_model(0, vocabulary=len(TOKENIZER))
    start, service = copy.deepcopy(model), ScriptedService(policy, copy.deepcopy(model))
    recorder, progress, sampled = grpo(model, service, loss_type=loss_type, **options)
    terms, ends = [], []
    for prompt in PROMPTS[:2]:
        found = [played(service, prompt, sample) for sample in range(4)]
        own = [[token for token, one in zip(ids, mask, strict=True) if one] for ids, mask, _ in found]
        rewards = torch.tensor(length([], own, [reason for *_, reason in found])[0])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert rewards.std() > 0.1
        for (ids, mask, reason), advantage in zip(found, advantages, strict=True):
            input_ids = torch.tensor([[*prompt.token_ids, *ids]])
            logits = start(input_ids=input_ids).logits[0, len(prompt.token_ids) - 1 : -1]
            logps = torch.log_softmax(logits, dim=-1)[range(len(ids)), ids][torch.tensor(mask).bool()]
            ratio = torch.exp(logps - logps.detach())
            if "ratio_level" in options:  # GSPO: the geometric mean over the model's tokens
                ratio = torch.exp((logps - logps.detach()).mean()).expand(len(logps))
            ends.append(reason)
            terms.append(-advantage * ratio)
    assert ends == ["stop", "stop", "stop", "turn_limit"] * 2
    if "mask_truncated" in options:
        terms = [term for term, end in zip(terms, ends, strict=True) if end == "stop"]
    groups = [torch.cat(terms[:4]).mean(), torch.cat(terms[4:]).mean()] if len(terms) == 8 else []
    loss = {
        "dapo": lambda: torch.cat(terms).mean(),
        "grpo": lambda: torch.stack([term.mean() for term in terms]).mean(),
        "group": lambda: torch.stack(groups).mean(),
        "dr_grpo": lambda: torch.cat(terms).sum() / (len(terms) * 500),
    }[loss_type]()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in start.parameters()])
    assert expected.norm() > 1e-4
    assert (progress.gradient - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
    assert recorder.lines[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert sampled.difference.largest < 1e-4


def test_lengths_turns_and_calls_are_counted_over_the_model_and_its_episodes() -> None:
    model = tiny_model(0, vocabulary=len(TOKENIZER))
    service = ScriptedService(policy, copy.deepcopy(model))
    recorder, progress, sampled = grpo(model, service)
    line = recorder.lines[0]
    found = [played(service, prompt, sample) for prompt in PROMPTS[:2] for sample in range(4)]
    own = sum(sum(mask) for _, mask, _ in found)
    assert progress.tokens == sampled.difference.tokens == own
    assert line["completion_length"] == own / 8
    assert line["environment_tokens"] == sum(mask.count(0) for _, mask, _ in found) / 8
    assert (line["turns"], line["tool_calls"], line["tool_errors"]) == (7 / 4, 4 / 4, 2 / 4)
    assert line["truncated"] == 1 / 4
    assert line["logprob_diff_max"] < 1e-4


def test_with_updates_in_flight_every_turn_has_the_version_that_sampled_it() -> None:
    model = tiny_model(0, vocabulary=len(TOKENIZER))
    service = ScriptedService(policy, copy.deepcopy(model), fairly=True)
    rollout, optimizer = RolloutConfig(mode="async", max_staleness=1), OptimizerConfig(lr=3e-3)
    recorder, _, sampled = grpo(model, service, rollout=rollout, steps=4, optimizer=optimizer)
    # Tokens of the weights that were trained have the trainer's log-probabilities; the others are of one step before.
    assert sampled.difference.tokens > 0 and sampled.difference.largest < 1e-4
    assert sampled.off_policy["staleness_max"] == 1
    assert 0 < sampled.off_policy["version_spans/2"] < 1  # episodes whose turns have different versions
    assert len(recorder.lines) == 4


def test_an_environments_reward_counts_and_its_failure_does_not() -> None:
    turns = {"0": f"crash{EOS}", "1": f"1{EOS}", "2": f"0{EOS}", "3": f"1{EOS}"}
    scored: list[str] = []

    def reward(problem_ids, completion_ids, reasons):  # type: ignore[no-untyped-def]
        scored.extend(reasons)
        return [float("nan") if reason.startswith("failed") else 0.25 for reason in reasons], [{}] * len(reasons)

    model = tiny_model(0, vocabulary=len(TOKENIZER))
    service = ScriptedService(lambda request, prompt: turns[request.id.split("/")[-2]], copy.deepcopy(model))
    recorder, *_ = grpo(model, service, reward, made=LocalEpisodes({"d/0": Guessing}, LIMITS), prompts_per_step=1)
    assert scored == ["failed: RuntimeError: gone", "stop", "turn_limit", "stop"]
    line = recorder.lines[0]
    # 0.75, 1.25 for two turns, 0.75; what failed counts as their mean
    assert line["reward"] == pytest.approx((0.75 + 1.25 + 0.75) / 3)
    assert line["reward/environment"] == pytest.approx((0.0 + 0.5 + 1.0 + 0.5) / 4)
    assert line["reward_errors"] == 1


def test_a_student_learns_its_own_turns_from_the_expert_and_not_the_environments(tmp_path: Path) -> None:
    size = len(TOKENIZER)
    student, expert = tiny_model(0, vocabulary=size), tiny_model(1, vocabulary=size)
    start, service = copy.deepcopy(student), ScriptedService(policy, copy.deepcopy(student))
    plain = [Prompt("plain/0", "plain", tuple(TOKENIZER.encode("what?")))]
    teachers = {"d": save(expert, tmp_path / "d"), "plain": save(expert, tmp_path / "plain")}
    config = OpdStage(steps=1, batch_size=4, optimizer=PLAIN)
    job = OpdJob(
        "student", config, "", "", {"d": PROMPTS, "plain": plain}, teachers, {"d": 500, "plain": 200}, length,
        episodes=episodes(),
    )  # fmt: skip
    recorder, pool = Recorder(), LocalTeachers()
    progress = Gradients(recorder, "student", 1)
    sampled = train_opd(student, TOKENIZER, job, service, pool, 3, progress)
    divergences: dict[str, Tensor] = {}
    identity, own = torch.eye(size), 0
    for domain, (_, sequences) in zip(("d", "plain"), pool.asked, strict=True):
        values = []
        for sequence, prompt in zip(sequences, PROMPTS if domain == "d" else plain * 2, strict=False):
            mask = [1] * (len(sequence) - len(prompt.token_ids))
            if domain == "d":
                ids, mask, _ = played(service, prompt, 0, "student")
                assert sequence == [*prompt.token_ids, *ids]
            row, learned = torch.tensor([sequence]), torch.tensor(mask).bool()
            own += sum(mask)
            span = slice(len(prompt.token_ids) - 1, len(sequence) - 1)
            ours, theirs = (model(input_ids=row).logits[0, span][learned] for model in (start, expert))
            values.append(oracle("reverse_kl", ours, identity, theirs.detach(), identity))
        divergences[domain] = torch.cat(values).mean()
        assert recorder.lines[0][f"kl/{domain}"] == pytest.approx(divergences[domain].item(), abs=1e-5)
    (sum(divergences.values()) / 2).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in start.parameters()])
    assert (progress.gradient - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
    assert progress.tokens == sampled.difference.tokens == own
    assert sampled.difference.largest < 1e-4
    assert recorder.lines[0]["tool_calls"] == 1


def test_tokens_of_the_environment_or_of_old_weights_are_not_learned() -> None:
    facts = EpisodeFacts([1, 1, 0, 0, 1, 1], 2, 1, 0)
    spans = (VersionSpan(0, 1, 3), VersionSpan(1, 4, 4), VersionSpan(4, 6, 5))
    episode = Completion([7] * 6, [0.0] * 6, "turn_limit", spans, episode=facts)
    answer = Completion.of_version([7] * 3, [0.0] * 3, "length", 5)
    generation = object.__new__(RolloutGeneration)
    generation.ages, generation.mask_truncated = Ages(limit=1), False
    generation.groups, generation._base, generation.steps_done = [], 0, 5
    generation.__class__ = type("Given", (RolloutGeneration,), {"samples": [episode, answer]})
    assert generation.loss_masks() == [[0, 1, 0, 0, 1, 1], [1, 1, 1]]
    generation.mask_truncated = True
    assert generation.loss_masks() == [[0] * 6, [0] * 3]
    generation.__class__ = type("Given", (RolloutGeneration,), {"samples": [answer]})
    assert generation.loss_masks() is None  # TRL leaves out answers that were cut off by itself
    metrics = generation.ages.add([episode, answer], 5)
    assert metrics["staleness/0"] == 5 / 7 and metrics["staleness/1"] == 1 / 7 and metrics["staleness_masked"] == 1 / 7
    assert metrics["version_spans/3"] == 4 / 7
