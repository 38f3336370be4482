"""A few of a stage's samples token by token, for the report: `traces.jsonl` in the run directory.

A line is an event `trace` (`Traces.write` says which fields it has). A stage that is repeated writes its steps again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.observe.metrics import MetricsLog
from posttrain.trainers.generation import Group

TRACED_STEPS = 5
"""Of a stage, the first and the last among them."""
TRACED_TOKENS = 384
"""Of an answer, from its beginning."""


class Traces:
    """Writes what became of single samples. Without a log nothing is written.

    Args:
        steps: Of the stage.
    """

    def __init__(self, log: MetricsLog | None, stage: str, steps: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self._log = log
        self._stage = stage
        self._tokenizer = tokenizer
        self._steps = {1 + round(part * (steps - 1) / (TRACED_STEPS - 1)) for part in range(TRACED_STEPS)}

    def wants(self, step: int) -> bool:
        """Whether samples of that step (from 1) are to be written."""
        return self._log is not None and step in self._steps

    def write(
        self,
        step: int,
        group: Group,
        index: int,
        reward: float | None,
        trainer_logprobs: Sequence[float],
        kl: Sequence[float] | None = None,
        **fields: Any,
    ) -> None:
        """One sample.

        Args:
            index: Of the sample in its group.
            trainer_logprobs: For each of its tokens, before the step's update.
            kl: For each token, NaN where nothing was learned.
            fields: What else is to be shown; plain data.
        """
        if self._log is None:
            return
        sample = group.completions[index]
        ids = sample.token_ids[:TRACED_TOKENS]
        traced: Mapping[str, Any] = {
            "stage": self._stage,
            "step": step,
            "domain": group.prompt.domain,
            "problem_id": group.prompt.problem_id,
            "prompt": self._text(group.request.prompt_ids),
            "reward": reward,
            "finish_reason": sample.finish_reason,
            "length": len(sample.token_ids),
            "tokens": [self._text([token]) for token in ids],
            "sampled": sample.loss_mask[: len(ids)],
            "sampler": _short(sample.logprobs[: len(ids)]),
            "trainer": _short(trainer_logprobs[: len(ids)]),
            "kl": None if kl is None else _short(kl[: len(ids)]),
            "versions": sample.versions[: len(ids)],
        }
        self._log.event("trace", **traced, **fields)

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _short(values: Sequence[float]) -> list[float | None]:
    """Four significant digits are enough to look at."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]
