"""The part of a recipe that says how models are evaluated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from posttrain.recipe.judging import JudgeEvaluation
from posttrain.recipe.section import Section, wrong

Models = Literal["base", "experts", "student"]


class HoldoutEvaluation(Section):
    n: int = Field(256, ge=1)
    """Held-out problems of each domain."""
    samples: int = Field(1, ge=1)
    """Answers sampled for each problem; pass@1 is their mean."""
    temperature: float = Field(1.0, ge=0)
    """0: the likeliest answer."""
    own_domain: bool = False
    """Experts answer the problems of their own domain only; base and student those of all."""

    def domains_of(self, model: str, domains: Iterable[str]) -> list[str]:
        """Of `domains` those that the model of a stage is evaluated on."""
        expert = model.split("/")[1] if self.own_domain and model.startswith("expert/") else None
        return [domain for domain in domains if expert in (None, domain)]


class LmEvalEvaluation(Section):
    """Tasks of lm-evaluation-harness, answered by the rollout workers."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks, or paths of their YAML files."""
    include: str | None = None
    """A directory with task files (YAML) of your own."""
    limit: int | None = Field(None, ge=1)
    """Documents of each task; default: all."""
    fewshot: int | None = Field(None, ge=0)
    """Examples before each document; default: the task's."""


class EvaluationHook(Section):
    """One evaluation. Exactly one of `holdout`, `lm_eval`, `judge` and `function` says which."""

    holdout: HoldoutEvaluation | None = None
    lm_eval: LmEvalEvaluation | None = None
    judge: JudgeEvaluation | None = None
    """How good judges the judge domains are."""
    function: str | None = None
    """`package.module:function`, called with a `posttrain.stages.hooks.EvaluatedModel`; returns numbers by name."""
    after: list[Models] = Field(["base", "experts", "student"], min_length=1)
    """The models that are evaluated."""

    @model_validator(mode="after")
    def _one_kind(self) -> EvaluationHook:
        kinds = [name for name in ("holdout", "lm_eval", "judge", "function") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise wrong(
                "", f"give exactly one of `holdout`, `lm_eval`, `judge` and `function`, not {len(kinds)} of them"
            )
        return self

    @property
    def name(self) -> str:
        """How its results are called."""
        return self.function or next(
            kind for kind in ("lm_eval", "judge", "holdout") if getattr(self, kind) is not None
        )

    def wants(self, model: str) -> bool:
        """Whether the model of that stage is evaluated."""
        kind: Models = "base" if model == "base" else "student" if model.startswith("student") else "experts"
        return kind in self.after
