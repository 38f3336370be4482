"""vLLM's engine core without its front: token ids in, token ids and log-probabilities out.

`LLMEngine.step` makes objects for every token that nothing here reads (detokeniser, `Logprob`, `RequestOutput`): with
64 requests of a tiny model a twentieth of a step. What is called instead is what it calls itself, under the same names
in 0.25.1 and 0.32.0: `vllm/v1/engine/llm_engine.py`, `add_request` and `step`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.errors import RunFailed

if TYPE_CHECKING:
    from vllm import SamplingParams

FINISHED = frozenset((None, "stop", "length"))
"""Reasons for which a request may end; None: it goes on."""


@dataclass(frozen=True, slots=True)
class CoreTokens:
    """What a step added to a request."""

    name: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None


class EngineCore:
    """The requests in an engine of this process, by names of the caller's.

    Args:
        llm_engine: vLLM's; not given requests in another way while any of these run.
    """

    def __init__(self, llm_engine: Any) -> None:
        self._core, self._processor = llm_engine.engine_core, llm_engine.input_processor
        self._inner = self._core.engine_core  # the client's own engine: it is in this process
        self._tasks = llm_engine.get_supported_tasks()
        self._name_of: dict[str, str] = {}
        """By vLLM's id, which is another one each time that a name is added."""
        self._id_of: dict[str, str] = {}

    def add(self, name: str, prompt_ids: list[int], params: SamplingParams) -> None:
        """Take in a request, whose `params` ask for `logprobs=0`: those of the sampled tokens alone."""
        from vllm.inputs.engine import tokens_input

        request = self._processor.process_inputs(name, tokens_input(prompt_ids), params, supported_tasks=self._tasks)
        self._processor.assign_request_id(request)
        self._core.add_request(request)
        self._name_of[request.request_id], self._id_of[name] = name, request.request_id

    def abort(self, names: Iterable[str]) -> None:
        """Forget requests; unknown names are fine."""
        ids = [self._id_of.pop(name) for name in names if name in self._id_of]
        for request_id in ids:
            del self._name_of[request_id]
        self._core.abort_requests(ids)

    def clear(self) -> None:
        """Forget all requests, and wait for the step that is under way, if there is one: its tokens are dropped."""
        self.abort(list(self._id_of))
        while self._inner.batch_queue:
            self._core.get_output()

    def one_step_at_a_time(self) -> None:
        """From now on no step begins before the last one's tokens are known. To be called when all is clear."""
        self._inner.batch_queue_size = 1

    def step(self) -> list[CoreTokens]:
        """One step of the engine; what it gave, request by request.

        With asynchronous scheduling this begins a step and gives the tokens of the one before.

        Raises:
            RunFailed: a request ended for another reason than a stop token or its length.
        """
        steps = []
        for output in self._core.get_output().outputs:
            name = self._name_of.get(output.request_id)
            if name is None:
                continue
            reason = None if output.finish_reason is None else str(output.finish_reason)
            if reason not in FINISHED or output.new_logprobs is None:
                raise RunFailed(f"vLLM ended request {name} with {reason!r}, not `stop` or `length`")
            if reason is not None:
                del self._name_of[output.request_id], self._id_of[name]
            logprobs = output.new_logprobs.logprobs[:, 0].tolist()  # the sampled token's column comes first
            steps.append(CoreTokens(name, list(output.new_token_ids), logprobs, reason))
        return steps
