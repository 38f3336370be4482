"""What is wrong with a recipe, in words: where (file, line, key), what was found, what is allowed."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from posttrain.errors import BadInput
from posttrain.recipe.document import Document, KeyPath, dotted, split_key
from posttrain.recipe.domains import SOURCE_KINDS
from posttrain.recipe.schema import NAME_PATTERN, Recipe

SHOWN_PROBLEMS = 6
SHOWN_NAMES = 24

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe."""

    key: KeyPath
    message: str
    allowed: str = ""
    """A second line: what would be right."""


def refuse(document: Document, problems: Sequence[Problem]) -> NoReturn:
    """Raise BadInput that tells all `problems` on less than a screen."""
    lines = []
    if len(problems) > 1 or not document.place(problems[0].key).startswith(str(document.path)):
        lines.append(f"{document.path} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:")
    for problem in problems[:SHOWN_PROBLEMS]:
        key = dotted(problem.key) or "the recipe"
        lines.append(f"{document.place(problem.key)}: {key}: {problem.message}")
        lines += [f"    {problem.allowed}"] if problem.allowed else []
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    raise BadInput("\n".join(lines))


def choices(names: Iterable[str], what: str) -> str:
    """`what`: the names, not too many of them."""
    names = list(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{what}: {', '.join(names[:SHOWN_NAMES])}{more}"


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing when no name is near."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def problems_of(error: ValidationError, data: Any) -> list[Problem]:
    """The schema's complaints about `data` in words, in the order of the keys in the schema."""
    problems = []
    for item in error.errors(include_url=False):
        key = _key_of(item["loc"], data)
        context = item.get("ctx", {})
        if item["type"] == "recipe":
            key += tuple(part for part in split_key(context.get("key", "")) if part != "")
        problem = _problem(item["type"], key, item["input"], context, item["msg"], data)
        if problem not in problems:
            problems.append(problem)
    return problems


def _key_of(location: Sequence[str | int], data: Any) -> KeyPath:
    """`location` without what is no key: the tags of unions, and the mark of an error in a key itself."""
    key: list[str | int] = []
    value = data
    for part in location:
        is_stage_tag = isinstance(value, dict) and part not in value and value.get("kind") == part
        if part == "[key]" or is_stage_tag or (isinstance(part, str) and part.startswith("<")):
            continue
        key.append(part)
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
    return tuple(key)


def _problem(kind: str, key: KeyPath, value: Any, context: Mapping[str, Any], message: str, data: Any) -> Problem:
    if kind == "extra_forbidden":
        keys = _keys_allowed_beside(key, data)
        return Problem(key, f"unknown key{did_you_mean(key[-1], keys)}", choices(keys, "keys allowed here"))
    if kind == "missing":
        return Problem(key, "this key is required and missing")
    if kind in ("literal_error", "union_tag_invalid"):
        if kind == "union_tag_invalid":
            key, value = (*key, "kind"), context.get("tag")
        allowed = [name.strip(" '") for name in _expected_names(context)]
        return Problem(key, f"got {_shown(value)}{did_you_mean(value, allowed)}", choices(allowed, "allowed"))
    if kind == "union_tag_not_found":
        if isinstance(value, dict):
            return Problem((*key, "kind"), "this key is required and missing", "allowed: sft, grpo")
        return Problem(key, f"expected a mapping, got {_shown(value)}")
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return Problem(key, f"must be {words} {context[bound]}, got {_shown(value)}")
    if kind in ("too_short", "too_long"):
        words = f"at least {context.get('min_length')}" if kind == "too_short" else f"{context.get('max_length')}"
        noun = "domain" if key == ("domains",) else "entry"
        return Problem(key, f"needs {words} {noun}, has {context.get('actual_length')}")
    if kind == "string_pattern_mismatch":
        return Problem(key, f"{_shown(value)} is no name", _name_rule(context.get("pattern", "")))
    if kind in _EXPECTED:
        return Problem(key, f"expected {_EXPECTED[kind]}, got {_shown(value)}", _hint(key, value))
    return Problem(key, message)


def _expected_names(context: Mapping[str, Any]) -> list[str]:
    return str(context.get("expected") or context.get("expected_tags") or "").replace(" or ", ", ").split(",")


def _name_rule(pattern: str) -> str:
    if pattern == NAME_PATTERN:
        return "allowed: letters, digits, `.`, `_` and `-`, beginning with a letter or digit, at most 100"
    return "allowed: small letters, digits, `_` and `-`, beginning with a letter or digit, at most 40"


def _hint(key: KeyPath, value: Any) -> str:
    """A word on the usual slip behind a wrong type."""
    if isinstance(value, str) and value.strip().lstrip("-").replace(".", "", 1).isdecimal():
        return "write the number without quotes"
    if key[-1:] == ("name",) and isinstance(value, int | float) and not isinstance(value, bool):
        return f'quote it to make it text: "{value}"'
    return ""


def _shown(value: Any) -> str:
    """`value` and what it is, short."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return f"a mapping with the keys {', '.join(map(str, list(value)[:5]))}" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_allowed_beside(key: KeyPath, data: Any) -> list[str]:
    """The keys of the section that `key` would belong to."""
    annotation: Any = Recipe
    value = data
    for part in key[:-1]:
        section = _section(annotation, value)
        if section is not None:
            annotation = section.model_fields[str(part)].annotation
        else:
            annotation = get_args(_without_none(annotation))[-1]  # of list[X] and dict[str, X]
        value = value[part]
    section = _section(annotation, value)
    return list(section.model_fields) if section is not None else []


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None` and of `Annotated[X, ...]`; other annotations as they are."""
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _without_none(members[0]) if len(members) == 1 else annotation
    return annotation


def _section(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The model that `annotation` stands for when the data is `value`; None for lists and mappings of models."""
    annotation = _without_none(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) not in (Union, types.UnionType):
        return None
    members = [_without_none(member) for member in get_args(annotation)]
    sections = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    for section in sections:
        kind = section.model_fields.get("kind")
        if kind is not None and isinstance(value, dict) and value.get("kind") in get_args(kind.annotation):
            return section
        if isinstance(value, dict) and any(name in value and name in section.model_fields for name in SOURCE_KINDS):
            return section
    return None
