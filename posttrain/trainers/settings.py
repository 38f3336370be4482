"""What all three trainers are told alike: TRL's arguments, and the order in which prompts are used."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from posttrain.recipe.stages import OptimizerConfig

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Item = TypeVar("Item")


def training_arguments(
    kind: type[Arguments],
    *,
    directory: str,
    updates: int,
    batch_size: int,
    seed: int,
    optimizer: OptimizerConfig,
    **more: Any,
) -> Arguments:
    """TRL's config of the class `kind`: no checkpoints, no reports, one log for each update.

    `batch_size` sequences make one update. Optimizer and schedule are handed to the trainer as objects; the rate is
    in the arguments for the sake of whoever reads them.
    """
    on_cpu = not torch.cuda.is_available()
    settings = {
        "output_dir": directory,
        "max_steps": updates,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": optimizer.lr,
        "max_grad_norm": optimizer.max_grad_norm,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": on_cpu,
        "bf16": False,  # no autocast: the model's own precision decides, in trainer and sampler alike
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not on_cpu,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would replace the loss that is not a number by the last good one
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
    }
    return kind(**(settings | more))


def endless(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """All items in the given order, then again and again in orders shuffled by `seed`."""
    yield from items
    generator = random.Random(seed)
    while True:
        again = list(items)
        generator.shuffle(again)
        yield from again


def cycle(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """The first `count` of `endless` items."""
    return list(islice(endless(items, seed), count))
