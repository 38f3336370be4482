"""Hidden states on their way from a teacher to the student's loss: one block for each sample and teacher.

The blocks lie in Ray's object store: it counts the references, lets memory go with the last, and spills to disk
what does not fit. What is added here is what a block says of itself, and a checksum; `distill.pool` holds the
references and gives each up as its block is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from posttrain.errors import RunFailed
from rollouts.weights import PackedTensor

TAP = "after the mHC collapse and the final norm"


class DamagedBlock(RunFailed):
    """A block is not what was sent."""


@dataclass(frozen=True)
class HiddenBlock:
    """States of one sample by one teacher, `[tokens, width]`, at the positions that predict its sampled tokens."""

    teacher: str
    sample: int
    """Its number in the request."""
    states: PackedTensor
    checksum: str
    tap: str = TAP

    @classmethod
    def of(cls, teacher: str, sample: int, states_NG: Tensor) -> HiddenBlock:
        """Pack states of any device in their own precision."""
        packed = PackedTensor.of(states_NG)
        return cls(teacher, sample, packed, packed.checksum())

    @property
    def nbytes(self) -> int:
        """Of the states."""
        return self.states.bits.nbytes

    def verified(self, teacher: str, sample: int, tokens: int) -> Tensor:
        """The states, only to be read.

        Raises:
            DamagedBlock: another block than expected, or other bytes than were sent.
        """
        found = (self.teacher, self.sample, self.states.bits.shape[0], self.tap)
        expected = (teacher, sample, tokens, TAP)
        if found != expected:
            raise DamagedBlock(f"hidden states of {found} came; {expected} were asked for")
        if self.states.checksum() != self.checksum:
            raise DamagedBlock(f"the hidden states of sample {sample} by {teacher} were damaged on the way")
        return self.states.tensor()


@dataclass(frozen=True)
class TeacherWork:
    """What it took to answer."""

    seconds_compute: float = 0.0
    seconds_load: float = 0.0
    """Waiting for the checkpoint to come into memory; 0 when it was there."""
    seconds_swap: float = 0.0
    """Host memory to device."""
    bytes_loaded: int = 0
    """From the checkpoint to host memory, and from there to a device."""
    bytes_returned: int = 0

    def __add__(self, other: TeacherWork) -> TeacherWork:
        """Both."""
        return TeacherWork(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def joined(teacher: str, kept: Sequence[int], blocks: Iterable[HiddenBlock]) -> Tensor:
    """All blocks of a request, one after the other, `[sum(kept), G]`; each may be freed when the next is taken."""
    states_NG: Tensor | None = None
    first = 0
    for sample, (tokens, block) in enumerate(zip(kept, blocks, strict=True)):
        part = block.verified(teacher, sample, tokens)
        if states_NG is None:
            states_NG = torch.empty(sum(kept), part.shape[1], dtype=part.dtype)
        states_NG[first : first + tokens] = part
        first += tokens
    assert states_NG is not None, "a request has at least one sample"
    return states_NG
