"""What only the run itself can find wrong with its input: exit code 2, a message, nothing started, nothing left."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import Result
from typer.testing import CliRunner

import posttrain.cluster
from posttrain.cli import app
from tests.pipeline_kit import contents
from tests.recipe_kit import REMOVED, ROOT, write_recipe
from tests.tiny_models import save_tiny_qwen3

SMALL_DOMAINS = {
    "domains.sums.train": 8,
    "domains.sums.selection": 4,
    "domains.sums.holdout": 8,
    "domains.words": REMOVED,
    "evaluation": [{"holdout": {"n": 4}}],
}
HF = {"model": {"family": "hf", "checkpoint": "good"}, "rollout": {"engine": "vllm"}}
GEMMA = {
    "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good one: a Qwen3 with 128 tokens and 512 positions."""
    path = tmp_path_factory.mktemp("model") / "good"
    save_tiny_qwen3(path, seed=0)
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the checkpoint as `good`, in which a start of Ray is an error."""

    def start(*_: object) -> None:
        raise AssertionError("Ray is started in spite of the bad input")

    shutil.copytree(checkpoint, tmp_path / "good")
    monkeypatch.setattr(posttrain.cluster, "_connect", start)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def config_with(path: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def cut_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_change(path: Path) -> None:
    pass


RUNS: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "a reward that calls the reference wrong": (
        {"domains.sums.reward": ["tests.test_pipeline_bad_input:nothing_is_right"]}, no_change,
        "domains.sums.reward: tests.test_pipeline_bad_input:nothing_is_right gives the reference answer"),
    "a reward that fails": (
        {"domains.sums.reward": ["tests.test_pipeline_bad_input:broken"]}, no_change,
        "domains.sums.reward fails on the reference answer"),
    "more problems than there are": ({"domains.sums.train": 100_000, "domains.sums.source.params.max_digits": 1},
        no_change, "domains.sums"),
    "answers longer than allowed": (
        {"domains.sums.max_new_tokens": 1}, no_change, "domains.sums.max_new_tokens is 1; the longest reference"),
    "an unknown field of our model": (
        {"model.config": {"preset": "tiny", "hidden_sizes": 64}}, no_change,
        "model.config.hidden_sizes: unknown field; there are "),
    "an unknown field of another model": (
        HF | {"model": {"family": "hf", "config": {"model_type": "qwen3", "hidden": 64}}}, no_change,
        "model.config.hidden: unknown field; there are "),
    "numbers that do not fit each other": (
        HF | {"model": {"family": "hf", "config": {"model_type": "qwen3", "num_attention_heads": 0}}}, no_change,
        "model.config: no model can be built from it"),
    "V4 as another model": (
        HF | {"model": {"family": "hf", "config": {"model_type": "deepseek_v4"}}}, no_change,
        "set the recipe's model.family to deepseek_v4 instead of hf"),
    "a student whose logits cannot be rebuilt": (
        HF | {"model": {"family": "hf", "config": GEMMA}}, no_change, "stages.student: distillation rebuilds"),
    "cut weights": (HF, cut_weights, "model.checkpoint: "),
    "a checkpoint of another family": (
        {"model": {"checkpoint": "good"}}, no_change, "model_type is 'qwen3', expected 'deepseek_v4'"),
    "a tokenizer with more tokens than the model": (
        HF, lambda path: _smaller_vocabulary(path), "the tokenizer has 128 tokens, the model's vocabulary"),
    "too few positions": (
        HF, lambda path: config_with(path, max_position_embeddings=64),
        "rollout.max_model_len is 256, but the model's max_position_embeddings is 64"),
    "an unknown address of the dashboard": (
        {"cluster.dashboard_host": "no.host.invalid"}, no_change, "cluster.dashboard_host: 'no.host.invalid'"),
}  # fmt: skip


def nothing_is_right(*_: Any) -> float:
    return 0.0


def broken(*_: Any) -> float:
    raise RuntimeError("no connection to the judge")


def _smaller_vocabulary(path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(64)
    model.save_pretrained(path)


@pytest.mark.parametrize("case", RUNS)
def test_a_run_is_refused(place: Path, case: str) -> None:
    changes, spoil, message = RUNS[case]
    spoil(place / "good")
    write_recipe(place / "recipe.yaml", SMALL_DOMAINS | changes)
    before = contents(place)
    result = command("run", "recipe.yaml")
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output
    assert contents(place) == before and list((place / "runs").iterdir()) == []
    assert not ray.is_initialized()


def test_a_port_that_is_taken_is_refused_unless_it_is_the_default_one(place: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        write_recipe(place / "recipe.yaml", SMALL_DOMAINS | {"cluster.dashboard_port": port})
        result = command("run", "recipe.yaml")
    assert result.exit_code == 2
    assert f"cluster.dashboard_port: {port} cannot be used" in result.stderr
    assert not list((place / "runs").iterdir())


def test_a_refused_resume_leaves_the_run_as_it_was(place: Path) -> None:
    """A module with a reward that is gone by now."""
    (place / "my_judge.py").write_text("def judge(problem, text, *_): return float(text == problem.answer)\n")
    write_recipe(place / "recipe.yaml", SMALL_DOMAINS | {"domains.sums.reward": ["my_judge:judge"]})
    result = command("run", "recipe.yaml", "--name", "one")
    assert result.exit_code == 1 and "Ray is started" in result.output  # the preparations are over
    sys.modules.pop("my_judge")
    (place / "my_judge.py").unlink()
    before = contents(place / "runs")
    result = command("resume", "one")
    assert result.exit_code == 2
    assert "domains.sums.reward[0]: my_judge:judge cannot be imported" in result.stderr
    assert contents(place / "runs") == before


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (shutil.rmtree, "good: not a checkpoint directory"),
    "no config.json": (lambda path: (path / "config.json").unlink(), "it has no config.json"),
    "a damaged config.json": (lambda path: (path / "config.json").write_text("{"), "config.json: cannot be read"),
    "another family": (
        lambda path: config_with(path, model_type="deepseek_v4"), "config.json: model_type is 'deepseek_v4'"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "the checkpoint has no weights"),
    "cut weights": (cut_weights, "model.safetensors: cannot be read"),
    "no tokenizer": (
        lambda path: [file.unlink() for file in path.glob("*token*")], "no tokenizer could be loaded from 'good'"),
    "another vocabulary": (
        lambda path: config_with(path, vocab_size=64), "the tokenizer has 128 tokens, the model's vocabulary"),
    "too few positions": (lambda path: config_with(path, max_position_embeddings=64), "max_position_embeddings is 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_an_evaluation_is_refused(place: Path, case: str) -> None:
    spoil, message = CHECKPOINTS[case]
    spoil(place / "good")
    model = {"model": {"family": "hf", "config": {"model_type": "qwen3"}}}
    write_recipe(place / "recipe.yaml", SMALL_DOMAINS | HF | model)
    before = contents(place)
    result = command("eval", "good", "--recipe", "recipe.yaml")
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output
    assert contents(place) == before
    assert not ray.is_initialized()


def test_prompts_that_do_not_fit_an_evaluation_are_refused(place: Path) -> None:
    changes = SMALL_DOMAINS | HF | {"rollout": {"engine": "vllm", "max_model_len": 40}}
    changes |= {"domains.sums.source.prompt": "please add: {question}", "domains.sums.max_new_tokens": 30}
    write_recipe(place / "recipe.yaml", changes)
    result = command("eval", "good", "--recipe", "recipe.yaml")
    assert result.exit_code == 2 and "rollout.max_model_len is 40" in result.stderr
