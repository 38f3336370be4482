"""Snapshots: all that a stage needs to go on in its middle, in directories that are there and whole, or not there.

    <run>/snapshots/<stage, `--` for `/`>/step-00000040/
        manifest.json        what made it, and the size and SHA-256 of each file
        ...                  what the trainer wrote (`posttrain.trainers.snapshots`)

A snapshot continues nothing but the stage of the recipe and the code that made it: it belongs to an `Origin`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.errors import BadInput
from posttrain.files import atomic_directory, atomic_write

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Origin:
    """What a snapshot comes from; only the same goes on from it to the same bits."""

    inputs: str
    """Hash of the stage's part of the recipe, its data, and what it starts from."""
    code: str
    """Hash of the project's source, and the versions of the libraries that compute."""


class FileFacts(BaseModel):
    """A file of a snapshot."""

    model_config = ConfigDict(extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """manifest.json."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = Field(1, alias="schema")
    stage: str
    step: int
    """Steps of the stage that are done."""
    inputs: str
    code: str
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that is there; whether it is good is another question (`damage`)."""

    path: Path
    step: int


def snapshots_in(directory: Path) -> list[Snapshot]:
    """The snapshots of a stage, the newest first."""
    named = [(path, NAME.fullmatch(path.name)) for path in directory.glob("step-*")]
    found = [Snapshot(path, int(match[1])) for path, match in named if match]
    return sorted(found, key=lambda snapshot: -snapshot.step)


def read_manifest(path: Path) -> Manifest:
    """Raises ValueError when it cannot be read, with a reason for people."""
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_text())
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValidationError, ValueError):
        raise ValueError(f"{MANIFEST} is damaged") from None


def damage(snapshot: Snapshot) -> str | None:
    """What is wrong with the files of a snapshot, all of which are read; None when they are as they were written."""
    try:
        manifest = read_manifest(snapshot.path)
    except ValueError as error:
        return str(error)
    if manifest.step != snapshot.step:
        return f"its name says step {snapshot.step}, {MANIFEST} says {manifest.step}"
    for name, facts in manifest.files.items():
        path = snapshot.path / name
        try:
            if path.stat().st_size != facts.bytes:
                return f"{name} has {path.stat().st_size} bytes; {facts.bytes} were written"
            if _sha256(path) != facts.sha256:
                return f"the SHA-256 of {name} is not that of what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest_good(directory: Path, tell: Callable[[str], None]) -> Snapshot | None:
    """The newest snapshot of a stage that is as it was written; `tell` hears of each newer one that is not.

    What an interrupted write left is removed.
    """
    for rest in directory.glob(".step-*"):
        shutil.rmtree(rest, ignore_errors=True)
    for snapshot in snapshots_in(directory):
        found = damage(snapshot)
        if found is None:
            return snapshot
        tell(f"the snapshot {snapshot.path} is damaged and not used: {found}; the one before it is tried")
    return None


def check_origin(directory: Path, origin: Origin) -> None:
    """Raise BadInput when snapshots of a stage were made by another recipe or another version of the project."""
    for snapshot in snapshots_in(directory):
        try:
            manifest = read_manifest(snapshot.path)
        except ValueError:
            continue  # damaged, which is found later
        for field, what in (
            ("inputs", "from another recipe or other data"),
            ("code", "by another version of posttrain's code"),
        ):
            if getattr(manifest, field) != getattr(origin, field):
                raise BadInput(
                    f"{snapshot.path} was made {what}: going on from it would give neither the old result nor the "
                    f"new one. Go on with what made it, or remove {directory} to begin the stage {manifest.stage} again"
                )


def write_snapshot(directory: Path, stage: str, step: int, origin: Origin, fill: Callable[[Path], None]) -> Snapshot:
    """Make a snapshot; it appears when it is whole and on disk.

    Args:
        fill: writes the files into a directory.

    Raises:
        OSError: it could not be written; nothing is left of it then.
    """
    path = directory / f"step-{step:08d}"
    with atomic_directory(path) as temporary:
        fill(temporary)
        files = {
            file.name: FileFacts(bytes=file.stat().st_size, sha256=_sha256(file))
            for file in sorted(temporary.iterdir())
        }
        manifest = Manifest(schema=1, stage=stage, step=step, files=files, **asdict(origin))
        atomic_write(temporary / MANIFEST, manifest.model_dump_json(by_alias=True, indent=2) + "\n")
    return Snapshot(path, step)


def prune(directory: Path, newest: Snapshot, keep: int) -> None:
    """Remove all but `newest` and the `keep - 1` before it; also later ones: damaged, or of a future that is redone."""
    older = [one for one in snapshots_in(directory) if one.step < newest.step]
    kept = {newest.path, *(one.path for one in older[: keep - 1])}
    for snapshot in snapshots_in(directory):
        if snapshot.path not in kept:
            hidden = directory / f".{snapshot.path.name}.old"  # half removed, it must not be taken for one
            snapshot.path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def digest(value: Any) -> str:
    """A hash of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
