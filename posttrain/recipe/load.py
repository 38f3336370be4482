"""Reading recipes: from the user's file, checked in full, or from a run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from posttrain.recipe.checks import check_names
from posttrain.recipe.document import Document, RecipeDumper, read_document
from posttrain.recipe.problems import problems_of, refuse
from posttrain.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read and check a recipe, and whether everything that it names is there.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, the value in YAML, applied in order.
        seed: replaces the recipe's.

    Returns:
        The recipe with its paths made absolute.

    Raises:
        BadInput: for anything wrong; the message names the file, line and key, and what is allowed.
    """
    document = read_document(Path(path))
    for assignment in overrides:
        document.override(assignment)
    if seed is not None:
        document.override(f"seed={seed}", f"--seed {seed}")
    recipe = _validate(document)
    checked = check_names(recipe, document)
    if checked.problems:
        refuse(document, checked.problems)
    for key, value in checked.paths.items():
        document.value(key[:-1])[key[-1]] = value
    return _validate(document)


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe and check it against the schema only: what it names may have moved on since the run began.

    Raises:
        BadInput: for anything that does not fit the schema.
    """
    return _validate(read_document(Path(path)))


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe with every default written out, as YAML that reads back as the same recipe."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, width=100, allow_unicode=True
    )


def _validate(document: Document) -> Recipe:
    # As JSON and strict: a list may stand for a tuple, but "3" is no number and `true` is not 1.
    try:
        return Recipe.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        refuse(document, problems_of(error, document.data))
