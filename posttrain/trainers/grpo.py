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
from collections.abc import Sequence
from statistics import fmean

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import RunFailed
from posttrain.optim import build_optimizer
from posttrain.recipe.schema import GrpoStage
from posttrain.trainers.auxiliary import auxiliary_objectives
from posttrain.trainers.generation import Client, LogprobDifference, RolloutGeneration
from posttrain.trainers.jobs import GrpoJob, Prompt, Reward
from posttrain.trainers.progress import Progress
from posttrain.trainers.settings import cycle, training_arguments
from posttrain.trainers.trl_seam import GroupRelativeTrainer, GRPOConfig
from rollouts.types import Sampling


class GrpoTrainer(GroupRelativeTrainer):
    """TRL's GRPO trainer that measures trainer against sampler on every batch."""

    progress: Progress
    difference: LogprobDifference

    def batch_scored(self, trainer_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor) -> None:
        chosen_BT = mask_BT.bool()
        for name, value in self.difference.add(trainer_logps_BT[chosen_BT], sampler_logps_BT[chosen_BT]).items():
            self.progress.add(name, value)


class RewardColumn:
    """The stage's reward as the function that TRL calls, on groups of `group_size` answers to one prompt."""

    __name__ = "reward"

    def __init__(self, reward: Reward, group_size: int, generation: RolloutGeneration, progress: Progress) -> None:
        self.reward = reward
        self.group_size = group_size
        self.generation = generation
        self.progress = progress

    def __call__(self, completion_ids: list[list[int]], problem_id: list[str], **columns: object) -> list[float]:
        started = time.perf_counter()
        finish_reasons = [sample.finish_reason for sample in self.generation.samples]
        rewards, parts = self.reward(problem_id, completion_ids, finish_reasons)
        for name in sorted({name for part in parts for name in part}):
            values = [part[name] for part in parts if name in part]
            self.progress.add(f"reward/{name}", sum(values) / len(values))
        self.progress.add("seconds_reward", time.perf_counter() - started)
        failed = sum(map(math.isnan, rewards))
        if not failed:
            return rewards
        self.progress.add("reward_errors", failed)
        if failed == len(rewards):
            raise RunFailed(f"the reward failed on all {failed} answers of a step; the first failure is in the log")
        return without_gaps(rewards, self.group_size)


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


def prompt_dataset(prompts: Sequence[Prompt]) -> Dataset:
    """The rows that TRL's on-policy trainers walk through."""
    return Dataset.from_dict(
        {
            "prompt": [list(prompt.token_ids) for prompt in prompts],
            "problem_id": [prompt.problem_id for prompt in prompts],
            "domain": [prompt.domain for prompt in prompts],
        }
    )


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
        loss_type=config.loss_type,
        scale_rewards=config.scale_rewards,
        shuffle_dataset=False,
        vllm_importance_sampling_correction=True,
        router_aux_loss_coef=0.0,
    )


def train_grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: GrpoJob,
    client: Client,
    seed: int,
    progress: Progress,
) -> tuple[LogprobDifference, list[float]]:
    """Train `model` in place; return trainer against sampler, and the seconds of each weight publication."""
    config = job.config
    generation = RolloutGeneration(
        client=client,
        model=lambda: trainer.accelerator.unwrap_model(trainer.model),
        sampling=Sampling(max_tokens=job.max_new_tokens, temperature=config.temperature),
        seed=seed,
        progress=progress,
    )
    reference = copy.deepcopy(model) if config.beta else None
    with (
        tempfile.TemporaryDirectory() as scratch,
        auxiliary_objectives(model, config.auxiliary, progress, job.stage) as auxiliary,
    ):
        trainer = GrpoTrainer(
            model=model,
            reference=reference,
            beta=config.beta,
            generation=generation,
            reward_funcs=RewardColumn(job.reward, config.group_size, generation, progress),
            args=grpo_arguments(config, job.max_new_tokens, scratch, seed),
            train_dataset=prompt_dataset(cycle(job.prompts, config.steps * config.prompts_per_step, seed)),
            processing_class=tokenizer,
            optimizers=build_optimizer(model, config.optimizer, config.steps * config.updates_per_batch),
            callbacks=[*([auxiliary] if auxiliary else []), progress],
        )
        trainer.progress, trainer.difference = progress, LogprobDifference()
        trainer.auxiliary = auxiliary
        trainer.train()
    return trainer.difference, generation.publish_seconds
