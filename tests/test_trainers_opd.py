"""On-policy distillation from several teachers, without Ray."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.canary import Canary
from distill.store import TeacherWork, joined
from distill.teacher import TeacherWorker
from posttrain.errors import BadInput
from posttrain.observe.metrics import MetricsLog, read_metrics
from posttrain.recipe.schema import RolloutConfig
from posttrain.recipe.stages import OpdStage, OptimizerConfig, SftStage
from posttrain.trainers.jobs import OpdJob
from posttrain.trainers.mixing import OrderedByTeacher
from posttrain.trainers.opd import train_opd
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import train_sft
from rollouts.types import Sampling
from tests.trainers_kit import EOS, LocalClient, Recorder, prompts, save, tiny_model, tiny_tokenizer, tokens

TEXTS = {"letters": ["what?", "say", "a", "hello 1234"], "sums": ["1+1=", "20+3=", "7-2=", "0-0="]}
LIMITS = {"letters": 6, "sums": 3}


class LocalTeachers:
    """The teachers' side in this process."""

    def __init__(self, family: str = "hf") -> None:
        self.worker = TeacherWorker(family, budget_bytes=1 << 30)
        self.asked: list[tuple[str, Sequence[Sequence[int]]]] = []
        self.work: dict[str, TeacherWork] = {}
        self.released: list[str] = []

    def examine(self, teachers: Sequence[str], canary: Canary, outside: Sequence[str]) -> None:
        for teacher in teachers:
            self.worker.examine(teacher, canary, teacher in outside)

    def hidden_states(
        self, teacher: str, sequences: Sequence[Sequence[int]], kept: Sequence[int], dtype: str | None
    ) -> Callable[[], Tensor]:
        self.asked.append((teacher, sequences))

        def states() -> Tensor:
            self.work[teacher], *blocks = self.worker.hidden_states(teacher, sequences, kept, dtype)
            return joined(teacher, kept, blocks)

        return states

    def head(self, teacher: str) -> Callable[[], Tensor]:
        return lambda: self.worker.head(teacher).tensor().clone()

    def release(self, teacher: str) -> None:
        self.released.append(teacher)

    def take_work(self) -> dict[str, TeacherWork]:
        work, self.work = self.work, {}
        return work


class Gradients(Progress):
    gradient: Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.gradient is None:
            self.gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def job(teachers: dict[str, str], **config: object) -> OpdJob:
    return OpdJob(
        stage="student",
        config=OpdStage(**({"steps": 1, "batch_size": 8} | config)),
        checkpoint="",
        output="",
        prompts={domain: prompts(domain, texts) for domain, texts in TEXTS.items() if domain in teachers},
        teachers=teachers,
        max_new_tokens=LIMITS,
    )


def train(  # type: ignore[no-untyped-def]
    student: torch.nn.Module,
    teachers: dict[str, str],
    reward=None,
    client: LocalClient | None = None,
    rollout: RolloutConfig | None = None,
    **config: object,
):
    stage = job(teachers, **config)
    stage = OpdJob(**(vars(stage) | {"reward": reward, "rollout": rollout or RolloutConfig()}))
    recorder, pool = Recorder(), LocalTeachers()
    client = client or LocalClient(copy.deepcopy(student))
    progress = Gradients(recorder, "student", stage.config.steps)
    sampled = train_opd(student, tiny_tokenizer(), stage, client, pool, 3, progress)
    assert len(sampled.publish_seconds) == stage.config.steps
    return recorder.lines, progress, client, pool, sampled.difference


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    return {name: save(tiny_model(seed), tmp_path / name) for seed, name in enumerate(TEXTS, start=1)}


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    student = tiny_model(0)
    path = save(student, tmp_path / "same")
    (line,), progress, *_ = train(student, {"letters": path, "sums": path})
    for domain in TEXTS:
        assert abs(line[f"kl/{domain}"]) < 1e-6
        assert line[f"top1_agreement/{domain}"] == 1
        assert line[f"teacher_entropy/{domain}"] == pytest.approx(line[f"entropy/{domain}"], abs=1e-5)
    assert progress.gradient.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_loss_and_gradient_are_those_of_dense_logits(kind: str, experts: dict[str, str]) -> None:
    from tests.test_distill import oracle

    student = tiny_model(0)
    start = copy.deepcopy(student)
    optimizer = OptimizerConfig(lr=1e-6, max_grad_norm=1e9)
    (line,), progress, client, pool, _ = train(
        student, experts, divergence=kind, weights={"letters": 3.0}, optimizer=optimizer
    )
    identity = torch.eye(start.config.vocab_size)
    loss = torch.zeros(())
    for domain, (teacher, sequences) in zip(sorted(TEXTS), pool.asked, strict=True):
        assert teacher == experts[domain]
        expert = tiny_model(1 + list(TEXTS).index(domain))
        values = []
        asked = [request.prompt_ids for request in client.asked[4 * (domain == "sums") :]]
        for sequence, prompt in zip(sequences, asked, strict=False):
            row = torch.tensor([sequence])
            span = slice(len(prompt) - 1, len(sequence) - 1)
            ours, theirs = start(input_ids=row).logits[0, span], expert(input_ids=row).logits[0, span].detach()
            values.append(oracle(kind, ours, identity, theirs, identity))
        mean = torch.cat(values).mean()
        loss = loss + (3 if domain == "letters" else 1) / 4 * mean
        assert line[f"kl/{domain}"] == pytest.approx(mean.item(), abs=1e-5)
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in start.parameters()])
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert (progress.gradient - expected).abs().max() < 1e-5


def trained_expert(domain: str, answer: str, path: Path) -> str:
    """An expert that has learned to give this answer to the domain's prompts."""
    model = tiny_model(0)
    rows = [
        {"input_ids": [*tokens(text + answer), EOS], "labels": [-100] * len(text) + [*tokens(answer), EOS]}
        for text in TEXTS[domain]
    ]
    config = SftStage(steps=25, batch_size=4, optimizer=OptimizerConfig(lr=1e-2))
    train_sft(model, tiny_tokenizer(), rows, config, 0, Progress(None, "expert", 25))
    return save(model, path)


def test_the_student_takes_up_what_each_expert_knows(tmp_path: Path) -> None:
    answers = {"letters": "yes", "sums": "42"}
    experts = {domain: trained_expert(domain, answer, tmp_path / domain) for domain, answer in answers.items()}
    lines, _, client, _, difference = train(
        tiny_model(0), experts, steps=60, batch_size=16, optimizer=OptimizerConfig(lr=1e-2)
    )
    for domain in TEXTS:
        assert lines[0][f"kl/{domain}"] > 1
        assert sum(line[f"kl/{domain}"] for line in lines[-5:]) / 5 < 0.1
        assert lines[-1][f"top1_agreement/{domain}"] > 0.9
    assert difference.largest < 1e-4
    last = client.generate([list(tokens("say")), list(tokens("7-2="))], Sampling(max_tokens=4, temperature=0.1))
    assert [group[0].token_ids for group in last] == [[*tokens("yes"), EOS], [*tokens("42"), EOS]]


def test_every_sample_goes_to_its_domains_teacher_within_its_limit(experts: dict[str, str]) -> None:
    _, _, client, pool, _ = train(tiny_model(0), experts, steps=2)
    for step in range(2):
        asked = [request.prompt_ids for request in client.batches[step]]
        assert {r.domain: r.sampling.max_tokens for r in client.batches[step]} == LIMITS
        for position, domain in enumerate(sorted(TEXTS)):
            teacher, sequences = pool.asked[2 * step + position]
            assert teacher == experts[domain]
            for sequence, prompt in zip(sequences, asked[4 * position :], strict=False):
                assert sequence[: len(prompt)] == prompt
                assert 1 <= len(sequence) - len(prompt) <= LIMITS[domain]


def test_a_batch_need_not_have_every_domain(experts: dict[str, str]) -> None:
    lines, *_ = train(tiny_model(0), experts, steps=2, batch_size=1)
    assert {name for line in lines for name in line if name.startswith("kl/")} == {"kl/letters", "kl/sums"}
    assert [len([name for name in line if name.startswith("kl/")]) for line in lines] == [1, 1]


def test_rewards_are_reported_by_domain(experts: dict[str, str]) -> None:
    def reward(problem_ids, completion_ids, finish_reasons):  # type: ignore[no-untyped-def]
        return [float(problem_id.startswith("sums")) for problem_id in problem_ids], [{}] * len(problem_ids)

    (line,), *_ = train(tiny_model(0), experts, reward)
    assert (line["reward"], line["reward/letters"], line["reward/sums"]) == (0.5, 0.0, 1.0)


def test_a_teacher_with_another_vocabulary_is_refused(experts: dict[str, str], tmp_path: Path) -> None:
    student = tiny_model(0)
    wider = save(tiny_model(5, vocabulary=student.config.vocab_size + 3), tmp_path / "wider")
    with pytest.raises(BadInput, match=r"vocabulary of 46 tokens, the student one of 43"):
        train(student, experts | {"sums": wider})


def test_a_domain_without_a_teacher_is_refused(experts: dict[str, str]) -> None:
    stage = job(experts)
    stage = OpdJob(**(vars(stage) | {"teachers": {"sums": experts["sums"]}}))
    with pytest.raises(BadInput, match=r"no teacher for the domains \['letters'\]"):
        train_opd(tiny_model(0), tiny_tokenizer(), stage, None, LocalTeachers(), 0, Progress(None, "student", 1))


def test_batches_are_ordered_by_teacher_and_follow_the_shares() -> None:
    supply = {name: prompts(name, ["a", "b", "c"]) for name in ("x", "y", "z")}
    shares = {"x": 5.0, "y": 2.0, "z": 0.5}
    rows = list(OrderedByTeacher(supply, lambda: shares, steps=30, batch_size=4, seed=0))
    assert len(rows) == 120
    for step in range(30):
        domains = [row.domain for row in rows[4 * step : 4 * step + 4]]
        assert domains == sorted(domains)
    assert Counter(row.domain for row in rows) == {"x": 80, "y": 32, "z": 8}


def test_the_first_sample_of_each_domain_is_written_down_with_the_divergence_of_each_token(
    experts: dict[str, str], tmp_path: Path
) -> None:
    def reward(problem_ids, completion_ids, finish_reasons):  # type: ignore[no-untyped-def]
        return [float(len(tokens)) for tokens in completion_ids], [{"length": float(len(t))} for t in completion_ids]

    # One sample of each domain, so that the mean over the trace's tokens is the metric.
    stage = job(experts, batch_size=2)
    stage = OpdJob(**(vars(stage) | {"reward": reward}))
    recorder, student = Recorder(), tiny_model(0)
    progress = Progress(recorder, "student", 1, 1, MetricsLog(tmp_path / "traces.jsonl"))
    train_opd(student, tiny_tokenizer(), stage, LocalClient(copy.deepcopy(student)), LocalTeachers(), 3, progress)
    traces = {trace["domain"]: trace for trace in read_metrics(tmp_path / "traces.jsonl")}
    assert set(traces) == set(TEXTS)
    for domain, trace in traces.items():
        assert trace["prompt"] in TEXTS[domain] and trace["kl_to"] == domain
        assert trace["reward"] == trace["reward_parts"]["length"] == len(trace["tokens"])
        mean = sum(trace["kl"]) / len(trace["kl"])
        assert mean == pytest.approx(recorder.lines[0][f"kl/{domain}"], rel=1e-3)
        assert trace["sampler"] == pytest.approx(trace["trainer"], abs=1e-4)
