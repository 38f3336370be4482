"""Problems and their three places: training, selection (choosing checkpoints), hold-out (reported accuracy).

A problem is known by the text of its prompt. No normalised prompt text (Unicode form, case and spacing aside) is
ever in two places, within a domain or across the domains of a recipe; and which problems are held out or selected
on does not depend on the run's seed, so that runs with different seeds are comparable.

- Generated problems: the hash of the normalised text alone decides the place, whatever the seed, the sizes and the
  other domains. A checkpoint of another run can not have been trained on a held-out problem.
- Files and data sets: ordered by that hash, the first `holdout` texts are held out, the next `selection` are selected
  on, the rest (at most `train`, shuffled by the seed) are trained on.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import BadInput

if TYPE_CHECKING:
    from posttrain.data.v4 import Mode
    from posttrain.recipe.domains import DomainConfig, Effort
    from posttrain.recipe.schema import Recipe

Split = Literal["train", "selection", "holdout"]

HOLDOUT_SHARE = 1 / 8
"""Share of all texts that a generated domain can never train on but reports accuracy with."""
SELECTION_SHARE = 1 / 16


@dataclass(frozen=True)
class Problem:
    """A question with one reference answer."""

    id: str
    """`<domain>/<hash of the prompt>`: the same in every run and process."""
    domain: str
    messages: tuple[dict[str, Any], ...]
    """The prompt: `{"role": ..., "content": ...}`, the last one the user's."""
    answer: str
    entry: dict[str, Any]
    """What the source says of the problem; what the `verifier` reward reads, for generated problems."""
    effort: Effort | None = None
    """The recipe's mode that it is asked in; see `posttrain.data.efforts`."""
    mode: Mode = "chat"
    """How that is written in V4's layout."""
    reasoning: str = ""
    """What SFT shows before the answer, in modes that think."""


@dataclass
class DomainData:
    """A domain's problems. The three lists share no prompt."""

    train: list[Problem]
    selection: list[Problem]
    holdout: list[Problem]


def prompt_text(messages: Iterable[Mapping[str, Any]]) -> str:
    """What a problem is known by. Without the system text, which domains may put in front of the same question."""
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def split_key(messages: Iterable[Mapping[str, Any]]) -> str:
    """The normalised prompt text: prompts with equal keys are never in two places."""
    return " ".join(unicodedata.normalize("NFKC", prompt_text(messages)).casefold().split())


def place(key: str) -> float:
    """A number in [0, 1), uniform and fixed for a split key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48


def split_of(key: str) -> Split:
    """The place of a generated problem."""
    position = place(key)
    if position < HOLDOUT_SHARE:
        return "holdout"
    return "selection" if position < HOLDOUT_SHARE + SELECTION_SHARE else "train"


def make_problem(
    domain: str, messages: Sequence[dict[str, Any]], answer: str, entry: dict[str, Any], system: str | None
) -> Problem:
    """A problem with its identity; `system` goes first unless the messages bring a system text of their own."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Problem(f"{domain}/{digest[:16]}", domain, tuple(messages), answer, entry)


def load_domain(
    name: str, config: DomainConfig, seed: int, others: Mapping[str, DomainData] | None = None
) -> DomainData:
    """Read or generate a domain's problems and split them. 20,000 generated ones take one or two seconds.

    Args:
        seed: the run's. It draws (or shuffles) the training problems and touches nothing else.
        others: the domains whose answers are judged, for a domain that judges them.

    Raises:
        BadInput: a task, parameter, template, file or row that is wrong, or too few distinct problems.
    """
    from posttrain.data import sources
    from posttrain.data.calculations import generate_calculations
    from posttrain.data.generators import generate_rows
    from posttrain.recipe.domains import (
        CalculationsSource,
        GeneratorSource,
        JsonlSource,
        JudgingSource,
        ReasoningGymSource,
    )

    source = config.source
    if isinstance(source, ReasoningGymSource):
        return sources.generate(name, source, config, seed)
    sizes: dict[Split, int] = {"train": config.train, "selection": config.selection, "holdout": config.holdout}
    if isinstance(source, GeneratorSource):
        return generate_rows(name, sizes, seed, source, config.system)
    if isinstance(source, CalculationsSource):
        kind = source.calculations
        return generate_calculations(name, sizes, seed, kind.min_digits, kind.max_digits, config.system, kind.shapes)
    if isinstance(source, JudgingSource):
        from posttrain.data.judging import from_domain, read_labels

        if source.judging.domain is None:
            return read_labels(name, source.judging, config, seed)
        return from_domain(name, source.judging, config, (others or {})[source.judging.domain])
    if isinstance(source, JsonlSource):
        problems = sources.read_jsonl(name, source.jsonl, config.system)
        held_out = sources.read_jsonl(name, source.holdout_jsonl, config.system) if source.holdout_jsonl else None
    else:
        problems, held_out = sources.read_dataset(name, source, config.system), None
    return split_finite(name, problems, held_out, config, seed)


def split_finite(
    name: str, problems: list[Problem], held_out: list[Problem] | None, config: DomainConfig, seed: int
) -> DomainData:
    """Split what a file holds by the order of the texts' hashes; `held_out` are problems of a file of their own.

    Raises:
        BadInput: too few problems for the hold-out and the selection.
    """
    ranked = _by_place(problems)
    if held_out is None:
        holdout, ranked = _take(ranked, config.holdout)
    else:
        holdout, _ = _take(_by_place(held_out), config.holdout)
        keys = {split_key(problem.messages) for problem in held_out}
        ranked = [problem for problem in ranked if split_key(problem.messages) not in keys]
    selection, train = _take(ranked, config.selection)
    if len(holdout) < config.holdout and held_out is not None:
        raise BadInput(
            f"domains.{name}.holdout asks for {config.holdout} problems; "
            f"source.holdout_jsonl has {len(holdout)} distinct ones"
        )
    if len(holdout) < config.holdout or len(selection) < config.selection or not train:
        raise BadInput(
            f"domains.{name} has {len(problems)} distinct problems: holdout {config.holdout} and selection "
            f"{config.selection} leave none to train on. Lower domains.{name}.holdout and .selection "
            "(and evaluation's holdout.n) or bring more problems"
        )
    Random(f"{name}:{seed}").shuffle(train)
    return DomainData(train[: config.train], selection, holdout)


def _by_place(problems: list[Problem]) -> list[Problem]:
    # Another hash than the generators': a file of problems that they hold out should not come first as a whole.
    return sorted(problems, key=lambda problem: (place("file: " + split_key(problem.messages)), problem.id))


def _take(ranked: list[Problem], count: int) -> tuple[list[Problem], list[Problem]]:
    """The first `count` and the rest, less what shares a key with the last one taken."""
    taken, rest = ranked[:count], ranked[count:]
    last = split_key(taken[-1].messages) if taken else None
    return taken, [problem for problem in rest if split_key(problem.messages) != last]


def _key_of(config: DomainConfig) -> Callable[[Problem], str]:
    """What places a domain's problems: their prompts, or of judging problems the questions whose answers are judged."""
    if config.judging is not None:
        from posttrain.data.judging import question_key

        return question_key
    return lambda problem: split_key(problem.messages)


def load_domains(recipe: Recipe) -> dict[str, DomainData]:
    """The problems of every domain of a recipe; none is trained on that any domain selects on or holds out.

    Raises:
        BadInput: see `load_domain`.
    """
    found: dict[str, DomainData] = {}
    for name, config in sorted(recipe.domains.items(), key=lambda item: item[1].judging is not None):
        found[name] = load_domain(name, config, recipe.seed, found)
    domains = {name: found[name] for name in recipe.domains}
    if len(domains) == 1:
        return domains
    key = {name: _key_of(config) for name, config in recipe.domains.items()}
    reserved = {key[name](problem) for name, data in domains.items() for problem in (*data.selection, *data.holdout)}
    held_out = {key[name](problem) for name, data in domains.items() for problem in data.holdout}
    for name, data in domains.items():
        data.train = [problem for problem in data.train if key[name](problem) not in reserved]
        data.selection = [problem for problem in data.selection if key[name](problem) not in held_out]
        if not data.train or not data.selection:
            raise BadInput(f"domains.{name}: all its problems are among those that other domains hold out")
    return domains
