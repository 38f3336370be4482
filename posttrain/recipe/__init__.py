"""Recipes: the schema, and reading them from YAML. Nothing here imports torch."""

from posttrain.recipe.load import load_recipe, read_recipe, resolved_yaml
from posttrain.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "read_recipe", "resolved_yaml"]
