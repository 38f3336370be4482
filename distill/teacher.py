"""Teachers: expert checkpoints that are loaded on demand and answer with last hidden states, never with logits.

A hidden state is smaller than a row of logits by the ratio of the vocabulary to the model's width; the student
multiplies it with the teacher's head itself (V4 report, section 5.2.2).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock

import torch

from distill.canary import Canary, Evidence, examine
from distill.checkpoint_store import default_cache
from distill.model_cache import Device, ModelCache
from distill.prefill import states_of
from distill.store import HiddenBlock, TeacherWork
from posttrain.observe.pulse import Pulse
from rollouts.weights import PackedTensor


class TeacherWorker:
    """Holds as many teachers as fit into `budget_bytes`, and drops the one not used for longest.

    One teacher is always held, however large. Run it in an actor (`distill.pool.start_teachers`) or, in a test, in the
    process. Two threads may call it: while one computes, the other brings the next teacher into memory.

    Every call raises BadInput for a checkpoint that cannot be fetched, verified or loaded.
    """

    def __init__(
        self,
        family: str,
        budget_bytes: int,
        threads: int | None = None,
        cache: Path | None = None,
        pulses: tuple[Path, str] | None = None,
        device: Device | None = None,
    ) -> None:
        """`pulses`: where to leave signs of life, and under which name. `device`: default, the GPU if there is one."""
        self._pulse = Pulse(*pulses) if pulses is not None else None
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = device or Device("cuda" if torch.cuda.is_available() else "cpu")
        self._models = ModelCache(
            family, budget_bytes, cache or default_cache(), on_load=self._device.prepare, on_drop=self._device.forget
        )
        self._computing = Lock()

    def hidden_states(
        self, checkpoint: str, sequences: Sequence[Sequence[int]], kept: Sequence[int], dtype: str | None = None
    ) -> tuple[TeacherWork | HiddenBlock, ...]:
        """Last hidden states, after the final norm, that predict the last `kept[i]` tokens of sequence i.

        Args:
            dtype: round to it, `bfloat16`; default: the model's own precision.

        Returns:
            What it took, then a block for each sequence.
        """
        with self._teaching(), self._models.using(checkpoint) as (held, seconds_load, loaded), self._computing:
            began = time.perf_counter()
            moved = self._device.place(held)
            swapped = time.perf_counter()
            states = states_of(held.model, sequences, kept, self._device.name)
            wanted = getattr(torch, dtype) if dtype else None
            blocks = [
                HiddenBlock.of(checkpoint, sample, states_NH if wanted is None else states_NH.to(wanted))
                for sample, states_NH in enumerate(states)
            ]
            work = TeacherWork(
                seconds_compute=time.perf_counter() - swapped,
                seconds_load=seconds_load if loaded else 0.0,
                seconds_swap=swapped - began if moved else 0.0,
                bytes_loaded=loaded + moved,
                bytes_returned=sum(block.nbytes for block in blocks),
            )
        return work, *blocks

    def head(self, checkpoint: str) -> PackedTensor:
        """The weight of the language-model head, `[V, H]`, in the model's own precision."""
        with self._teaching(), self._models.using(checkpoint) as (held, _, _), self._computing:
            return PackedTensor.of(held.model.get_output_embeddings().weight)

    def examine(self, checkpoint: str, canary: Canary, outside: bool) -> Evidence:
        """`distill.canary.examine` on the loaded teacher."""
        with self._teaching(), self._models.using(checkpoint) as (held, _, _), self._computing:
            self._device.place(held)
            return examine(checkpoint, held.model, held.path, canary, outside, self._device.name)

    def _teaching(self) -> AbstractContextManager[None]:
        return nullcontext() if self._pulse is None else self._pulse.phase("teaching")

    def loaded(self) -> list[str]:
        """The checkpoints in memory, the one used last at the end."""
        return self._models.names()
