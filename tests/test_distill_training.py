"""The student's options: several teachers, masks, mixing, guards, what it starts from."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.errors import RunFailed
from posttrain.recipe.schema import Recipe
from posttrain.recipe.stages import OpdStage, OptimizerConfig
from posttrain.recipe.student import GuardsConfig
from posttrain.stages.merge import merge, student_start
from posttrain.stages.opd import teachers_by_domain
from posttrain.trainers.jobs import OpdJob, Teacher
from posttrain.trainers.mixing import Guards, Mixing, OrderedByTeacher
from posttrain.trainers.models import load_model
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from tests.recipe_kit import recipe_with
from tests.test_distill import oracle
from tests.test_trainers_opd import TEXTS, Gradients, LocalTeachers, job
from tests.trainers_kit import LocalClient, Recorder, prompts, save, tiny_model, tiny_tokenizer

STILL = OptimizerConfig(lr=1e-6, max_grad_norm=1e9)


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    return {name: save(tiny_model(seed), tmp_path / name) for seed, name in enumerate(TEXTS, start=1)}


class Trained:
    """One training of the tiny student, and what came of it."""

    def __init__(self, teachers: dict[str, str | list[Teacher]], **config: object) -> None:
        self.start, student = tiny_model(0), tiny_model(0)
        made = job(teachers, optimizer=STILL, **config)
        recorder, self.pool = Recorder(), LocalTeachers()
        self.client = LocalClient(copy.deepcopy(student))
        progress = Gradients(recorder, "student", made.config.steps)
        train_opd(student, tiny_tokenizer(), OpdJob(**vars(made)), self.client, self.pool, 3, progress)
        self.lines, self.events, self.gradient = recorder.lines, recorder.events, progress.gradient

    def logits(self, seed: int | None, request: int, of: int = 1) -> torch.Tensor:
        """Of the student (None) or the teacher with this seed, where the tokens of sample `request` were drawn."""
        sequence = [one for _, rows in self.pool.asked[::of] for one in rows][request]
        prompt = self.client.asked[request].prompt_ids
        model = self.start if seed is None else tiny_model(seed).requires_grad_(False)
        return model(input_ids=torch.tensor([sequence])).logits[0, len(prompt) - 1 : -1]

    def assert_gradient(self, loss: torch.Tensor) -> None:
        loss.backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in self.start.parameters()])
        assert (self.gradient - expected).abs().max() < 1e-5


def kl(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(ours.shape[-1])
    return oracle("reverse_kl", ours, identity, theirs, identity)


def test_several_teachers_of_a_sample_are_averaged_by_their_weights(experts: dict[str, str]) -> None:
    first, second = experts.values()
    both = [Teacher("one", first, 3.0), Teacher("two", second, 1.0)]
    found = Trained({"sums": both}, batch_size=4)
    (line,) = found.lines
    values = {
        seed: torch.cat([kl(found.logits(None, n, 2), found.logits(seed, n, 2)) for n in range(4)]) for seed in (1, 2)
    }
    loss = 0.75 * values[1].mean() + 0.25 * values[2].mean()
    assert line["kl/sums/one"] == pytest.approx(values[1].mean().item(), abs=1e-5)
    assert line["kl/sums/two"] == pytest.approx(values[2].mean().item(), abs=1e-5)
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["kl"] == line["kl/sums"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["entropy/sums"] == line["entropy/sums/one"]
    found.assert_gradient(loss)


def test_nothing_is_learned_from_truncated_answers_if_so_asked(experts: dict[str, str]) -> None:
    found = Trained({"letters": experts["letters"]}, batch_size=8, mask_truncated=True)
    (line,) = found.lines
    answers = [one for _, rows in found.pool.asked for one in rows]
    whole = [n for n in range(8) if len(answers[n]) - len(found.client.asked[n].prompt_ids) < 6]
    assert 0 < len(whole) < 8 and line["truncated"] >= 1 - len(whole) / 8
    loss = torch.cat([kl(found.logits(None, n), found.logits(1, n)) for n in whole]).mean()
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    found.assert_gradient(loss)


@pytest.mark.parametrize("kind", ["sampled_token", "fixed_negative"])
def test_the_sampled_tokens_reach_the_objective(kind: str, experts: dict[str, str]) -> None:
    found = Trained({"sums": experts["sums"]}, batch_size=4, divergence=kind)
    answers = [one for _, rows in found.pool.asked for one in rows]
    surrogates, values = [], []
    for n, sequence in enumerate(answers):
        tokens = torch.tensor(sequence[len(found.client.asked[n].prompt_ids) :])[:, None]
        p, q = (torch.log_softmax(found.logits(seed, n), -1).gather(-1, tokens)[:, 0] for seed in (None, 2))
        values.append((p - q).detach())
        surrogates.append(p * (values[-1] if kind == "sampled_token" else 1))
    assert found.lines[0]["loss"] == pytest.approx(torch.cat(values).mean().item(), abs=1e-5)
    found.assert_gradient(torch.cat(surrogates).mean())


def test_rounded_states_cost_little_and_are_said_to_be_fewer_bytes(experts: dict[str, str]) -> None:
    exact, rounded = (Trained(experts, steps=1, hidden_dtype=dtype).lines[0] for dtype in (None, "bfloat16"))
    for domain in TEXTS:
        assert exact[f"teacher_bytes_returned/{domain}"] == 2 * rounded[f"teacher_bytes_returned/{domain}"]
        assert exact[f"kl/{domain}"] != rounded[f"kl/{domain}"]
        assert exact[f"kl/{domain}"] == pytest.approx(rounded[f"kl/{domain}"], rel=0.01)
        assert exact[f"seconds_teacher/{domain}"] > 0
        assert 0 < exact[f"teacher_busy/{domain}"] < 1
        assert exact[f"share/{domain}"] == 0.5


def mixing(recorder: Recorder | None = None, **config: object) -> Mixing:
    stage = OpdStage(**({"batch_size": 8} | config))
    return Mixing(stage, ["a", "b"], Progress(recorder, "student", 9))


def test_shares_follow_the_divergences_within_bounds() -> None:
    mixed = mixing(adaptive_shares=0.5, shares={"a": 2.0})
    assert mixed.shares() == {"a": 2.0, "b": 1.0}
    mixed.learned({"a": 0.5, "b": 1.5})
    shares = mixed.shares()
    assert shares["a"] == pytest.approx(2 * 0.5**0.5)
    assert shares["b"] == pytest.approx(1.5**0.5)
    for _ in range(200):
        mixed.learned({"a": 0.0, "b": 1.0})
    assert mixed.shares()["a"] == pytest.approx(2 * 0.25**0.5)  # never nothing


def test_adapted_shares_decide_what_is_asked_next() -> None:
    mixed = mixing(adaptive_shares=1.0)
    supply = {name: prompts(name, ["x", "y", "z"]) for name in ("a", "b")}
    asked = iter(OrderedByTeacher(supply, mixed.shares, steps=2, batch_size=8, seed=0))
    first = [next(asked).domain for _ in range(8)]
    mixed.learned({"a": 1.0, "b": 3.0})
    assert Counter(first) == {"a": 4, "b": 4}
    assert Counter(prompt.domain for prompt in asked) == {"a": 2, "b": 6}


def test_normalised_divergences_weigh_alike() -> None:
    mixed = mixing(normalise_kl=True)
    assert mixed.factor("a") == 1.0
    mixed.learned({"a": 0.5, "b": 1.5})
    assert (mixed.factor("a") * 0.5, mixed.factor("b") * 1.5) == (pytest.approx(1.0), pytest.approx(1.0))
    assert mixing().factor("a") == 1.0


def test_a_recipe_may_normalise_by_domain(experts: dict[str, str]) -> None:
    lines = Trained(experts, steps=2, normalise_kl=True).lines
    first, second = ([line[f"kl/{domain}"] for domain in sorted(TEXTS)] for line in lines)
    assert lines[0]["loss"] == pytest.approx(sum(first) / 2, abs=1e-6)
    mean = sum(first) / 2
    expected = sum(value * mean / before for value, before in zip(second, first, strict=True)) / 2
    assert lines[1]["loss"] == pytest.approx(expected, abs=1e-6)


def test_a_starving_domain_is_reported_once() -> None:
    recorder = Recorder()
    mixed = mixing(recorder)
    for _ in range(60):
        mixed.learned({"a": 1.0})
    (event,) = recorder.events
    assert "b starves: nothing was learned of it in 20 steps, in each of which 4 samples" in str(event["message"])
    rare = Recorder()
    mixed = mixing(rare, shares={"b": 0.01})
    for _ in range(60):
        mixed.learned({"a": 1.0})
    assert rare.events == []  # 0.08 samples a step are due


def test_guards_stop_a_student_that_breaks_after_some_patience() -> None:
    guards = Guards(GuardsConfig(min_entropy=0.5, patience=2), "student", Progress(None, "student", 9))
    for entropy in (0.4, 0.6, 0.4, None):
        guards.check("a", entropy, 10)
    with pytest.raises(RunFailed, match=r"stage student: the entropy of a is 0.3 nats, below guards.min_entropy"):
        guards.check("a", 0.3, 10)


def test_guards_may_only_warn() -> None:
    recorder = Recorder()
    config = GuardsConfig(length_ratio=2, patience=1, action="warn")
    guards = Guards(config, "student", Progress(recorder, "student", 9))
    for length in (10, 19, 21, 22, 6, 4):
        guards.check("a", None, length)
    first, second = (str(event["message"]) for event in recorder.events)
    assert first.startswith("answers of a have 21 tokens in the mean, 10 in the first step: more than")
    assert "have 4 tokens" in second


def test_a_guard_ends_the_stage(experts: dict[str, str]) -> None:
    with pytest.raises(RunFailed, match=r"below guards.min_entropy, which is 9, for 2 steps"):
        Trained(experts, steps=3, guards={"min_entropy": 9, "patience": 2})


def test_experts_merge_into_a_start(tmp_path: Path) -> None:
    paths = [Path(save(tiny_model(seed), tmp_path / str(seed))) for seed in range(3)]
    for name, scale, shares in (("average", 0.5, (0, 0.5, 0.5)), ("arithmetic", 0.8, (1 - 1.6, 0.8, 0.8))):
        merge("hf", paths[0], paths[1:], scale, tmp_path / name)
        found = load_model("hf", tmp_path / name).state_dict()
        models = [tiny_model(seed).state_dict() for seed in range(3)]
        for tensor in found:
            expected = sum(share * model[tensor] for share, model in zip(shares, models, strict=True))
            assert torch.allclose(found[tensor], expected, atol=1e-6)
    merge("hf", paths[0], [paths[0], paths[0]], 3.0, tmp_path / "same")
    same, base = (load_model("hf", path).state_dict() for path in (tmp_path / "same", paths[0]))
    assert all(torch.equal(same[name], base[name]) for name in base)


def work_of(recipe: Recipe, directory: Path) -> Any:
    return SimpleNamespace(recipe=recipe, run=SimpleNamespace(checkpoint_path=lambda name: directory / name))


def test_domains_are_taught_by_whom_the_recipe_says_and_the_gates_left(tmp_path: Path) -> None:
    teachers = {"words": [{"expert": "sums", "weight": 2}, {"checkpoint": "s3://b/large"}, {"expert": "words"}]}
    recipe = Recipe(**recipe_with({"stages.student.teachers": teachers}))
    work, both = work_of(recipe, tmp_path), {"words": Path("/w"), "sums": Path("/s")}
    assert teachers_by_domain(work, both) == {
        "sums": [Teacher("sums", "/s")],
        "words": [Teacher("sums", "/s", 2), Teacher("large", "s3://b/large", outside=True), Teacher("words", "/w")],
    }
    assert teachers_by_domain(work, {"words": Path("/w")}) == {
        "words": [Teacher("large", "s3://b/large", outside=True), Teacher("words", "/w")]
    }


def test_a_merged_start_is_made_once(tmp_path: Path) -> None:
    paths = [Path(save(tiny_model(seed), tmp_path / str(seed))) for seed in range(3)]
    recipe = Recipe(**recipe_with({"model": {"family": "hf", "checkpoint": "x"}, "rollout.engine": "vllm"}))
    work, experts = work_of(recipe, tmp_path), {"a": paths[1], "b": paths[2]}
    assert student_start(work, OpdStage(), paths[0], experts) == paths[0]
    start = student_start(work, OpdStage(init="average"), paths[0], experts)
    mean = (tiny_model(1).lm_head.weight + tiny_model(2).lm_head.weight) / 2
    assert torch.allclose(load_model("hf", start).lm_head.weight, mean, atol=1e-6)
    (start / "mark").touch()
    config = OpdStage(init="task_arithmetic", init_scale=3.0)
    assert (student_start(work, config, paths[0], experts) / "mark").exists()
