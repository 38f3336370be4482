"""Supervised fine-tuning on token ids: mean cross-entropy over the answers' tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.data.packing import PackedBatch
from posttrain.data.rows import IGNORED
from posttrain.errors import BadInput
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.optim import build_optimizer
from posttrain.recipe.stages import SftStage
from posttrain.trainers.auxiliary import auxiliary_objectives
from posttrain.trainers.jobs import SnapshotPlan
from posttrain.trainers.progress import Progress
from posttrain.trainers.router import RoutedAhead, frozen_router
from posttrain.trainers.settings import training_arguments
from posttrain.trainers.snapshots import train
from posttrain.trainers.trl_seam import Batch, SFTConfig, SupervisedTrainer


class SftTrainer(SupervisedTrainer):
    """TRL's SFT trainer that counts the answers' tokens for the metrics."""

    progress: Progress
    ahead: RoutedAhead | None = None
    """Chooses experts for a batch some updates before its own."""

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], *arguments: Any) -> tuple[list[Batch], Any]:
        """The next batches, with experts for the tokens where they are chosen ahead."""
        batches = epoch_iterator if self.ahead is None else self.ahead.of(epoch_iterator)
        return super().get_batch_samples(batches, *arguments)

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


def packed_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SftStage, stage: str
) -> PackedBatch:
    """The collator of a stage that packs: one row for our own model, which takes sequences apart; else rows of at most
    `max_length` tokens, as their attention costs the square of a row's length.

    Raises:
        BadInput: the model mixes the sequences of a row.
    """
    assert isinstance(tokenizer.pad_token_id, int)
    if isinstance(model, DeepseekV4ForCausalLM):
        return PackedBatch(None, tokenizer.pad_token_id)
    if mixes_sequences(model):
        raise BadInput(
            f"stage {stage}: packing: {type(model).__name__} does not keep the sequences of a packed row apart; "
            "leave packing out for this model"
        )
    return PackedBatch(config.max_length, tokenizer.pad_token_id)


@torch.no_grad()
def mixes_sequences(model: PreTrainedModel) -> bool:
    """Whether the second of two sequences in a row feels what the first one is, beyond rounding.

    Models with recurrent layers, for one, may read a row through whatever its positions are.
    """
    length, head_VH = 8, model.get_output_embeddings().weight
    first, other, second = torch.arange(3 * length, device=head_VH.device).view(3, length) % len(head_VH)
    rows_2T = torch.stack([torch.cat((before, second)) for before in (first, other)])
    positions_2T = torch.arange(length, device=head_VH.device).repeat(2, 2)
    logits_2TV = model(input_ids=rows_2T, position_ids=positions_2T, use_cache=False).logits[:, length:]
    return bool((logits_2TV[0] - logits_2TV[1]).abs().max() > 1e-3 * logits_2TV[0].std())


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Sequence[int]]],
    config: SftStage,
    seed: int,
    progress: Progress,
    plan: SnapshotPlan | None = None,
) -> None:
    """Train `model` in place for `config.steps` updates, or those behind the snapshot that `plan` names."""
    dataset = fitting(rows, config.max_length)
    with (
        tempfile.TemporaryDirectory() as scratch,
        frozen_router(model, config.freeze_router),
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
            data_collator=packed_batch(model, tokenizer, config, progress.stage) if config.packing else None,
            processing_class=tokenizer,
            optimizers=build_optimizer(model, config.optimizer, config.steps),
            callbacks=[*([auxiliary] if auxiliary else []), progress],
        )
        trainer.progress, trainer.auxiliary = progress, auxiliary
        if config.anticipatory_routing:
            # called through the trainer: it may wrap the model
            trainer.ahead = RoutedAhead(
                lambda **inputs: trainer.model_wrapped(**inputs), trainer.model, config.anticipatory_routing
            )
        train(trainer, plan, progress, {"ahead": trainer.ahead} if trainer.ahead else {})
