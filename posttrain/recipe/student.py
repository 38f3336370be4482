"""Options of the student's stage: its teachers, its start, its guards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field, model_validator

from posttrain.recipe.section import Section, wrong


class TeacherConfig(Section):
    """One of the teachers of a domain: this run's expert for a domain, or a checkpoint from elsewhere."""

    expert: str | None = None
    """Of this run, by its domain."""
    checkpoint: str | None = None
    """A directory, or any URL that fsspec reads (`s3://...`)."""
    weight: float = Field(1.0, gt=0)
    """Against the domain's other teachers."""
    first_step: int = Field(1, ge=1)
    """From which on it teaches."""
    last_step: int | None = Field(None, ge=1)
    """It teaches from the one step to the other, both included; default: to the end. So teachers come, go, and take
    each other's places."""

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.expert is None) == (self.checkpoint is None):
            raise wrong("", "give exactly one of `expert` (a domain's name) and `checkpoint` (a directory or a URL)")
        if self.last_step is not None and self.last_step < self.first_step:
            raise wrong("last_step", f"must not be before first_step, which is {self.first_step}")
        return self

    @property
    def name(self) -> str:
        """In metrics: the expert's domain, or the last part of the checkpoint's place."""
        return self.expert or str(self.checkpoint).rstrip("/").rpartition("/")[2]


class InTurn(Protocol):
    """A teacher of some steps."""

    @property
    def first_step(self) -> int: ...

    @property
    def last_step(self) -> int | None: ...


One = TypeVar("One", bound=InTurn)


def teaching(teachers: Iterable[One], step: int) -> list[One]:
    """Those that teach in a step (from 1)."""
    return [one for one in teachers if one.first_step <= step <= (one.last_step or step)]


def first_untaught(teachers: Iterable[InTurn], steps: int) -> int | None:
    """The first of `steps` steps that nobody teaches in; None if there is none."""
    known = list(teachers)
    return next((step for step in range(1, steps + 1) if not teaching(known, step)), None)


Teachers = Annotated[list[TeacherConfig], Field(min_length=1)]


def experts_or_mapping(value: Any) -> Any:
    """`experts` stands for an empty mapping: every domain has its own expert."""
    if value == "experts":
        return {}
    if not isinstance(value, dict):
        raise wrong("", "expected `experts`, or a mapping from domains to lists of teachers")
    return value


class GuardsConfig(Section):
    """Signs that a student is breaking; off unless a bound is given."""

    min_entropy: float | None = Field(None, gt=0)
    """Nats: the mean over a domain's tokens in a step must not fall below."""
    length_ratio: float | None = Field(None, gt=1)
    """A domain's mean answer must not become this many times longer, or shorter, than in its first step."""
    patience: int = Field(3, ge=1)
    """Steps in a row that have to be out of bounds."""
    action: Literal["stop", "warn"] = "stop"
    """End the run (it can be resumed), or say so."""

    @model_validator(mode="after")
    def _action_needed(self) -> GuardsConfig:
        unbounded = self.min_entropy is None and self.length_ratio is None
        if unbounded and (self.patience != 3 or self.action != "stop"):
            raise wrong("", "there is nothing to guard: give min_entropy, length_ratio or both")
        return self
