"""What comes out of vLLM's engine core, on a core of the test's own (on the real one: test_native_engine)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine import FinishReason

from posttrain.errors import RunFailed
from rollouts.core import CoreTokens, EngineCore


class Front:
    """vLLM's `LLMEngine`, as far as it is used: hands out ids, and what the test puts into `outputs`."""

    def __init__(self) -> None:
        self.engine_core = self.input_processor = self
        self.outputs: list[Any] = []
        self.added: list[str] = []
        self.aborted: list[str] = []

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def process_inputs(self, name: str, prompt: Any, params: Any, supported_tasks: Any) -> SimpleNamespace:
        return SimpleNamespace(request_id=name)

    def assign_request_id(self, request: SimpleNamespace) -> None:
        request.request_id += f"-{len(self.added)}"

    def add_request(self, request: SimpleNamespace) -> None:
        self.added.append(request.request_id)

    def abort_requests(self, ids: list[str]) -> None:
        self.aborted.extend(ids)

    def get_output(self) -> SimpleNamespace:
        return SimpleNamespace(outputs=self.outputs)

    def give(self, request_id: str, token: int, reason: FinishReason | None = None) -> None:
        logprobs = SimpleNamespace(logprobs=np.array([[-0.5, -9.0]], dtype=np.float32))
        self.outputs.append(
            SimpleNamespace(request_id=request_id, new_token_ids=[token], new_logprobs=logprobs, finish_reason=reason)
        )


def made(*names: str) -> tuple[Front, EngineCore]:
    front = Front()
    core = EngineCore(front)
    for name in names:
        core.add(name, [1, 2], None)  # type: ignore[arg-type]
    return front, core


def test_tokens_come_under_the_callers_names_with_the_sampled_tokens_log_probability() -> None:
    front, core = made("a", "b")
    front.give("a-0", 7)
    front.give("b-1", 8, FinishReason.STOP)
    assert core.step() == [CoreTokens("a", [7], [-0.5], None), CoreTokens("b", [8], [-0.5], "stop")]


def test_what_was_aborted_or_has_ended_is_not_heard_of_again() -> None:
    front, core = made("a", "b")
    front.give("b-1", 8, FinishReason.LENGTH)
    core.step()
    core.abort(["a", "b", "never"])
    assert front.aborted == ["a-0"]
    core.add("a", [1, 2], None)  # type: ignore[arg-type]
    front.outputs.clear()
    front.give("a-0", 7)
    front.give("a-2", 9)
    assert [(new.name, new.token_ids) for new in core.step()] == [("a", [9])]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_an_end_that_was_not_asked_for_is_an_error(reason: FinishReason) -> None:
    front, core = made("a")
    front.give("a-0", 7, reason)
    with pytest.raises(RunFailed, match=f"request a with '{reason}'"):
        core.step()
