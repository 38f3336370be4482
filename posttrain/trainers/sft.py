"""Supervised fine-tuning on token ids: mean cross-entropy over the answers' tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.data.rows import IGNORED
from posttrain.errors import BadInput
from posttrain.optim import build_optimizer
from posttrain.recipe.schema import SftStage
from posttrain.trainers.auxiliary import auxiliary_objectives
from posttrain.trainers.progress import Progress
from posttrain.trainers.settings import training_arguments
from posttrain.trainers.trl_seam import Batch, SFTConfig, SupervisedTrainer


class SftTrainer(SupervisedTrainer):
    """TRL's SFT trainer that counts the answers' tokens for the metrics."""

    progress: Progress

    def compute_loss(self, model, inputs: Batch, return_outputs: bool = False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """TRL's loss: the sum over the labels that are not ignored, divided by their number in the update."""
        self.progress.add_tokens(int((inputs["labels"] != IGNORED).sum()))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def fitting(rows: Sequence[Mapping[str, Sequence[int]]], max_length: int) -> Dataset:
    """The rows of at most `max_length` tokens as a data set of `input_ids` and `labels`.

    Longer rows are left out: cut short, an answer would teach the model not to stop.
    """
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    if not kept:
        raise BadInput(
            f"none of the {len(rows)} training rows fits into max_length={max_length} tokens; raise max_length"
        )
    return Dataset.from_dict({name: [list(row[name]) for row in kept] for name in ("input_ids", "labels")})


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Sequence[int]]],
    config: SftStage,
    seed: int,
    progress: Progress,
) -> None:
    """Train `model` in place for `config.steps` updates."""
    dataset = fitting(rows, config.max_length)
    with (
        tempfile.TemporaryDirectory() as scratch,
        auxiliary_objectives(model, config.auxiliary, progress, progress.stage) as auxiliary,
    ):
        arguments = training_arguments(
            SFTConfig,
            directory=scratch,
            updates=config.steps,
            batch_size=config.batch_size,
            seed=seed,
            optimizer=config.optimizer,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_drop_last=len(dataset) >= config.batch_size,
            router_aux_loss_coef=0.0,
        )
        trainer = SftTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            optimizers=build_optimizer(model, config.optimizer, config.steps),
            callbacks=[*([auxiliary] if auxiliary else []), progress],
        )
        trainer.progress, trainer.auxiliary = progress, auxiliary
        trainer.train()
