"""What the schema cannot know: whether what a recipe names is there. Paths, tasks, rewards, presets, checkpoints.

Each check imports what it needs when it runs. None imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import BadInput
from posttrain.imports import import_function
from posttrain.recipe.conversations import EnvironmentConfig
from posttrain.recipe.document import Document, KeyPath, split_key
from posttrain.recipe.domains import DatasetSource, DomainConfig, GeneratorSource, JsonlSource, ReasoningGymSource
from posttrain.recipe.problems import Problem, choices, did_you_mean
from posttrain.recipe.schema import Recipe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Checked:
    """What the checks found."""

    problems: list[Problem] = field(default_factory=list)
    paths: dict[KeyPath, str] = field(default_factory=dict)
    """Keys that name a file or directory, made absolute: the run's recipe must mean the same from anywhere."""


def check_names(recipe: Recipe, document: Document) -> Checked:
    """Check everything that `recipe` names.

    Relative paths start at the recipe file, those of `--set` at the working directory.
    """
    checked = Checked()
    for key, found in _model(recipe, document):
        _add(checked, key, found)
    for key, found in _teachers(recipe, document):
        _add(checked, key, found)
    for name, domain in recipe.domains.items():
        key = ("domains", name, "source")
        if isinstance(domain.source, ReasoningGymSource):
            checked.problems += _reasoning_gym(key, domain.source)
        elif isinstance(domain.source, GeneratorSource):
            checked.problems += _generator((*key, "generator"), domain.source.generator)
        elif isinstance(domain.source, JsonlSource):
            for field_name in ("jsonl", "holdout_jsonl"):
                value = getattr(domain.source, field_name)
                if value is not None:
                    _add(checked, (*key, field_name), _file(value, _base(document, (*key, field_name))))
        elif isinstance(domain.source, DatasetSource):
            _add(checked, (*key, "dataset"), _dataset(domain.source.dataset, _base(document, (*key, "dataset"))))
        elif domain.judging is not None and domain.judging.labels is not None:
            labels = (*key, "judging", "labels")
            _add(checked, labels, _file(domain.judging.labels, _base(document, labels)))
        checked.problems += _rewards(("domains", name, "reward"), domain.reward) or _modes(("domains", name), domain)
        if domain.environment is not None:
            checked.problems += _environment(("domains", name, "environment"), domain.environment)
    for stage_key, stage in recipe.sft_stages().items():
        if stage.conversations is not None:
            key = (*split_key(stage_key), "conversations", "jsonl")
            _add(checked, key, _file(stage.conversations.jsonl, _base(document, key)))
    for index, hook in enumerate(recipe.evaluation):
        if hook.lm_eval is not None and hook.lm_eval.include is not None:
            include: KeyPath = ("evaluation", index, "lm_eval", "include")
            _add(checked, include, _directory(hook.lm_eval.include, _base(document, include)))
    checked.problems += _lora_targets(recipe)
    return checked


def _add(checked: Checked, key: KeyPath, found: str | Path | None) -> None:
    """Note a path, or what is wrong with it; a name that is no path (None) stays as it is."""
    if isinstance(found, Path):
        checked.paths[key] = str(found)
    elif found:
        message, _, allowed = found.partition("\n")
        checked.problems.append(Problem(key, message, allowed))


def _base(document: Document, key: KeyPath) -> Path:
    return Path() if document.place(key).startswith("--") else document.path.parent


def _resolve(value: str, base: Path) -> Path:
    return (base / Path(value).expanduser()).resolve()


def _is_path(value: str, base: Path) -> bool:
    """Whether `value` means a place on disk and not `owner/name` on a hub."""
    return value.startswith((".", "/", "~")) or value.count("/") > 1 or _resolve(value, base).exists()


def _file(value: str, base: Path) -> str | Path:
    path = _resolve(value, base)
    if path.is_dir():
        return f"{path} is a directory; name a file"
    if not path.is_file():
        return f"there is no file {path}"
    return path if path.stat().st_size else f"the file {path} is empty"


def _directory(value: str, base: Path) -> str | Path:
    path = _resolve(value, base)
    return path if path.is_dir() else f"there is no directory {path}"


def _dataset(value: str, base: Path) -> str | Path | None:
    if not _is_path(value, base):
        return None if _HUB_ID.fullmatch(value) else f"{value!r} is neither a path nor a hub id (owner/name)"
    path = _resolve(value, base)
    return path if path.is_dir() else f"there is no directory {path}"


def _model(recipe: Recipe, document: Document) -> Iterator[tuple[KeyPath, str | Path | None]]:
    model = recipe.model
    if isinstance(model.config, str):
        from posttrain.models.deepseek_v4.presets import PRESETS

        if model.config not in PRESETS:
            near = did_you_mean(model.config, PRESETS)
            yield ("model", "config"), f"no preset {model.config!r}{near}\n{choices(PRESETS, 'presets')}"
    for name, files in (("checkpoint", ("config.json",)), ("tokenizer", TOKENIZER_FILES)):
        value = getattr(model, name)
        if value is not None:
            key: KeyPath = ("model", name)
            yield key, _model_files(value, _base(document, key), files)


def _lora_targets(recipe: Recipe) -> Iterator[Problem]:
    """The targets of LoRA are ones of our own model; those of another's are known when it is loaded."""
    from posttrain.models.deepseek_v4.presets import LORA_TARGETS

    for key, stage in recipe.stages_by_key().items():
        targets = stage.lora.targets if stage.lora is not None and recipe.model.family == "deepseek_v4" else None
        for index, name in enumerate(targets or []):
            if name not in LORA_TARGETS:
                where = (*split_key(f"stages.{key}.lora.targets"), index)
                found = f"no target {name!r}{did_you_mean(name, LORA_TARGETS)}"
                yield Problem(where, found, choices(LORA_TARGETS, "targets"))


def _teachers(recipe: Recipe, document: Document) -> Iterator[tuple[KeyPath, str | Path | None]]:
    """Teachers from elsewhere that are directories; what is behind a URL is seen when it is fetched."""
    student = recipe.stages.student
    for domain, teachers in student.teachers.items() if student else ():
        for index, teacher in enumerate(teachers):
            if teacher.checkpoint is not None and "://" not in teacher.checkpoint:
                key: KeyPath = ("stages", "student", "teachers", domain, index, "checkpoint")
                path = _resolve(teacher.checkpoint, _base(document, key))
                if not path.is_dir():
                    yield key, f"there is no directory {path}"
                else:
                    yield key, path if (path / "config.json").is_file() else f"{path} has no config.json"


def _model_files(value: str, base: Path, files: tuple[str, ...]) -> str | Path | None:
    """A directory with one of `files`, or a hub id that has the first of them."""
    path = _resolve(value, base)
    if _is_path(value, base):
        if not path.is_dir():
            return f"{path} is a file; name its directory" if path.exists() else f"there is no directory {path}"
        if not any((path / file).is_file() for file in files):
            return f"{path} has no {' or '.join(files)}\n{_contents(path)}"
        return path
    if not _HUB_ID.fullmatch(value):
        return f"{value!r} is neither a path nor a hub id (owner/name)"
    return _hub_problem(value, "config.json")


def _contents(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return choices(names, "the directory holds") if names else "the directory is empty"


def _hub_problem(model: str, file: str) -> str | None:
    """None when `file` of the hub's `model` is in the local cache, or the hub has it (asked once, without retries)."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, file), str):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(model, file))
    except Exception as error:  # every kind of refusal and of network trouble has a class of its own
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 160 else reason[:157] + "..."
        return f"{model!r} is no directory here, and the hub does not give it: {type(error).__name__}: {reason}"
    return None


def _reasoning_gym(key: KeyPath, source: ReasoningGymSource) -> list[Problem]:
    """The task exists, takes these parameters, and its problems fit the prompt template: one is made to see."""
    from reasoning_gym.factory import DATASETS

    from posttrain.data.sources import make_generator
    from posttrain.data.template import fill_template

    task = source.reasoning_gym
    if task not in DATASETS:
        allowed = choices(sorted(DATASETS), "tasks")
        return [Problem((*key, "reasoning_gym"), f"no task {task!r}{did_you_mean(task, DATASETS)}", allowed)]
    try:
        entry = make_generator(task, source.params, 1, 0)[0]
    except BadInput as error:
        return [_params_problem((*key, "params"), task, source.params, str(error).removeprefix("params: "))]
    try:
        fill_template(source.prompt, entry)
    except BadInput as error:
        return [Problem((*key, "prompt"), str(error))]
    return []


def _generator(key: KeyPath, name: str) -> list[Problem]:
    """The function can be imported."""
    try:
        import_function(name, "")
    except BadInput as error:
        return [Problem(key, str(error).removeprefix(": "))]
    return []


def _params_problem(key: KeyPath, task: str, params: dict[str, Any], message: str) -> Problem:
    """The complaint, at the parameter that it is about where that can be told."""
    from dataclasses import fields

    from reasoning_gym.factory import DATASETS

    known = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    for name in params:
        if name not in known:
            allowed = choices(known, f"parameters of {task}")
            return Problem((*key, name), f"unknown parameter{did_you_mean(name, known)}", allowed)
    return Problem(key, message)


def _environment(key: KeyPath, config: EnvironmentConfig) -> list[Problem]:
    """What the environment names can be imported, and tools can be tools."""
    from rollouts.environments import named_tool

    named: list[tuple[KeyPath, str, Callable[[str, str], Any]]] = [
        ((*key, "tools", index), name, named_tool) for index, name in enumerate(config.tools)
    ]
    for field_name in ("factory", "demonstrations"):
        value = getattr(config, field_name)
        if value is not None:
            named.append(((*key, field_name), value, import_function))
    problems = []
    for place, name, read in named:
        try:
            read(name, "")
        except BadInput as error:
            problems.append(Problem(place, str(error).removeprefix(": ")))
    return problems


def _modes(key: KeyPath, domain: DomainConfig) -> Iterator[Problem]:
    """The modes' penalties beside the domain's reward, which is good, and the functions that write reasoning."""
    for effort, mode in domain.modes.items():
        place = (*key, "modes", effort)
        for problem in _rewards((), domain.rewards(effort)):
            yield Problem((*place, "length_penalty"), problem.message, problem.allowed)
        if mode.reasoning is not None:
            try:
                import_function(mode.reasoning, "")
            except BadInput as error:
                yield Problem((*place, "reasoning"), str(error).removeprefix(": "))


def _rewards(key: KeyPath, specs: list[str | dict[str, dict[str, Any]]]) -> list[Problem]:
    from rewards import build

    try:
        build(specs, "")
    except BadInput as error:
        match = re.match(r"(?:\[(\d+)\])?:? ?(.*)", str(error), re.DOTALL)
        assert match is not None  # every part is optional
        return [Problem((*key, int(match[1])) if match[1] else key, match[2])]
    return []
