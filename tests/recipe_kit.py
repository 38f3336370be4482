"""A small valid recipe as plain data, and ways to write it wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from posttrain.recipe.document import split_key

ROOT = Path(__file__).resolve().parent.parent
REMOVED = object()
"""As a value of `recipe_with`: take the key out."""

SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": {"family": "deepseek_v4", "config": "tiny"},
    "domains": {
        "sums": {
            "source": {"reasoning_gym": "chain_sum", "params": {"max_terms": 2}},
            "reward": ["exact"],
            "train": 100,
            "selection": 16,
            "holdout": 32,
            "max_new_tokens": 8,
        },
        "words": {"source": {"reasoning_gym": "spell_backward"}, "holdout": 32},
    },
    "stages": {
        "base": {"kind": "sft", "steps": 10, "optimizer": {"lr": 1e-3}},
        "experts": {"per_domain": [{"kind": "sft", "steps": 10}, {"kind": "grpo", "steps": 5}]},
        "student": {"kind": "opd", "steps": 10},
    },
    "evaluation": [{"holdout": {"n": 32}}],
}


def recipe_with(changes: dict[str, Any]) -> dict[str, Any]:
    """The small recipe with the values at dotted keys replaced, added or `REMOVED`."""
    data = copy.deepcopy(SMALL)
    for text, value in changes.items():
        *parents, last = split_key(text)
        parent: Any = data
        for part in parents:
            parent = parent[part] if isinstance(part, int) else parent.setdefault(part, {})
        if value is REMOVED:
            del parent[last]
        else:
            parent[last] = value
    return data


def write_recipe(path: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write the small recipe with `changes` to `path`."""
    path.write_text(yaml.safe_dump(recipe_with(changes or {}), sort_keys=False))
    return path


def files_below(directory: Path) -> set[str]:
    """The names of everything in `directory`."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
