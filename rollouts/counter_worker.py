"""vLLM's worker with random numbers that depend on a request's seed and a token's position alone.

vLLM (V1 model runner, 0.25 to 0.32) gives every seeded request a `torch.Generator` whose state is its history. Here
the sampler draws by `rollouts.randomness` instead, so that a request which continues from the write-ahead log gives
the tokens it would have given without the interruption, on any engine and in any batch.

Generators are dropped before every sampling. That also removes a defect: when a step holds only a part of a request's
prompt, vLLM samples a token for it all the same, throws it away, and rewinds the request's generator by CUDA's
counter (`generator.set_offset(generator.get_offset() - 4)`, vllm/v1/worker/gpu_model_runner.py:3502 in 0.32.0,
https://github.com/vllm-project/vllm/pull/10097). CPU generators have no counter, so the engine would end with
`RuntimeError: CPU Generator does not use offset`.

vLLM's own option `worker_cls` puts `CounterWorker` in place, on CPUs and GPUs alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

from rollouts.randomness import draw, position_keys

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker


class CounterSampler(TopKTopPSampler):
    """Top-k and top-p as vLLM does them; then a draw by the rows' keys.

    Attributes:
        keys_B: The keys of the rows of the coming call; None in vLLM's own trial runs, which have no requests.
        watch: Is shown the logits after top-k and top-p.
    """

    def __init__(self, logprobs_mode: Any) -> None:
        super().__init__(logprobs_mode)
        self.keys_B: torch.Tensor | None = None
        self.watch: Callable[[torch.Tensor], None] | None = None
        # The parent stores its choice of a method on the instance, which would hide ours.
        self.forward = self._forward

    def _forward(
        self,
        logits_BV: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.keys_B is None:
            return self.forward_native(logits_BV, generators, k, p)
        logits_BV = apply_top_k_top_p(logits_BV, k, p)
        if self.watch is not None and (k is not None or p is not None):
            self.watch(logits_BV)
        reported = None
        if self.logprobs_mode == "processed_logits":
            reported = logits_BV
        elif self.logprobs_mode == "processed_logprobs":
            reported = logits_BV.log_softmax(dim=-1, dtype=torch.float32)
        return draw(logits_BV, self.keys_B), reported


class CounterRunner:
    """Mixed into vLLM's model runner: hands the rows' keys to the sampler."""

    def _sample(self: Any, logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None:
            raise RuntimeError("counter-based random numbers and speculative decoding do not go together")
        self.input_batch.generators.clear()
        sampler = self.sampler.topk_topp_sampler
        sampler.keys_B = torch.from_numpy(self._keys()).to(self.device, non_blocking=True)
        try:
            return super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]
        finally:
            sampler.keys_B = None

    def _keys(self: Any) -> np.ndarray:
        """[B] keys. The next token's index is the length of the row, a token still on its way counted."""
        batch = self.input_batch
        seeds = [self._seed(request_id) for request_id in batch.req_ids]
        return position_keys(np.array(seeds, dtype=np.uint64), batch.num_tokens_no_spec[: batch.num_reqs])

    def _seed(self: Any, request_id: str) -> int:
        seed = self.requests[request_id].sampling_params.seed
        return random.getrandbits(63) if seed is None else seed & (2**64 - 1)


class CounterWorker(PlatformWorker):
    """A worker whose model runner and sampler are the ones above."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        # The parent names its runner's class in the middle of a long method; ours adds methods and no state.
        runner.__class__ = type("CounterModelRunner", (CounterRunner, type(runner)), {})
        runner.sampler.topk_topp_sampler = CounterSampler(runner.sampler.logprobs_mode)
