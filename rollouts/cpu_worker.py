"""vLLM's CPU worker, with seeded requests made safe under chunked prefill.

The defect: when a step holds only a part of a request's prompt, vLLM samples a token for it all the
same, throws it away, and rewinds the request's generator by CUDA's counter
(`generator.set_offset(generator.get_offset() - 4)`, vllm/v1/worker/gpu_model_runner.py:3502 in 0.32.0,
introduced in https://github.com/vllm-project/vllm/pull/10097). CPU generators have no counter, so every
seeded request whose prompt is split over two steps ends the engine with
`RuntimeError: CPU Generator does not use offset`. It strikes as soon as the waiting prompts hold more
tokens than `max_num_batched_tokens`.

The remedy: a request whose token will be thrown away is sampled without its generator, so there is
nothing to rewind, and its stream does not depend on how the prompt was split.

vLLM's own option `worker_cls` puts this class in place. `tests/test_rollouts_engine.py` has a test that
fails when vLLM no longer needs it; then delete this module and `worker_cls` in `rollouts/engine.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class SeedSafeModelRunner(CPUModelRunner):
    """A model runner that draws nothing from the generator of a request whose prompt is not complete."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        with self._without_generators_of_partial_prompts():
            return super().sample_tokens(grammar_output)

    @contextmanager
    def _without_generators_of_partial_prompts(self) -> Iterator[None]:
        """Take those generators out of the batch (the sampler reads the same dict) and put them back."""
        generators = self.input_batch.generators
        partial = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
        withheld = {row: generators.pop(row) for row in partial if row in generators}
        try:
            yield
        finally:
            generators.update(withheld)


class SeedSafeCPUWorker(CPUWorker):
    """A CPU worker whose model runner is the one above."""

    def init_device(self) -> None:
        super().init_device()
        # The parent names its runner's class in the middle of a long method; the runner has no state of its own here.
        assert type(self.model_runner) is CPUModelRunner, type(self.model_runner)
        self.model_runner.__class__ = SeedSafeModelRunner
