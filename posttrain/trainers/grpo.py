"""GRPO on verified rewards: TRL's trainer, sampling from the rollout service.

For a group of G answers to one prompt with rewards R: advantage A_i = (R_i - mean R) / (std R + 1e-4) (the division
depends on `scale_rewards`), and the clipped objective of DeepSeekMath (arXiv 2402.03300) with the aggregation of
`loss_type`. The ratio of the trainer's to the sampler's probability corrects for what is left of their difference.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from posttrain.errors import RunFailed
from posttrain.optim import build_optimizer
from posttrain.recipe.stages import GrpoStage
from posttrain.trainers.auxiliary import auxiliary_objectives
from posttrain.trainers.generation import Ask, Client, Group, RolloutGeneration, Sampled, means_by_effort
from posttrain.trainers.jobs import GrpoJob, Reward, bind_reward
from posttrain.trainers.mismatch import LogprobDifference, importance_ratios
from posttrain.trainers.progress import Progress
from posttrain.trainers.router import frozen_router
from posttrain.trainers.settings import endless, training_arguments
from posttrain.trainers.snapshots import Part, train
from posttrain.trainers.traces import Traces
from posttrain.trainers.trl_seam import Batch, GroupRelativeTrainer, GRPOConfig
from rollouts.environments import with_episodes


class GrpoTrainer(GroupRelativeTrainer):
    """TRL's GRPO trainer that measures trainer against sampler on every batch."""

    rollouts: RolloutGeneration
    progress: Progress
    difference: LogprobDifference
    config: GrpoStage
    traces: Traces

    def batch_scored(self, batch: Batch) -> None:
        trainer_BT, sampler_BT = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
        mask_BT = batch["completion_mask"] * batch.get("tool_mask", 1)
        fresh_BT = mask_BT.bool() & (self._ages_like(mask_BT) == 0)
        ratio_BT, outside_BT = importance_ratios(trainer_BT, sampler_BT, mask_BT, self.config.importance)
        learned_BT = mask_BT.bool()
        metrics = self.difference.add(trainer_BT[fresh_BT], sampler_BT[fresh_BT])
        metrics |= self.rollouts.ages.add_ratios(ratio_BT[learned_BT], outside_BT[learned_BT])
        for name, value in metrics.items():
            self.progress.add(name, value)
        if self.config.loss_type == "group":
            batch["importance_sampling_ratio"] = batch["importance_sampling_ratio"] * self._group_weights(mask_BT)
        if self.traces.wants(self.rollouts.steps_done):
            self._trace(batch)

    def _trace(self, batch: Batch) -> None:
        """Write down the best answer of the batch's first group, and the worst if it earned less."""
        group = self.rollouts.groups[0]
        known = [row for row, reward in enumerate(group.rewards) if not math.isnan(reward)]
        order = sorted(known, key=lambda row: group.rewards[row])
        worst = [row for row in order[:1] if group.rewards[row] < group.rewards[order[-1]]]
        for row in [*order[-1:], *worst]:
            logps_T = batch["old_per_token_logps"][row, : len(group.completions[row].token_ids)].double().cpu()
            kl = None
            if "ref_per_token_logps" in batch:  # k3, as in the loss
                ratio_T = batch["ref_per_token_logps"][row, : len(logps_T)].double().cpu() - logps_T
                kl = (ratio_T.exp() - ratio_T - 1).tolist()
            self.traces.write(
                self.rollouts.steps_done,
                group,
                row,
                group.rewards[row],
                logps_T.tolist(),
                kl,
                kl_to="the reference",
                reward_parts=group.reward_parts[row],
                advantage=float(batch["advantages"][row]),
                group_rewards=group.rewards,
            )

    def _group_weights(self, mask_BT: Tensor) -> Tensor:
        """Weights of the samples with which the mean over the batch's tokens is the mean over groups of the mean over
        a group's tokens: tokens of the batch / (tokens of the group * groups); shape [B, 1]."""
        tokens_B = mask_BT.sum(dim=1)
        tokens_G = tokens_B.view(-1, self.config.group_size).sum(dim=1)
        weights_G = tokens_B.sum() / (tokens_G.clamp(min=1) * len(tokens_G))
        return weights_G.repeat_interleave(self.config.group_size)[:, None]

    def _ages_like(self, mask_BT: Tensor) -> Tensor:
        """For each token the steps between the version that sampled it and the one that is trained; shape [B, T]."""
        ages_BT = torch.zeros_like(mask_BT, dtype=torch.long)
        for row, sample in enumerate(self.rollouts.samples):
            ages_BT[row, : len(sample.token_ids)] = self.rollouts.version - torch.tensor(sample.versions)
        return ages_BT


class RewardColumn:
    """The stage's reward: judges groups as they come in, and hands TRL what it said of those that make a batch."""

    __name__ = "reward"

    def __init__(self, reward: Reward, progress: Progress) -> None:
        self.reward = reward
        self.progress = progress
        self.groups: Callable[[], Sequence[Group]] = lambda: ()
        self._seconds = 0.0

    def judge(self, groups: Sequence[Group]) -> list[bool]:
        """Score groups; for each, whether its answers differ in reward, so that something can be learned from it."""
        started = time.perf_counter()
        pairs = [(group, sample) for group in groups for sample in group.completions]
        with self.progress.phase("rewarding"):
            rewards, parts = self.reward(
                [group.prompt.problem_id for group, _ in pairs],
                [sample.sampled_ids for _, sample in pairs],
                [sample.finish_reason for _, sample in pairs],
            )
        paid = [sample.episode.reward if sample.episode else 0.0 for _, sample in pairs]
        if any(paid):
            rewards = [reward + own for reward, own in zip(rewards, paid, strict=True)]
            parts = [{**part, "environment": own} for part, own in zip(parts, paid, strict=True)]
        first = 0
        for group in groups:
            rows = slice(first, first + len(group.completions))
            group.rewards, group.reward_parts = list(rewards[rows]), list(parts[rows])
            first = rows.stop
        self._seconds += time.perf_counter() - started
        return [informs(group.rewards) for group in groups]

    def __call__(self, completion_ids: list[list[int]], problem_id: list[str], **columns: object) -> list[float]:
        groups = self.groups()
        if [group.prompt.problem_id for group in groups for _ in group.rewards] != problem_id:
            raise RunFailed("TRL scores other rows than those of the batch that was drawn")
        self._add_parts("reward", groups)
        domains = sorted({group.prompt.domain for group in groups})
        for domain in domains if len(domains) > 1 else ():
            self._add_parts(f"reward/{domain}", [group for group in groups if group.prompt.domain == domain])
        self.progress.add("seconds_reward", self._seconds)
        self._seconds = 0.0
        rewards = [reward for group in groups for reward in group.rewards]
        for effort, mean in means_by_effort(groups, rewards).items():
            self.progress.add(f"effort/{effort}/reward", mean)
        failed = sum(map(math.isnan, rewards))
        if not failed:
            return rewards
        self.progress.add("reward_errors", failed)
        if failed == len(rewards):
            raise RunFailed(f"the reward failed on all {failed} answers of a step; the first failure is in the log")
        return without_gaps(rewards, len(groups[0].rewards))

    def _add_parts(self, prefix: str, groups: Sequence[Group]) -> None:
        """Log the mean of each part of the reward."""
        parts = [part for group in groups for part in group.reward_parts]
        for name in sorted({name for part in parts for name in part}):
            values = [part[name] for part in parts if name in part]
            self.progress.add(f"{prefix}/{name}", sum(values) / len(values))


def informs(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ; those that are not a number do not count."""
    known = [reward for reward in rewards if not math.isnan(reward)]
    return bool(known) and max(known) > min(known)


def without_gaps(rewards: Sequence[float], group_size: int) -> list[float]:
    """Rewards with every NaN replaced by the mean of its group, so that its advantage is 0 and it teaches nothing.

    A group of nothing but NaN gets the mean of all rewards.
    """
    overall = fmean(reward for reward in rewards if not math.isnan(reward))
    filled: list[float] = []
    for first in range(0, len(rewards), group_size):
        group = rewards[first : first + group_size]
        known = [reward for reward in group if not math.isnan(reward)]
        mean = fmean(known) if known else overall
        filled += [mean if math.isnan(reward) else reward for reward in group]
    return filled


class FreshReference(TrainerCallback):
    """The policy becomes the reference again after every `updates` optimizer updates."""

    def __init__(self, reference: PreTrainedModel, updates: int) -> None:
        self.reference = reference
        self.updates = updates

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None and state.global_step % self.updates == 0:
            self.reference.load_state_dict(model.state_dict())


def placeholders(count: int) -> Dataset:
    """`count` rows for TRL's data loader to walk through; the generation puts its own in their place."""
    return Dataset.from_dict({"prompt": [[0]] * count})


def grpo_arguments(config: GrpoStage, max_new_tokens: int, directory: str, seed: int) -> GRPOConfig:
    """TRL's arguments for a stage: one generated batch is one step, and `updates_per_batch` updates reuse it."""
    return training_arguments(
        GRPOConfig,
        directory=directory,
        updates=config.steps * config.updates_per_batch,
        batch_size=config.prompts_per_step * config.group_size,
        seed=seed,
        optimizer=config.optimizer,
        logging_steps=config.updates_per_batch,
        num_generations=config.group_size,
        num_iterations=config.updates_per_batch,
        steps_per_generation=1,
        max_completion_length=max_new_tokens,
        temperature=config.temperature,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        # a group's mean is the batch's, with its tokens weighted (`GrpoTrainer.batch_scored`)
        loss_type="dapo" if config.loss_type == "group" else config.loss_type,
        importance_sampling_level=config.ratio_level,
        use_bias_correction_kl=config.unbiased_kl,
        off_policy_mask_threshold=config.off_policy_threshold,
        mask_truncated_completions=config.mask_truncated,
        scale_rewards=config.scale_rewards,
        shuffle_dataset=False,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=f"{config.importance.level}_{config.importance.bound}",
        vllm_importance_sampling_clip_min=config.importance.min,
        vllm_importance_sampling_clip_max=config.importance.max,
        router_aux_loss_coef=0.0,
    )


def train_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: GrpoJob,
    client: Client,
    seed: int,
    progress: Progress,
) -> Sampled:
    """Train `model` in place; return what is to be known of the sampling."""
    config = job.config
    bind_reward(job.reward, client, job.stage)
    column = RewardColumn(job.reward, progress)
    generation = RolloutGeneration(
        client=with_episodes(client, job.episodes),
        model=lambda: trainer.accelerator.unwrap_model(trainer.model),
        stage=job.stage,
        asks=(Ask(prompt, prompt.max_new_tokens or job.max_new_tokens) for prompt in endless(job.prompts, seed)),
        steps=config.steps,
        prompts_per_step=config.prompts_per_step,
        group_size=config.group_size,
        temperature=config.temperature,
        seed=seed,
        progress=progress,
        rollout=job.rollout,
        first_version=job.first_version,
        informs=column.judge,
        keep_routing=config.keep_routing,
        top_p=config.top_p,
        spare_groups=config.dynamic_sampling * config.prompts_per_step,
        mask_truncated=config.mask_truncated,
    )
    column.groups = lambda: generation.groups
    reference = copy.deepcopy(model) if config.beta else None
    with (
        tempfile.TemporaryDirectory() as scratch,
        frozen_router(model, config.freeze_router),
        auxiliary_objectives(model, config.auxiliary, progress, job.stage) as auxiliary,
    ):
        callbacks: list[TrainerCallback] = [*([auxiliary] if auxiliary else []), progress]
        if reference is not None and config.reference_every is not None:
            callbacks.append(FreshReference(reference, config.reference_every * config.updates_per_batch))
        trainer = GrpoTrainer(
            model=model,
            reference=reference,
            beta=config.beta,
            generation=generation,
            reward_funcs=column,
            args=grpo_arguments(config, job.max_new_tokens, scratch, seed),
            train_dataset=placeholders(config.steps * config.prompts_per_step),
            processing_class=tokenizer,
            optimizers=build_optimizer(model, config.optimizer, config.steps * config.updates_per_batch),
            callbacks=callbacks,
        )
        trainer.progress, trainer.difference = progress, LogprobDifference()
        trainer.auxiliary, trainer.config = auxiliary, config
        trainer.traces = Traces(progress.traces, job.stage, config.steps, tokenizer)
        parts: dict[str, Part] = {"generation": generation, "difference": trainer.difference}
        if reference is not None and config.reference_every is not None:
            parts["reference"] = reference
        train(trainer, job.snapshots, progress, parts, generation.snapshots_begin)
    generation.finish()
    return Sampled.of(generation, trainer.difference)
