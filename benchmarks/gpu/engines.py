"""Random V4s and vLLM engines in one process with a trainer, without Ray: what `agreement` and `decode` begin with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from posttrain.files import atomic_write
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config
from posttrain.models.deepseek_v4.checkpoint import FLOAT32
from posttrain.models.deepseek_v4.config import native_config_dict
from posttrain.models.deepseek_v4.presets import HEAVY, SLIDING, SPARSE
from rollouts.settings import EngineKind, EngineSettings, engine_environment, write_description

SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "n_routed_experts": 64,
    "layer_types": [SLIDING, SPARSE, HEAVY, SPARSE],
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "o_lora_rank": 128,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""One layer of each kind and another; everything that is not named here has V4-Flash's size."""

WIDE: dict[str, Any] = {**SMALL, "num_attention_heads": 64}
"""With as many heads as V4-Flash: on Hopper another kernel then computes attention (`kernels.attention.hopper`)."""

FLASH: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": [SPARSE, HEAVY],
    "mlp_layer_types": ["moe", "moe"],
    "max_position_embeddings": 8192,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Two layers of V4-Flash."""

SIZES = {"small": SMALL, "wide": WIDE, "flash": FLASH, "tiny": {"preset": "tiny", "vocab_size": 128, "eos_token_id": 1}}


@dataclass(frozen=True)
class Place:
    """Where trainer and engine run."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


def with_engine_environment() -> None:
    """Begin the process again in an engine's environment, unless it is in it: torch and vLLM read it when imported."""
    wanted = engine_environment(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if any(os.environ.get(name) != value for name, value in wanted.items() if name != "PYTHONPATH"):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


def config_of(size: str, fp4: bool = False) -> DeepseekV4Config:
    """A key of `SIZES`, with `fp4` under quantisation-aware training."""
    return make_config(SIZES[size], **({"precision": "bf16_fp4_experts"} if fp4 else {}))


def random_model(config: DeepseekV4Config, place: Place, seed: int = 0) -> DeepseekV4ForCausalLM:
    """Random weights on the device; matrices in the place's dtype, the rest in fp32. Nothing is left at 0 or 1."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if not FLOAT32.search(name):
            parameter.data = parameter.data.to(place.dtype)
    model.to_empty(device=place.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith(".ape"):
                around = 1.0 if name.endswith(("norm.weight", "scale")) else 0.0
                parameter.normal_(around, 0.1)
            else:
                parameter.normal_(0, config.initializer_range)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                orders = torch.rand(buffer.shape[0], config.n_routed_experts, device=place.device).argsort(1)
                buffer.copy_(orders[:, : buffer.shape[1]])
            elif name.endswith("bias"):
                buffer.normal_(0, 0.05)
    return model


def describe(config: DeepseekV4Config, directory: Path, kind: EngineKind = "native") -> Path:
    """A directory that an engine starts from; no token ends an answer, so that all have their full length."""
    checkpoint, description = directory / "checkpoint", directory / "description"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(native_config_dict(config)))
    write_description(checkpoint, description, kind)
    (description / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    return description


def start_engine(config: DeepseekV4Config, directory: Path, place: Place, **settings: Any) -> Any:
    """`rollouts.engine.Engine` on our model, without weights.

    Args:
        settings: fields of `EngineSettings`.
    """
    from vllm import ModelRegistry

    from rollouts.engine import Engine
    from rollouts.plugin import ARCHITECTURE
    from rollouts.plugin.model import PosttrainDeepseekV4ForCausalLM

    # By its class rather than its name, which vLLM would look at in a process of its own.
    ModelRegistry.register_model(ARCHITECTURE, PosttrainDeepseekV4ForCausalLM)
    description = str(describe(config, directory))
    dtype: Any = str(place.dtype).removeprefix("torch.")
    return Engine(EngineSettings(description=description, kind="native", dtype=dtype, **settings))


def random_prompts(lengths: list[int], vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def versions() -> dict[str, Any]:
    """What ran."""
    import triton
    import vllm

    from rollouts.plugin import compat

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": gpu,
        "interface": {"rate": compat.RATE_FIELD, "layouts": len(compat.LAYOUTS)},
    }


def packed(sequences: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    """Tokens `[T]` of all sequences, and where each begins and the last ends."""
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    return torch.tensor(list(chain(*sequences)), device=device), lengths.cumsum(0).to(device)


def alone(module: str, which: str, *options: str) -> dict[str, Any]:
    """`python -m MODULE --one WHICH` in a process of its own, and what it wrote; what it said last, where it failed."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        command = [sys.executable, "-m", module, "--one", which, *options, "--out", str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        return json.loads(out.read_text()) if out.exists() else {"error": done.stdout[-3000:]}


def give(results: dict[str, Any], out: Path | None) -> None:
    """Results as JSON, printed and, where asked for, written."""
    text = json.dumps(results, indent=2)
    if out:
        atomic_write(out, text + "\n")
    print(text)
