"""Weights on their way from a trainer or a checkpoint to the engines: packing, checksums, coverage by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from posttrain.errors import BadInput, RunFailed

if TYPE_CHECKING:
    import torch

SHOWN_NAMES = 8
"""How many tensor names an error message lists."""

PINNED_BYTES = 64 << 20
"""Host memory through which a GPU's tensors pass to have their checksums taken."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as numpy bits, which Ray's object store shares between processes without a copy.

    numpy knows neither bfloat16 nor the 8-bit floats, so `bits` holds such a tensor as integers of the same
    width, and `dtype` says what they are (`float32`, `bfloat16`, ...: torch's names).
    """

    bits: np.ndarray
    dtype: str

    @classmethod
    def of(cls, value: np.ndarray | torch.Tensor) -> PackedTensor:
        """Pack an array or a tensor (of any device); shares the memory where that is possible."""
        if isinstance(value, np.ndarray):
            return cls(np.require(value, requirements="C"), str(value.dtype))
        import torch

        tensor = value.detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        try:
            return cls(tensor.numpy(), dtype)
        except TypeError:
            same_width = {1: torch.uint8, 2: torch.int16}
            return cls(tensor.view(same_width[tensor.element_size()]).numpy(), dtype)

    def tensor(self) -> torch.Tensor:
        """The tensor, on the memory of `bits`: only to be read."""
        import torch

        with warnings.catch_warnings():
            # Arrays from the object store are read-only, of which torch warns; nobody here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(self.bits)
        dtype = getattr(torch, self.dtype)
        return tensor if tensor.dtype == dtype else tensor.view(dtype)

    def checksum(self) -> str:
        """16 hexadecimal digits over type, shape and every byte (XXH3-64)."""
        digest = xxhash.xxh3_64(f"{self.dtype}{list(self.bits.shape)}".encode())
        digest.update(self.bits.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def checksum_of(value: np.ndarray | torch.Tensor) -> str:
    """`PackedTensor.checksum` of a tensor on any device; one on a GPU crosses to the host in parts."""
    if isinstance(value, np.ndarray) or value.device.type == "cpu":
        return PackedTensor.of(value).checksum()
    import torch

    digest = xxhash.xxh3_64(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}".encode())
    bytes_N = value.detach().contiguous().view(-1).view(torch.uint8)
    pinned = torch.empty(min(len(bytes_N), PINNED_BYTES), dtype=torch.uint8, pin_memory=value.is_cuda)
    for part in bytes_N.split(PINNED_BYTES):
        digest.update(pinned[: len(part)].copy_(part).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class WeightUpdate:
    """The weights of one version, with the checksums that its sender took; without those that the receiver has."""

    version: int
    tensors: dict[str, PackedTensor]
    checksums: dict[str, str]
    """Of all weights, those left out too."""
    unchanged: frozenset[str] = frozenset()
    """Names that were left out: the receiver said that it holds them."""

    @classmethod
    def pack(
        cls,
        weights: Mapping[str, np.ndarray | torch.Tensor],
        version: int,
        known: Mapping[str, str] = MappingProxyType({}),
    ) -> WeightUpdate:
        """Take the checksums of all weights, and pack those that are not `known`.

        Args:
            weights: Complete, by name.
            version: Higher than all before.
            known: Name → checksum of what the receiver has.
        """
        tensors, checksums, unchanged = {}, {}, set()
        for name, value in weights.items():
            packed = PackedTensor.of(value)
            checksums[name] = packed.checksum()
            if known.get(name) == checksums[name]:
                unchanged.add(name)
            else:
                tensors[name] = packed
        return cls(version, tensors, checksums, frozenset(unchanged))

    def check(self) -> None:
        """Make sure that every byte is what was sent.

        Raises:
            RunFailed: a tensor without a checksum, a checksum without a tensor, or one that does not match.
        """
        if names := (self.tensors.keys() | self.unchanged) ^ self.checksums.keys():
            raise RunFailed(f"weights of version {self.version}: {shown(names)} arrived without tensor or checksum")
        require_checksums(self.tensors, self.checksums, self.version)

    def checked_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, after `check`."""
        self.check()
        return {name: tensor.tensor() for name, tensor in self.tensors.items()}


def require_checksums(tensors: Mapping[str, PackedTensor], checksums: Mapping[str, str], version: int) -> None:
    """Raise RunFailed, with the names, when tensors are not those that the checksums were taken of."""
    wrong = [name for name, tensor in tensors.items() if tensor.checksum() != checksums[name]]
    if wrong:
        raise RunFailed(f"weights of version {version} were damaged on the way: checksums of {shown(wrong)}")


def combined_checksum(checksums: Mapping[str, str]) -> str:
    """One checksum for a whole set of weights, whatever their order."""
    text = "\n".join(f"{name} {checksums[name]}" for name in sorted(checksums))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def shown(names: Iterable[str]) -> str:
    """The first few names, for an error message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN_NAMES} more" if len(ordered) > SHOWN_NAMES else ""
    return ", ".join(ordered[:SHOWN_NAMES]) + more


def check_coverage(
    expected: Mapping[str, tuple[int, ...]], optional: set[str], weights: Mapping[str, tuple[int, ...]]
) -> None:
    """Every expected tensor is there in its shape, and nothing else.

    Args:
        expected: Name → shape of every weight of the engine's model.
        optional: Names among them that may be absent (tied to another).
        weights: Name → shape of what is about to be loaded.

    Raises:
        RunFailed: names what is missing, unknown or of another shape.
    """
    problems = []
    if missing := expected.keys() - optional - weights.keys():
        problems.append(f"missing: {shown(missing)}")
    if unknown := weights.keys() - expected.keys():
        problems.append(f"unknown to the engine: {shown(unknown)}")
    for name in sorted(expected.keys() & weights.keys()):
        if tuple(weights[name]) != tuple(expected[name]):
            problems.append(f"{name} has shape {list(weights[name])}, the engine's has {list(expected[name])}")
    if problems:
        raise RunFailed("the weights do not fit the engine's model: " + "; ".join(problems[:SHOWN_NAMES]))


def iterate_safetensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in the `*.safetensors` files of a checkpoint directory.

    Raises:
        BadInput: no such directory, or no such file in it.
    """
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{directory}: no checkpoint here (a directory with config.json and *.safetensors is needed)")
    for file in files:
        yield from load_file(file).items()
