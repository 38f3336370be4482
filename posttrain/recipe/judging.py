"""The part of a recipe that says what judging problems look like (docs/judge.md)."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from posttrain.recipe.section import Section, wrong

FIELD = re.compile(r"\{(\w+)\}")
"""A field of a judging prompt."""

_SINGLE = "{question}\n\nAnswer:\n{answer}\n\nCriterion: {criterion}\nDoes the answer meet it? Say yes or no."
_PAIR = (
    "{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nCriterion: {criterion}\nWhich answer meets it better? "
    "Say A or B."
)


class JudgingConfig(Section):
    """Problems of judging answers. Give `domain` or `labels`."""

    domain: str | None = None
    """Whose questions and reference answers are judged; a wrong answer is made of each right one."""
    labels: str | None = None
    """A file of labelled answers, one JSON object a line."""
    form: Literal["single", "pair"] = "single"
    """`single`: does an answer meet the criterion, yes or no. `pair`: which of two does better, A or B; every pair is
    there in both orders."""
    criterion: str = Field("The answer is right.", min_length=1)
    """Of answers that bring none of their own."""
    prompt: str | None = None
    """A template over `{question}`, `{criterion}` and `{answer}`, or with pairs `{first}` and `{second}`."""

    @property
    def template(self) -> str:
        """The prompt."""
        return self.prompt or (_SINGLE if self.form == "single" else _PAIR)

    @model_validator(mode="after")
    def _fits(self) -> JudgingConfig:
        if (self.domain is None) == (self.labels is None):
            raise wrong("", "give exactly one of `domain` (whose answers are judged) and `labels` (a file)")
        needed = ["question", *(["answer"] if self.form == "single" else ["first", "second"])]
        found = FIELD.findall(self.template)
        for name in found:
            if name not in (*needed, "criterion"):
                raise wrong("prompt", f"there is no {{{name}}} with `form: {self.form}`; there are "
                                      f"{', '.join(f'{{{one}}}' for one in (*needed, 'criterion'))}")  # fmt: skip
        for name in needed:
            if name not in found:
                raise wrong("prompt", f"leaves out {{{name}}}, which nobody could judge without")
        return self


class JudgeEvaluation(Section):
    """How good a judge a model is, in all judge domains of the recipe (docs/judge.md)."""

    n: int = Field(256, ge=2)
    """Held-out judging problems of each domain; as many of the model's own answers are judged too."""
