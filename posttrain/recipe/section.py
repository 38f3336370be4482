"""What all parts of a recipe have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


def wrong(key: str, message: str) -> PydanticCustomError:
    """An error that belongs to `key`, a dotted path below the section that is being checked."""
    return PydanticCustomError("recipe", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """A part of a recipe: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
