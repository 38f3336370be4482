"""On-policy distillation from one expert per domain into one student (V4 report, eq. 29 and section 5.2.2).

    L = sum_i w_i D_i / sum_i w_i,     D_i = mean over the tokens of domain i's samples of D(student, expert i)

Each step samples answers from the current student, asks each sample's expert for its hidden states, and takes the
exact divergence over the whole vocabulary, at temperature 1, on the sampled prefixes. Dividing by the sum of the
weights keeps the loss in nats per token whatever the number of experts; a domain counts by its weight, not by how long
its answers are. Samples are ordered by expert, and one expert's head is in memory at a time.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.divergence import BETA, Divergence, TeacherReport, TeacherRows, one_head_at_a_time
from posttrain.errors import BadInput
from posttrain.optim import build_optimizer
from posttrain.recipe.schema import OpdStage
from posttrain.trainers.auxiliary import auxiliary_objectives
from posttrain.trainers.generation import Ask, Client, RolloutGeneration, Sampled, derive_seed, means_by_effort
from posttrain.trainers.grpo import placeholders
from posttrain.trainers.jobs import OpdJob, Prompt, Reward
from posttrain.trainers.mismatch import LogprobDifference
from posttrain.trainers.models import distillation_obstacle
from posttrain.trainers.progress import Progress
from posttrain.trainers.router import frozen_router
from posttrain.trainers.settings import cycle, training_arguments
from posttrain.trainers.trl_seam import Batch, DistillationConfig, OnPolicyTrainer, sampled_logps
from rollouts.environments import with_episodes


class Teachers(Protocol):
    """The teachers' side (`distill.teacher.TeacherPool`). A teacher is named by its checkpoint's directory."""

    def check_vocabulary(self, teachers: Sequence[str], student_size: int) -> None: ...

    def hidden_states(
        self, teacher: str, sequences: Sequence[Sequence[int]], kept: Sequence[int]
    ) -> Callable[[], Tensor]: ...

    def head(self, teacher: str) -> Callable[[], Tensor]: ...


class OpdTrainer(OnPolicyTrainer):
    """TRL's distillation trainer with one teacher for each domain. Set the attributes before `train()`."""

    kind: Divergence
    teachers: Teachers
    experts: Mapping[str, str]
    """For each domain, the checkpoint of its expert."""
    weights: Mapping[str, float]
    """For each domain, w_i; they sum to one."""
    reward: Reward | None
    rollouts: RolloutGeneration
    progress: Progress
    difference: LogprobDifference

    def batch_generated(self, inputs: Sequence[Batch]) -> None:
        """Send every sample to its teacher: they work while the student's own forward pass runs."""
        samples = self.rollouts.samples
        self._domains: list[tuple[str, int, Callable[[], Tensor]]] = []
        first = 0
        for domain, members in groupby(inputs, key=lambda row: row["domain"]):
            rows = list(members)
            completions = [sample.token_ids for sample in samples[first : first + len(rows)]]
            first += len(rows)
            kept = [len(tokens) for tokens in completions]
            sequences = [row["prompt"] + tokens for row, tokens in zip(rows, completions, strict=True)]
            pending = self.teachers.hidden_states(self.experts[domain], sequences, kept)
            self._domains.append((domain, sum(kept), pending))
            sampled = [sum(sample.loss_mask) for sample in samples[first - len(rows) : first]]
            self.progress.add(f"completion_length/{domain}", sum(sampled) / len(sampled))
        if self.reward is not None:
            self._score(self.reward, inputs)

    def divergence_loss(self, hidden_BTH: Tensor, head_VH: Tensor, inputs: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss over all domains, one teacher after the other."""
        chosen_BT = inputs["completion_mask"].bool()
        hidden_NH = hidden_BTH[chosen_BT]  # sample after sample, so a domain's positions are next to each other
        with torch.no_grad():
            targets_N = inputs["completion_ids"][chosen_BT]
            logps_N = sampled_logps(hidden_NH, head_VH, targets_N, self.rollouts.temperature)
        samples = self.rollouts.samples
        sampler_N = torch.tensor([value for sample in samples for value in sample.logprobs], dtype=torch.float64)
        ages_N = self.rollouts.version - torch.tensor([one for sample in samples for one in sample.versions])
        sampled_N = torch.tensor([one for sample in samples for one in sample.loss_mask], dtype=torch.bool)
        fresh_N = sampled_N & (ages_N == 0)
        for name, value in self.difference.add(logps_N.cpu()[fresh_N], sampler_N[fresh_N]).items():
            self.progress.add(name, value)
        started = time.perf_counter()
        learned_N = sampled_N & (ages_N <= self.rollouts.ages.limit)
        loss, reports = one_head_at_a_time(
            self.kind, hidden_NH[learned_N.to(hidden_NH.device)], head_VH, self._teacher_rows(learned_N)
        )
        self.progress.add("seconds_divergence", time.perf_counter() - started)
        self._report(reports)
        entropy = torch.tensor(sum(report.student_entropy * report.tokens for report in reports))
        return loss, entropy, torch.tensor(max(1, sum(report.tokens for report in reports)))

    def _teacher_rows(self, learned_N: Tensor) -> list[TeacherRows]:
        """What each teacher teaches of the positions that `learned_N` keeps; a teacher without any is left out."""
        rows, position, first = [], 0, 0
        for domain, tokens, pending in self._domains:
            kept_N = learned_N[position : position + tokens]
            position += tokens
            count = int(kept_N.sum())
            if count:
                head = self.teachers.head(self.experts[domain])
                hidden = pending if count == tokens else partial(_selected, pending, kept_N)
                rows.append(TeacherRows(domain, slice(first, first + count), self.weights[domain], hidden, head))
            first += count
        return rows

    def _report(self, reports: Sequence[TeacherReport]) -> None:
        tokens = sum(report.tokens for report in reports)
        if not tokens:  # all of them too old to learn from
            return
        self.progress.add("kl", sum(report.divergence * report.tokens for report in reports) / tokens)
        for report in reports:
            self.progress.add(f"kl/{report.name}", report.divergence)
            self.progress.add(f"top1_agreement/{report.name}", report.top1_agreement)
            self.progress.add(f"entropy/{report.name}", report.student_entropy)
            self.progress.add(f"teacher_entropy/{report.name}", report.teacher_entropy)

    def _score(self, reward: Reward, inputs: Sequence[Batch]) -> None:
        samples = self.rollouts.samples
        rewards, _ = reward(
            [row["problem_id"] for row in inputs],
            [sample.sampled_ids for sample in samples],
            [sample.finish_reason for sample in samples],
        )
        for effort, mean in means_by_effort(self.rollouts.groups, rewards).items():
            self.progress.add(f"effort/{effort}/reward", mean)
        scored = [pair for pair in zip(inputs, rewards, strict=True) if not math.isnan(pair[1])]
        if len(scored) < len(rewards):
            self.progress.add("reward_errors", len(rewards) - len(scored))
        if scored:
            self.progress.add("reward", sum(value for _, value in scored) / len(scored))
        for domain, members in groupby(scored, key=lambda pair: pair[0]["domain"]):
            values = [value for _, value in members]
            self.progress.add(f"reward/{domain}", sum(values) / len(values))


def _selected(states: Callable[[], Tensor], kept_N: Tensor) -> Tensor:
    return states()[kept_N]


def ordered_by_teacher(
    prompts: Mapping[str, Sequence[Prompt]], shares: Mapping[str, float], steps: int, batch_size: int, seed: int
) -> list[Prompt]:
    """`steps` batches of `batch_size` prompts, in each batch one domain after the other.

    Over the steps each domain's part approaches its share (equal where `shares` has none): what a batch cannot give
    a domain because samples are whole, the next ones make up for.
    """
    domains = sorted(prompts)
    total = sum(shares.get(domain, 1.0) for domain in domains)
    owed = dict.fromkeys(domains, 0.0)
    counts: list[dict[str, int]] = []
    for _ in range(steps):
        for domain in domains:
            owed[domain] += batch_size * shares.get(domain, 1.0) / total
        count = {domain: max(0, int(owed[domain])) for domain in domains}
        for _ in range(batch_size - sum(count.values())):
            count[max(domains, key=lambda domain: (owed[domain] - count[domain], domain))] += 1
        for domain in domains:
            owed[domain] -= count[domain]
        counts.append(count)
    needed = {domain: sum(count[domain] for count in counts) for domain in domains}
    supply = {d: iter(cycle(prompts[d], needed[d], derive_seed(seed, d))) for d in domains}
    return [next(supply[domain]) for count in counts for domain in domains for _ in range(count[domain])]


def train_opd(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: OpdJob,
    client: Client,
    teachers: Teachers,
    seed: int,
    progress: Progress,
) -> Sampled:
    """Train `model` in place; return what is to be known of the sampling.

    Raises BadInput when a teacher is missing or has another vocabulary.
    """
    check_teachers(model, job, teachers)
    config, domains = job.config, sorted(job.prompts)
    rows = ordered_by_teacher(job.prompts, config.shares, config.steps, config.batch_size, seed)
    generation = RolloutGeneration(
        client=with_episodes(client, job.episodes),
        model=lambda: trainer.accelerator.unwrap_model(trainer.model),
        stage=job.stage,
        asks=iter([Ask(prompt, prompt.max_new_tokens or job.max_new_tokens[prompt.domain]) for prompt in rows]),
        steps=config.steps,
        prompts_per_step=config.batch_size,
        temperature=config.temperature,
        seed=seed,
        progress=progress,
        rollout=job.rollout,
        first_version=job.first_version,
    )
    longest = max(job.max_new_tokens[domain] for domain in domains)
    with (
        tempfile.TemporaryDirectory() as scratch,
        frozen_router(model, config.freeze_router),
        auxiliary_objectives(model, config.auxiliary, progress, job.stage) as auxiliary,
    ):
        trainer = OpdTrainer(
            model=model,
            generation=generation,
            args=opd_arguments(config, longest, scratch, seed),
            train_dataset=placeholders(len(rows)),
            processing_class=tokenizer,
            optimizers=build_optimizer(model, config.optimizer, config.steps),
            callbacks=[*([auxiliary] if auxiliary else []), progress],
        )
        total = sum(config.weights.get(domain, 1.0) for domain in domains)
        trainer.kind, trainer.teachers, trainer.experts = config.divergence, teachers, job.teachers
        trainer.weights = {domain: config.weights.get(domain, 1.0) / total for domain in domains}
        trainer.reward, trainer.progress = job.reward, progress
        trainer.difference, trainer.auxiliary = LogprobDifference(), auxiliary
        trainer.train()
    generation.finish()
    return Sampled.of(generation, trainer.difference)


def opd_arguments(config: OpdStage, max_new_tokens: int, directory: str, seed: int) -> DistillationConfig:
    """TRL's arguments for a stage: one generated batch, one update."""
    return training_arguments(
        DistillationConfig,
        directory=directory,
        updates=config.steps,
        batch_size=config.batch_size,
        seed=seed,
        optimizer=config.optimizer,
        max_completion_length=max_new_tokens,
        temperature=config.temperature,
        beta=BETA[config.divergence],
        shuffle_dataset=False,
    )


def check_teachers(model: PreTrainedModel, job: OpdJob, teachers: Teachers) -> None:
    """Raise BadInput unless every domain has a teacher, and all have the student's vocabulary."""
    missing = sorted(set(job.prompts) - set(job.teachers))
    if missing:
        raise BadInput(f"stage {job.stage}: no teacher for the domains {missing}; there are {sorted(job.teachers)}")
    if problem := distillation_obstacle(model):
        raise BadInput(f"stage {job.stage}: {problem}")
    used = [job.teachers[domain] for domain in sorted(job.prompts)]
    teachers.check_vocabulary(used, model.get_output_embeddings().weight.size(0))
