"""A checkpoint behind an OpenAI-compatible endpoint: vLLM's own server on the engine that training samples with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import BadInput
from posttrain.recipe.domains import Effort
from rollouts.settings import engine_environment, write_description

DEFAULTS: dict[Effort, dict[str, Any]] = {
    "chat": {"enable_thinking": False},
    "high": {"enable_thinking": True, "reasoning_effort": "low"},
    "max": {"enable_thinking": True, "reasoning_effort": "high"},
}
"""How vLLM's encoder names V4's efforts: as V4-Flash-0731 does, one step lower than the V4 report and recipes."""
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "chat_template.jinja")


def serve(checkpoint: Path, host: str, port: int, mode: Effort = "chat", extra: Sequence[str] = ()) -> int:
    """Serve until the server ends or this process is told to.

    Args:
        checkpoint: a directory. V4 runs on our own kernels, anything else on vLLM's model.
        mode: of V4's chat requests that do not say.
        extra: further options of vLLM's server; they win over ours.

    Returns:
        The server's exit code.

    Raises:
        BadInput: not a checkpoint with a tokenizer.
    """
    with tempfile.TemporaryDirectory(prefix="posttrain-serve-") as directory:
        command = server_command(checkpoint.resolve(), Path(directory) / "model", host, port, mode)
        process = subprocess.Popen([*command, *extra], env={**os.environ, **server_environment()})
        with _handed_on(process):
            return process.wait()


def server_command(checkpoint: Path, directory: Path, host: str, port: int, mode: Effort = "chat") -> list[str]:
    """The command line of vLLM's server; writes what it starts from into `directory` (a few small files)."""
    config = checkpoint / "config.json"
    if not config.is_file():
        raise BadInput(f"{checkpoint}: not a checkpoint directory, config.json is missing")
    if not (checkpoint / "tokenizer.json").is_file():
        raise BadInput(f"{checkpoint}: no tokenizer.json; a server needs the checkpoint's tokenizer")
    fields = json.loads(config.read_text())
    native = fields.get("model_type") == "deepseek_v4"
    options: dict[str, Any] = {
        "--model": checkpoint,
        "--served-model-name": checkpoint.name,
        "--host": host,
        "--port": port,
        "--generation-config": "vllm",
        "--worker-cls": "rollouts.counter_worker.CounterWorker",
    }
    if native:
        write_description(checkpoint, directory, "native")
        for pattern in TOKENIZER_FILES:
            for file in checkpoint.glob(pattern):
                shutil.copy(file, directory)
        options |= _native_options(checkpoint, directory, mode)
        # What it is written in: vLLM would round fp32 to 16 bits.
        options["--dtype"] = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    flags = ["--enforce-eager", "--enable-auto-tool-choice"] if native else ["--enforce-eager"]
    pairs = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags]


def _native_options(checkpoint: Path, directory: Path, mode: Effort) -> dict[str, Any]:
    from rollouts.plugin import LOAD_FORMAT
    from rollouts.plugin.loader import CHECKPOINT

    return {
        "--model": directory,
        "--load-format": LOAD_FORMAT,
        "--model-loader-extra-config": json.dumps({CHECKPOINT: str(checkpoint)}),
        # V4's chat format, reasoning and DSML tool calls, as vLLM reads and writes them.
        "--tokenizer-mode": "deepseek_v4",
        "--reasoning-parser": "deepseek_v4",
        "--tool-call-parser": "deepseek_v4",
        "--default-chat-template-kwargs": json.dumps(DEFAULTS[mode]),
    }


def server_environment() -> dict[str, str]:
    """An engine's, but for the engine's process (a server has it apart) and vLLM's messages, which a server shows."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    environment = engine_environment(threads)
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return environment | {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}


@contextmanager
def _handed_on(process: subprocess.Popen) -> Iterator[None]:
    """SIGTERM and SIGINT go to the server, which ends its engine; then we end with it."""

    def hand_on(number: int, frame: Any) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
