"""Teachers: expert checkpoints that are loaded on demand and answer with last hidden states, never with logits.

A hidden state is smaller than a row of logits by the ratio of the vocabulary to the model's width; the student
multiplies it with the teacher's head itself (V4 report, section 5.2.2).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import BadInput
from posttrain.trainers.models import load_model

TOKENS_PER_FORWARD = 16384
"""Padded tokens in one forward pass of a teacher."""


class TeacherWorker:
    """Holds as many teachers as fit into `budget_bytes` of parameters, and drops the one not used for longest.

    One teacher is always held, however large. Run it in an actor (`start_teachers`) or, in a test, in the process.
    """

    def __init__(self, family: str, budget_bytes: int, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.family = family
        self.budget_bytes = budget_bytes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._models: OrderedDict[str, PreTrainedModel] = OrderedDict()

    def hidden_states(self, checkpoint: str, sequences: Sequence[Sequence[int]], kept: Sequence[int]) -> np.ndarray:
        """Last hidden states, after the final norm, that predict the last `kept[i]` tokens of sequence i.

        Returns float32 of shape [sum(kept), H], one sequence after the other.
        """
        backbone = self._model(checkpoint).base_model
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        for indices in _batches([len(sequence) for sequence in sequences]):
            states_BTH = _forward(backbone, [sequences[index] for index in indices], self.device)
            for row, index in enumerate(indices):
                end = len(sequences[index]) - 1
                found[index] = states_BTH[row, end - kept[index] : end]
        return torch.cat(found).float().cpu().numpy()

    def head(self, checkpoint: str) -> np.ndarray:
        """The weight of the language-model head, float32 of shape [V, H]."""
        return self._model(checkpoint).get_output_embeddings().weight.detach().float().cpu().numpy()

    def vocabulary_size(self, checkpoint: str) -> int:
        """Rows of the head."""
        return self._model(checkpoint).get_output_embeddings().weight.size(0)

    def loaded(self) -> list[str]:
        """The checkpoints in memory, the one used last at the end."""
        return list(self._models)

    def _model(self, checkpoint: str) -> PreTrainedModel:
        if checkpoint not in self._models:
            needed = _stored_parameters(checkpoint) * torch.float32.itemsize
            while self._models and self._held_bytes() + needed > self.budget_bytes:
                self._models.popitem(last=False)
            model = load_model(self.family, checkpoint).eval().requires_grad_(False)
            self._models[checkpoint] = model.to(self.device)
        self._models.move_to_end(checkpoint)
        return self._models[checkpoint]

    def _held_bytes(self) -> int:
        return sum(map(_parameter_bytes, self._models.values()))


class TeacherPool:
    """The teachers as the student's trainer sees them. Requests run while the trainer goes on.

    Each teacher belongs to one worker, so that its weights are in memory once. The pool can be sent to another actor.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers = list(workers)
        self._heads: dict[str, Any] = {}
        self._owners: dict[str, int] = {}

    def check_vocabulary(self, teachers: Sequence[str], student_size: int) -> None:
        """Raise BadInput when the vocabulary of a teacher's checkpoint has not `student_size` tokens."""
        import ray

        from distill.divergence import vocabulary_mismatch  # loads TRL, which the teachers' processes do without

        sizes = ray.get([self._worker(teacher).vocabulary_size.remote(teacher) for teacher in teachers])
        for teacher, size in zip(teachers, sizes, strict=True):
            if size != student_size:
                raise BadInput(vocabulary_mismatch(f"the teacher {teacher}", size, student_size))

    def hidden_states(
        self, teacher: str, sequences: Sequence[Sequence[int]], kept: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Start `TeacherWorker.hidden_states`; the result is there when the returned function is called."""
        import ray

        reference = self._worker(teacher).hidden_states.remote(teacher, sequences, kept)
        return lambda: torch.from_numpy(ray.get(reference).copy())

    def head(self, teacher: str) -> Callable[[], Tensor]:
        """A function that copies the teacher's head out of the object store, where it stays for the stage."""
        import ray

        if teacher not in self._heads:
            self._heads[teacher] = self._worker(teacher).head.remote(teacher)
        reference = self._heads[teacher]
        return lambda: torch.from_numpy(ray.get(reference).copy())

    def _worker(self, teacher: str) -> Any:
        owner = self._owners.setdefault(teacher, len(self._owners) % len(self.workers))
        return self.workers[owner]


def start_teachers(
    count: int, family: str, budget_bytes: int, threads: int = 1, actor_options: dict[str, Any] | None = None
) -> TeacherPool:
    """Start `count` teacher actors. `actor_options` go to Ray (`num_cpus`, `runtime_env`, ...).

    A worker keeps nothing but a cache, so a dead one is restarted and its calls are repeated.
    """
    import ray

    options = {"num_cpus": threads, "max_restarts": 3, "max_task_retries": 3} | (actor_options or {})
    actor = ray.remote(TeacherWorker).options(**options)
    return TeacherPool([actor.remote(family, budget_bytes, threads) for _ in range(count)])


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches of similar length, each of at most TOKENS_PER_FORWARD padded tokens (or one sequence)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        # the first of a batch is its longest, so it decides the padded width
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= TOKENS_PER_FORWARD:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.no_grad()
def _forward(backbone: PreTrainedModel, sequences: Sequence[Sequence[int]], device: str) -> Tensor:
    """Last hidden states of right-padded sequences, [B, T, H]. Causal: what is left of the padding is exact."""
    width = max(map(len, sequences))
    tokens_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)] = torch.as_tensor(sequence)
        mask_BT[row, : len(sequence)] = 1
    tokens_BT, mask_BT = tokens_BT.to(device), mask_BT.to(device)
    return backbone(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state


def _stored_parameters(checkpoint: str) -> int:
    """Parameters in the checkpoint's files, from their headers alone."""
    count = 0
    for path in Path(checkpoint).glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def _parameter_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
