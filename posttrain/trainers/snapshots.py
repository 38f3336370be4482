"""Snapshots of a trainer: what goes into them, when they are written, and how a stage goes on from one.

A snapshot is `state.pt`, a mapping from the names of parts (model, optimizer, schedule, random states, the position in
the data, ...) to what their `state_dict()` returns, all in full precision, and `trainer_state.json`, which is
transformers' own count of steps. Both hold plain data and tensors; nothing in them is code (`weights_only`).
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.observe.words import size
from posttrain.snapshots import prune, snapshots_in, write_snapshot
from posttrain.trainers.jobs import SnapshotPlan
from posttrain.trainers.progress import Progress
from posttrain.trainers.trl_seam import Resumable

STATE = "state.pt"
SPARE_BYTES = 64 << 20
"""Left on the disk beside a snapshot and the stage's own checkpoint, for logs and the report."""


class Part(Protocol):
    """Something that changes while a stage runs."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class RandomStates:
    """The generators of the process that training may draw from."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        version, internal, gauss = random.getstate()
        numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
        key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
        return {
            "python": [version, list(internal), gauss],
            "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        numpy = state["numpy"]
        key = numpy["state"]["key"].numpy().astype(np.uint32)
        np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])


class Snapshots(TrainerCallback):
    """Asks the trainer for a snapshot after every so many steps, writes it, and reads the one to go on from.

    `trl_seam.Resumable` calls `write`, `load` and `load_random`.
    """

    def __init__(
        self, plan: SnapshotPlan, progress: Progress, parts: Mapping[str, Part], on_written: Callable[[int], None]
    ) -> None:
        """See `train`; `parts` in the order in which they are to be restored."""
        self.plan = plan
        self.on_written = on_written
        self.progress = progress
        self.parts = {"progress": progress, **parts}
        self._saved: dict[str, Any] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the last step the stage's checkpoint comes instead."""
        step, within = divmod(state.global_step, self.progress.updates_per_step)
        if not within and step % self.plan.every == 0 and step < self.progress.steps:
            control.should_save = True

    def write(self, parts: Mapping[str, Part], state: TrainerState) -> None:
        """Write the state of the trainer's `parts` and of our own; a full disk is no reason to stop.

        What the disk must hold besides is the stage's checkpoint, which is no larger than the model's part.
        """
        began, step = time.perf_counter(), state.global_step // self.progress.updates_per_step
        whole = {name: part.state_dict() for name, part in {**parts, **self.parts, "random": RandomStates()}.items()}
        nbytes = sum(tensor.nbytes for tensor in _tensors(whole))
        needed = nbytes + sum(tensor.nbytes for tensor in _tensors(whole["model"])) + SPARE_BYTES
        directory = Path(self.plan.directory)
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < needed:
            self.progress.warn(f"no snapshot after step {step}: {size(needed)} needed, {size(free)} free on the disk")
            return

        def fill(temporary: Path) -> None:
            torch.save(whole, temporary / STATE)
            state.save_to_json(str(temporary / "trainer_state.json"))

        try:
            with self.progress.phase("saving"):
                written = write_snapshot(directory, self.progress.stage, step, self.plan.origin, fill)
        except (OSError, RuntimeError) as error:  # torch's writer has its own error for a full disk
            self.progress.warn(f"no snapshot after step {step}: {' '.join(str(error).split())[:200]}")
            return
        prune(directory, written, self.plan.keep)
        self.on_written(snapshots_in(directory)[-1].step)
        self.progress.event("snapshot", step=step, bytes=nbytes, seconds=time.perf_counter() - began)

    def load(self, parts: Mapping[str, Part]) -> None:
        """Bring the trainer's `parts` and our own to the state of the snapshot; random states come later."""
        assert self.plan.resume is not None
        self._saved = torch.load(Path(self.plan.resume) / STATE, map_location="cpu", weights_only=True)
        for name, part in {**parts, **self.parts}.items():
            part.load_state_dict(self._saved.pop(name))

    def load_random(self) -> None:
        """Bring the generators to their state: when all is done that draws from them before the next step."""
        RandomStates().load_state_dict(self._saved["random"])


def train(
    trainer: Resumable,
    plan: SnapshotPlan | None,
    progress: Progress,
    parts: Mapping[str, Part],
    on_written: Callable[[int], None] = lambda step: None,
) -> None:
    """Train from the start, or from the snapshot that `plan` names, and write what snapshots it asks for.

    Args:
        parts: what changes in training beside model, optimizer and schedule.
        on_written: called after each snapshot with the step of the oldest one that is kept.
    """
    if plan is not None:
        trainer.snapshots = Snapshots(plan, progress, parts, on_written)
        trainer.add_callback(trainer.snapshots)
    trainer.train(resume_from_checkpoint=plan.resume if plan else None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
