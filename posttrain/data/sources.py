"""Where problems come from: reasoning-gym's generators, JSONL files, `datasets` data sets."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.problems import DomainData, Problem, Split, make_problem, split_key, split_of
from posttrain.data.template import fill_template
from posttrain.errors import BadInput

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

    from posttrain.recipe.domains import DatasetSource, DomainConfig, ReasoningGymSource

logger = logging.getLogger(__name__)

CHUNK = 2048
"""Problems for which one generator object is made."""
EVALUATION_START = 0
"""Where the stream of hold-out and selection problems begins: fixed, so that all seeds share them."""
SHOWN_ERRORS = 5
ROLES = ("system", "user", "assistant")


# reasoning-gym


def make_generator(task: str, params: Mapping[str, Any], size: int, seed: int) -> ProceduralDataset:
    """A reasoning-gym data set of `size` problems, problem i drawn from a stream of its own (`seed + i`).

    Raises:
        BadInput: an unknown task or a parameter that the task does not take.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        similar = difflib.get_close_matches(task, DATASETS, n=3) or sorted(DATASETS)
        raise BadInput(f"reasoning_gym has no task {task!r}; did you mean {', '.join(similar)}?")
    known = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    unknown = [key for key in params if key not in known]
    if unknown:
        raise BadInput(f"params: {task} takes no {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **params)
    except Exception as error:  # most check by `assert`; a value of a wrong type can fail in any way
        raise BadInput(f"params: {task} refuses {dict(params)}: {error}") from error


def generate(name: str, source: ReasoningGymSource, config: DomainConfig, seed: int) -> DomainData:
    """Generate a domain's problems.

    Hold-out and selection are the first of a fixed stream that belong there (so a larger hold-out begins with the
    smaller one's problems); training problems come from a stream of the run's seed.

    Raises:
        BadInput: see `make_generator` and `fill_template`; or fewer distinct problems than asked for.
    """
    try:
        evaluation = _collect(
            name, source, config.system, EVALUATION_START, {"holdout": config.holdout, "selection": config.selection}
        )
        # Streams of neighbouring seeds would share all but one problem: problem i is drawn from seed + i.
        start = 2**30 + int.from_bytes(hashlib.sha256(f"train:{seed}".encode()).digest()[:4]) % 2**30
        train = _collect(name, source, config.system, start, {"train": config.train})
    except BadInput as error:
        raise BadInput(f"domains.{name}.source: {error}") from error
    found = {**evaluation, **train}
    for split in ("train", "selection", "holdout"):
        asked = getattr(config, split)
        if len(found[split]) < asked:
            raise BadInput(
                f"domains.{name}.{split} asks for {asked} problems; reasoning_gym's {source.reasoning_gym} with these "
                f"params has only {len(found[split])} distinct ones there. Lower domains.{name}.{split} "
                f"or widen domains.{name}.source.params"
            )
    return DomainData(**found)


def _stream(source: ReasoningGymSource, start: int) -> Iterator[dict[str, Any]]:
    """Problems without end, made chunk by chunk."""
    while True:
        generator = make_generator(source.reasoning_gym, source.params, CHUNK, start)
        for index in range(CHUNK):
            try:
                entry = generator[index]
            except Exception as error:  # tasks do not check every combination of parameters when they are made
                raise BadInput(
                    f"params: {source.reasoning_gym} fails on {source.params}: {type(error).__name__}: {error}"
                ) from error
            yield entry
        start += CHUNK


def _collect(
    name: str, source: ReasoningGymSource, system: str | None, start: int, wanted: Mapping[Split, int]
) -> dict[Split, list[Problem]]:
    """Draw from the stream at `start` until every wanted split is full or nothing new comes any more."""
    found: dict[Split, list[Problem]] = {split: [] for split in wanted}
    seen: dict[str, tuple[str, str]] = {}
    without_news, began, warned = 0, time.monotonic(), False
    for entry in _stream(source, start):
        prompt = fill_template(source.prompt, entry)
        if prompt not in seen:
            seen[prompt] = (entry["question"], entry["answer"])
            without_news = 0
            split = split_of(split_key([{"role": "user", "content": prompt}]))
            if split in wanted and len(found[split]) < wanted[split]:
                found[split].append(_generated(name, source, system, prompt, entry))
        else:
            _check_unambiguous(source, prompt, entry, seen[prompt])
            without_news += 1
        # Of n equally likely problems, the last unseen one takes n draws on average.
        if without_news > 2000 + 4 * len(seen) or all(len(found[split]) >= wanted[split] for split in wanted):
            return found
        if not warned and time.monotonic() - began > 10:
            warned = True
            logger.warning(
                "domains.%s: %d problems in 10 s, reasoning_gym's %s is slow; fewer `train` problems start sooner",
                name, len(seen), source.reasoning_gym,
            )  # fmt: skip
    raise AssertionError("the stream has no end")


def _generated(
    name: str, source: ReasoningGymSource, system: str | None, prompt: str, entry: dict[str, Any]
) -> Problem:
    if not isinstance(entry["answer"], str):
        raise BadInput(f"{source.reasoning_gym} gives no reference answers, which fine-tuning needs")
    # The verifiers of some tasks read the parameters.
    entry = {**entry, "reasoning_gym": {"task": source.reasoning_gym, "params": source.params}}
    return make_problem(name, [{"role": "user", "content": prompt}], entry["answer"], entry, system)


def _check_unambiguous(source: ReasoningGymSource, prompt: str, entry: dict[str, Any], seen: tuple[str, str]) -> None:
    """A template that leaves out what the answer depends on shows by one prompt with two answers."""
    if entry["question"] != seen[0] and entry["answer"] != seen[1]:
        raise BadInput(
            f"prompt {source.prompt!r} leaves out what the answer depends on: {prompt!r} stands for problems with the "
            f"answers {seen[1]!r} and {entry['answer']!r}. Their questions: {seen[0]!r} and {entry['question']!r}"
        )


# Files and data sets


def read_jsonl(name: str, path: str, system: str | None) -> list[Problem]:
    """Read one problem a line; lines without text are skipped, equal lines are one problem.

    Raises:
        BadInput: no such file, or bad rows: the first five with their line and what is wrong.
    """
    if not Path(path).is_file():
        raise BadInput(f"domains.{name}.source: there is no file {path!r} (looked in {Path.cwd()})")
    rows = (
        (f"{path}:{number}", line)
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1)
        if line.strip()
    )
    return _read_rows(name, path, ((where, parse_json(line)) for where, line in rows), system)


def parse_json(line: bytes) -> Any:
    """The value of a line of JSON, or the error that it is."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: {error.reason} at byte {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


def read_dataset(name: str, source: DatasetSource, system: str | None) -> list[Problem]:
    """Read a `datasets` data set: a directory (saved by `save_to_disk`, or of data files) or a hub id.

    Raises:
        BadInput: nothing loadable there, a missing split or column, or bad rows.
    """
    dataset = _load_dataset(name, source)
    columns = dataset.column_names
    prompt_field = source.prompt_field if source.prompt_field in columns else "messages"
    for field, column in (("prompt_field", prompt_field), ("answer_field", source.answer_field)):
        if column not in columns:
            raise BadInput(
                f"domains.{name}.source.{field}: {source.dataset!r} has no column {getattr(source, field)!r}; "
                f"it has {', '.join(columns)}"
            )

    def rows() -> Iterator[tuple[str, Any]]:
        for index, row in enumerate(dataset):
            prompt = row.pop(prompt_field)
            named = {
                "messages" if isinstance(prompt, list) else "prompt": prompt,
                "answer": row.pop(source.answer_field),
            }
            others = {key: value for key, value in row.items() if key not in ("prompt", "messages", "answer")}
            yield f"{source.dataset}[{index}]", {**others, **named}

    return _read_rows(name, source.dataset, rows(), system)


def _load_dataset(name: str, source: DatasetSource) -> Any:
    import datasets

    where = f"domains.{name}.source: the data set {source.dataset!r}"
    directory = Path(source.dataset)
    try:
        if (directory / "dataset_dict.json").exists() or (directory / "state.json").exists():
            loaded = datasets.load_from_disk(str(directory))
        else:
            loaded = datasets.load_dataset(source.dataset, source.subset)
    except Exception as error:  # the library raises a different one for every format and transport
        raise BadInput(f"{where} could not be loaded: {type(error).__name__}: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if source.split not in loaded:
        raise BadInput(f"{where} has no split {source.split!r}; it has {', '.join(loaded)}")
    return loaded[source.split]


def _read_rows(name: str, origin: str, rows: Iterable[tuple[str, Any]], system: str | None) -> list[Problem]:
    problems: dict[str, Problem] = {}
    places: dict[str, str] = {}
    errors: list[str] = []
    for where, row in rows:
        try:
            messages, answer = parse_row(row)
            problem = make_problem(name, messages, answer, row, system)
            known = problems.setdefault(problem.id, problem)
            if known.answer != answer:
                raise ValueError(
                    f"the prompt of {places[problem.id]} with another answer: {answer!r} instead of {known.answer!r}"
                )
            places.setdefault(problem.id, where)
        except ValueError as error:
            errors.append(f"{where}: {error}")
            if len(errors) == SHOWN_ERRORS:
                break
    if errors:
        more = ["(later rows were not checked)"] if len(errors) == SHOWN_ERRORS else []
        raise BadInput(f"domains.{name}.source has bad rows:\n  " + "\n  ".join(errors + more))
    if not problems:
        raise BadInput(f"domains.{name}.source: {origin!r} holds no problems")
    return list(problems.values())


def parse_row(row: Any) -> tuple[list[dict[str, Any]], str]:
    """The messages and the answer of a row. Raises ValueError with what is wrong."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object with `prompt` and `answer`, not {type(row).__name__}")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("a row has either `prompt` or `messages`" + (", not both" if "prompt" in row else ""))
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` is a list of at least one message")
    for index, message in enumerate(messages):
        what = "`prompt`" if "prompt" in row else f"messages[{index}].content"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"messages[{index}] is an object whose `role` is one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{what} is text, not {type(message.get('content')).__name__}")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("the prompt ends with a user message that is not empty")
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError("`answer` is text or a number" + ("; it is missing" if answer is None else ""))
    if not str(answer).strip():
        raise ValueError("`answer` is empty")
    return messages, str(answer)
