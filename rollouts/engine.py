"""One vLLM engine in this process: weights in by version, completions with their log-probabilities out."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput, RunFailed
from rollouts.core import EngineCore
from rollouts.masks import KEY as MASK_KEY
from rollouts.masks import MaskCapture, joined_masks, masks_of_tokens
from rollouts.routes import KEY as ROUTES_KEY
from rollouts.routes import joined_routes
from rollouts.settings import EngineInfo, EngineSettings, check_prompts, read_eos_token_ids, request_problem
from rollouts.types import Completion, NewTokens, SampleRequest, Sampling
from rollouts.weights import checksum_of, shown

if TYPE_CHECKING:
    import torch
    from vllm.outputs import RequestOutput

    from rollouts.loading import Verification
    from rollouts.routes import RouteCapture

SCORING_TEMPERATURE = 1.0
"""vLLM computes the log-probabilities of prompt tokens from the raw logits, whatever the temperature."""


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

        from rollouts.loading import standing_weights

        self.settings = settings
        self.version: int | None = None
        self._highest_version = -1
        self._eos_token_ids = read_eos_token_ids(settings.description)
        self._samples: dict[str, SampleRequest] = {}
        self._routes: RouteCapture | None = None
        self._masks: MaskCapture | None = None
        # vLLM collects garbage again and again while it starts, through all that was imported (1.3 s).
        gc.freeze()
        self._llm = LLM(**_engine_arguments(settings))
        self._core = EngineCore(self._llm.llm_engine)
        self._weights = standing_weights(self._llm, settings.kind, settings.description)
        self.info = EngineInfo(
            vocab_size=self._llm.model_config.get_vocab_size(),
            max_model_len=self._llm.model_config.max_model_len,
            start_seconds=time.monotonic() - begin,
        )

    def load_weights(
        self, weights: Mapping[str, torch.Tensor], version: int, checksums: Mapping[str, str] | None = None
    ) -> Verification:
        """Replace the weights, verify them in place, forget every cached prefix.

        Samples in progress go on under the new weights, which compute the caches of their tokens so far anew.

        Args:
            weights: Name → tensor: our own model's state dict (`native`) or the checkpoint's names (`vllm`). Complete,
                or with `checksums` at least what `lacking` names.
            version: Higher than every version before.
            checksums: Of all weights (`rollouts.weights.checksum_of`); default: they are taken here.

        Raises:
            RunFailed: names or shapes that do not fit, an engine that does not hold what it was sent, or a version
                that is not higher. After a failed load the engine serves nothing until the next good one.
        """
        if version <= self._highest_version:
            raise RunFailed(f"weights of version {version} after version {self._highest_version}: versions must grow")
        self.version = None
        with self._at_rest():
            if checksums is None:
                checksums = {name: checksum_of(tensor) for name, tensor in weights.items()}
            verification = self._weights.load(weights, checksums)
            if not self._llm.reset_prefix_cache():
                raise RunFailed("the engine could not drop its prefix cache: it would mix two versions of the weights")
            self.version = self._highest_version = version
        return verification

    def lacking(self, checksums: Mapping[str, str]) -> set[str]:
        """Names of the tensors that `load_weights` needs to bring the engine to weights of these checksums."""
        return self._weights.lacking(checksums)

    def audit(self) -> None:
        """Compare the weights in the engine's memory with those that were loaded and verified.

        Raises:
            RunFailed: a bit of them has changed. The engine then serves nothing until a good load; best replace it.
        """
        if self.version is not None and (changed := self._weights.audit()):
            version, self.version = self.version, None
            raise RunFailed(f"weights of version {version} have changed in the engine's memory: {shown(changed)}")

    @property
    def samples(self) -> Mapping[str, SampleRequest]:
        """The samples in progress, with their tokens so far."""
        return self._samples

    def add(self, request: SampleRequest) -> None:
        """Take in a sample, fresh or resumed; it runs from the next step on, or once there are weights.

        Its next token depends on the weights, prompt, tokens so far, `request.sampling` and `request.seed`, and on
        nothing else: not on the engine, nor on what else it samples, nor on an interruption.

        Raises:
            BadInput: a prompt that cannot be served, a stop token outside the vocabulary, or routes of a model that
                does not return them.
        """
        if request.sampling.routes and self._routes is None:
            self._watch_routes()
        if request.sampling.masks and self._masks is None:
            self._watch_masks()
        if problem := request_problem(request.prompt_ids, request.sampling, self.info):
            raise BadInput(f"the prompt of request {request.id} {problem}")
        # A copy: it grows with every step.
        sample = replace(request, token_ids=list(request.token_ids))
        if self.version is not None:
            self._enter(sample)
        self._samples[sample.id] = sample

    def abort(self, ids: Iterable[str]) -> None:
        """Forget samples; unknown ids are fine."""
        known = [sample_id for sample_id in ids if self._samples.pop(sample_id, None)]
        self._core.abort(known)
        if self._routes is not None:
            self._routes.forget(known)
        if self._masks is not None:
            self._masks.forget(known)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return self.version is not None and bool(self._samples)

    def step(self) -> list[NewTokens]:
        """One step of continuous batching: a token for each running sample whose prompt is in the cache.

        On a GPU those of the step before (docs/plugin.md, "A step ahead").
        """
        assert self.version is not None
        steps = []
        outputs = self._core.step()
        if self._routes is not None:
            self._routes.collect()
        for output in outputs:
            token_ids = self._samples[output.name].token_ids
            new = NewTokens(
                output.name, len(token_ids), output.token_ids, output.logprobs, self.version, output.finish_reason
            )
            token_ids.extend(new.token_ids)
            if self._routes is not None:
                new.routes = self._routes.take(new.id)
            if self._masks is not None:
                new.mask = self._masks.take(new.id)
            if new.finish_reason is not None:
                del self._samples[new.id]
                if self._routes is not None:
                    self._routes.forget([new.id])
            steps.append(new)
        return steps

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt, in this thread.

        At temperature 0 the most likely token is taken, and the log-probabilities are those of temperature 1.

        Raises:
            BadInput: a prompt that cannot be served (the message names its row).
            RunFailed: no weights yet.
        """
        version = self._require_weights()
        check_prompts(prompts, sampling.max_tokens, self.info.max_model_len, self.info.vocab_size)
        parts: dict[str, list[NewTokens]] = {}
        for row, prompt in enumerate(prompts):
            for number in range(sampling.n):
                seed = request_seed(sampling.seed, row, number)
                parts[f"{row}#{number}"] = []
                self.add(SampleRequest(f"{row}#{number}", prompt, [], sampling, seed))
        while self._samples:
            for new in self.step():
                parts[new.id].append(new)
        lengths = [len(prompt) for prompt in prompts for _ in range(sampling.n)]
        completions = [_joined(*sample, version) for sample in zip(parts.values(), lengths, strict=True)]
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
        prompts_given = [TokensPrompt(prompt_token_ids=text) for text in texts]
        # vLLM would step the samples in progress as well, and drop their tokens.
        with self._at_rest():
            outputs = self._llm.generate(prompts_given, params, use_tqdm=False)
        return [_scores(*row) for row in zip(outputs, prompts, completions, strict=True)]

    def _require_weights(self) -> int:
        if self.version is None:
            raise RunFailed("the engine has no weights: publish some before asking it to generate or score")
        return self.version

    @property
    def _runner(self) -> Any:
        """vLLM's model runner: the engine is in this process."""
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def _watch_routes(self) -> None:
        from rollouts.routes import RouteCapture

        if self.settings.kind != "native":
            raise BadInput(
                "routes can be had from rollout.engine: native alone; vLLM returns those of its own models only with "
                "its second model runner, which samples by random numbers that depend on the batch"
            )
        runner = self._runner
        with self._at_rest():
            self._core.one_step_at_a_time()
            self._routes = self._llm.apply_model(lambda model: RouteCapture(model, runner))[0]

    def _watch_masks(self) -> None:
        runner = self._runner
        with self._at_rest():
            self._core.one_step_at_a_time()
            self._masks = runner.sampler.topk_topp_sampler.watch = MaskCapture(runner)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """No request in vLLM and no step under way; afterwards the samples enter it again, if there are weights."""
        self._core.clear()
        try:
            yield
        finally:
            if self.version is not None:
                for sample in self._samples.values():
                    self._enter(sample)

    def _enter(self, sample: SampleRequest) -> None:
        """Hand a sample to vLLM, whose prompt then is everything so far."""
        from vllm import SamplingParams

        sampling = sample.sampling
        params = SamplingParams(
            max_tokens=sampling.max_tokens - len(sample.token_ids),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sample.seed,
            stop_token_ids=[*self._eos_token_ids, *sampling.stop_token_ids],
            logprobs=0,
            detokenize=False,
            skip_clone=True,
            # What comes out of the prefix cache passes no router.
            skip_reading_prefix_cache=sampling.routes,
            extra_args={
                key: sample.id for key, asked in ((ROUTES_KEY, sampling.routes), (MASK_KEY, sampling.masks)) if asked
            }
            or None,
        )
        self._core.add(sample.id, [*sample.prompt_ids, *sample.token_ids], params)


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
        # On a GPU a step is scheduled while the one before computes; `_at_rest` waits for it.
        "async_scheduling": not current_platform.is_cpu(),
        # Without this two engines on one machine would each claim most of its memory.
        "kv_cache_memory_bytes": settings.kv_cache_bytes,
        # The default reports log-probabilities before the temperature is applied.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "worker_cls": "rollouts.counter_worker.CounterWorker",
    }
    if not current_platform.is_cpu():
        # The caches' size is given; this only says how much must be free at the start, beside a trainer perhaps.
        arguments["gpu_memory_utilization"] = 0.05
        # It would try kernels that our model does not call.
        arguments["enable_flashinfer_autotune"] = False
        if settings.kind == "vllm" and _model_type(settings) == "deepseek_v4":
            arguments["kv_cache_dtype"] = "fp8"  # the only one that its kernels have
    return arguments


def _model_type(settings: EngineSettings) -> str | None:
    return json.loads((Path(settings.description) / "config.json").read_text()).get("model_type")


def check_context(settings: EngineSettings) -> None:
    """Raise BadInput when the described model has fewer positions than `settings.max_model_len`."""
    config = json.loads((Path(settings.description) / "config.json").read_text())
    allowed = config.get("max_position_embeddings")
    if allowed is not None and settings.max_model_len > allowed:
        raise BadInput(
            f"rollout.max_model_len is {settings.max_model_len}, but the model's max_position_embeddings is {allowed}: "
            f"set rollout.max_model_len to {allowed} or less"
        )


def _joined(steps: list[NewTokens], prompt_tokens: int, version: int) -> Completion:
    token_ids = [token for step in steps for token in step.token_ids]
    logprobs = [value for step in steps for value in step.logprobs]
    completion = Completion.of_version(token_ids, logprobs, str(steps[-1].finish_reason), version)
    masks = joined_masks([mask for step in steps for mask in masks_of_tokens(step)])
    return replace(completion, routes=joined_routes([step.routes for step in steps], prompt_tokens), masks=masks)


def _scores(output: RequestOutput, prompt: list[int], completion: list[int]) -> list[float]:
    inner = output.prompt_logprobs[len(prompt) :] if output.prompt_logprobs else []
    positions = [*inner, output.outputs[0].logprobs[0]]  # type: ignore[index]
    return [position[token].logprob for position, token in zip(positions, completion, strict=True)]  # type: ignore[index]
