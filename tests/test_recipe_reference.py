"""docs/recipe.md is what the models say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from pydantic import Field

from posttrain.recipe.section import Section

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "recipe_reference.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Inner(Section):
    depth: int = Field(3, ge=1, lt=9)
    """How deep."""


class Outer(Section):
    """An example."""

    kind: Literal["a", "b"] | None = None
    inner: Inner
    rates: dict[str, float] = Field(default_factory=dict)


def test_the_page_is_current(script: ModuleType) -> None:
    assert script.PAGE.read_text() == script.reference(), "run `python scripts/recipe_reference.py`"


def test_a_model_becomes_a_table(script: ModuleType) -> None:
    assert script.section(Inner).splitlines()[-1] == "| `depth` | whole number ≥ 1, < 9 | `3` | How deep. |"
    assert "An example." in script.section(Outer)
    assert "| `kind` | `a`, `b` |  |  |" in script.section(Outer)
    assert "| `inner` | [Inner](#inner) | required |  |" in script.section(Outer)
    assert [model.__name__ for model in script.models(Outer)] == ["Outer", "Inner"]
