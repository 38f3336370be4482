"""GRPO's variants: the loss of each against one computed by hand, on ratios and references that were made up."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.recipe.schema import Recipe, RolloutConfig
from posttrain.recipe.stages import GrpoStage, OptimizerConfig
from posttrain.trainers.grpo import GrpoTrainer, informs
from posttrain.trainers.trl_seam import Batch
from rollouts.types import Completion, FinishedGroup, GroupRequest
from tests.recipe_kit import recipe_with
from tests.test_trainers_grpo import train
from tests.trainers_kit import EOS, LocalClient, tiny_model, tokens

PROMPTS = [list(tokens("what?")), list(tokens("a"))]
"""Each with two answers."""
ANSWERS = [[*tokens("yes"), EOS], list(tokens("no")), list(tokens("12345")), [*tokens("b"), EOS]]
ADVANTAGES = (1.0, -1.0, 0.5, -0.5)
LENGTHS = [len(answer) for answer in ANSWERS]
MAX_NEW_TOKENS = 6


@pytest.fixture
def trainer_of(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A trainer as a recipe's stage makes it, which does not train."""
    made: list[GrpoTrainer] = []
    monkeypatch.setattr(GrpoTrainer, "train", lambda self, **options: made.append(self))

    def make(**config: Any) -> GrpoTrainer:
        train(tiny_model(0), max_new_tokens=MAX_NEW_TOKENS, **({"prompts_per_step": 2, "group_size": 2} | config))
        made[-1].current_gradient_accumulation_steps = 1
        return made[-1]

    return make


def logps_of(model: torch.nn.Module) -> list[Tensor]:
    """Log-probability of each token of each answer."""
    found = []
    for index, answer in enumerate(ANSWERS):
        prompt = PROMPTS[index // 2]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits, dim=-1)[range(len(answer)), answer])
    return found


def drifts(seed: int, size: float) -> list[Tensor]:
    """What is taken from the log-probability of each token of each answer."""
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(length, generator=generator) for length in LENGTHS]


def right_padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def batch(logps: Sequence[Tensor], drift: Sequence[Tensor], reference: Sequence[Tensor] | None = None) -> Batch:
    """As TRL makes it: prompts padded on the left, answers on the right; the sampler's probabilities are the old."""
    width = max(map(len, PROMPTS))
    rows = [PROMPTS[index // 2] for index in range(len(ANSWERS))]
    old_BT = right_padded([(logp - d).detach() for logp, d in zip(logps, drift, strict=True)])
    made = {
        "prompt_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "prompt_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "completion_ids": right_padded([torch.tensor(answer) for answer in ANSWERS]),
        "completion_mask": right_padded([torch.ones(length, dtype=torch.long) for length in LENGTHS]),
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": torch.tensor(sum(LENGTHS)),
        "old_per_token_logps": old_BT,
        "sampling_per_token_logps": old_BT,
        "importance_sampling_ratio": torch.ones(len(ANSWERS), 1),
        "row": torch.arange(len(ANSWERS)),
    }
    if reference is not None:
        shifted = [(logp + d).detach() for logp, d in zip(logps, reference, strict=True)]
        made["ref_per_token_logps"] = right_padded(shifted)
    return made


def clipped(ratio: Tensor, advantage: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def check(trainer: GrpoTrainer, inputs: Batch, model: torch.nn.Module, loss: Tensor) -> None:
    """The trainer's loss and its gradient are those of `loss`, which was computed from `model`, by hand."""
    trainer.model.train()
    found = trainer._compute_loss(trainer.model, inputs)
    assert found.item() == pytest.approx(loss.item(), abs=1e-6)
    found.backward()
    loss.backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    by_hand = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert by_hand.norm() > 1e-3
    assert (ours - by_hand).abs().max() < 1e-5


def setting(drift_size: float = 0.4) -> tuple[torch.nn.Module, list[Tensor], list[Tensor], list[Tensor]]:
    """A model of the trainer's weights, its log-probabilities, the drift since the sampling, and the ratios."""
    model = tiny_model(0)
    logps, drift = logps_of(model), drifts(1, drift_size)
    return model, logps, drift, [(logp - (logp - d).detach()).exp() for logp, d in zip(logps, drift, strict=True)]


def mean_of_batch(terms: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(terms)).sum() / sum(LENGTHS)


NORMALISATIONS = {
    "grpo": lambda terms: torch.stack([term.mean() for term in terms]).mean(),
    "dapo": mean_of_batch,
    "bnpo": mean_of_batch,
    "group": lambda terms: torch.stack([torch.cat(terms[:2]).mean(), torch.cat(terms[2:]).mean()]).mean(),
    "dr_grpo": lambda terms: torch.cat(terms).sum() / (4 * MAX_NEW_TOKENS),
}


@pytest.mark.parametrize("loss_type", NORMALISATIONS)
def test_normalisations(loss_type: str, trainer_of) -> None:  # type: ignore[no-untyped-def]
    model, logps, drift, ratios = setting()
    terms = [clipped(ratio, advantage) for ratio, advantage in zip(ratios, ADVANTAGES, strict=True)]
    trainer = trainer_of(loss_type=loss_type)
    inputs = batch(logps, drift)
    if loss_type == "group":  # as `batch_scored` does before TRL sees the batch
        inputs["importance_sampling_ratio"] = trainer._group_weights(inputs["completion_mask"])
        lengths = torch.tensor([LENGTHS[0] + LENGTHS[1]] * 2 + [LENGTHS[2] + LENGTHS[3]] * 2)
        assert inputs["importance_sampling_ratio"].flatten() == pytest.approx(sum(LENGTHS) / (2 * lengths))
    check(trainer, inputs, model, NORMALISATIONS[loss_type](terms))


def test_clip_higher(trainer_of) -> None:  # type: ignore[no-untyped-def]
    model, logps, drift, ratios = setting()
    terms = [clipped(ratio, a, low=0.1, high=0.28) for ratio, a in zip(ratios, ADVANTAGES, strict=True)]
    assert any(((ratio > 1.1) & (ratio < 1.28)).any() for ratio in ratios)
    check(trainer_of(epsilon=0.1, epsilon_high=0.28), batch(logps, drift), model, mean_of_batch(terms))


def test_gspo_clips_the_geometric_mean_of_an_answers_ratios(trainer_of) -> None:  # type: ignore[no-untyped-def]
    model, logps, drift, ratios = setting()
    means = [ratio.log().mean().exp() for ratio in ratios]
    assert {bool(abs(mean - 1) > 0.2) for mean in means} == {True, False}
    terms = [clipped(mean, a).expand(length) for mean, a, length in zip(means, ADVANTAGES, LENGTHS, strict=True)]
    trainer = trainer_of(ratio_level="sequence", loss_type="grpo")
    check(trainer, batch(logps, drift), model, NORMALISATIONS["grpo"](terms))


def test_cispo_weighs_the_log_likelihood_with_clipped_ratios(trainer_of) -> None:  # type: ignore[no-untyped-def]
    model, logps, drift, ratios = setting(1.0)
    assert any((ratio > 1.5).any() for ratio in ratios)
    terms = [
        -ratio.detach().clamp(max=1.5) * advantage * logp
        for ratio, advantage, logp in zip(ratios, ADVANTAGES, logps, strict=True)
    ]
    trainer = trainer_of(loss_type="cispo", epsilon_high=1.5)
    check(trainer, batch(logps, drift), model, mean_of_batch(terms))


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_penalty_is_the_k3_estimate_with_or_without_the_ratio(unbiased: bool, trainer_of) -> None:  # type: ignore[no-untyped-def]
    model, logps, drift, ratios = setting()
    reference = drifts(2, 0.5)
    terms = []
    for ratio, advantage, logp, shift in zip(ratios, ADVANTAGES, logps, reference, strict=True):
        distance = (logp + shift).detach() - logp
        k3 = distance.exp() - distance - 1
        terms.append(clipped(ratio, advantage) + 0.3 * (ratio * k3 if unbiased else k3))
    trainer = trainer_of(beta=0.3, unbiased_kl=unbiased)
    check(trainer, batch(logps, drift, reference), model, mean_of_batch(terms))


def test_off_policy_masking_drops_bad_answers_that_drifted_away(trainer_of) -> None:  # type: ignore[no-untyped-def]
    model, logps, _, _ = setting()
    # mean of log(old / new): answers 1 and 3 are below their group's mean, 1 and 2 became less likely by half a nat
    drift = [torch.full((length,), shift) for length, shift in zip(LENGTHS, (0.1, -0.5, -0.5, -0.1), strict=True)]
    terms = []
    for index, (logp, d, advantage) in enumerate(zip(logps, drift, ADVANTAGES, strict=True)):
        ratio = (logp - (logp - d).detach()).exp()
        terms.append(clipped(ratio, advantage) * (index != 1))
    check(trainer_of(off_policy_threshold=0.3), batch(logps, drift), model, mean_of_batch(terms))


def test_advantages_with_and_without_deviation() -> None:
    """Of a group that is rewarded 1, 0, 0, 0: mean 1/4, standard deviation 1/2."""
    expected = {"none": (0.75, -0.25), "group": (0.75 / 0.5001, -0.25 / 0.5001), "batch": None}
    for scale, values in expected.items():
        seen = advantages_of(scale)
        if values is None:  # of the batch's rewards: 1, 0, 0, 0 and four times 0
            deviation = torch.tensor([1.0] + [0.0] * 7).std().item() + 1e-4
            values = (0.75 / deviation, -0.25 / deviation)
        assert seen[:4].sort(descending=True).values == pytest.approx(torch.tensor([values[0]] + [values[1]] * 3))
        assert seen[4:].abs().max() == 0


def advantages_of(scale: str) -> Tensor:
    found: list[Tensor] = []

    def first_is_best(problem_ids, completion_ids, finish_reasons):  # type: ignore[no-untyped-def]
        return [float(index == 0) for index in range(len(problem_ids))], [{} for _ in problem_ids]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrpoTrainer, "batch_scored", lambda self, made: found.append(made["advantages"]))
        train(tiny_model(0), reward=first_is_best, prompts_per_step=2, scale_rewards=scale)
    return found[0]


def test_answers_that_were_cut_off_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first update all ratios are 1: the loss is minus the mean advantage of the tokens that count."""
    seen: list[tuple[Batch, list[Completion]]] = []
    original = GrpoTrainer.batch_scored

    def batch_scored(self: GrpoTrainer, made: Batch) -> None:
        original(self, made)
        seen.append((made, self.rollouts.samples))

    monkeypatch.setattr(GrpoTrainer, "batch_scored", batch_scored)
    recorder, *_ = train(tiny_model(0), max_new_tokens=20, group_size=16, mask_truncated=True)
    ((made, samples),) = seen
    ended = torch.tensor([sample.finish_reason == "stop" for sample in samples])
    assert 3 < ended.sum() < 61
    lengths = torch.tensor([len(sample.token_ids) for sample in samples]) * ended
    assert made["completion_mask"].sum(dim=1).tolist() == lengths.tolist()
    expected = -(made["advantages"] * lengths).sum() / lengths.sum()
    assert recorder.lines[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_the_reference_is_refreshed() -> None:
    """The second step starts at the reference, the third does not."""
    optimizer = OptimizerConfig(lr=1e-2)
    fixed, *_ = train(tiny_model(0), steps=4, beta=1e-3, optimizer=optimizer)
    fresh, *_ = train(tiny_model(0), steps=4, beta=1e-3, reference_every=2, optimizer=optimizer)
    assert [line["kl"] > 1e-6 for line in fixed.lines] == [False, True, True, True]
    assert [line["kl"] > 1e-6 for line in fresh.lines] == [False, True, False, True]
    twice, *_ = train(tiny_model(0), steps=3, beta=1e-3, reference_every=1, updates_per_batch=2, optimizer=optimizer)
    assert all(line["kl"] > 1e-7 for line in twice.lines)  # the mean over a step's two updates: only the first is 0


class Scripted(LocalClient):
    """Answers of its own making: group g of the stage gets rewards by `script[g]`."""

    script: Sequence[tuple[int, ...]] = ()

    def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
        batch_number, row = map(int, request.id.split("/")[-2:])
        pattern = self.script[batch_number * 2 + row]
        answers = [[*tokens("e" if right else "f"), EOS] for right in pattern]
        made = [Completion.of_version(answer, [-1.0, -1.0], "stop", self.version or 0) for answer in answers]
        return FinishedGroup(request, made)


def good(problem_ids, completion_ids, finish_reasons):  # type: ignore[no-untyped-def]
    return [float(ids[0] == tokens("e")[0]) for ids in completion_ids], [{} for _ in problem_ids]


SCRIPT = [(1, 1), (1, 0), (0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 1), (1, 0), (0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("times", "kept", "replaced"),
    [
        (0, [[0, 1], [2, 3]], [0, 0]),
        (1, [[1, 3], [4, 7]], [2, 2]),  # after two replacements the next group is taken as it is
        (3, [[1, 4], [8, 9]], [3, 3]),
    ],
)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_groups_without_a_difference_are_replaced(
    times: int, kept: list[list[int]], replaced: list[int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.trainers.mismatch.LARGEST_MEAN_DIFFERENCE", float("inf"))
    seen: list[list[int]] = []
    original = GrpoTrainer.batch_scored

    def batch_scored(self: GrpoTrainer, made: Batch) -> None:
        original(self, made)
        seen.append([member.number for member in self.rollouts.groups])

    monkeypatch.setattr(GrpoTrainer, "batch_scored", batch_scored)
    model = tiny_model(0)
    client = Scripted(copy.deepcopy(model))
    client.script = SCRIPT
    rollout = RolloutConfig(mode="async", deterministic=True) if mode == "async" else RolloutConfig()
    settings = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "dynamic_sampling": times}
    recorder, *_ = train(model, client, good, rollout=rollout, **settings)
    assert seen == kept
    if times:
        assert [line["groups_replaced"] for line in recorder.lines] == replaced
    assert sorted(client.consumed + client.cancelled) == sorted(request.id for request in client.asked)


def test_a_group_informs_when_its_rewards_differ() -> None:
    assert informs([0.0, 1.0]) and informs([0.0, math.nan, 0.5])
    assert not informs([1.0, 1.0]) and not informs([1.0, math.nan]) and not informs([math.nan, math.nan])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "cispo"}, "largest ratio itself"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "largest ratio itself"),
        ({"reference_every": 5}, "no reference without a penalty"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GrpoStage(kind="grpo", **options)
    GrpoStage(kind="grpo", reference_every=5, beta_by_domain={"a": 0.1})
    GrpoStage(kind="grpo", loss_type="cispo", epsilon_high=5)


def test_a_penalty_can_differ_by_domain() -> None:
    key = "stages.experts.per_domain[1].beta_by_domain"
    stage = Recipe.model_validate(recipe_with({key: {"words": 0.1}})).expert_stages("words")[1]
    assert isinstance(stage, GrpoStage)
    assert (stage.for_domain("words").beta, stage.for_domain("sums").beta) == (0.1, 0.0)
    with pytest.raises(ValidationError, match="no such domain; the domains are sums, words"):
        Recipe.model_validate(recipe_with({key: {"nowhere": 0.0}}))
