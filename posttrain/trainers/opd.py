"""On-policy distillation from one expert per domain into one student (V4 report, eq. 29 and section 5.2.2).

    L = sum_i w_i D_i / sum_i w_i,     D_i = mean over the tokens of domain i's samples of D(student, expert i)

Each step samples answers from the current student, asks each sample's teachers for their hidden states, and takes the
exact divergence over the whole vocabulary on the sampled prefixes (or what else the recipe says). Dividing by the sum
of the weights keeps the loss in nats per token whatever the number of experts; a domain counts by its weight, not by
how long its answers are. Samples are ordered by teacher, and one teacher's states and head are in memory at a time.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.canary import Canary, end_tokens, vocabulary_digest
from distill.divergence import TeacherReport, TeacherRows, one_head_at_a_time
from distill.objective import Objective
from posttrain.errors import BadInput
from posttrain.optim import build_optimizer
from posttrain.recipe.stages import OpdStage
from posttrain.recipe.student import first_untaught
from posttrain.trainers.asking import Asking, Taught, Teachers
from posttrain.trainers.auxiliary import auxiliary_objectives
from posttrain.trainers.generation import Ask, Client, RolloutGeneration, Sampled, means_by_effort
from posttrain.trainers.grpo import placeholders
from posttrain.trainers.jobs import OpdJob, Reward, bind_reward
from posttrain.trainers.mismatch import LogprobDifference
from posttrain.trainers.mixing import Guards, Mixing, OrderedByTeacher
from posttrain.trainers.models import distillation_obstacle
from posttrain.trainers.progress import Progress
from posttrain.trainers.router import frozen_router
from posttrain.trainers.settings import training_arguments
from posttrain.trainers.snapshots import Part, train
from posttrain.trainers.traces import Traces
from posttrain.trainers.trl_seam import Batch, DistillationConfig, OnPolicyTrainer, sampled_logps
from rollouts.environments import with_episodes

CANARY_PROMPTS = 4
"""Of each domain: what every teacher is tried on."""


class Learned(NamedTuple):
    """What was learned of a domain in a step, means over its tokens, over its teachers by their weights."""

    tokens: int
    divergence: float
    reverse_kl: float
    entropy: float


class OpdTrainer(OnPolicyTrainer):
    """TRL's distillation trainer with teachers for each domain. Set the attributes before `train()`."""

    job: OpdJob
    teachers: Teachers
    asking: Asking
    rollouts: RolloutGeneration
    progress: Progress
    difference: LogprobDifference
    mixing: Mixing
    guards: Guards
    traces: Traces

    def batch_generated(self, inputs: Sequence[Batch]) -> None:
        """Send every sample to its teachers: they work while the student's own forward pass runs."""
        self._taught = self.asking.batch_finished(self.rollouts.groups)
        self._scores: list[tuple[float | None, dict[str, float]]] = [(None, {})] * len(inputs)
        if self.job.reward is not None:
            self._score(self.job.reward, inputs)

    def divergence_loss(self, hidden_BTH: Tensor, head_VH: Tensor, inputs: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss over all domains, one teacher after the other."""
        chosen_BT = inputs["completion_mask"].bool()
        hidden_NH = hidden_BTH[chosen_BT]  # sample after sample, so a domain's positions are next to each other
        targets_N = inputs["completion_ids"][chosen_BT]
        with torch.no_grad():
            logps_N = sampled_logps(hidden_NH, head_VH, targets_N, self.rollouts.temperature)
        samples = self.rollouts.samples
        sampler_N = torch.tensor([value for sample in samples for value in sample.logprobs], dtype=torch.float64)
        ages_N = self.rollouts.version - torch.tensor([one for sample in samples for one in sample.versions])
        sampled_N = torch.tensor([one for sample in samples for one in sample.loss_mask], dtype=torch.bool)
        fresh_N = sampled_N & (ages_N == 0)
        for name, value in self.difference.add(logps_N.cpu()[fresh_N], sampler_N[fresh_N]).items():
            self.progress.add(name, value)
        started = time.perf_counter()
        learned_N = sampled_N & (ages_N <= self.rollouts.ages.limit) & self._not_masked()
        chosen_N = learned_N.to(hidden_NH.device)
        rows = self._teacher_rows(learned_N)
        with self.progress.phase("distilling"):
            loss, reports = one_head_at_a_time(
                objective_of(self.job.config), hidden_NH[chosen_N], head_VH, rows, targets_N[chosen_N]
            )
        self.progress.add("seconds_divergence", time.perf_counter() - started)
        if self.traces.wants(self.rollouts.steps_done):
            self._trace(logps_N, learned_N, rows, reports)
        entropy = torch.tensor(self._report(reports))
        return loss, entropy, torch.tensor(max(1, int(learned_N.sum())))

    def _not_masked(self) -> Tensor:
        """Which of the sampled tokens the recipe lets be learned from."""
        samples, masks = self.rollouts.samples, self.job.config.mask_truncated
        whole_B = torch.tensor([not (masks and sample.finish_reason == "length") for sample in samples])
        return whole_B.repeat_interleave(torch.tensor([len(sample.token_ids) for sample in samples]))

    def _teacher_rows(self, learned_N: Tensor) -> list[TeacherRows]:
        """What each teacher teaches of the positions that `learned_N` keeps; a domain without any is left out."""
        config = self.job.config
        total = sum(config.weights.get(domain, 1.0) for domain in self.job.prompts)
        rows, position, first = [], 0, 0
        self._learned: list[tuple[Taught, list[float]]] = []
        for taught in self._taught:
            domain, tokens = taught.domain, taught.tokens
            kept_N = learned_N[position : position + tokens]
            position += tokens
            count = int(kept_N.sum())
            if count:
                weight = config.weights.get(domain, 1.0) / total * self.mixing.factor(domain)
                weights = _relative([teacher.weight for teacher, _ in taught.states])
                self._learned.append((taught, weights))
                for (teacher, pending), part in zip(taught.states, weights, strict=True):
                    head = self.teachers.head(teacher.checkpoint)
                    hidden = pending if count == tokens else partial(_selected, pending, kept_N)
                    name = domain if len(weights) == 1 else f"{domain}/{teacher.name}"
                    rows.append(TeacherRows(name, slice(first, first + count), weight * part, hidden, head))
            first += count
        return rows

    def _trace(
        self, logps_N: Tensor, learned_N: Tensor, rows: Sequence[TeacherRows], reports: Sequence[TeacherReport]
    ) -> None:
        """Write down the first sample of each domain."""
        learned_kl_L = torch.zeros(int(learned_N.sum()), dtype=torch.float64)
        weights = [weight for _, weights in self._learned for weight in weights]
        for row, report, weight in zip(rows, reports, weights, strict=True):
            learned_kl_L[row.rows] += weight * report.divergence_N.double().cpu()
        kl_N = torch.full((len(learned_N),), math.nan, dtype=torch.float64)
        kl_N[learned_N] = learned_kl_L
        names = {taught.domain: ", ".join(one.name for one, _ in taught.states) for taught in self._taught}
        begin, seen = 0, set()
        for group, score in zip(self.rollouts.groups, self._scores, strict=True):
            end, domain = begin + len(group.completions[0].token_ids), group.prompt.domain
            if domain not in seen:
                seen.add(domain)
                logprobs, kl = logps_N[begin:end].tolist(), kl_N[begin:end].tolist()
                reward, parts = score
                self.traces.write(
                    self.rollouts.steps_done, group, 0, reward, logprobs, kl, kl_to=names[domain], reward_parts=parts,
                    measure=self.job.config.divergence,
                )  # fmt: skip
            begin = end

    def _report(self, reports: Sequence[TeacherReport]) -> float:
        """Note what happened; returns the sum of the student's entropies."""
        for report in reports:
            self.progress.add(f"kl/{report.name}", report.divergence)
            self.progress.add(f"top1_agreement/{report.name}", report.top1_agreement)
            self.progress.add(f"entropy/{report.name}", report.student_entropy)
            self.progress.add(f"teacher_entropy/{report.name}", report.teacher_entropy)
        self.asking.batch_learned()
        remaining = iter(reports)
        domains: dict[str, Learned] = {}
        for taught, weights in self._learned:
            own = [next(remaining) for _ in weights]
            pairs = list(zip(weights, own, strict=True))
            divergence = sum(weight * report.divergence for weight, report in pairs)
            reverse_kl = sum(weight * report.reverse_kl for weight, report in pairs)
            domains[taught.domain] = Learned(own[0].tokens, divergence, reverse_kl, own[0].student_entropy)
            if len(own) > 1:
                self.progress.add(f"kl/{taught.domain}", divergence)
                self.progress.add(f"entropy/{taught.domain}", own[0].student_entropy)
        for taught in self._taught:
            entropy = domains[taught.domain].entropy if taught.domain in domains else None
            self.guards.check(taught.domain, entropy, taught.length)
        self.mixing.learned({domain: one.divergence for domain, one in domains.items()})
        if domains:  # not all of them too old to learn from
            tokens = sum(one.tokens for one in domains.values())
            self.progress.add("kl", sum(one.divergence * one.tokens for one in domains.values()) / tokens)
            if objective_of(self.job.config) != Objective():
                self.progress.add("reverse_kl", sum(one.reverse_kl * one.tokens for one in domains.values()) / tokens)
        return sum(one.entropy * one.tokens for one in domains.values())

    def _score(self, reward: Reward, inputs: Sequence[Batch]) -> None:
        samples = self.rollouts.samples
        with self.progress.phase("rewarding"):
            rewards, parts = reward(
                [row["problem_id"] for row in inputs],
                [sample.sampled_ids for sample in samples],
                [sample.finish_reason for sample in samples],
            )
        self._scores = list(zip(rewards, parts, strict=True))
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


def _relative(weights: Sequence[float]) -> list[float]:
    """They sum to one."""
    return [weight / sum(weights) for weight in weights]


def objective_of(config: OpdStage) -> Objective:
    """What the recipe's student minimises."""
    return Objective(config.divergence, config.divergence_temperature, config.jsd_beta, config.top_k)


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
    with progress.phase("distilling"):
        check_teachers(model, tokenizer, job, teachers)
    bind_reward(job.reward, client, job.stage)
    config, domains = job.config, sorted(job.prompts)
    asking = Asking(job, teachers, progress)
    mixing = Mixing(config, domains, progress)
    rows = OrderedByTeacher(job.prompts, mixing.shares, config.steps, config.batch_size, seed)
    generation = RolloutGeneration(
        client=with_episodes(client, job.episodes),
        model=lambda: trainer.accelerator.unwrap_model(trainer.model),
        stage=job.stage,
        asks=(Ask(prompt, prompt.max_new_tokens or job.max_new_tokens[prompt.domain]) for prompt in rows),
        steps=config.steps,
        prompts_per_step=config.batch_size,
        temperature=config.temperature,
        seed=seed,
        progress=progress,
        rollout=job.rollout,
        first_version=job.first_version,
        domain_finished=asking.domain_finished,
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
            train_dataset=placeholders(config.steps * config.batch_size),
            processing_class=tokenizer,
            optimizers=build_optimizer(model, config.optimizer, config.steps),
            callbacks=[*([auxiliary] if auxiliary else []), progress],
        )
        trainer.job, trainer.teachers, trainer.asking, trainer.progress = job, teachers, asking, progress
        trainer.mixing, trainer.guards = mixing, Guards(config.guards, job.stage, progress)
        trainer.difference, trainer.auxiliary = LogprobDifference(), auxiliary
        trainer.traces = Traces(progress.traces, job.stage, config.steps, tokenizer)
        parts: dict[str, Part] = {"mixing": mixing, "rows": rows, "generation": generation}
        parts |= {"asking": asking, "guards": trainer.guards, "difference": trainer.difference}
        train(trainer, job.snapshots, progress, parts, generation.snapshots_begin)
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
        shuffle_dataset=False,
    )


def check_teachers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: OpdJob, teachers: Teachers) -> None:
    """Raise BadInput unless every domain has a teacher, and all can teach this student (`distill.canary`)."""
    missing = sorted(set(job.prompts) - set(job.teachers))
    if missing:
        raise BadInput(f"stage {job.stage}: no teacher for the domains {missing}; there are {sorted(job.teachers)}")
    for domain in sorted(job.prompts):
        if (step := first_untaught(job.teachers_of(domain), job.config.steps)) is not None:
            raise BadInput(f"stage {job.stage}: nobody teaches {domain} in step {step}; was its teacher dropped?")
    if problem := distillation_obstacle(model):
        raise BadInput(f"stage {job.stage}: {problem}")
    used = job.all_teachers()
    canary = Canary(
        prompts=[prompt.token_ids for domain in sorted(job.prompts) for prompt in job.prompts[domain][:CANARY_PROMPTS]],
        vocabulary=model.get_output_embeddings().weight.size(0),
        eos=sorted({*end_tokens(model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}),
        tokens=vocabulary_digest(Path(job.checkpoint)) if job.checkpoint else None,
    )
    outside = [teacher.checkpoint for teacher in used if teacher.outside]
    teachers.examine([teacher.checkpoint for teacher in used], canary, outside)
