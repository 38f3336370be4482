"""Judging as problems: a question, an answer or two, and the verdict that is right.

Made of another domain, a judging problem is where the question is: trained on, selected on or held out. Labelled
answers of a file are split by the hash of the question as other files are, so that no question is in two places.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from posttrain.data.problems import DomainData, Problem, make_problem, place, prompt_text, split_key
from posttrain.data.sources import SHOWN_ERRORS, parse_json
from posttrain.errors import BadInput
from posttrain.recipe.domains import DomainConfig
from posttrain.recipe.judging import FIELD, JudgingConfig

VERDICTS = {"single": ("yes", "no"), "pair": ("A", "B")}
"""What a judge can say; the first means that the answer meets the criterion, or that the first answer does better."""


def judging_problem(
    name: str,
    config: JudgingConfig,
    system: str | None,
    question: str,
    answers: Sequence[str],
    verdict: str,
    criterion: str | None = None,
) -> Problem:
    """One answer (or two) to be judged; `verdict` is the reference."""
    shown = ("answer",) if config.form == "single" else ("first", "second")
    fields = {
        "question": question,
        "criterion": criterion or config.criterion,
        **dict(zip(shown, answers, strict=True)),
    }
    text = FIELD.sub(lambda match: fields[match[1]], config.template)
    entry = {**fields, "pair": split_key([{"role": "user", "content": "\n".join((question, *sorted(answers)))}])}
    return make_problem(name, [{"role": "user", "content": text}], verdict, entry, system)


def from_domain(name: str, judging: JudgingConfig, config: DomainConfig, judged: DomainData) -> DomainData:
    """Judging problems of a domain's reference answers and of wrong ones made of them.

    Raises:
        BadInput: fewer problems than the judge domain selects on or holds out.
    """
    made = {
        split: list(islice(_of_problems(name, judging, config, getattr(judged, split)), getattr(config, split)))
        for split in ("train", "selection", "holdout")
    }
    for split in ("selection", "holdout"):
        if len(made[split]) < getattr(config, split):
            raise BadInput(
                f"domains.{name}.{split} asks for {getattr(config, split)} problems; the {split} problems of "
                f"domains.{judging.domain} make {len(made[split])}"
            )
    return DomainData(**made)


def _of_problems(
    name: str, judging: JudgingConfig, config: DomainConfig, problems: Iterable[Problem]
) -> Iterator[Problem]:
    for problem in problems:
        question, right = prompt_text(problem.messages), problem.answer
        wrong = near_miss(right, Random(f"{name}/{problem.id}"))
        cases = [([right, wrong], "A"), ([wrong, right], "B")]
        if judging.form == "single":
            cases = [([right], "yes"), ([wrong], "no")]
        for answers, verdict in cases:
            yield judging_problem(name, judging, config.system, question, answers, verdict)


def near_miss(answer: str, random: Random) -> str:
    """A wrong answer that is close: another number nearby, or another letter or digit in one place."""
    if answer.strip().lstrip("-").isdecimal():
        return str(int(answer) + random.choice((-10, -2, -1, 1, 2, 10)))
    places = [at for at, one in enumerate(answer) if one.isalnum()]
    if not places:
        return answer + random.choice(string.ascii_lowercase)
    at = random.choice(places)
    kinds = (string.digits, string.ascii_uppercase, string.ascii_lowercase)
    kind = next((kind for kind in kinds if answer[at] in kind), string.ascii_lowercase)
    return answer[:at] + random.choice([one for one in kind if one != answer[at]]) + answer[at + 1 :]


def read_labels(name: str, judging: JudgingConfig, config: DomainConfig, seed: int) -> DomainData:
    """Judging problems of a file of labelled answers.

    Raises:
        BadInput: bad rows, by file and line, or too few questions.
    """
    assert judging.labels is not None
    path = Path(judging.labels)
    if not path.is_file():
        raise BadInput(f"domains.{name}.source.judging.labels: there is no file {path}")
    by_question: dict[str, dict[str, Problem]] = {}
    errors: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            for problem in _of_row(name, judging, config, parse_json(line)) if line.strip() else ():
                known = by_question.setdefault(question_key(problem), {}).setdefault(problem.id, problem)
                if known.answer != problem.answer:
                    raise ValueError(f"the same answer was labelled {known.answer!r} before")
        except ValueError as error:
            errors.append(f"{path}:{number}: {error}")
            if len(errors) == SHOWN_ERRORS:
                break
    if errors:
        raise BadInput(f"domains.{name}.source.judging.labels has bad rows:\n  " + "\n  ".join(errors))
    return _split(name, config, {key: list(found.values()) for key, found in by_question.items()}, seed)


def _of_row(name: str, judging: JudgingConfig, config: DomainConfig, row: Any) -> list[Problem]:
    """The problems of a row. Raises ValueError with what is wrong."""
    if isinstance(row, ValueError):
        raise row
    answers = ("answer",) if judging.form == "single" else ("first", "second")
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is an object, not {type(row).__name__}")
    for key in ("question", *answers, *(["criterion"] if "criterion" in row else [])):
        if not isinstance(row.get(key), str) or not (row[key].strip() or key == "answer"):
            raise ValueError(f"`{key}` is text" + ("" if key in row else "; it is missing"))
    verdicts = VERDICTS[judging.form]
    if row.get("verdict") not in verdicts:
        raise ValueError(f"`verdict` is {' or '.join(verdicts)}, not {row.get('verdict')!r}")
    cases = [([row[key] for key in answers], row["verdict"])]
    if judging.form == "pair":
        cases.append((cases[0][0][::-1], verdicts[1 - verdicts.index(row["verdict"])]))
    return [
        judging_problem(name, judging, config.system, row["question"], shown, verdict, row.get("criterion"))
        for shown, verdict in cases
    ]


def question_key(problem: Problem) -> str:
    """By which a judging problem has its place."""
    return split_key([{"role": "user", "content": problem.entry["question"]}])


def _split(name: str, config: DomainConfig, by_question: Mapping[str, list[Problem]], seed: int) -> DomainData:
    """Whole questions in the order of their hashes: first those that are held out, then those that are selected on."""
    found: dict[str, list[Problem]] = {"holdout": [], "selection": [], "train": []}
    for _, problems in sorted(by_question.items(), key=lambda one: place("file: " + one[0])):
        for split, size in (("holdout", config.holdout), ("selection", config.selection), ("train", None)):
            if size is None or len(found[split]) < size:
                found[split] += problems
                break
    if not found["train"]:
        total = sum(map(len, by_question.values()))
        raise BadInput(
            f"domains.{name}: its labels make {total} problems; holdout {config.holdout} and selection "
            f"{config.selection} leave none to train on"
        )
    Random(f"{name}:{seed}").shuffle(found["train"])
    return DomainData(found["train"][: config.train], found["selection"], found["holdout"])
