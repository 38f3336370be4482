"""Rewards put together: a weighted sum whose every part is kept."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput, RunFailed
from posttrain.imports import import_function
from rewards import functions
from rewards.batches import complaint_about, is_batched, reasoning_options
from rewards.options import check_parameters
from rewards.rubric import ActorJudge, Ask

if TYPE_CHECKING:
    from posttrain.data.problems import Problem

JUDGES = ("exact", "verifier", "numeric", "math_verify", "json_equal", "code", "rubric")
"""Rewards that say whether an answer is right: one of them, or a function of the user's, comes first."""
SHAPERS = ("format", "json_format", "language", "length", "effort_length")
"""Rewards that shape an answer whoever is right."""

RewardFunction = Callable[..., float]
Spec = str | Mapping[str, Mapping[str, Any]]
"""`exact`, or `{length: {weight: 0.1, target: 20, limit: 40}}`."""


def known_rewards() -> list[str]:
    """The names that a recipe can use besides `package.module:function`."""
    return [*JUDGES, *SHAPERS]


@dataclass(frozen=True)
class RewardResult:
    """The score of one answer."""

    problem_id: str
    total: float
    """The weighted sum of the parts; 0 if a reward failed."""
    parts: dict[str, float] = field(default_factory=dict)
    """What each reward said, before its weight."""
    correct: bool = False
    """Whether the answer counts for pass@1: the first reward gave exactly 1."""
    error: str | None = None
    """Which reward failed and how. Such a sample says nothing of the model."""


@dataclass(frozen=True)
class Answer:
    """What is to be scored."""

    problem: Problem
    text: str
    """Without its end token."""
    token_ids: Sequence[int]
    """As sampled, with the end token if there was one."""
    finish_reason: str
    """`stop` or `length`."""
    reasoning_tokens: int | None = None
    """In modes that think: how many of the tokens are reasoning, which the text is without."""


@dataclass(frozen=True)
class Part:
    """One reward of a sum."""

    name: str
    function: RewardFunction
    parameters: dict[str, Any]
    weight: float

    @property
    def awaits_actor(self) -> bool:
        """Whether the model is the judge, and there is none yet."""
        judge = self.parameters.get("judge")
        return isinstance(judge, ActorJudge) and judge.ask is None


@dataclass(frozen=True)
class Scorer:
    """A weighted sum of rewards; the first one decides what is correct."""

    parts: tuple[Part, ...]

    def score(self, problem: Problem, text: str, token_ids: Sequence[int], finish_reason: str) -> RewardResult:
        """Score one answer; see `score_batch`."""
        return self.score_batch([Answer(problem, text, token_ids, finish_reason)])[0]

    def score_batch(self, answers: Sequence[Answer]) -> list[RewardResult]:
        """Score answers, of one problem or of many. Programs run side by side, a judge sees all answers at once.

        A reward that raises or returns no finite number marks the sample, never the run; later rewards do not see
        that answer. One that takes lists and returns a list of the wrong length marks all that it was given.

        Raises:
            RunFailed: the engines that a judge asks cannot answer any more.
        """
        values: list[dict[str, float]] = [{} for _ in answers]
        errors: list[str | None] = [None for _ in answers]
        for part in self.parts:
            asked = [index for index, error in enumerate(errors) if error is None]
            for index, value in zip(asked, _values(part, [answers[index] for index in asked]), strict=True):
                if isinstance(value, str):
                    errors[index] = f"{part.name}: {value}"
                else:
                    values[index][part.name] = value
        return [self._sum(*scored) for scored in zip(answers, values, errors, strict=True)]

    def _sum(self, answer: Answer, values: dict[str, float], error: str | None) -> RewardResult:
        if error is not None:
            return RewardResult(answer.problem.id, 0.0, values, error=error)
        total = sum(part.weight * values[part.name] for part in self.parts)
        # Not "nearly 1", nor "at least 1": reasoning-gym's partial credit for nine right letters out of nine and one
        # too many is nine ninths, 1.0000000000000002. Its right answers get a literal 1.
        return RewardResult(answer.problem.id, total, values, correct=values[self.parts[0].name] == 1.0)

    def without_actor(self) -> Scorer:
        """The parts that can be computed before there is a model to judge."""
        return Scorer(tuple(part for part in self.parts if not part.awaits_actor))

    def unfit(self, problems: Iterable[Problem]) -> dict[str, str]:
        """Problems whose answers cannot be judged: by id, which reward cannot and why."""
        found: dict[str, str] = {}
        for problem in problems:
            for part in self.parts:
                complaint = complaint_about(part.function, problem, part.parameters)
                if complaint is not None:
                    found.setdefault(problem.id, f"{part.name}: {complaint}")
        return found


def _values(part: Part, answers: Sequence[Answer]) -> list[float | str]:
    """What a reward says of each answer, or what went wrong."""
    if not is_batched(part.function):
        return [_one_value(part, answer) for answer in answers]
    if not answers:
        return []
    try:
        given: Any = part.function(
            [one.problem for one in answers],
            [one.text for one in answers],
            [one.token_ids for one in answers],
            [one.finish_reason for one in answers],
            **part.parameters,
        )
        if len(given) != len(answers):
            return [f"returned {len(given)} rewards for {len(answers)} answers"] * len(answers)
        return [_number_or_complaint(value) for value in given]
    except RunFailed:  # the engines that a judge asks are gone: that says nothing of the answers
        raise
    except Exception as error:
        return [_words(error)] * len(answers)


def _one_value(part: Part, answer: Answer) -> float | str:
    options = {**part.parameters, **reasoning_options(part.function, answer.reasoning_tokens)}
    try:
        value = part.function(answer.problem, answer.text, answer.token_ids, answer.finish_reason, **options)
    except Exception as error:
        return _words(error)
    return _number_or_complaint(value)


def _number_or_complaint(value: Any) -> float | str:
    if isinstance(value, Exception):
        return _words(value)
    try:
        if hasattr(value, "__len__") and getattr(value, "shape", None) != ():
            return f"returned a {type(value).__name__} of length {len(value)}, not one number"
        number = float(value)
    except Exception as error:
        return _words(error)
    return number if math.isfinite(number) else f"returned {number}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def build(specs: Sequence[Spec], where: str = "reward", actor: Ask | None = None) -> Scorer:
    """Put the rewards of a recipe together.

    Args:
        specs: a name, or `{name: {weight: ..., parameter: ...}}`. A name with a colon is a function of the user's,
            `package.module:function`; it is imported.
        where: the recipe's key, for error messages.
        actor: asks the model itself for grades, for rubrics that it judges.

    Raises:
        BadInput: an unknown reward or parameter, a function that cannot be imported, or a first reward that does
            not judge answers.
    """
    parts = [_build_part(spec, f"{where}[{index}]", actor) for index, spec in enumerate(specs)]
    if not parts:
        raise BadInput(f"{where}: give at least one of {', '.join(known_rewards())}")
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{where}: {name} is there {names.count(name)} times")
    if names[0] in SHAPERS:
        raise BadInput(f"{where}: {names[0]} cannot be first; the first reward decides what is correct ({_judges()})")
    return Scorer(tuple(parts))


def check(scorer: Scorer, problem: Problem, where: str = "reward") -> None:
    """Try the rewards on a problem's reference answer: it must count as correct, and nothing else may.

    Of what the model itself is to judge, only whether it can be judged.

    Raises:
        BadInput: a reward fails on it, or calls the reference wrong or an empty answer right.
    """
    for complaint in scorer.unfit([problem]).values() if any(part.awaits_actor for part in scorer.parts) else ():
        raise BadInput(f"{where} cannot judge answers to {problem.id}: {complaint}")
    if scorer.parts[0].awaits_actor:
        return
    scorer = scorer.without_actor()
    good = scorer.score(problem, problem.answer, [], "stop")
    if good.error:
        raise BadInput(f"{where} fails on the reference answer {problem.answer!r} of {problem.id}: {good.error}")
    if not good.correct:
        raise BadInput(
            f"{where}: {scorer.parts[0].name} gives the reference answer {problem.answer!r} of {problem.id} "
            f"{good.parts[scorer.parts[0].name]}, not 1: no answer could count as correct"
        )
    if scorer.score(problem, "", [], "stop").correct:
        raise BadInput(f"{where}: {scorer.parts[0].name} calls an empty answer to {problem.id} correct")


def _judges() -> str:
    return f"{', '.join(JUDGES)} or package.module:function"


def _build_part(spec: Spec, where: str, actor: Ask | None) -> Part:
    if isinstance(spec, str):
        name, options = spec, {}
    elif isinstance(spec, Mapping) and len(spec) == 1:
        name, given = next(iter(spec.items()))
        if not isinstance(given, Mapping):
            raise BadInput(f"{where}: the options of {name} are `key: value` pairs, not {given!r}")
        options = dict(given)
    else:
        raise BadInput(f"{where}: a reward is a name or {{name: {{options}}}}, not {spec!r}")
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        raise BadInput(f"{where}: the weight of {name} is a number of at least 0, not {weight!r}")
    function = import_function(name, where) if ":" in name else _known_function(name, where)
    if name == "rubric" and "judge" in options:
        options["judge"] = _judge(options["judge"], where, actor)
    check_parameters(name, function, options, where)
    return Part(name, function, options, float(weight))


def _judge(judge: Any, where: str, actor: Ask | None) -> Any:
    """The judge that a recipe names; what is none is left for the check of the options."""
    if isinstance(judge, str):
        return import_function(judge, where)
    if not isinstance(judge, Mapping) or not isinstance(judge.get("actor"), str) or {*judge} - {"actor", "votes"}:
        return judge
    votes = judge.get("votes", 1)
    if isinstance(votes, bool) or not isinstance(votes, int) or votes < 1:
        raise BadInput(f"{where}: the votes of a judge are a whole number of at least 1, not {votes!r}")
    return ActorJudge(judge["actor"], votes, actor)


def _known_function(name: str, where: str) -> RewardFunction:
    if name not in known_rewards():
        similar = difflib.get_close_matches(name, known_rewards(), n=1)
        hint = f" (did you mean {similar[0]}?)" if similar else ""
        raise BadInput(
            f"{where}: there is no reward {name!r}{hint}; there are {', '.join(known_rewards())} and "
            "package.module:function"
        )
    return getattr(functions, name)
