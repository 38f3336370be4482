"""`python scripts/recipe_reference.py`: docs/recipe.md, every key of a recipe, from the models that check recipes."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from posttrain.files import atomic_write
from posttrain.recipe.schema import Recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"
HEAD = """\
# Recipes: every key

Written by `python scripts/recipe_reference.py` from the models that check recipes (`posttrain/recipe`); tests compare.
`posttrain validate RECIPE` shows a recipe with every default written out, and the stages that it makes. A key that is
not here is refused, with the line and what is allowed. Examples: [recipes](../recipes).
"""


def reference() -> str:
    """The page."""
    return HEAD + "".join(f"\n{section(model)}" for model in models(Recipe))


def models(root: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that a recipe is made of, in the order in which a reader meets them."""
    found: list[type[BaseModel]] = []

    def visit(model: type[BaseModel]) -> None:
        if model not in found:
            found.append(model)
            for field in model.model_fields.values():
                for part in sections_in(field.annotation):
                    visit(part)

    visit(root)
    return found


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def section(model: type[BaseModel]) -> str:
    """Heading, description and table of one model."""
    text = " ".join((model.__doc__ or "").split())
    rows = [row(name, field) for name, field in model.model_fields.items()]
    table = "\n".join(["| key | value | default | |", "| --- | --- | --- | --- |", *rows])
    return f"## {model.__name__}\n\n{text + 2 * chr(10) if text else ''}{table}\n"


def row(name: str, field: FieldInfo) -> str:
    """One key."""
    kind = kind_of(field.annotation) + bounds(field.metadata)
    parts = list(sections_in(field.annotation))
    text = field.description or (first_sentence(parts[0]) if len(parts) == 1 else "")
    meaning = " ".join(text.split())
    return (
        "| " + " | ".join(part.replace("|", r"\|") for part in (f"`{name}`", kind, default_of(field), meaning)) + " |"
    )


def first_sentence(model: type[BaseModel]) -> str:
    """Of its description."""
    return (model.__doc__ or "").split("\n\n")[0].partition(". ")[0].rstrip(".") + "." if model.__doc__ else ""


def kind_of(annotation: Any) -> str:
    """A type in words; a model as a link to its table."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0]) + bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(part) for part in arguments if part is not type(None)))
    if origin is dict:
        return f"mapping to {kind_of(arguments[1])}" if len(arguments) > 1 else "mapping"
    if origin in (list, tuple):
        inner = list(dict.fromkeys(kind_of(part) for part in arguments if part is not ...))
        return f"list of {' or '.join(inner)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    words = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "`true`, `false`",
        Any: "anything",
        dict: "mapping",
    }
    return words.get(annotation) or str(getattr(annotation, "__name__", annotation))


def bounds(metadata: Any) -> str:
    """` ≥ 1, < 5` and the like."""
    signs = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<", MinLen: "at least", MaxLen: "at most"}
    parts = []
    for limit in metadata:
        if type(limit) in signs:
            (value,) = [
                getattr(limit, slot)
                for slot in ("ge", "gt", "le", "lt", "min_length", "max_length")
                if hasattr(limit, slot)
            ]
            parts.append(f"{signs[type(limit)]} {value}" + (" of them" if isinstance(limit, MinLen | MaxLen) else ""))
    return " " + ", ".join(parts) if parts else ""


def default_of(field: FieldInfo) -> str:
    """As it would stand in a recipe; nothing where the key may be left out and then means nothing."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value in ({}, (), []):
        return ""
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, list | tuple) and any(isinstance(part, BaseModel) for part in value):
        return "`[" + ", ".join(re.sub(r"'", "", str(part.model_dump(exclude_none=True))) for part in value) + "]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    atomic_write(PAGE, reference())
    print(PAGE)
