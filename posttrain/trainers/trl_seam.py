"""The only module that touches private parts of TRL and of transformers' Trainer.

`GroupRelativeTrainer` and `OnPolicyTrainer` turn TRL's trainers into ones with a small public surface: prompts
are token ids, completions come from an object that is handed in, and subclasses override methods of ours.
`broken_contracts` says what a new version of TRL has changed under us; tests/test_trl_seam.py asserts that it is empty.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import trl.import_utils as trl_imports
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerState

from posttrain import kernels
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.trainers.masked import masked_logprob

_is_vllm_available = trl_imports.is_vllm_available
# TRL loads all of vLLM on import if it is there (180 MB and 4 s), for a client that is never used here.
trl_imports.is_vllm_available = lambda min_version=None: False
try:
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.trainer.utils import add_fused_lm_head
finally:
    trl_imports.is_vllm_available = _is_vllm_available

__all__ = [
    "Batch",
    "DistillationConfig",
    "GRPOConfig",
    "GroupRelativeTrainer",
    "OnPolicyTrainer",
    "SFTConfig",
    "SupervisedTrainer",
    "WithAuxiliary",
    "broken_contracts",
    "sampled_logps",
]

Batch = dict[str, Any]

PARAMETERS: dict[Callable[..., Any], tuple[str, ...]] = {
    GRPOTrainer._tokenize_prompts: ("self", "prompts"),
    GRPOTrainer._generate: ("self", "prompts"),
    GRPOTrainer._generate_and_score_completions: ("self", "inputs"),
    GRPOTrainer._compute_loss: ("self", "model", "inputs"),
    GRPOTrainer._get_per_token_logps_and_entropies: (
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
        *("compute_entropy", "compute_aux_loss"),
    ),
    DistillationTrainer._tokenize_prompts: ("self", "prompts"),
    DistillationTrainer._generate_and_score_completions: ("self", "inputs"),
    DistillationTrainer._prepare_inputs: ("self", "generation_batch"),
    DistillationTrainer._compute_loss: ("self", "unwrapped_student", "inputs", "num_items_in_batch"),
    SFTTrainer._send_telemetry: ("self",),
    Trainer.compute_loss: ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    Trainer._clip_grad_norm: ("self", "model"),
    ChunkedDivergenceFunction.forward: (
        *("ctx", "student_hidden", "student_weight", "student_bias"),
        *("teacher_hidden", "teacher_weight", "teacher_bias", "beta", "temperature"),
    ),
    add_fused_lm_head: ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
}
"""Functions that are overridden or called, with the leading parameters that we rely on."""

SOURCE: dict[Callable[..., Any], tuple[str, ...]] = {
    GRPOTrainer._generate_single_turn: (
        "self.use_vllm",
        "self._last_loaded_step",
        "self.vllm_generation.sync_weights()",
        "_, completion_ids, logprobs, _ = self.vllm_generation.generate(",
    ),
    DistillationTrainer._generate_single_turn: (
        "self.use_vllm",
        "self._last_loaded_step",
        "self.vllm_generation.sync_weights()",
        "self.vllm_generation.generate(",
    ),
    GRPOTrainer._generate: (
        "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images",
    ),
    GRPOTrainer._generate_and_score_completions: (
        '[x["prompt"] for x in inputs]',
        "self._calculate_rewards(inputs, prompts, completions, completion_ids_list)",
        "completion_mask if tool_mask is None else completion_mask * tool_mask",
        '"old_per_token_logps"',
        '"sampling_per_token_logps"',
        "self.vllm_importance_sampling_correction",
        "self.beta != 0.0",
        "self.ref_model",
    ),
    DistillationTrainer._generate_and_score_completions: ('[x["prompt"] for x in inputs]',),
    GRPOTrainer._compute_loss: (
        'completion_mask * inputs["tool_mask"]',
        'inputs["ref_per_token_logps"]',
        "self.beta",
        "self.use_vllm",
    ),
    SFTTrainer.compute_loss: ("self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1",),
    Trainer.training_step: ("loss / self.current_gradient_accumulation_steps",),
    Trainer._prepare_for_training: ("self._load_optimizer_and_scheduler(resume_from_checkpoint)",),
    Trainer._run_epoch: (
        "self._load_rng_state(resume_from_checkpoint)",
        "self.get_batch_samples(epoch_iterator, num_batches, self.args.device)",
    ),
    Trainer._maybe_log_save_evaluate: ("if self.control.should_save:", "self._save_checkpoint(model, trial)"),
    GRPOTrainer._prepare_inputs: ("self.args.steps_per_generation", "shuffle_sequence_dict(generation_batch)"),
    DistillationTrainer.compute_loss: ("self._forward_redirection(", "loss, entropy_sum, num_valid_tokens ="),
}
"""Functions of TRL that run unchanged, with fragments of their source that our use of them depends on."""


def broken_contracts() -> list[str]:
    """What the installed TRL does differently from the one that this module was written for; empty when nothing."""
    found = []
    for function, expected in PARAMETERS.items():
        actual = tuple(inspect.signature(function).parameters)[: len(expected)]
        if actual != expected:
            found.append(f"{function.__qualname__} has the parameters {actual}; this project needs {expected}")
    for function, fragments in SOURCE.items():
        source = inspect.getsource(function)
        found += [
            f"the source of {function.__qualname__} no longer contains `{fragment}`"
            for fragment in fragments
            if fragment not in source
        ]
    return found


class Generation(Protocol):
    """What TRL asks of its vLLM client, and what the trainers below ask; ours talks to the rollout workers."""

    def draw(self) -> list[Batch]:
        """Sample the next batch; returns the rows of the data set that it consists of, repeated for each sample."""

    def loss_masks(self) -> list[list[int]] | None:
        """For each token of each sample of the batch 1 if something is learned from it; None when that is so of all."""

    def routes(self, rows: Sequence[int] | None, mask_BS: Tensor) -> Tensor | None:
        """Experts that the samples in these rows of the batch (None: in all) are to use again, -1 where there are none.

        `mask_BS` is 1 on the tokens of prompts and answers; shape `[B, S, layers, k]`. None: the model's own choice.
        """

    def masks(self, rows: Sequence[int] | None) -> list[bytes] | None:
        """For each token of the samples in these rows, one sample after the other, which tokens could have been drawn.

        Encoded by `rollouts.masks`. None: all tokens, always.
        """

    def sync_weights(self) -> None: ...

    def generate(
        self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]: ...


def inject_generation(trainer: GRPOTrainer | DistillationTrainer, generation: Generation) -> None:
    """Make `trainer` sample through `generation`, as if it were TRL's own vLLM client.

    The trainers below have it draw the batch, and put its rows in place of the data loader's: which prompts make a
    batch is decided by what is finished. TRL then asks it for the answers to these rows, and in GRPO corrects for the
    difference between the sampler's log-probabilities and its own.
    """
    trainer.use_vllm = True
    trainer.vllm_generation = generation
    trainer._last_loaded_step = -1


def quiet(trainer: Trainer) -> None:
    """Take away the callback that prints every log to the terminal."""
    trainer.remove_callback(PrinterCallback)


class Snapshots(Protocol):
    """Snapshots in the middle of training (`posttrain.trainers.snapshots.Snapshots`)."""

    def write(self, parts: dict[str, Any], state: TrainerState) -> None: ...

    def load(self, parts: dict[str, Any]) -> None: ...

    def load_random(self) -> None: ...


class Resumable(Trainer):
    """A trainer whose checkpoints are `snapshots`: transformers' loop says when they are written and restored.

    `train(resume_from_checkpoint=directory)` reads the steps from `trainer_state.json` there and skips the data that
    was used; all else is restored here.
    """

    snapshots: Snapshots | None = None

    def _snapshot_parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.lr_scheduler}

    def _save_checkpoint(self, model, trial) -> None:  # type: ignore[no-untyped-def]
        """Called after the step's log."""
        assert self.snapshots is not None
        kept = copy.copy(self.state)
        kept.log_history = []  # of every step, and nobody reads it
        self.snapshots.write(self._snapshot_parts(), kept)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:  # type: ignore[no-untyped-def]
        """All is loaded once there is an optimizer."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:  # type: ignore[no-untyped-def]
        """Called before the first step, and without a checkpoint in training from the start."""
        if checkpoint is not None:
            assert self.snapshots is not None
            self.snapshots.load(self._snapshot_parts())
            self._step = self.state.global_step  # TRL's: it samples when this is due

    def _load_rng_state(self, checkpoint) -> None:  # type: ignore[no-untyped-def]
        """Called when the data stand where they stood."""
        assert self.snapshots is not None
        self.snapshots.load_random()


class Auxiliary(Protocol):
    """Objectives beside a trainer's own (`posttrain.trainers.auxiliary.AuxiliaryObjectives`)."""

    apart: list[torch.nn.Parameter]
    """Parameters that these objectives alone reach."""

    def take_loss(self) -> Tensor | None: ...


class WithAuxiliary(Resumable):
    """A trainer that adds the loss of `auxiliary`, where there is one, to its own."""

    auxiliary: Auxiliary | None = None

    def compute_loss(self, model, inputs: Batch, return_outputs: bool = False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """The loss, scaled for gradient accumulation where the trainer's own is."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = self.auxiliary.take_loss() if self.auxiliary is not None else None
        if extra is None:
            return result
        scaled = num_items_in_batch is not None if self.loss_is_scaled_for_ga is None else self.loss_is_scaled_for_ga
        if scaled:
            extra = extra / self.current_gradient_accumulation_steps
        return (result[0] + extra, *result[1:]) if return_outputs else result + extra

    def _clip_grad_norm(self, model):  # type: ignore[no-untyped-def]
        """transformers', but parameters that the main loss does not reach neither take from nor add to its norm."""
        if self.auxiliary is None or not self.auxiliary.apart:
            return super()._clip_grad_norm(model)
        apart = {id(parameter) for parameter in self.auxiliary.apart}
        others = [parameter for parameter in model.parameters() if id(parameter) not in apart]
        self.accelerator.clip_grad_norm_(self.auxiliary.apart, self.args.max_grad_norm)
        return self.accelerator.clip_grad_norm_(others, self.args.max_grad_norm)


class GroupRelativeTrainer(WithAuxiliary, GRPOTrainer):
    """TRL's GRPO on prompts of token ids (column `prompt`), without a forward pass that it does twice.

    Override `batch_scored`.
    """

    beta: float

    def __init__(
        self, *args: Any, generation: Generation, reference: PreTrainedModel | None, beta: float, **kwargs: Any
    ) -> None:
        self._kept_forward: tuple[Tensor, Tensor] | None = None
        self._kept_rows: Tensor | None = None
        self.rollouts = generation
        super().__init__(*args, **kwargs)
        if self.beta != 0.0:
            raise ValueError("give beta to the trainer, not to GRPOConfig: TRL would load the reference by itself")
        inject_generation(self, generation)
        quiet(self)
        if beta:
            # TRL loads a reference from the config's architecture name, which is another class than ours
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
            self.beta = beta
        self._keeps_forward = (
            self.accelerator.num_processes == 1
            and not self.args.gradient_checkpointing
            and self.args.gradient_accumulation_steps == self.args.steps_per_generation == 1
        )

    def batch_scored(self, batch: Batch) -> None:
        """Called for every generated batch, which it may change, before it is split and shuffled.

        `old_per_token_logps` and `sampling_per_token_logps` are the trainer's and the sampler's log-probabilities of
        the sampled tokens; `completion_mask` is 1 on tokens, `tool_mask`, if there, on those that are learned from.
        """

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _generate(self, prompts: list[list[int]]) -> tuple[Any, ...]:
        output = super()._generate(prompts)
        masks = self.rollouts.loss_masks()
        return output if masks is None else (*output[:2], masks, *output[3:])  # in place of those of tool calls

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        """TRL's on the rows that the generation draws, whatever the data loader has."""
        inputs = self.rollouts.draw()
        self._kept_rows = None
        output = super()._generate_and_score_completions(inputs)
        output["row"] = torch.arange(len(inputs))  # TRL shuffles the rows afterwards
        self.batch_scored(output)
        return output

    def _get_per_token_logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, but the forward pass for the old log-probabilities serves the first update on the batch as well.

        TRL computes them without gradients right after generation, and then the same numbers again in the loss.
        """
        native = isinstance(self.accelerator.unwrap_model(model), DeepseekV4ForCausalLM)
        parent = self._sampler_logps if native else super()._get_per_token_logps_and_entropies
        inputs = (model, input_ids, attention_mask, logits_to_keep)
        if self._keeps_forward and model is self.model and model.training:
            if not torch.is_grad_enabled():
                with torch.enable_grad():
                    logps_BT, entropies_BT, _ = parent(*inputs, compute_entropy=True)
                self._kept_forward = logps_BT, entropies_BT
                return logps_BT.detach(), None, None
            if self._kept_forward is not None:
                logps_BT, entropies_BT = self._kept_forward
                self._kept_forward = None
                return logps_BT[self._kept_rows], entropies_BT[self._kept_rows], None
        return parent(*inputs, batch_size, compute_entropy, compute_aux_loss, **kwargs)

    def _sampler_logps(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *options: Any,
        **more: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Instead of TRL's for our own model: what its engine reports, to the last bit, without logits of a batch."""
        model = self.accelerator.unwrap_model(model)
        routes, rows = None, None if self._kept_rows is None else self._kept_rows.tolist()
        if model is self.accelerator.unwrap_model(self.model):  # a reference chooses for itself
            routes = self.rollouts.routes(rows, attention_mask)
        hidden_BSH = model.model(input_ids, attention_mask, routes=routes).last_hidden_state
        hidden_BTH = hidden_BSH[:, -logits_to_keep - 1 : -1]
        real_BT = attention_mask[:, -logits_to_keep:].bool()
        targets_N = input_ids[:, -logits_to_keep:][real_BT]
        head_VH = model.get_output_embeddings().weight
        masks, inputs = self.rollouts.masks(rows), (hidden_BTH[real_BT], head_VH, targets_N, self.temperature)
        found = kernels.linear_logprob(*inputs, rounded=True) if masks is None else masked_logprob(*inputs, masks)
        zeros_BT = hidden_BTH.new_zeros(real_BT.shape, dtype=torch.float32)
        logps_BT, entropies_BT = (zeros_BT.masked_scatter(real_BT, one_N) for one_N in found)
        return logps_BT, entropies_BT, None

    def _compute_loss(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        self._kept_rows = inputs["row"]
        return super()._compute_loss(model, inputs)


class OnPolicyTrainer(WithAuxiliary, DistillationTrainer):
    """TRL's on-policy distillation on prompts of token ids (column `prompt`), with the teachers left to a subclass.

    Override `batch_generated` and `divergence_loss`. One generated batch is one update.
    """

    def __init__(self, *args: Any, generation: Generation, **kwargs: Any) -> None:
        self.rollouts = generation
        super().__init__(*args, teacher_model=None, **kwargs)
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError("rows are ordered by teacher within one update: gradient_accumulation_steps must be 1")
        inject_generation(self, generation)
        quiet(self)

    def batch_generated(self, inputs: Sequence[Batch]) -> None:
        """Called after every generation with the rows of the data set, in the order of the samples."""

    def divergence_loss(self, hidden_BTH: Tensor, head_VH: Tensor, inputs: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the sum of the student's entropies and the number of tokens, from the student's hidden states.

        `hidden_BTH` are the states that predict `inputs["completion_ids"]` (right-padded, `completion_mask`);
        `head_VH` is the weight of the language-model head.
        """
        raise TypeError(f"{type(self).__name__} does not define divergence_loss")

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        """TRL's on the rows that the generation draws, whatever the data loader has."""
        inputs = self.rollouts.draw()
        output = super()._generate_and_score_completions(inputs)
        self.batch_generated(inputs)
        return output

    def _prepare_inputs(self, generation_batch: list[Batch]) -> Batch:
        """TRL's without its shuffle: samples stay ordered by teacher."""
        return self._generate_and_score_completions(generation_batch)

    def _compute_loss(
        self, unwrapped_student: PreTrainedModel, inputs: Batch, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        # the backbone alone: TRL's own helper passes arguments that belong to the model with a head
        output = unwrapped_student.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        length = inputs["completion_ids"].size(1)
        hidden_BTH = output.last_hidden_state[:, -length - 1 : -1]
        head_VH = unwrapped_student.get_output_embeddings().weight
        return self.divergence_loss(hidden_BTH, head_VH, inputs)


class SupervisedTrainer(WithAuxiliary, SFTTrainer):
    """TRL's SFT on rows of `input_ids` and `labels`, taken as they are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        quiet(self)

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""


def sampled_logps(hidden_NH: Tensor, head_VH: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target under `softmax(hidden @ head.T / temperature)`, in tiles. Shape [N]."""
    return kernels.linear_logprob(hidden_NH, head_VH, targets_N, temperature, rounded=True)[0]
