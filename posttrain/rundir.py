"""The run directory: the whole truth about one run, which one process at a time drives.

runs/<name>/
    recipe.yaml      resolved recipe
    state.json       which stages are done; what `posttrain resume` goes by
    metrics.jsonl    what happened, step by step (posttrain.observe.metrics)
    traces.jsonl     a few samples token by token (posttrain.trainers.traces)
    log.txt  tokenizer/  checkpoints/<stage, `--` for `/`>/  snapshots/<stage>/  report.json  report.html
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.errors import BadInput
from posttrain.files import atomic_write
from posttrain.observe.metrics import MetricsLog, plain_json
from posttrain.recipe import Recipe, read_recipe, resolved_yaml
from posttrain.recipe.schema import NAME_PATTERN

STATE_SCHEMA = 1
MERGED = "student-start"
"""The checkpoint that a student starts from whose `init` is not the base."""

StageStatus = Literal["pending", "running", "done", "failed", "dropped"]
RunStatus = Literal["running", "finished", "failed", "interrupted"]


class StageState(BaseModel):
    """What is known of one stage."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    status: StageStatus = "pending"
    checkpoint: str | None = None
    """Where the stage's model lies, relative to the run directory when it is inside."""
    seconds: float | None = None
    attempts: int = 0
    metrics: dict[str, Any] = {}
    error: str | None = None
    inputs: str | None = None
    """Hash of what it was begun with: its part of the recipe, its data, and the inputs of what it starts from."""
    code: str | None = None
    """Hash of the code that it was begun with."""


class RunState(BaseModel):
    """state.json."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    version: Literal[1] = Field(1, alias="schema")
    name: str
    status: RunStatus = "running"
    created: float
    """Unix seconds."""
    stages: dict[str, StageState]
    """In the order in which they can run."""


class RunDirectory:
    """A run directory that this process drives. Made by `create` or `open`; `close` lets another process drive it.

    May be used by several threads; not by other processes, which append to metrics.jsonl by themselves.
    """

    def __init__(self, path: Path, recipe: Recipe, state: RunState, lock: int) -> None:
        """For `create` and `open` only."""
        self.path = path.resolve()  # actors have another working directory
        self.recipe = recipe
        self.metrics = MetricsLog(self.path / "metrics.jsonl")
        self._state = state
        self._lock: int | None = lock
        self._guard = threading.RLock()

    @classmethod
    def create(cls, root: str | Path, name: str | None, recipe: Recipe) -> RunDirectory:
        """Make a new run directory in `root`.

        Args:
            name: None means the recipe's name, with -2, -3, ... behind it when that is taken.

        Raises:
            BadInput: `name` is taken or cannot be a directory's name, or `root` cannot be written.
        """
        root = Path(root)
        path = _claim(root, name) if name is not None else _claim_numbered(root, recipe.name)
        lock = _lock(path)
        stages = {stage: StageState() for stage in recipe.stage_names()}
        if recipe.stages.base is None:
            stages["base"].status = "done"  # the initial weights are the base: there is nothing to train
        run = cls(path, recipe, RunState(schema=1, name=path.name, created=time.time(), stages=stages), lock)
        atomic_write(path / "recipe.yaml", resolved_yaml(recipe))
        run._save()
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open an existing run to go on with it; stages that were running when it stopped are pending again.

        Raises:
            BadInput: not a run directory, one that another process drives, or one that lost a finished checkpoint.
        """
        path = Path(path)
        state = read_state(path)
        recipe = read_recipe(path / "recipe.yaml")
        if list(state.stages) != recipe.stage_names():
            raise BadInput(f"{path}: recipe.yaml and state.json name different stages; was recipe.yaml changed?")
        lock = _lock(path)
        run = cls(path, recipe, read_state(path), lock)  # read again: it may have changed until the lock was ours
        for half in (path / "checkpoints").glob(".*"):  # a checkpoint that was being written when its writer was killed
            shutil.rmtree(half, ignore_errors=True)
        for name, stage in run._state.stages.items():
            if stage.status == "running":
                stage.status = "pending"
            if stage.status == "done" and (checkpoint := run.stage_checkpoint(name)) and not checkpoint.is_dir():
                run.close()
                raise BadInput(
                    f"{path}: the checkpoint of the finished stage {name} is gone: {checkpoint}\n"
                    "Put it back, or start a new run: what came after it was trained from it."
                )
        run._save()
        return run

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the run; the directory stays."""
        self.metrics.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def has_started(self) -> bool:
        """Whether a stage was ever started."""
        return any(stage.attempts for stage in self._state.stages.values())

    def discard(self) -> None:
        """Remove the directory of a run that never started a stage, so that a refused input leaves nothing behind."""
        if self.has_started():
            raise ValueError(f"{self.path} holds work")
        self.close()
        shutil.rmtree(self.path)

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.path.name

    @property
    def log_path(self) -> Path:
        """log.txt."""
        return self.path / "log.txt"

    @property
    def tokenizer_path(self) -> Path:
        """The directory of the run's tokenizer."""
        return self.path / "tokenizer"

    def checkpoint_path(self, stage: str) -> Path:
        """Where `stage` saves its model: `checkpoints/expert--arithmetic--sft` for `expert/arithmetic/sft`."""
        return self.path / "checkpoints" / stage.replace("/", "--")

    def snapshots_path(self, stage: str) -> Path:
        """Where `stage` keeps its snapshots until it is done (`posttrain.snapshots`)."""
        return self.path / "snapshots" / stage.replace("/", "--")

    def stage_checkpoint(self, stage: str) -> Path | None:
        """The checkpoint that `stage` has recorded, None before."""
        checkpoint = self._state.stages[stage].checkpoint
        return None if checkpoint is None else self.path / checkpoint

    def stage(self, name: str) -> StageState:
        """A copy of what is known of a stage."""
        with self._guard:
            return self._state.stages[name].model_copy(deep=True)

    def unfinished_stages(self) -> list[str]:
        """The stages still to run, in order: neither done nor dropped."""
        with self._guard:
            return [name for name, stage in self._state.stages.items() if stage.status not in ("done", "dropped")]

    def start_stage(self, name: str) -> None:
        """`name` runs now, for the first time or once more."""
        self._change(name, status="running", attempts=self.stage(name).attempts + 1, error=None)

    def note_origin(self, name: str, inputs: str, code: str) -> None:
        """What `name` is made from (`posttrain.stages.origin`)."""
        self._change(name, inputs=inputs, code=code)

    def reset_stage(self, name: str) -> None:
        """`name` is to be done anew, as if it had never been begun; what it left is removed."""
        with self._guard:
            self._state.stages[name] = StageState()
            self._save()
        self.append_event({"event": "stage_reset", "stage": name})
        for path in (self.checkpoint_path(name), self.snapshots_path(name)):
            shutil.rmtree(path, ignore_errors=True)

    def forget_checkpoint(self, name: str) -> None:
        """Remove what lies under `checkpoints/` in this name, if anything does."""
        shutil.rmtree(self.checkpoint_path(name), ignore_errors=True)

    def adopt(self, recipe: Recipe) -> None:
        """Go on with another recipe; stages of the same names stay as they are."""
        if recipe == self.recipe:
            return
        with self._guard:
            known = dict(self._state.stages)
            if (recipe.stages.base is None) != (self.recipe.stages.base is None):
                known["base"] = StageState(status="done" if recipe.stages.base is None else "pending")
            self.recipe = recipe
            self._state.stages = {name: known.get(name, StageState()) for name in recipe.stage_names()}
            atomic_write(self.path / "recipe.yaml", resolved_yaml(recipe))
            self._save()

    def finish_stage(self, name: str, checkpoint: str | Path, seconds: float, metrics: Mapping[str, Any]) -> None:
        """`name` is done and its whole checkpoint lies at `checkpoint`; it will not run again."""
        path = Path(checkpoint).resolve()
        inside = path.is_relative_to(self.path)
        recorded = str(path.relative_to(self.path) if inside else path)
        self._change(name, status="done", checkpoint=recorded, seconds=seconds, metrics=plain_json(metrics))

    def fail_stage(self, name: str, error: str) -> None:
        """`name` ended with `error`; a resumed run tries it again."""
        self._change(name, status="failed", error=error)

    def release_stage(self, name: str) -> None:
        """`name` was stopped before its end, through no fault of its own; a resumed run starts it again."""
        self._change(name, status="pending")

    def drop_stage(self, name: str, reason: str) -> None:
        """`name` is left out of the rest of the run, for example by a gate. It keeps its checkpoint."""
        self._change(name, status="dropped", error=reason)

    @property
    def status(self) -> RunStatus:
        """How the run as a whole stands."""
        return self._state.status

    def set_status(self, status: RunStatus) -> None:
        """Record how the run as a whole stands."""
        with self._guard:
            self._state.status = status
            self._save()

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Append `{"event": name, ...}` to metrics.jsonl; see posttrain.observe.metrics for the events."""
        fields = dict(event)
        self.metrics.event(fields.pop("event"), **fields)

    def _change(self, name: str, **values: Any) -> None:
        with self._guard:
            for key, value in values.items():
                setattr(self._state.stages[name], key, value)
            self._save()

    def _save(self) -> None:
        text = self._state.model_dump_json(by_alias=True, indent=2)
        atomic_write(self.path / "state.json", text + "\n")


def read_state(path: str | Path) -> RunState:
    """The state of the run in `path`, which may be running. Raises BadInput when there is none."""
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"{path}: there is no such run directory")
    try:
        text = (path / "state.json").read_text()
    except FileNotFoundError:
        raise BadInput(f"{path}: not a run directory: it has no state.json") from None
    try:
        return RunState.model_validate_json(text)
    except (ValidationError, ValueError) as error:
        if re.search(r'"schema":\s*(?!1\b)\d+', text):
            raise BadInput(f"{path}: state.json was written by another version of posttrain; use that one") from None
        raise BadInput(f"{path / 'state.json'}: damaged: {str(error).splitlines()[0]}") from error


def driver_of(path: str | Path) -> int | None:
    """The process that drives the run in `path`, None when there is none on this machine."""
    try:
        process = int((Path(path) / "lock").read_text())
        os.kill(process, 0)
    except PermissionError:  # it is another user's
        return process
    except (OSError, ValueError):
        return None
    return process


def find_run(run: str | None, root: str | Path) -> Path:
    """The directory that `run` names: a path, a name in `root`, or for None the newest run there.

    Raises:
        BadInput: there is no such run; the message lists those that there are.
    """
    root = Path(root)
    known = sorted((path.parent for path in root.glob("*/state.json")), key=lambda path: path.stat().st_mtime)
    if run is None:
        if not known:
            raise BadInput(f"there is no run in {root}/; `posttrain run RECIPE` makes one")
        return known[-1]
    for path in (Path(run), root / run):
        if (path / "state.json").is_file():
            return path
    there_are = f"; in {root}/ there are {', '.join(path.name for path in known[-8:])}" if known else ""
    raise BadInput(f"{run}: no such run{there_are}")


def _claim(root: Path, name: str) -> Path:
    if not re.fullmatch(NAME_PATTERN, name):
        raise BadInput(
            f"{name!r} cannot be a run's name: letters, digits, `.`, `_` and `-`, beginning with a letter or digit"
        )
    path = root / name
    if not _make(path):
        raise BadInput(
            f"{path}: this run exists already, and a run never overwrites another.\n"
            f"Go on with it (posttrain resume {path}), or choose another name (--name, RUN=)."
        )
    return path


def _claim_numbered(root: Path, name: str) -> Path:
    number = 1
    while not _make(path := root / (name if number == 1 else f"{name}-{number}")):
        number += 1
    return path


def _make(path: Path) -> bool:
    """Make the directory; False when it is there already. Two processes never both get True."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        if path.parent.is_dir():
            return False
        raise BadInput(f"{path.parent}: is a file; runs need a directory") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be made: {error.strerror}") from error
    return True


def _lock(path: Path) -> int:
    """Take the run for this process until it ends: the kernel lets go of the lock with the process."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise BadInput(f"{path}: process {owner or 'unknown'} is running it; wait for it or stop it first") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
