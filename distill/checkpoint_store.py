"""Where teachers come from: a directory, or any URL that fsspec reads, fetched once into a local cache.

A checkpoint may bring a manifest, `SHA256SUMS` as `sha256sum` writes it; then every file is held against it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain.errors import BadInput
from posttrain.files import atomic_directory

MANIFEST = "SHA256SUMS"


def default_cache() -> Path:
    """Where fetched checkpoints are kept on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain" / "teachers"


def local_checkpoint(source: str, cache: Path) -> Path:
    """The directory of the checkpoint `source`; one behind a URL is fetched into `cache` unless it is there.

    A fetched checkpoint appears when all of its files are there and verified, whoever else is fetching it. It is known
    by its URL and by what the store says of its files, so that one that was replaced there is fetched again.

    Raises:
        BadInput: nothing there, a store that cannot be read, or a file that differs from the manifest.
    """
    if "://" not in source:
        return Path(source)
    try:
        filesystem, root = _filesystem(source)
        files: dict[str, dict[str, Any]] = filesystem.find(root, detail=True)
        marks = sorted(f"{name} {filesystem.ukey(name)}" for name in files)
    except Exception as error:  # every store has errors of its own
        raise _unreadable(source, error) from error
    if not files:
        raise BadInput(f"{source} is not a model checkpoint: there are no files")
    target = cache / hashlib.sha256("\n".join([source, *marks]).encode()).hexdigest()[:24]
    with _locked(cache / f"{target.name}.lock"):
        if not target.is_dir():
            with atomic_directory(target) as directory:
                for name, facts in files.items():
                    _fetch(filesystem, source, name, facts.get("size"), directory / _relative(name, root))
                verify_manifest(directory, source)
    return target


def verify_manifest(directory: Path, source: str | None = None) -> int:
    """Compare the files with the manifest, if there is one; returns how many were compared.

    Raises:
        BadInput: a file that is missing or differs, or a manifest that cannot be understood.
    """
    where = source or str(directory)
    if not (directory / MANIFEST).is_file():
        return 0
    lines = [line for line in (directory / MANIFEST).read_text().splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        expected, separator, name = line.partition(" ")
        path = directory / name.strip().removeprefix("*")
        if len(expected) != 64 or not separator or not path.resolve().is_relative_to(directory.resolve()):
            raise BadInput(f"{where}: {MANIFEST}, line {number}: expected a SHA-256 checksum and a file, got {line!r}")
        if not path.is_file():
            raise BadInput(f"{where}: {path.name} is missing; {MANIFEST} has it. Copy the checkpoint again")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise BadInput(
                f"{where}: {path.name} is damaged: its SHA-256 is {found}, {MANIFEST} says {expected}. "
                "Copy the checkpoint again"
            )
    return len(lines)


def _filesystem(source: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    filesystem, root = url_to_fs(source)
    return filesystem, str(root)


def _relative(name: str, root: str) -> PurePosixPath:
    relative = PurePosixPath(name).relative_to(PurePosixPath(root))
    if ".." in relative.parts:
        raise BadInput(f"the store lists a file outside of the checkpoint: {name}")
    return relative


def _fetch(filesystem: Any, source: str, name: str, size: int | None, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        filesystem.get_file(name, str(target))
    except Exception as error:  # as above
        raise _unreadable(f"{source} ({name})", error) from error
    if size is not None and target.stat().st_size != size:
        raise BadInput(f"{source}: {name} came with {target.stat().st_size} bytes; the store says {size}")


def _unreadable(where: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())
    return BadInput(f"{where} cannot be fetched: {type(error).__name__}: {reason}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
