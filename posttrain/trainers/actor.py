"""The trainer as a Ray actor: one process that runs a stage after the other, so that torch and TRL load once.

Importing this module loads neither: the driver imports it to start the actors.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import RunFailed
from posttrain.observe.metrics import MetricsLog
from posttrain.observe.pulse import PULSES, Pulse
from posttrain.recipe.schema import Recipe
from posttrain.trainers.jobs import GrpoJob, OpdJob, SftJob, StageResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.trainers.generation import Client, Sampled
    from posttrain.trainers.opd import Teachers
    from posttrain.trainers.progress import Progress


class TrainerActor:
    """Trains one model at a time and leaves its checkpoint in the job's output directory.

    Make it an actor with `ray.remote(TrainerActor)`; the methods are the same without Ray. Stages write their
    metrics lines to `metrics.jsonl` in the run directory. When the actor dies, a stage goes on from its last snapshot,
    or starts again.
    """

    def __init__(self, slot: int, recipe_json: str, run_directory: str) -> None:
        self.slot = slot
        self.recipe = Recipe.model_validate_json(recipe_json)
        self.log = MetricsLog(Path(run_directory) / "metrics.jsonl")
        self.traces = MetricsLog(Path(run_directory) / "traces.jsonl")
        self.pulse = Pulse(Path(run_directory) / PULSES, f"trainer {slot}")
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        import torch
        import transformers

        from posttrain.trainers.trl_seam import broken_contracts

        torch.set_num_threads(self.recipe.cluster.threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("trl").setLevel(logging.ERROR)
        if broken := broken_contracts():
            raise RunFailed("the installed TRL is not the one this project was built on: " + "; ".join(broken))

    def sft(self, job: SftJob) -> StageResult:
        """Supervised fine-tuning."""
        from posttrain.trainers.sft import train_sft

        def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, progress: Progress) -> None:
            train_sft(model, tokenizer, job.rows, job.config, seed, progress, job.snapshots)

        return self._run(job, train)

    def grpo(self, job: GrpoJob, client: Client) -> StageResult:
        """Reinforcement learning on the job's reward, sampling through `client`."""
        from posttrain.trainers.grpo import train_grpo

        def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, progress: Progress) -> Sampled:
            return train_grpo(model, tokenizer, job, client, seed, progress)

        return self._run(job, train, updates_per_step=job.config.updates_per_batch)

    def opd(self, job: OpdJob, client: Client, teachers: Teachers) -> StageResult:
        """Distillation from the job's experts, sampling through `client`."""
        from posttrain.trainers.opd import train_opd

        def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, progress: Progress) -> Sampled:
            return train_opd(model, tokenizer, job, client, teachers, seed, progress)

        return self._run(job, train)

    def _run(
        self, job: SftJob | GrpoJob | OpdJob, train: Callable[..., Sampled | None], updates_per_step: int = 1
    ) -> StageResult:
        from posttrain.trainers.models import save_checkpoint
        from posttrain.trainers.progress import Progress

        started = time.perf_counter()
        with self.pulse.phase("loading"):
            model, tokenizer, seed = self._load(job)
        progress = Progress(self.log, job.stage, job.config.steps, updates_per_step, self.traces, self.pulse)
        with self.pulse.phase("learning"):
            outcome = train(model, tokenizer, seed, progress)
        with self.pulse.phase("saving"):
            save_checkpoint(model, tokenizer, job.output)
        rollouts: dict[str, Any] = {}
        if outcome is not None:
            measured = outcome.difference.tokens > 0
            rollouts = {
                "max_abs_logprob_diff": outcome.difference.largest if measured else None,
                "k3": outcome.difference.k3 if measured else None,
                "weight_sync_seconds": outcome.publish_seconds,
                "off_policy": outcome.off_policy,
                "waited_seconds": outcome.waited_seconds,
                "sampling_seconds": outcome.seconds,
            }
        return StageResult(
            stage=job.stage,
            checkpoint=str(job.output),
            steps=job.config.steps,
            seconds=time.perf_counter() - started,
            tokens=progress.tokens,
            metrics=progress.last,
            **rollouts,
        )

    def _load(self, job: SftJob | GrpoJob | OpdJob) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
        """Model, tokenizer and seed of a stage."""
        from transformers import set_seed

        from posttrain.trainers.generation import derive_seed
        from posttrain.trainers.lora import add_adapters
        from posttrain.trainers.models import load_model, load_tokenizer

        gc.collect()  # trainers of TRL refer to themselves: the last stage's model goes now, before the next is there
        seed = derive_seed(self.recipe.seed, job.stage)
        set_seed(seed)
        model = load_model(self.recipe.model.family, job.checkpoint)
        if job.config.lora is not None:
            add_adapters(model, job.config.lora, job.stage)
        return model, load_tokenizer(job.checkpoint), seed
