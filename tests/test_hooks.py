"""Evaluations that hang on a run: functions of the user's and tasks of lm-eval, answered by the rollout workers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from posttrain.data import load_domains
from posttrain.data.tokenizer import build_character_tokenizer
from posttrain.errors import BadInput
from posttrain.recipe import Recipe, load_recipe
from posttrain.recipe.evaluation import HoldoutEvaluation, LmEvalEvaluation
from posttrain.rundir import RunDirectory
from posttrain.stages.evaluate import evaluate
from posttrain.stages.hooks import EvaluatedModel, check_hooks, named_hooks, numbers
from posttrain.stages.work import Work
from rollouts.types import Completion, Sampling
from tests.recipe_kit import recipe_with, write_recipe

TOKENIZER = build_character_tokenizer()


class Adder:
    """A rollout client that answers sums like `3+4=` rightly, and finds right answers likely."""

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        return [[self._answer(prompt, sampling.max_tokens)] * sampling.n for prompt in prompts]

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        return [
            [-0.1 if TOKENIZER.decode(completion).strip() == self._sum(prompt) else -2.0 for _ in completion]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def _sum(self, prompt: list[int]) -> str:
        left, _, right = TOKENIZER.decode(prompt, skip_special_tokens=True).partition("=")[0].partition("+")
        return str(int("".join(filter(str.isdigit, left)) or 0) + int("".join(filter(str.isdigit, right)) or 0))

    def _answer(self, prompt: list[int], limit: int) -> Completion:
        text = TOKENIZER.encode(self._sum(prompt), add_special_tokens=False)[:limit]
        return Completion.of_version(
            [*text, TOKENIZER.eos_token_id][:limit], [-0.1] * min(limit, len(text) + 1), "stop", 1
        )


def model(max_model_len: int = 64) -> EvaluatedModel:
    client: Any = Adder()
    return EvaluatedModel("student", Path("nowhere"), TOKENIZER, client, max_model_len)


def task_directory(path: Path, kind: str) -> Path:
    """A task of lm-eval with six sums in a local file."""
    documents = [{"question": f"{a}+{a + 1}=", "answer": str(2 * a + 1), "wrong": str(2 * a)} for a in range(6)]
    (path / "sums.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    task: dict[str, Any] = {
        "task": f"sums_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path / "sums.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    if kind == "choice":
        task |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{[answer, wrong]}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
        }
    else:
        task |= {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        }
    (path / f"sums_{kind}.yaml").write_text(yaml.safe_dump(task))
    return path


@pytest.mark.parametrize(("kind", "metric"), [("choice", "acc"), ("generate", "exact_match")])
def test_a_local_task_of_lm_eval_is_answered_by_the_rollout_workers(tmp_path: Path, kind: str, metric: str) -> None:
    from posttrain.stages.lm_eval_tasks import check_tasks, evaluate_tasks

    config = LmEvalEvaluation(tasks=[f"sums_{kind}"], include=str(task_directory(tmp_path, kind)), limit=4)
    check_tasks(config, "evaluation[0].lm_eval")
    assert evaluate_tasks(model(), config) == {f"sums_{kind}/{metric}": 1.0}


def test_likelihoods_are_sums_over_the_continuation_and_greedy_ones_are_told() -> None:
    from posttrain.stages.lm_eval_tasks import ServedModel

    served = ServedModel(model())
    requests = [SimpleNamespace(args=("3+4=", "7")), SimpleNamespace(args=("3+4=", "12"))]
    assert served.loglikelihood(requests) == [(-0.1, True), (-4.0, False)]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_a_long_text_is_scored_whole_in_windows_that_fit(length: int) -> None:
    from posttrain.stages.lm_eval_tasks import ServedModel

    seen: list[tuple[int, int]] = []

    class Counting(Adder):
        def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
            seen.extend((len(prompt), len(completion)) for prompt, completion in zip(prompts, completions, strict=True))
            return [[-1.0] * len(completion) for completion in completions]

    client: Any = Counting()
    served = ServedModel(EvaluatedModel("base", Path(), TOKENIZER, client, 8))
    assert served.loglikelihood_rolling([SimpleNamespace(args=("a" * length,))]) == [-float(length)]
    assert all(prompt >= 1 and prompt + completion <= 8 for prompt, completion in seen)


def test_a_function_asks_the_model_in_text() -> None:
    assert model().answers(["3+4=", [{"role": "user", "content": "5+6="}]], 8, samples=2) == [["7"] * 2, ["11"] * 2]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "not list"),
        ({"accuracy": "high"}, "'accuracy' is 'high'"),
        ({"a": math.nan}, "a is nan"),
        ({"a": True}, "True"),
    ],
)
def test_what_is_not_finite_numbers_by_name_is_refused(result: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        numbers(result)
    assert numbers({"a": 1}) == {"a": 1.0}


def hooked(*hooks: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(recipe_with({"evaluation": [{"holdout": {"n": 8}}, *hooks]}))


def test_hooks_have_names_and_say_which_models_they_want() -> None:
    recipe = hooked(
        {"function": "math:sqrt", "after": ["student"]}, {"lm_eval": {"tasks": ["a"]}}, {"function": "math:sqrt"}
    )
    found = named_hooks(recipe)
    assert list(found) == ["math:sqrt", "lm_eval", "math:sqrt 2"]
    wanted = [name for name in ("base", "expert/sums/sft", "student") if found["math:sqrt"].wants(name)]
    assert wanted == ["student"]


def test_hooks_that_cannot_work_are_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"evaluation\[1\]\.function: nothing_here:f cannot be imported"):
        check_hooks(hooked({"function": "nothing_here:f"}))
    with pytest.raises(BadInput, match=r"evaluation\[1\]\.lm_eval\.tasks\[0\]: no task 'sums_of_nobody'"):
        check_hooks(hooked({"lm_eval": {"tasks": ["sums_of_nobody"]}}))
    recipe = write_recipe(tmp_path / "r.yaml", {"evaluation": [{"lm_eval": {"tasks": ["a"], "include": "gone"}}]})
    with pytest.raises(BadInput, match=r"evaluation\[0\]\.lm_eval\.include.*there is no directory"):
        load_recipe(recipe)
    recipe = write_recipe(tmp_path / "s.yaml", {"evaluation": [{"holdout": {"n": 8}, "function": "math:sqrt"}]})
    with pytest.raises(BadInput, match="give exactly one of"):
        load_recipe(recipe)


def test_a_model_is_loaded_once_for_all_its_evaluations_and_not_at_all_for_none(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        recipe_with({"evaluation": [{"holdout": {"n": 2}}, {"function": "tests.hook_functions:lengths"}]})
    )
    loaded: list[tuple[Path, int]] = []

    class Loading(Adder):
        def weight_version(self) -> int | None:
            return loaded[-1][1] if loaded else None

        def load_checkpoint(self, path: Path, version: int) -> None:
            loaded.append((path, version))

    run = RunDirectory.create(tmp_path, "run", recipe)
    TOKENIZER.save_pretrained(run.tokenizer_path)
    cluster: Any = SimpleNamespace(client=lambda slot: Loading())
    work = Work(recipe, run, load_domains(recipe), TOKENIZER, cluster)
    found = evaluate(work, "base", tmp_path / "base")
    assert set(found) == {"sums", "words"} and len(work.hooked) == 1
    evaluate(work, "base", tmp_path / "base")  # all of it is known
    evaluate(work, "expert/sums/sft", tmp_path / "expert", slot=1)
    assert loaded == [(tmp_path / "base", 1), (tmp_path / "expert", 2)]


def test_experts_can_be_measured_on_their_own_domain_alone() -> None:
    config, domains = HoldoutEvaluation(own_domain=True), ["sums", "words"]
    assert config.domains_of("expert/words/grpo", domains) == ["words"]
    assert config.domains_of("base", domains) == config.domains_of("student", domains) == domains
    assert HoldoutEvaluation().domains_of("expert/words/grpo", domains) == domains
