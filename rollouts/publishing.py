"""Weights from a trainer to the engines, version by version: only what changed, and never more trusted than checked.

    trainer   update = WeightUpdate.pack(weights, version, store.checksums)    takes checksums, packs what changed
    service   published = store.put(update)                                    keeps the version, complete
    engine    receive(engine, published)                                       fetches what it lacks, loads, compares

The store belongs to the process that outlives trainers and engines (the rollout service): an object in Ray's store
dies with the process that put it there, and an engine that restarts receives `store.current` before its first token.
An engine compares the checksums of `published` with those of what it holds: one that has just started fetches every
tensor, one that has the version before only those that changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from posttrain.errors import RunFailed
from posttrain.files import atomic_directory
from rollouts.weights import PackedTensor, WeightUpdate, require_checksums, shown

if TYPE_CHECKING:
    import torch
    from ray import ObjectRef

    from rollouts.engine import Engine
    from rollouts.loading import Verification

PARTS = 4
"""A version that would lie in more parts is put down whole, so that tensors that nobody needs are not kept for long."""


class Part(Protocol):
    """Some tensors in one place."""

    def read(self, names: Iterable[str]) -> dict[str, PackedTensor]:
        """These of its tensors. Raises RunFailed when they are gone."""


@dataclass(frozen=True, eq=False)
class ObjectPart:
    """Tensors in Ray's object store: memory that the processes of a node share; Ray copies it to other nodes."""

    reference: ObjectRef

    def read(self, names: Iterable[str]) -> dict[str, PackedTensor]:
        """On the store's own memory, not copied."""
        import ray
        from ray.exceptions import ObjectLostError

        try:
            tensors: dict[str, PackedTensor] = ray.get(self.reference)
        except ObjectLostError as error:  # its owner's death too
            raise RunFailed(f"published weights are gone from the object store: {error}") from error
        return {name: tensors[name] for name in names}


@dataclass(frozen=True, eq=False)
class FilePart:
    """Tensors in a safetensors file, for engines on this machine or on a file system that they share with it."""

    file: Path

    def read(self, names: Iterable[str]) -> dict[str, PackedTensor]:
        """Copied from the file, nothing else of it is read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "pt") as tensors:
                return {name: PackedTensor.of(tensors.get_tensor(name)) for name in names}
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"published weights cannot be read from {self.file}: {error}") from error


@dataclass(frozen=True)
class PublishedWeights:
    """One version, complete: each tensor's checksum and where it lies. Small and picklable.

    Whoever holds it keeps Ray from freeing the tensors.
    """

    version: int
    checksums: dict[str, str]
    parts: tuple[Part, ...]
    places: dict[str, int] = field(repr=False)
    """Name → number of the part in which the tensor is."""

    def fetch(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """These tensors, once their checksums are found right; only to be read.

        Raises:
            RunFailed: they are gone, or damaged.
        """
        return {name: tensor.tensor() for name, tensor in self.packed(names).items()}

    def packed(self, names: Iterable[str]) -> dict[str, PackedTensor]:
        """As `fetch`, still packed."""
        wanted: dict[int, list[str]] = {}
        for name in names:
            wanted.setdefault(self.places[name], []).append(name)
        found: dict[str, PackedTensor] = {}
        for place, own in wanted.items():
            found |= self.parts[place].read(own)
        require_checksums(found, self.checksums, self.version)
        return found


class WeightStore:
    """Holds the current version of the weights for whoever needs it, now or after a restart.

    Each update goes to Ray's object store, or into a file where that is full or not to be used. What no tensor of the
    current version is in any more is freed; a file one version later, for engines that are still reading it.

    Args:
        directory: For files, `<run>/weights` say; what an earlier store left there is removed.
        shared_memory: Whether to try Ray's object store. Ray must be initialised then.
    """

    def __init__(self, directory: str | Path, shared_memory: bool = True) -> None:
        self._directory = Path(directory)
        self._shared_memory = shared_memory
        self._current: PublishedWeights | None = None
        self._before: PublishedWeights | None = None
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def current(self) -> PublishedWeights | None:
        """What an engine that starts has to receive; None before the first version."""
        return self._current

    @property
    def checksums(self) -> Mapping[str, str]:
        """Of the current version: tensors that have them need not be sent again."""
        return self._current.checksums if self._current else {}

    def put(self, update: WeightUpdate) -> PublishedWeights:
        """Make a new version the current one. If that fails, the one before stays.

        Raises:
            RunFailed: a version that does not grow; tensors that are damaged, or were left out although they are not
                held; no room.
        """
        before = self._current
        if before is not None and update.version <= before.version:
            raise RunFailed(f"weights of version {update.version} after version {before.version}: versions must grow")
        update.check()
        if strange := [name for name in update.unchanged if self.checksums.get(name) != update.checksums[name]]:
            raise RunFailed(f"weights of version {update.version} were left out but are not held: {shown(strange)}")
        published = self._placed(update, before)
        self._before, self._current = before, published
        self._remove_files()
        return published

    def _placed(self, update: WeightUpdate, before: PublishedWeights | None) -> PublishedWeights:
        """The update's tensors in a part of their own, beside the parts in which the others already are."""
        if before is None or not update.unchanged:
            part = self._write(update.tensors, update.version)
            return PublishedWeights(update.version, update.checksums, (part,), dict.fromkeys(update.tensors, 0))
        numbers = sorted({before.places[name] for name in update.unchanged})
        if len(numbers) >= PARTS:
            whole = WeightUpdate(
                update.version, {**before.packed(update.unchanged), **update.tensors}, update.checksums
            )
            return self._placed(whole, before)
        renumbered = {old: new for new, old in enumerate(numbers)}
        places = {name: renumbered[before.places[name]] for name in update.unchanged}
        parts = [before.parts[number] for number in numbers]
        if update.tensors:
            places |= dict.fromkeys(update.tensors, len(parts))
            parts.append(self._write(update.tensors, update.version))
        return PublishedWeights(update.version, update.checksums, tuple(parts), places)

    def _write(self, tensors: Mapping[str, PackedTensor], version: int) -> Part:
        if self._shared_memory:
            import ray
            from ray.exceptions import ObjectStoreFullError, OutOfDiskError

            try:
                return ObjectPart(ray.put(dict(tensors)))
            except (ObjectStoreFullError, OutOfDiskError):
                pass  # a file then
        from safetensors.torch import save_file

        try:
            with atomic_directory(self._directory / str(version)) as temporary:
                contents = {name: tensor.tensor() for name, tensor in tensors.items()}
                save_file(contents, temporary / "weights.safetensors")
        except OSError as error:
            raise RunFailed(f"weights of version {version} cannot be written to {self._directory}: {error}") from error
        return FilePart(self._directory / str(version) / "weights.safetensors")

    def _remove_files(self) -> None:
        if not self._directory.exists():
            return
        needed = {
            part.file.parent.name
            for published in (self._before, self._current)
            if published is not None
            for part in published.parts
            if isinstance(part, FilePart)
        }
        for directory in self._directory.iterdir():
            if directory.name not in needed:
                shutil.rmtree(directory, ignore_errors=True)


def receive(engine: Engine, published: PublishedWeights) -> Verification:
    """Bring an engine to a published version: fetch the tensors that it lacks, load them, compare all that it has.

    Raises:
        RunFailed: gone or damaged on the way: the engine keeps the weights it had. Names or shapes that do not fit, or
            an engine that does not hold what was published: it serves nothing until a good version, and it is best
            replaced.
    """
    tensors = published.fetch(engine.lacking(published.checksums))
    return engine.load_weights(tensors, published.version, published.checksums)
