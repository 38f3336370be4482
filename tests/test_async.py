"""Asynchronous rollouts, on a service in this process: what is asked for when, what is learned from old tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.errors import RunFailed
from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import ImportanceConfig, OptimizerConfig
from posttrain.trainers.generation import Group
from posttrain.trainers.grpo import GrpoTrainer
from posttrain.trainers.mismatch import Ages
from posttrain.trainers.opd import OpdTrainer
from posttrain.trainers.trl_seam import Batch
from rollouts.types import Completion, FinishedGroup, GroupRequest, version_spans
from tests.test_trainers_grpo import TEXTS, share_of_target, train
from tests.test_trainers_opd import TEXTS as TEXTS_OF
from tests.test_trainers_opd import train as train_student
from tests.trainers_kit import LocalClient, Running, save, tiny_model, tokens

ASYNC = RolloutConfig(mode="async")
STEADY = RolloutConfig(mode="async", deterministic=True)
FAST = OptimizerConfig(lr=1e-2)


@dataclass
class Seen:
    """A batch as the trainer learned from it."""

    version: int
    groups: list[Group]
    batch: Batch
    model: torch.nn.Module


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Every batch of the trainings in the test."""
    batches: list[Seen] = []
    original = GrpoTrainer.batch_scored

    def batch_scored(self: GrpoTrainer, batch: Batch) -> None:
        original(self, batch)
        model = tiny_model(0)  # a copy would keep TRL's forward, which belongs to the model that goes on learning
        model.load_state_dict(self.accelerator.unwrap_model(self.model).state_dict())
        batches.append(Seen(self.rollouts.version, list(self.rollouts.groups), dict(batch), model))

    monkeypatch.setattr(GrpoTrainer, "batch_scored", batch_scored)
    return batches


class OneByOne(LocalClient):
    """What it computes of a request does not depend, to the bit, on what else runs: as with the project's own model."""

    def _next_logits(self, samples: Sequence[Running]) -> Tensor:
        rows = [super(OneByOne, self)._next_logits([sample]) for sample in samples]
        return torch.cat(rows) if rows else torch.zeros(0)


def run(rollout: RolloutConfig, steps_between: int = 0, delays: dict[str, int] | None = None, **config: Any):  # type: ignore[no-untyped-def]
    model = tiny_model(0)
    client = OneByOne(copy.deepcopy(model), steps_between, delays)
    recorder, _, _, sampled = train(model, client, rollout=rollout, **({"optimizer": FAST} | config))
    return model, client, recorder.lines, sampled


def group(step: int, row: int) -> str:
    return f"expert/d/grpo/{step}/{row}"


def samples(seen: Sequence[Seen]) -> list[Completion]:
    return [sample for one in seen for group in one.groups for sample in group.completions]


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_stage_keeps_so_many_batches_ahead_and_no_more(ahead: int) -> None:
    rollout = RolloutConfig(mode="async", max_staleness=ahead)
    _, client, _, _ = run(rollout, steps=6, prompts_per_step=2)
    assert [len(batch) for batch in client.batches] == [2 * (ahead + 1)] + [2] * (5 - ahead)
    assert sorted(client.acknowledged) == sorted(request.id for request in client.asked)
    assert len(client.asked) == 12 and not client.cancelled


def test_weights_are_published_every_step_while_requests_run(seen: list[Seen]) -> None:
    _, client, lines, sampled = run(ASYNC, steps_between=2, steps=6)
    assert client.versions == [1, 2, 3, 4, 5, 6]
    mixed = [sample for sample in samples(seen) if len(sample.spans) > 1]
    assert mixed and len(mixed) < len(samples(seen))
    assert lines[0]["staleness_max"] == 0 and lines[-1]["staleness_max"] >= 1
    assert sum(value for name, value in sampled.off_policy.items() if name.startswith("staleness/")) == pytest.approx(1)
    assert sum(value for name, value in sampled.off_policy.items() if "spans/" in name) == pytest.approx(1)
    assert 0 < sampled.off_policy["staleness_mean"] < 1


def test_whichever_groups_finish_first_make_the_batch(seen: list[Seen]) -> None:
    run(ASYNC, delays={group(0, 1): 20, group(1, 0): 20}, steps=4)
    batches = [[one.request.id for one in batch.groups] for batch in seen]
    assert group(0, 1) not in batches[0] and len(batches[0]) == 4
    assert sorted(name for batch in batches for name in batch) == sorted(
        group(b, r) for b in range(4) for r in range(4)
    )


def test_rewards_and_advantages_belong_to_the_groups_that_came(seen: list[Seen]) -> None:
    asked: list[tuple[str, Sequence[int]]] = []

    def reward(problem_ids, completion_ids, finish_reasons):  # type: ignore[no-untyped-def]
        asked.extend(zip(problem_ids, completion_ids, strict=True))
        return share_of_target(problem_ids, completion_ids, finish_reasons)

    _, client, _, _ = run(ASYNC, delays={group(0, 1): 9, group(0, 2): 20}, steps=3, reward=reward)
    sampled = {request.id: request for request in client.asked}
    out_of_order = [
        one for one in seen if [g.number for g in one.groups] != list(range(g0 := one.groups[0].number, g0 + 4))
    ]
    assert out_of_order
    for one in seen:
        rewards = []
        for index, member in enumerate(one.groups):
            prompt = list(tokens(TEXTS[int(member.prompt.problem_id.removeprefix("d/"))]))
            assert sampled[member.request.id].prompt_ids == prompt
            for row, sample in enumerate(member.completions, start=4 * index):
                ids, mask = one.batch["prompt_ids"][row], one.batch["prompt_mask"][row].bool()
                assert ids[mask].tolist() == prompt
                assert (member.prompt.problem_id, sample.token_ids) in asked
            rewards.append(share_of_target([], [sample.token_ids for sample in member.completions], [])[0])
        values = torch.tensor(rewards)
        expected = (values - values.mean(dim=1, keepdim=True)) / (values.std(dim=1, keepdim=True) + 1e-4)
        assert one.batch["advantages"] == pytest.approx(expected.flatten(), abs=1e-5)


@pytest.mark.parametrize("ahead", [1, 2])
def test_deterministic_runs_do_not_depend_on_timing(ahead: int, seen: list[Seen]) -> None:
    rollout = RolloutConfig(mode="async", deterministic=True, max_staleness=ahead)
    one, client, _, _ = run(rollout, steps=5)
    first, seen[:] = list(seen), []
    other, _, _, _ = run(rollout, steps_between=3, delays={group(1, 2): 11, group(2, 0): 5}, steps=5)
    assert [c.token_ids for c in samples(first)] == [c.token_ids for c in samples(seen)]
    assert all(torch.equal(*pair) for pair in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(len(sample.spans) == 1 for sample in samples(first))
    assert [batch.version - batch.groups[0].completions[0].weight_version for batch in first] == (
        [0, 1, 1, 1, 1] if ahead == 1 else [0, 1, 2, 1, 2]
    )
    assert client.versions == ([1, 2, 3, 4] if ahead == 1 else [1, 3])


def test_a_deterministic_run_differs_from_a_synchronous_one_only_by_its_lead(seen: list[Seen]) -> None:
    run(RolloutConfig(), steps=2)
    plain, seen[:] = list(seen), []
    run(STEADY, steps=2)
    assert [c.token_ids for c in samples(plain[:1])] == [c.token_ids for c in samples(seen[:1])]
    assert [c.token_ids for c in samples(plain[1:])] != [c.token_ids for c in samples(seen[1:])]


def test_nothing_is_learned_from_tokens_over_the_bound(seen: list[Seen]) -> None:
    """The delayed group's first token is older than allowed when the group comes; the rest of it is fresh."""
    _, _, lines, _ = run(
        ASYNC, steps_between=3, delays={group(0, 1): 14}, steps=4, loss_type="grpo", importance={"level": "token"}
    )
    late = next(one for one in seen if any(g.request.id == group(0, 1) for g in one.groups))
    assert late.version - 1 > 1
    mask_BT = late.batch["tool_mask"] * late.batch["completion_mask"]
    ages = [[late.version - version for version in sample.versions] for g in late.groups for sample in g.completions]
    assert max(map(max, ages)) > 1
    for row, of_sample in enumerate(ages):
        assert mask_BT[row, : len(of_sample)].tolist() == [int(age <= 1) for age in of_sample]
    line = lines[seen.index(late)]
    over = sum(age > 1 for of_sample in ages for age in of_sample)
    assert line["staleness_masked"] == pytest.approx(over / sum(map(len, ages)))
    assert line["loss"] == pytest.approx(loss_by_hand(late), abs=1e-5)


def loss_by_hand(one: Seen) -> float:
    """GRPO's: the mean over each answer's tokens that are not too old, then over the answers."""
    terms, row = [], 0
    for member in one.groups:
        for sample in member.completions:
            logps = logps_of(one.model, member, sample)
            keep = torch.tensor([one.version - version <= 1 for version in sample.versions])
            ratios = (logps - torch.tensor(sample.logprobs)).exp()
            weights = torch.where(ratios > 3, 0.0, ratios)
            terms.append((-one.batch["advantages"][row] * weights)[keep].sum() / max(1, int(keep.sum())))
            row += 1
    return torch.stack(terms).mean().item()


def logps_of(model: torch.nn.Module, member: Group, sample: Completion) -> Tensor:
    return all_logps(model, member, sample)[range(len(sample.token_ids)), sample.token_ids]


@torch.no_grad()
def all_logps(model: torch.nn.Module, member: Group, sample: Completion) -> Tensor:
    """Of the whole vocabulary at every place of the answer; shape [tokens, V]."""
    prompt = member.request.prompt_ids
    logits = model(input_ids=torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)


class Shifted(LocalClient):
    """Its log-probabilities of the tokens at place p are wrong by `shifts[p]`."""

    shifts = (-0.9, 0.6, 0.0, 0.2, -0.1, 0.3)

    def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
        return FinishedGroup(
            request,
            [
                replace(c, logprobs=[value + shift for value, shift in zip(c.logprobs, self.shifts, strict=False)])
                for c in completions
            ],
        )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bound", ["truncate", "mask"])
def test_importance_weights_are_those_computed_by_hand(level: str, bound: str, seen: list[Seen]) -> None:
    model = tiny_model(0)
    importance = ImportanceConfig(level=level, bound=bound, min=0.8, max=1.5)
    recorder, _, _, sampled = train(model, Shifted(copy.deepcopy(model)), importance=importance, loss_type="grpo")
    (one,) = seen
    raw, terms = [], []
    for row, sample in enumerate(samples(seen)):
        shifts = Shifted.shifts[: len(sample.token_ids)]
        ratios = [math.exp(-shift) for shift in shifts] if level == "token" else [math.exp(-sum(shifts))] * len(shifts)
        inside = [0.8 <= ratio <= 1.5 for ratio in ratios]
        limited = [
            min(max(ratio, 0.8), 1.5) if bound == "truncate" else ratio * ok
            for ratio, ok in zip(ratios, inside, strict=True)
        ]
        raw += zip(ratios, inside, strict=True)
        found = one.batch["importance_sampling_ratio"][row].expand(len(one.batch["completion_mask"][row]))
        assert found[: len(limited)] == pytest.approx(torch.tensor(limited), rel=1e-4)
        terms.append(-one.batch["advantages"][row].item() * sum(limited) / len(limited))
    assert recorder.lines[0]["loss"] == pytest.approx(sum(terms) / len(terms), abs=1e-5)
    for metrics in (recorder.lines[0], sampled.off_policy):
        assert metrics["importance_ratio_raw"] == pytest.approx(sum(ratio for ratio, _ in raw) / len(raw), rel=1e-4)
        assert metrics["importance_bounded"] == pytest.approx(sum(not ok for _, ok in raw) / len(raw))


def test_ages_are_counted_by_token() -> None:
    ages = Ages(limit=1)
    two = Completion([5, 6, 7], [-1.0] * 3, "stop", version_spans([3, 3, 5]))
    one = Completion([5], [-1.0], "length", version_spans([4]))
    assert ages.add([two, one], version=5) == {
        "staleness_mean": pytest.approx((2 + 2 + 0 + 1) / 4),
        "staleness_max": 2,
        "staleness_masked": 0.5,
        "staleness/0": 0.25,
        "staleness/1": 0.25,
        "staleness/2": 0.5,
        "version_spans/1": 0.25,
        "version_spans/2": 0.75,
    }
    assert ages.mask([two, one], version=5) == [[0, 0, 1], [1]]
    assert ages.mask([two, one], version=4) is None
    assert ages.add([one], version=4)["staleness_max"] == 0
    assert ages.summary()["staleness_mean"] == pytest.approx(5 / 5)
    assert ages.summary()["staleness_masked"] == pytest.approx(2 / 5)


def test_a_student_learns_nothing_from_tokens_over_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delayed group's first token is too old when it comes, but its teacher and the student read it."""
    seen: list[Seen] = []
    original = OpdTrainer.batch_generated

    def batch_generated(self: OpdTrainer, inputs: Sequence[Batch]) -> None:
        original(self, inputs)
        model = tiny_model(0)
        model.load_state_dict(self.accelerator.unwrap_model(self.model).state_dict())
        seen.append(Seen(self.rollouts.version, list(self.rollouts.groups), {}, model))

    monkeypatch.setattr(OpdTrainer, "batch_generated", batch_generated)
    experts = {name: tiny_model(seed) for seed, name in enumerate(TEXTS_OF, start=1)}
    paths = {name: save(model, tmp_path / name) for name, model in experts.items()}
    client = OneByOne(tiny_model(0), 3, {"student/0/1": 14})
    lines, *_ = train_student(tiny_model(0), paths, None, client, ASYNC, steps=5, optimizer=FAST)
    late = next(one for one in seen if any(g.request.id == "student/0/1" for g in one.groups))
    assert [g.prompt.domain for g in late.groups] == sorted(g.prompt.domain for g in late.groups)
    by_domain: dict[str, list[Tensor]] = {}
    learned = total = 0
    for member in late.groups:
        (sample,) = member.completions
        keep = torch.tensor([late.version - version <= 1 for version in sample.versions])
        learned, total = learned + int(keep.sum()), total + len(keep)
        ours, theirs = (all_logps(model, member, sample)[keep] for model in (late.model, experts[member.prompt.domain]))
        by_domain.setdefault(member.prompt.domain, []).append((ours.exp() * (ours - theirs)).sum(dim=1))
    assert learned < total
    means = {domain: torch.cat(values).mean().item() for domain, values in by_domain.items()}
    line = lines[seen.index(late)]
    assert line["staleness_masked"] == pytest.approx(1 - learned / total)
    for domain, mean in means.items():
        assert line[f"kl/{domain}"] == pytest.approx(mean, abs=1e-5)
    assert line["loss"] == pytest.approx(sum(means.values()) / 2, abs=1e-5)


class Failing(LocalClient):
    """Gives up the groups that `fails` names."""

    fails: Callable[[str], bool]

    def answer(self, request: GroupRequest, completions: list[Completion]) -> FinishedGroup:
        if self.fails(request.id):
            return FinishedGroup(request, [], failure="it ended every engine it came to")
        return super().answer(request, completions)


def test_a_group_that_was_given_up_leaves_a_smaller_batch(seen: list[Seen]) -> None:
    model = tiny_model(0)
    client = Failing(copy.deepcopy(model))
    client.fails = lambda name: name == group(0, 2)
    recorder, _, _, _ = train(model, client, steps=2)
    assert [[member.request.id for member in one.groups] for one in seen] == [
        [group(0, row) for row in (0, 1, 3)],
        [group(1, row) for row in range(4)],
    ]
    assert recorder.lines[0]["groups_given_up"] == 1 and "groups_given_up" not in recorder.lines[1]
    assert sorted(client.consumed) == sorted(request.id for request in client.asked if request.id != group(0, 2))


def test_a_step_without_any_group_ends_the_stage() -> None:
    model = tiny_model(0)
    client = Failing(copy.deepcopy(model))
    client.fails = lambda name: name.startswith("expert/d/grpo/1/")
    with pytest.raises(RunFailed, match=r"none of the groups of step 2 could be sampled \(it ended every engine"):
        train(model, client, steps=3)


def test_stages_start_above_the_version_that_they_are_given(seen: list[Seen]) -> None:
    model = tiny_model(0)
    client = LocalClient(copy.deepcopy(model))
    client.version = 7
    train(model, client, steps=2)
    assert client.versions == [8, 9]


@pytest.mark.parametrize("key", ["max_staleness", "deterministic"])
def test_options_of_asynchrony_are_refused_in_sync_mode(key: str) -> None:
    with pytest.raises(ValidationError, match="is for `mode: async`"):
        RolloutConfig(**{key: 1 if key == "max_staleness" else True})


def test_importance_bounds_must_be_there_and_in_order() -> None:
    with pytest.raises(ValidationError, match="give `min`, `max` or both"):
        ImportanceConfig(max=None)
    with pytest.raises(ValidationError, match="must be below max"):
        ImportanceConfig(min=2, max=1)
