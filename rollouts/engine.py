"""One vLLM engine in this process: weights in by version, completions with their log-probabilities out."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput, RunFailed
from rollouts.settings import EngineSettings, check_prompts, read_eos_token_ids
from rollouts.types import Completion, Sampling

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput, RequestOutput

    from rollouts.loading import Verification

SCORING_TEMPERATURE = 1.0
"""vLLM computes the log-probabilities of prompt tokens from the raw logits, whatever the temperature."""


@dataclass(frozen=True)
class EngineInfo:
    """What the other side needs to know of an engine that is ready."""

    vocab_size: int
    max_model_len: int
    start_seconds: float


class Engine:
    """A vLLM engine that starts without weights and serves nothing before it was given some.

    The process's environment must be `rollouts.settings.engine_environment` before torch and vllm are imported.

    Attributes:
        version: The version of the weights that stand in the engine; None before the first and after a failed load.

    Raises:
        BadInput: settings that the described model cannot serve.
    """

    def __init__(self, settings: EngineSettings) -> None:
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS"):
            if name not in os.environ:
                raise RuntimeError(f"{name} is not set: start engines with rollouts.settings.engine_environment")
        check_context(settings)
        begin = time.monotonic()
        if settings.kind == "native":
            from rollouts.plugin import register

            register()
        from vllm import LLM

        self.settings = settings
        self.version: int | None = None
        self._highest_version = -1
        self._eos_token_ids = read_eos_token_ids(settings.description)
        self._llm = LLM(**_engine_arguments(settings))
        self.info = EngineInfo(
            vocab_size=self._llm.model_config.get_vocab_size(),
            max_model_len=self._llm.model_config.max_model_len,
            start_seconds=time.monotonic() - begin,
        )

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> Verification:
        """Replace all weights, verify them in place, forget every cached prefix.

        Args:
            weights: Name → tensor, complete: our own model's state dict (`native`) or the checkpoint's names (`vllm`).
            version: Higher than every version before.

        Raises:
            RunFailed: names or shapes that do not fit, an engine that does not hold what it was sent, or a version
                that is not higher. After a failed load the engine serves nothing until the next good one.
        """
        from rollouts.loading import load_native, load_vllm

        if version <= self._highest_version:
            raise RunFailed(f"weights of version {version} after version {self._highest_version}: versions must grow")
        self.version = None
        if self.settings.kind == "native":
            verification = self._llm.apply_model(lambda model: load_native(model, weights))[0]
        else:
            verification = load_vllm(self._llm, Path(self.settings.description), weights)
        if not self._llm.reset_prefix_cache():
            raise RunFailed("the engine could not drop its prefix cache: it would mix two versions of the weights")
        self.version = self._highest_version = version
        return verification

    def generate(self, prompts: list[list[int]], sampling: Sampling, first_index: int = 0) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt.

        What is sampled for a prompt depends on the weights, the prompt, `sampling` and the prompt's global index
        (`first_index` + row), and on nothing else: not on the engine, the split or what else is in the batch.
        At temperature 0 the most likely token is taken, and the log-probabilities are those of temperature 1.

        Raises:
            BadInput: a prompt that cannot be served (the message names its index).
            RunFailed: no weights yet.
        """
        from vllm.inputs import TokensPrompt

        version = self._require_weights()
        check_prompts(prompts, sampling.max_tokens, self.info.max_model_len, self.info.vocab_size, first_index)
        requests, params = [], []
        for index, prompt in enumerate(prompts, start=first_index):
            for sample in range(sampling.n):
                requests.append(TokensPrompt(prompt_token_ids=prompt))
                params.append(self._sampling_params(sampling, index, sample))
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        completions = [_completion(output.outputs[0], version) for output in outputs]
        return [completions[start : start + sampling.n] for start in range(0, len(completions), sampling.n)]

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """Log-probability of each completion token, from prefill alone, at temperature 1.

        Compared with what `generate` reported at temperature 1 this checks decode against prefill.

        Raises:
            BadInput: a row that cannot be served, or an empty completion.
            RunFailed: no weights yet.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._require_weights()
        # The last token is scored as the next token of the rest, so that a full context still fits.
        texts = [prompt + completion[:-1] for prompt, completion in zip(prompts, completions, strict=True)]
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if not completion:
                raise BadInput(f"completion {row} is empty; there is nothing to score")
            check_prompts([prompt], len(completion), self.info.max_model_len, self.info.vocab_size, row)
        params = [
            SamplingParams(
                max_tokens=1,
                temperature=SCORING_TEMPERATURE,
                prompt_logprobs=0,
                logprob_token_ids=[completion[-1]],
                detokenize=False,
                skip_clone=True,
            )
            for completion in completions
        ]
        outputs = self._llm.generate([TokensPrompt(prompt_token_ids=text) for text in texts], params, use_tqdm=False)
        return [_scores(*row) for row in zip(outputs, prompts, completions, strict=True)]

    def _require_weights(self) -> int:
        if self.version is None:
            raise RunFailed("the engine has no weights: publish some before asking it to generate or score")
        return self.version

    def _sampling_params(self, sampling: Sampling, prompt_index: int, sample_index: int) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request_seed(sampling.seed, prompt_index, sample_index),
            stop_token_ids=self._eos_token_ids,
            logprobs=0,
            detokenize=False,
            skip_clone=True,
        )


def request_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """The seed of one request: a stable hash, so that no two streams of a run are related. 63 bits.

    vLLM's own rule for n > 1, `seed + index`, would give neighbouring prompts the same streams.
    """
    digest = hashlib.blake2b(struct.pack("<3q", seed, prompt_index, sample_index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": settings.description,
        "load_format": "dummy",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "enforce_eager": True,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        # Without this two engines on one machine would each claim most of its memory.
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        # The default reports log-probabilities before the temperature is applied.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        arguments["worker_cls"] = "rollouts.cpu_worker.SeedSafeCPUWorker"
    else:
        # The caches' size is given; this only says how much must be free at the start, beside a trainer perhaps.
        arguments["gpu_memory_utilization"] = 0.05
        # It would try kernels that our model does not call.
        arguments["enable_flashinfer_autotune"] = False
    return arguments


def check_context(settings: EngineSettings) -> None:
    """Raise BadInput when the described model has fewer positions than `settings.max_model_len`."""
    config = json.loads((Path(settings.description) / "config.json").read_text())
    allowed = config.get("max_position_embeddings")
    if allowed is not None and settings.max_model_len > allowed:
        raise BadInput(
            f"rollout.max_model_len is {settings.max_model_len}, but the model's max_position_embeddings is {allowed}: "
            f"set rollout.max_model_len to {allowed} or less"
        )


def _completion(output: CompletionOutput, version: int) -> Completion:
    token_ids = list(output.token_ids)
    if output.finish_reason not in ("stop", "length") or output.logprobs is None:
        raise RunFailed(f"vLLM ended a request with {output.finish_reason!r} instead of `stop` or `length`")
    logprobs = [position[token].logprob for position, token in zip(output.logprobs, token_ids, strict=True)]
    return Completion(token_ids, logprobs, output.finish_reason, version)


def _scores(output: RequestOutput, prompt: list[int], completion: list[int]) -> list[float]:
    inner = output.prompt_logprobs[len(prompt) :] if output.prompt_logprobs else []
    positions = [*inner, output.outputs[0].logprobs[0]]  # type: ignore[index]
    return [position[token].logprob for position, token in zip(positions, completion, strict=True)]  # type: ignore[index]
