"""A recipe that is wrong in whatever way: exit code 2, one screen that names file and key, nothing on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from tests.recipe_kit import REMOVED, ROOT, files_below, recipe_with, write_recipe

SCREEN_LINES = 24

# (changes to a valid recipe, the key that the message names, words that it holds)
Case = tuple[dict[str, Any], str, list[str]]
WRONG_KEYS: list[Case] = [
    ({"sead": 1}, "sead", ["unknown key", "did you mean `seed`"]),
    ({"zzz": 1}, "zzz", ["unknown key", "keys allowed here: name, seed, model"]),
    ({"model.cofnig": "tiny"}, "model.cofnig", ["did you mean `config`"]),
    ({"cluster.trainer": 1}, "cluster.trainer", ["did you mean `trainers`"]),
    ({"rollout.gpu_memory": 1}, "rollout.gpu_memory", ["unknown key", "max_model_len"]),
    ({"domains.sums.rewards": ["exact"]}, "domains.sums.rewards", ["did you mean `reward`"]),
    ({"domains.sums.source.parameters": {}}, "domains.sums.source.parameters", ["keys allowed here: reasoning_gym"]),
    ({"domains.sums.source": {"jsonl": "a", "params": {}}}, "domains.sums.source.params", ["keys allowed here: jsonl"]),
    ({"stages.expert": {}}, "stages.expert", ["did you mean `experts`"]),
    ({"stages.base.stpes": 1}, "stages.base.stpes", ["did you mean `steps`"]),
    ({"stages.base.lr": 1}, "stages.base.lr", ["keys allowed here: kind, steps"]),
    (
        {"stages.base.optimizer.learning_rate": 1},
        "stages.base.optimizer.learning_rate",
        ["keys allowed here: name, lr"],
    ),
    (
        {"stages.experts.per_domain[1].num_generations": 8},
        "stages.experts.per_domain[1].num_generations",
        ["group_size"],
    ),
    ({"stages.experts.per_domain[0].group_size": 8}, "stages.experts.per_domain[0].group_size", ["max_length"]),
    ({"stages.experts.gate.min_gian": 0.1}, "stages.experts.gate.min_gian", ["did you mean `min_gain`"]),
    ({"stages.student.teacher": "x"}, "stages.student.teacher", ["did you mean `teachers`"]),
    ({"evaluation[0].mmlu": {}}, "evaluation[0].mmlu", ["keys allowed here: holdout, lm_eval, judge, function, after"]),
    ({"evaluation[0].lm_eval": {}}, "evaluation[0].lm_eval.tasks", ["required and missing"]),
    ({"evaluation[0].function": "math:sqrt"}, "evaluation[0]", ["one of `holdout`, `lm_eval`, `judge` and `function`"]),
    ({"evaluation[0].holdout.k": 1}, "evaluation[0].holdout.k", ["keys allowed here: n, samples"]),
]
MISSING_KEYS: list[Case] = [
    ({"name": REMOVED}, "name", ["required and missing"]),
    ({"model": REMOVED}, "model", ["required and missing"]),
    ({"domains": REMOVED}, "domains", ["required and missing"]),
    ({"stages": REMOVED}, "stages", ["required and missing"]),
    ({"stages.experts": REMOVED}, "stages.experts.per_domain", ["sums has no expert", "name a checkpoint"]),
    ({"domains.sums.source": REMOVED}, "domains.sums.source", ["required and missing"]),
    ({"stages.experts.per_domain[0].kind": REMOVED}, "stages.experts.per_domain[0].kind", ["missing", "sft, grpo"]),
    ({"model.config": REMOVED}, "model", ["exactly one of `config`"]),
    ({"domains": {}}, "domains", ["at least 1 domain"]),
    ({"domains.sums.reward": []}, "domains.sums.reward", ["at least 1 entry"]),
    ({"stages.experts.per_domain": []}, "stages.experts.per_domain", ["sums has no expert", "name a checkpoint"]),
    (
        {"stages.experts.overrides": {"sums": []}},
        "stages.experts.overrides.sums",
        ["has no expert", "name a checkpoint"],
    ),
    (
        {"stages.experts.per_domain": [], "stages.student": None},
        "stages.experts.per_domain",
        ["is empty, and there is no student"],
    ),
]
WRONG_TYPES: list[Case] = [
    ({"name": 5}, "name", ["expected text, got 5", "quote it"]),
    ({"name": None}, "name", ["expected text, got nothing"]),
    ({"seed": "3"}, "seed", ["expected a whole number, got '3'", "without quotes"]),
    ({"seed": True}, "seed", ["expected a whole number, got true"]),
    ({"seed": 1.5}, "seed", ["expected a whole number, got 1.5"]),
    ({"model": "tiny"}, "model", ["expected a mapping, got 'tiny'"]),
    ({"model": []}, "model", ["expected a mapping, got a list"]),
    ({"model.config": 3}, "model.config", ["preset's name or a mapping"]),
    ({"domains": ["sums"]}, "domains", ["expected a mapping, got a list"]),
    ({"domains.sums": "chain_sum"}, "domains.sums", ["expected a mapping"]),
    ({"domains.sums.source": "chain_sum"}, "domains.sums.source", ["exactly one of reasoning_gym, jsonl, dataset"]),
    ({"domains.sums.source.params": [1]}, "domains.sums.source.params", ["expected a mapping"]),
    ({"domains.sums.reward": "exact"}, "domains.sums.reward", ["expected a list"]),
    ({"domains.sums.reward": [3]}, "domains.sums.reward[0]", ["a reward is a name"]),
    ({"stages.base": [1]}, "stages.base", ["expected a mapping"]),
    ({"stages.base.steps": "many"}, "stages.base.steps", ["expected a whole number, got 'many'"]),
    ({"stages.base.optimizer.lr": "fast"}, "stages.base.optimizer.lr", ["expected a number, got 'fast'"]),
    ({"stages.base.optimizer.betas": 0.9}, "stages.base.optimizer.betas", ["expected a list"]),
    ({"stages.experts.per_domain": {"kind": "sft"}}, "stages.experts.per_domain", ["expected a list"]),
    ({"stages.experts.per_domain[0]": "sft"}, "stages.experts.per_domain[0]", ["expected a mapping"]),
    ({"cluster.dashboard": "yes please"}, "cluster.dashboard", ["expected true or false"]),
    ({"evaluation": {"holdout": {}}}, "evaluation", ["expected a list"]),
]
WRONG_VALUES: list[Case] = [
    ({"name": "a/b"}, "name", ["'a/b'", "letters, digits"]),
    ({"name": "../up"}, "name", ["'../up'", "letters, digits"]),
    ({"domains.Big Name": recipe_with({})["domains"]["sums"]}, "domains.Big Name", ["small letters"]),
    ({"seed": -1}, "seed", ["at least 0, got -1"]),
    ({"model.family": "llama"}, "model.family", ["got 'llama'", "deepseek_v4, hf"]),
    ({"rollout.engine": "vlm"}, "rollout.engine", ["did you mean `vllm`"]),
    ({"rollout.dtype": "fp8"}, "rollout.dtype", ["allowed: float32, bfloat16"]),
    ({"rollout.max_num_batched_tokens": 16}, "rollout.max_num_batched_tokens", ["at least max_num_seqs"]),
    ({"cluster.dashboard_port": 70000}, "cluster.dashboard_port", ["at most 65535"]),
    ({"stages.base.kind": "grpo"}, "stages.base.kind", ["allowed: sft"]),
    ({"stages.base.steps": 0}, "stages.base.steps", ["at least 1, got 0"]),
    ({"stages.base.optimizer.lr": 0}, "stages.base.optimizer.lr", ["more than 0"]),
    ({"stages.base.optimizer.lr": float("inf")}, "stages.base.optimizer.lr", ["finite"]),
    ({"stages.base.optimizer.lr": float("nan")}, "stages.base.optimizer.lr", ["finite"]),
    ({"stages.base.optimizer.name": "sgd"}, "stages.base.optimizer.name", ["allowed: adamw, muon"]),
    ({"stages.base.optimizer.adamw_lr": 0.1}, "stages.base.optimizer.adamw_lr", ["muon"]),
    ({"stages.base.optimizer.betas": [0.9, 1.0]}, "stages.base.optimizer.betas[1]", ["[0, 1)"]),
    ({"stages.experts.per_domain[1].kind": "ppo"}, "stages.experts.per_domain[1].kind", ["allowed: sft, grpo"]),
    ({"stages.experts.per_domain[0].kind": "grpo"}, "stages.experts.per_domain[1]", ["second grpo stage"]),
    ({"stages.experts.per_domain[1].group_size": 1}, "stages.experts.per_domain[1].group_size", ["at least 2"]),
    ({"stages.experts.gate.action": "halt"}, "stages.experts.gate.action", ["stop, warn, drop"]),
    ({"stages.experts.overrides": {"maths": [{"kind": "sft"}]}}, "stages.experts.overrides.maths", ["sums, words"]),
    ({"stages.student.shares": {"letters": 1}}, "stages.student.shares.letters", ["the domains are sums, words"]),
    ({"stages.student.weights": {"sums": -1}}, "stages.student.weights.sums", ["more than 0"]),
    ({"stages.student.divergence": "kl"}, "stages.student.divergence", ["reverse_kl, forward_kl, jsd"]),
    ({"evaluation[0].holdout.n": 64}, "evaluation[0].holdout.n", ["64", "domains.sums.holdout is 32"]),
    ({"domains.sums.max_new_tokens": 256}, "domains.sums.max_new_tokens", ["rollout.max_model_len"]),
    ({"model.family": "hf"}, "model.config", ["family deepseek_v4"]),
    ({"model": {"family": "hf", "config": {"hidden_size": 8}}}, "model.config.model_type", ["required"]),
    ({"model": {"family": "hf", "config": {"model_type": "qwen3"}}}, "rollout.engine", ["must be vllm"]),
    ({"model.checkpoint": "somewhere"}, "model", ["exactly one of"]),
    ({"domains.sums.environment": {}}, "domains.sums.environment", ["give either `tools` or `factory`"]),
    (
        {"domains.sums.environment": {"factory": "rollouts.environments:SingleTurn", "tool_seconds": 3}},
        "domains.sums.environment.tool_seconds",
        ["bounds calls of `tools`"],
    ),
    (
        {"domains.sums.environment": {"factory": "rollouts.environments:SingleTurn", "describe": False}},
        "domains.sums.environment.describe",
        ["is about `tools`"],
    ),
    ({"domains.sums.environment": {"tool": []}}, "domains.sums.environment.tool", ["did you mean `tools`"]),
    (
        {"domains.sums.environment": {"tools": ["calculator"], "turn_tokens": 9}},
        "domains.sums.environment.turn_tokens",
        ["at most max_new_tokens", "8"],
    ),
    ({"domains.sums.environment": {"tools": ["calculator"] * 2}}, "domains.sums.environment.tools[1]", ["twice"]),
    (
        {"domains.sums.source": {"calculations": {"min_digits": 6}}},
        "domains.sums.source.calculations.min_digits",
        ["at most max_digits"],
    ),
    ({"stages.base.conversations": {"jsonl": "a", "bad_rows": "keep"}}, "stages.base.conversations.bad_rows", ["drop"]),
    ({"stages.experts.per_domain[1].top_p": 0}, "stages.experts.per_domain[1].top_p", ["more than 0"]),
    ({"domains.sums.max_running": 0}, "domains.sums.max_running", ["at least 1"]),
    (
        {"stages.experts.per_domain[1].keep_routing": True, "rollout.engine": "vllm", "cluster.gpus_per_worker": 1},
        "stages.experts.per_domain[1].keep_routing",
        ["only `rollout.engine: native`"],
    ),
]
NOT_THERE: list[Case] = [
    ({"model.config": "tinny"}, "model.config", ["no preset 'tinny'", "did you mean `tiny`"]),
    ({"model": {"checkpoint": "./nowhere"}}, "model.checkpoint", ["there is no directory", "nowhere"]),
    ({"model": {"checkpoint": "/no/such/place"}}, "model.checkpoint", ["there is no directory /no/such/place"]),
    ({"model": {"checkpoint": "."}}, "model.checkpoint", ["has no config.json", "the directory holds"]),
    ({"model": {"checkpoint": "./bad.yaml"}}, "model.checkpoint", ["is a file; name its directory"]),
    ({"model": {"checkpoint": "what is this"}}, "model.checkpoint", ["neither a path nor a hub id"]),
    ({"model.tokenizer": "./nowhere"}, "model.tokenizer", ["there is no directory"]),
    (
        {"domains.sums.source": {"generator": "posttrain.data.puzzles:riddle"}},
        "domains.sums.source.generator",
        ["posttrain.data.puzzles:riddle cannot be imported", "riddle"],
    ),
    ({"domains.sums.source.reasoning_gym": "chain_sums"}, "domains.sums.source.reasoning_gym", ["mean `chain_sum`"]),
    ({"domains.sums.source.reasoning_gym": ""}, "domains.sums.source.reasoning_gym", ["no task ''", "tasks: ab"]),
    ({"domains.sums.source.params": {"max_term": 3}}, "domains.sums.source.params.max_term", ["mean `max_terms`"]),
    ({"domains.sums.source.params": {"min_terms": 9}}, "domains.sums.source.params", ["max_terms must be"]),
    ({"domains.sums.source.params": {"min_terms": "two"}}, "domains.sums.source.params", ["'two'"]),
    ({"domains.sums.source.prompt": "{answer}"}, "domains.sums.source.prompt", ["{metadata[key]}"]),
    ({"domains.sums.source.prompt": "{metadata[term]}"}, "domains.sums.source.prompt", ["there is no 'term'"]),
    ({"domains.sums.source": {"jsonl": "no.jsonl"}}, "domains.sums.source.jsonl", ["there is no file", "no.jsonl"]),
    ({"domains.sums.source": {"jsonl": "."}}, "domains.sums.source.jsonl", ["is a directory"]),
    ({"domains.sums.source": {"dataset": "./none"}}, "domains.sums.source.dataset", ["there is no directory"]),
    ({"domains.sums.source": {"jsonl": "a", "dataset": "b"}}, "domains.sums.source", ["exactly one of"]),
    ({"domains.sums.reward": ["exat"]}, "domains.sums.reward[0]", ["exat", "exact"]),
    ({"domains.sums.reward": ["exact", {"length": {"goal": 3}}]}, "domains.sums.reward[1]", ["length"]),
    ({"domains.sums.reward": ["no_such_module:score"]}, "domains.sums.reward[0]", ["no_such_module"]),
    (
        {"domains.sums.environment": {"tools": ["abacus"]}},
        "domains.sums.environment.tools[0]",
        ["'abacus'", "calculator"],
    ),
    (
        {"domains.sums.environment": {"tools": ["calculator", "math:sqrt"]}},
        "domains.sums.environment.tools[1]",
        ["cannot be passed by name"],
    ),
    (
        {"domains.sums.environment": {"factory": "rollouts.environments:SingleTurns"}},
        "domains.sums.environment.factory",
        ["SingleTurns", "cannot be imported"],
    ),
    (
        {"domains.sums.environment": {"tools": ["calculator"], "demonstrations": "math:pi"}},
        "domains.sums.environment.demonstrations",
        ["math:pi is not a function"],
    ),
    (
        {"stages.experts.per_domain[0].conversations": {"jsonl": "no.jsonl"}},
        "stages.experts.per_domain[0].conversations.jsonl",
        ["there is no file"],
    ),
]
CASES = WRONG_KEYS + MISSING_KEYS + WRONG_TYPES + WRONG_VALUES + NOT_THERE

# File in bad_recipes/ -> words of its message.
BAD_FILES = {
    "alias_bomb": ["values; that is no recipe"],
    "binary": ["not a text file"],
    "comment_only": ["the file is empty", "name, model, domains and stages"],
    "cyclic_alias": ["nested too deeply"],
    "deep_nesting": ["nested too deeply"],
    "duplicate_key": [":4: name: written twice, first in line 1"],
    "duplicate_nested_key": [":9: stages.experts.per_domain[0].steps: written twice, first in line 8"],
    "empty": ["the file is empty"],
    "indentation": [":2: not valid YAML"],
    "json_with_extra_brace": [":1: not valid YAML"],
    "latin1": ["not a text file"],
    "list": ["a recipe is a mapping", "this is a list"],
    "list_as_key": [":2:", "a key is text"],
    "nul_character": ["not valid YAML"],
    "number_as_key": [":2:", "a key is text; 1 is not"],
    "python_object": [":1: name: the tag", "is not allowed"],
    "set_tag": [":2: model: the tag !!set is not allowed"],
    "single_value": ["a recipe is a mapping", "single value"],
    "tab": [":3: not valid YAML"],
    "two_documents": ["not valid YAML", "document"],
    "unclosed_bracket": ["not valid YAML"],
    "unknown_alias": [":2: not valid YAML", "nowhere"],
}


def refused(arguments: list[str]) -> str:
    """Run the command line in this process; the message with which it refused."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= SCREEN_LINES
    assert all(len(line) < 500 for line in result.stderr.splitlines())
    return result.stderr


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
def test_a_wrong_value_is_refused_by_file_line_and_key_and_nothing_is_made(case: Case, tmp_path: Path) -> None:
    changes, key, words = case
    write_recipe(tmp_path / "bad.yaml", changes)
    message = refused(["run", "bad.yaml"])
    assert re.search(rf"^(error: )?bad\.yaml(:\d+)?: {re.escape(key)}: ", message, re.MULTILINE), message
    for word in words:
        assert word in message, message
    assert files_below(tmp_path) == {"bad.yaml"}


@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_a_file_that_is_no_recipe_is_refused_and_nothing_is_made(name: str, tmp_path: Path) -> None:
    path = ROOT / "tests" / "bad_recipes" / f"{name}.yaml"
    message = refused(["run", str(path)])
    assert message.startswith(f"error: {path}"), message
    for word in BAD_FILES[name]:
        assert word in message, message
    assert files_below(tmp_path) == set()


def test_every_bad_file_is_tested() -> None:
    assert {path.stem for path in (ROOT / "tests" / "bad_recipes").iterdir()} == set(BAD_FILES)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "there is no such file" in refused(["run", "nothing.yaml"])
    assert "this is a directory" in refused(["run", "."])
    write_recipe(tmp_path / "good.yaml")
    assert "there are good.yaml" in refused(["run", "goof.yaml"])


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(8 << 30)
    assert "larger than 1 MiB" in refused(["run", "huge.yaml"])


def test_many_problems_fit_on_one_screen_and_come_together(tmp_path: Path) -> None:
    write_recipe(tmp_path / "bad.yaml", {f"wrong_{i}": 1 for i in range(30)} | {"seed": "x"})
    message = refused(["validate", "bad.yaml"])
    assert "bad.yaml has 31 problems" in message
    assert "and 25 more" in message
    assert "bad.yaml:3: seed" not in message  # pydantic's order: known keys first
    assert "seed: expected a whole number" in message


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stages.base.steps", ["write --set key.of.the.recipe=value"]),
        ("=3", ["write --set"]),
        ("stages..steps=3", ["write --set"]),
        ("stages.base.steps=[", ["not valid YAML"]),
        ("name.first=3", ["name is 'small', which holds no 'first'"]),
        ("stages.experts.per_domain.7.steps=3", ["a list of 2"]),
        ("stages.experts.per_domain.first.steps=3", ["a list of 2"]),
        ("stages.base.stepz=3", ["small.yaml", "stages.base.stepz: unknown key; did you mean `steps`"]),
        (
            "stages.base.steps=x",
            ["small.yaml", "--set stages.base.steps=x: stages.base.steps: expected a whole number"],
        ),
        ("model.tokenizer=./here", ["model.tokenizer: there is no directory"]),
    ],
)
def test_a_wrong_set_option_is_refused_and_named(assignment: str, words: list[str], tmp_path: Path) -> None:
    write_recipe(tmp_path / "small.yaml")
    message = refused(["run", "small.yaml", "--set", assignment])
    assert f"--set {assignment}" in message
    for word in words:
        assert word in message, message
    assert files_below(tmp_path) == {"small.yaml"}


def test_a_wrong_seed_or_name_is_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path / "small.yaml")
    assert "--seed -4: seed: must be at least 0" in refused(["run", "small.yaml", "--seed", "-4"])
    assert "--seed" in refused(["run", "small.yaml", "--seed", "many"])
    assert files_below(tmp_path) == {"small.yaml"}


@pytest.mark.parametrize("command", ["validate", "run", "eval"])
def test_every_command_that_reads_a_recipe_refuses_it_alike(command: str, tmp_path: Path) -> None:
    write_recipe(tmp_path / "bad.yaml", {"sead": 1})
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    arguments = ["checkpoint", "--recipe", "bad.yaml"] if command == "eval" else ["bad.yaml"]
    assert "bad.yaml:" in refused([command, *arguments])
