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


def write_description(checkpoint: str | Path, directory: str | Path, kind: EngineKind) -> None:
    """Write the model description that engines start from, out of a checkpoint's configuration files.

    Args:
        checkpoint: A checkpoint directory; its weights are not read.
        directory: Where to write; replaced if it exists.
        kind: The engine that will read it.

    Raises:
        BadInput: no `config.json` in `checkpoint`, or no end-of-sequence token in its configuration.
    """
    checkpoint = Path(checkpoint)
    config = _read_json(checkpoint / "config.json")
    eos_token_ids = _eos_token_ids(checkpoint)
    with atomic_directory(directory) as temporary:
        if kind == "native":
            from rollouts.plugin import write_engine_config

            write_engine_config(config, temporary)
        else:
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {"eos_token_id": eos_token_ids}
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


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
        if not prompt:
            raise BadInput(f"prompt {row} is empty; every prompt needs at least one token")
        if len(prompt) + max_tokens > max_model_len:
            raise BadInput(
                f"prompt {row} has {len(prompt)} tokens and asks for up to {max_tokens} more; rollout.max_model_len is "
                f"{max_model_len}: shorten the prompt, lower max_new_tokens or raise rollout.max_model_len"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise BadInput(f"prompt {row} has a token id outside the model's vocabulary (0 to {vocab_size - 1})")
