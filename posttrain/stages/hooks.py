"""Evaluations beside the held-out problems: lm-eval's tasks, the model as a judge, and functions of the user's.

A hook that fails says so in the log, and the run goes on: hours of training are not lost to an evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.encoding import decode_completion, encode_prompt
from posttrain.data.v4 import Mode
from posttrain.errors import BadInput
from posttrain.imports import import_function
from posttrain.recipe import Recipe
from posttrain.recipe.evaluation import EvaluationHook
from rollouts.types import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.stages.serving import Served
    from posttrain.stages.work import Work
    from rollouts.pool import RolloutClient


@dataclass(frozen=True)
class EvaluatedModel:
    """A model whose weights the rollout workers serve: what a hook is called with."""

    name: str
    """Of the stage that made it, for example `expert/arithmetic/grpo`."""
    checkpoint: Path
    tokenizer: PreTrainedTokenizerBase
    client: RolloutClient
    max_model_len: int
    """Tokens of a prompt and its answer together."""

    def answers(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        max_tokens: int,
        *,
        temperature: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        mode: Mode = "chat",
    ) -> list[list[str]]:
        """`samples` answers to each prompt: a user's text, or the messages of a conversation.

        Raises:
            BadInput: a prompt that leaves no room for `max_tokens` more; the message names its row.
        """
        messages = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt) for prompt in prompts
        ]
        ids = [list(encode_prompt(self.tokenizer, one, mode)) for one in messages]
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, n=samples, seed=seed)
        groups = self.client.generate(ids, sampling)
        return [[decode_completion(self.tokenizer, one.token_ids) for one in group] for group in groups]


def check_hooks(recipe: Recipe) -> None:
    """Raise BadInput for a function that cannot be imported, or a task that lm-eval does not know."""
    for index, hook in enumerate(recipe.evaluation):
        where = f"evaluation[{index}]"
        if hook.function is not None:
            import_function(hook.function, f"{where}.function")
        if hook.lm_eval is not None:
            from posttrain.stages.lm_eval_tasks import check_tasks

            check_tasks(hook.lm_eval, f"{where}.lm_eval")


def run_hooks(served: Served, model: str) -> None:
    """Run the hooks of a model that have not been run in this run yet."""
    work, checkpoint = served.work, served.checkpoint
    due = [
        (name, hook)
        for name, hook in named_hooks(work.recipe).items()
        if hook.wants(model) and (str(checkpoint), name) not in work.hooked
    ]
    if not due:
        return
    work.require_going_on()
    evaluated = EvaluatedModel(model, checkpoint, work.tokenizer, served.client, work.recipe.rollout.max_model_len)
    for name, hook in due:
        began = time.monotonic()
        try:
            metrics = numbers(_function_of(hook, work)(evaluated))
        except Exception as error:  # the hook is the user's: it may fail in any way
            work.require_going_on()  # unless the workers were ended under it
            message = f"the evaluation {name} failed: {type(error).__name__}: {error}"
            work.run.metrics.event("warning", stage=model, message=message)
            continue
        work.run.append_event(
            {"event": "hook", "stage": model, "model": model, "checkpoint": str(checkpoint), "hook": name,
             "metrics": metrics, "seconds": time.monotonic() - began}
        )  # fmt: skip
        work.hooked.add((str(checkpoint), name))


def named_hooks(recipe: Recipe) -> dict[str, EvaluationHook]:
    """The hooks beside the held-out problems; a second one of the same name gets a number."""
    found: dict[str, EvaluationHook] = {}
    for hook in recipe.evaluation:
        if hook.holdout is None:
            same = sum(name == hook.name or name.startswith(f"{hook.name} ") for name in found)
            found[f"{hook.name} {same + 1}" if same else hook.name] = hook
    return found


def _function_of(hook: EvaluationHook, work: Work) -> Callable[[EvaluatedModel], Any]:
    if hook.function is not None:
        return import_function(hook.function, "evaluation")
    if hook.judge is not None:
        from posttrain.stages.judge_evaluation import evaluate_judges

        n, directory = hook.judge.n, work.run.path / "judge"
        return lambda model: evaluate_judges(model, work.recipe, work.domains, n, directory)
    config = hook.lm_eval
    assert config is not None
    from posttrain.stages.lm_eval_tasks import evaluate_tasks

    return lambda model: evaluate_tasks(model, config)


def numbers(result: Any) -> dict[str, float]:
    """What a hook returned, if it is finite numbers by name.

    Raises:
        BadInput: anything else.
    """
    if not isinstance(result, Mapping):
        raise BadInput(f"an evaluation returns numbers by name, not {type(result).__name__}")
    for name, value in result.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(f"an evaluation returns numbers by name; {name!r} is {value!r}")
        if not math.isfinite(value):
            raise BadInput(f"{name} is {value}")
    return {name: float(value) for name, value in result.items()}
