"""What an engine is started from: its settings, and a directory that describes its model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import BadInput
from posttrain.files import atomic_directory

if TYPE_CHECKING:
    from posttrain.recipe.schema import RolloutConfig
    from rollouts.types import Sampling

EngineKind = Literal["native", "vllm"]
"""`native`: our V4 on our op table inside vLLM (the plugin). `vllm`: an implementation of vLLM's own."""


@dataclass(frozen=True)
class EngineSettings:
    """Everything an engine process needs to start; picklable."""

    description: str
    """Directory with `config.json` and `generation_config.json` (`write_description` makes one). No weights."""
    kind: EngineKind
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: int = 256
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    kv_cache_bytes: int = 64 << 20
    threads: int = 1
    kernels: str | None = None
    """Implementation of the op table; None: the device's own."""


@dataclass(frozen=True)
class EngineInfo:
    """What the other side needs to know of an engine that is ready."""

    vocab_size: int
    max_model_len: int
    start_seconds: float


def engine_kind(family: Literal["deepseek_v4", "hf"], rollout: RolloutConfig) -> EngineKind:
    """The implementation a recipe asks for. Only V4 has a native one; `hf` models always run on vLLM's own."""
    return rollout.engine if family == "deepseek_v4" else "vllm"


def engine_settings(
    description: str | Path, kind: EngineKind, rollout: RolloutConfig, threads: int, kernels: str | None = None
) -> EngineSettings:
    """Settings from a recipe's `rollout` section, `cluster.threads` and `model.kernels`."""
    return EngineSettings(
        description=str(Path(description).resolve()),
        kind=kind,
        dtype=rollout.dtype,
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        kv_cache_bytes=rollout.kv_cache_mib << 20,
        threads=threads,
        kernels=kernels,
    )


def write_description(checkpoint: str | Path, directory: str | Path, kind: EngineKind, quantised: bool = True) -> None:
    """Write the model description that engines start from, out of a checkpoint's configuration files.

    Args:
        checkpoint: A checkpoint directory; its weights are not read.
        directory: Where to write; replaced if it exists.
        kind: The engine that will read it.
        quantised: Whether vLLM's own V4 is to hold its weights in FP8 and MXFP4, or in bf16.

    Raises:
        BadInput: no `config.json` in `checkpoint`, no end-of-sequence token in its configuration, or a V4 whose sizes
            vLLM's own does not know.
    """
    checkpoint = Path(checkpoint)
    config = _read_json(checkpoint / "config.json")
    eos_token_ids = _eos_token_ids(checkpoint)
    with atomic_directory(directory) as temporary:
        if kind == "native":
            from rollouts.plugin import write_engine_config

            write_engine_config(config, temporary)
        elif config.get("model_type") == "deepseek_v4":
            released = _released_config(checkpoint, quantised)
            (temporary / "config.json").write_text(json.dumps(released, indent=2) + "\n")
        else:
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {"eos_token_id": eos_token_ids}
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _released_config(checkpoint: Path, quantised: bool) -> dict[str, Any]:
    from posttrain.models.deepseek_v4.checkpoint import read_config
    from posttrain.models.deepseek_v4.export import engine_obstacles, released_config_dict

    config = read_config(checkpoint)
    if obstacles := engine_obstacles(config):
        raise BadInput(
            f"{checkpoint}: rollout.engine: vllm cannot run this model: {'; '.join(obstacles)}; use `native`"
        )
    return released_config_dict(config, "fp8_fp4" if quantised else "bf16")


def read_eos_token_ids(description: str | Path) -> list[int]:
    """The tokens that end an answer, of a directory that `write_description` wrote."""
    return list(_read_json(Path(description) / "generation_config.json")["eos_token_id"])


def _eos_token_ids(checkpoint: Path) -> list[int]:
    """From `generation_config.json` when it is there (transformers lets it win too), else from `config.json`."""
    for name in ("generation_config.json", "config.json"):
        if (checkpoint / name).exists():
            value = _read_json(checkpoint / name).get("eos_token_id")
            if value is not None:
                return [value] if isinstance(value, int) else list(value)
    raise BadInput(
        f"{checkpoint}: neither generation_config.json nor config.json has eos_token_id; answers could never end"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path.parent}: not a checkpoint directory, {path.name} is missing") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from error


def engine_environment(threads: int, kernels: str | None = None) -> dict[str, str]:
    """Environment variables of an engine process; they must be set before it imports torch or vllm."""
    inherited = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root]),
        "OMP_NUM_THREADS": str(threads),
        # The engine lives in the actor's own process: one process instead of three, and tensors can be handed over.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The runner that vLLM has for CPUs and GPUs alike; the other one samples by kernels of its own.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # Otherwise the first request with log-probabilities waits for a C++ compiler, and fails where there is none.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # An engine reads nothing but its description directory.
        "HF_HUB_OFFLINE": "1",
    }
    if kernels is not None:
        environment["POSTTRAIN_KERNELS"] = kernels
    if "RAY_AUTH_MODE" in os.environ:
        environment["RAY_AUTH_MODE"] = os.environ["RAY_AUTH_MODE"]
    return environment


def check_prompts(
    prompts: Iterable[list[int]], max_tokens: int, max_model_len: int, vocab_size: int, first_index: int = 0
) -> None:
    """Reject what an engine could not serve, before it gets there.

    Raises:
        BadInput: an empty prompt, a prompt that leaves no room for `max_tokens` more, or a token outside the
            vocabulary; the message names the row.
    """
    for row, prompt in enumerate(prompts, start=first_index):
        if problem := _prompt_problem(prompt, max_tokens, max_model_len, vocab_size):
            raise BadInput(f"prompt {row} {problem}")


def _prompt_problem(prompt: list[int], max_tokens: int, max_model_len: int, vocab_size: int) -> str | None:
    if not prompt:
        return "is empty; every prompt needs at least one token"
    if len(prompt) + max_tokens > max_model_len:
        return (
            f"has {len(prompt)} tokens and asks for up to {max_tokens} more; rollout.max_model_len is "
            f"{max_model_len}: shorten the prompt, lower max_new_tokens or raise rollout.max_model_len"
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        return f"has a token id outside the model's vocabulary (0 to {vocab_size - 1})"
    return None


def request_problem(prompt: list[int], sampling: Sampling, info: EngineInfo) -> str | None:
    """What is wrong with a request, to be put after the words for its prompt; None if it can be served."""
    for name, least in (("max_tokens", 1), ("n", 1), ("temperature", 0)):
        if not getattr(sampling, name) >= least:
            return f"asks for sampling.{name} {getattr(sampling, name)}; it must be at least {least}"
    if not 0 < sampling.top_p <= 1:
        return f"asks for sampling.top_p {sampling.top_p}; it must be above 0 and at most 1"
    for token in sampling.stop_token_ids:
        if not 0 <= token < info.vocab_size:
            return f"has the stop token {token}, which is not in the model's vocabulary (0 to {info.vocab_size - 1})"
    return _prompt_problem(prompt, sampling.max_tokens, info.max_model_len, info.vocab_size)
