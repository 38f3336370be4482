"""Tasks of lm-evaluation-harness on a model that the rollout workers serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from posttrain.data.encoding import decode_completion
from posttrain.errors import BadInput
from posttrain.recipe.evaluation import LmEvalEvaluation
from rollouts.types import Sampling

if TYPE_CHECKING:
    from posttrain.stages.hooks import EvaluatedModel

DEFAULT_TOKENS = 256
"""Of an answer whose task names no limit."""


def check_tasks(config: LmEvalEvaluation, where: str) -> None:
    """Raise BadInput for a task that is neither lm-eval's nor in `include`."""
    known = set(_manager(config).all_tasks)
    for index, task in enumerate(config.tasks):
        if task not in known:
            beside = f" and {config.include}" if config.include else ""
            raise BadInput(f"{where}.tasks[{index}]: no task {task!r} among the {len(known):,} of lm-eval{beside}")


def evaluate_tasks(model: EvaluatedModel, config: LmEvalEvaluation) -> dict[str, float]:
    """Every number that lm-eval gives for the tasks, as `<task>/<metric>`."""
    found = simple_evaluate(
        model=ServedModel(model),
        tasks=list(config.tasks),
        num_fewshot=config.fewshot,
        limit=config.limit,
        task_manager=_manager(config),
        log_samples=False,
        bootstrap_iters=0,
    )
    results: dict[str, dict[str, Any]] = found["results"] if found else {}
    return {
        f"{task}/{name.partition(',')[0]}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if "," in name and "stderr" not in name and isinstance(value, int | float)  # `acc,none`: metric and filter
    }


def _manager(config: LmEvalEvaluation) -> TaskManager:
    return TaskManager(include_path=config.include)


class ServedModel(LM):
    """lm-eval's three kinds of requests, answered by the rollout workers. Text is plain: no chat layout around it."""

    def __init__(self, model: EvaluatedModel) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities, and whether greedy decoding would give it."""
        pairs = [self._pair(*request.args) for request in requests]
        contexts, continuations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        scores = self.model.client.score(contexts, continuations)
        greedy = self._greedy(contexts, continuations)
        return [(sum(score), same) for score, same in zip(scores, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of whole texts, in windows of the model's length that overlap by half."""
        return [sum(map(sum, self._windows(self._ids(request.args[0])))) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, cut before the first of the task's stop texts."""
        found = []
        for request in requests:
            context, options = request.args
            limit = min(int(options.get("max_gen_toks", DEFAULT_TOKENS)), self.model.max_model_len - 1)
            prompt = self._begin(self._ids(context))[-(self.model.max_model_len - limit) :]
            warm = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            ((answer,),) = self.model.client.generate([prompt], Sampling(max_tokens=limit, temperature=warm))
            text = decode_completion(self.model.tokenizer, answer.token_ids)
            for stop in options.get("until") or []:
                text = text.split(stop)[0] if stop else text
            found.append(text)
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, the context cut from the left where they do not fit."""
        tokens = self._ids(continuation)
        room = self.model.max_model_len - len(tokens)
        return self._begin(self._ids(context))[-max(1, room) :], tokens

    def _greedy(self, contexts: list[list[int]], continuations: list[list[int]]) -> list[bool]:
        longest = max(map(len, continuations), default=0)
        fitting = [context[-(self.model.max_model_len - longest) :] for context in contexts]
        answers = self.model.client.generate(fitting, Sampling(max_tokens=longest, temperature=0.0))
        return [
            list(answer.token_ids[: len(wanted)]) == wanted
            for (answer,), wanted in zip(answers, continuations, strict=True)
        ]

    def _windows(self, tokens: list[int]) -> list[list[float]]:
        size = self.model.max_model_len - 1
        step = max(1, size // 2)
        contexts, parts = [self._begin([])], [tokens[:size]]
        for start in range(size, len(tokens), step):
            part = tokens[start : start + step]
            contexts.append(tokens[max(0, start - (self.model.max_model_len - len(part))) : start])
            parts.append(part)
        return self.model.client.score(contexts, parts)

    def _ids(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text, add_special_tokens=False)

    def _begin(self, tokens: list[int]) -> list[int]:
        first = self.model.tokenizer.bos_token_id
        return tokens if first is None else [first, *tokens]
