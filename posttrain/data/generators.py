"""Problems that are drawn without end: by our own generators, and by functions that a recipe names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from random import Random
from typing import TYPE_CHECKING

from posttrain.data.problems import DomainData, Problem, Split, make_problem, split_key, split_of
from posttrain.data.sources import parse_row
from posttrain.errors import BadInput
from posttrain.imports import import_function

if TYPE_CHECKING:
    from posttrain.recipe.domains import GeneratorSource


def draw_apart(
    name: str, kind: str, draw: Callable[[Random], Problem], sizes: Mapping[Split, int], seed: int
) -> DomainData:
    """A domain's problems, none in two places: as `posttrain.data.sources.generate` does for reasoning-gym.

    Hold-out and selection are the same for every seed.

    Args:
        kind: of problems; random numbers depend on it, the seed and nothing else.
        sizes: How many problems for `train`, `selection` and `holdout`.

    Raises:
        BadInput: fewer different problems than asked for.
    """
    found: dict[Split, list[Problem]] = {"train": [], "selection": [], "holdout": []}
    seen: set[str] = set()
    streams: dict[str, tuple[Split, ...]] = {"evaluation": ("selection", "holdout"), f"train/{seed}": ("train",)}
    for stream_seed, splits in streams.items():
        random, without_news = Random(hashlib.sha256(f"{kind}/{stream_seed}".encode()).digest()), 0
        while any(len(found[split]) < sizes[split] for split in splits):
            problem = draw(random)
            split = split_of(split_key(problem.messages))
            without_news += 1
            if split in splits and len(found[split]) < sizes[split] and problem.id not in seen:
                seen.add(problem.id)
                found[split].append(problem)
                without_news = 0
            if without_news > 2000 + 40 * len(seen):  # of n problems, the last unseen one takes n draws on average
                counts = ", ".join(f"{len(found[one])} of {sizes[one]} for {one}" for one in splits)
                raise BadInput(f"domains.{name}: there are too few different {kind}: {counts}")
    return DomainData(**found)


def generate_rows(
    name: str, sizes: Mapping[Split, int], seed: int, source: GeneratorSource, system: str | None
) -> DomainData:
    """A domain's problems from the function that its source names.

    Raises:
        BadInput: a function that cannot be imported, fails, or returns no row; too few different problems.
    """
    where = f"domains.{name}.source.generator"
    function = import_function(source.generator, where)

    def draw(random: Random) -> Problem:
        try:
            row = function(random, **source.params)
            messages, answer = parse_row(row)
        except Exception as error:  # the user's function may fail in any way
            raise BadInput(f"{where}: {source.generator} fails: {type(error).__name__}: {error}") from error
        return make_problem(name, messages, answer, row, system)

    return draw_apart(name, f"problems of {source.generator}", draw, sizes, seed)
