"""What the benchmarks of the rollout service share: a tiny V4 whose answers have many lengths, and killing."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from posttrain.cluster import reach_other_machines
from posttrain.files import atomic_write
from rollouts.types import FinishedGroup, GroupRequest, Sampling

PROMPT = 12
MAX_TOKENS = 240
STOP_TOKEN = 2
"""Ends answers, besides the end token: of 128 tokens, about equally likely, so that answers have some 60 tokens."""


def write_checkpoint(directory: Path) -> None:
    """`checkpoint` and `description` of the model, unless they are there."""
    import torch

    from benchmarks.models import v4_config
    from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
    from rollouts.settings import write_description

    if (directory / "description").exists():
        return
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(v4_config())
    model.save_pretrained(directory / "checkpoint")
    write_description(directory / "checkpoint", directory / "description", "native")


@contextmanager
def rollout_pool(directory: Path, log: Path, workers: int = 2, spares: int = 1, **options: Any) -> Iterator[Any]:
    """Ray and a pool whose workers have the weights of `write_checkpoint`, as version 1."""
    import ray

    from posttrain.recipe.schema import RolloutConfig
    from rollouts.pool import RolloutPool
    from rollouts.settings import engine_settings

    config = RolloutConfig(max_model_len=256, max_num_seqs=64, max_num_batched_tokens=512, kv_cache_mib=32)
    settings = engine_settings(directory / "description", "native", config, threads=1)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    reach_other_machines(False)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    try:
        with RolloutPool(settings, workers, directory=log, spares=spares, **options) as pool:
            pool.client().load_checkpoint(directory / "checkpoint", 1)
            yield pool
    finally:
        ray.shutdown()


def make_groups(count: int, samples: int, seed: int = 0, name: str = "group") -> list[GroupRequest]:
    """Prompts of random tokens."""
    chance = random.Random(seed)
    sampling = Sampling(MAX_TOKENS, n=samples, seed=seed, stop_token_ids=(STOP_TOKEN,))
    prompts = [[chance.randrange(2, 128) for _ in range(PROMPT)] for _ in range(count)]
    return [GroupRequest(f"{name}/{row}", prompt, sampling, row) for row, prompt in enumerate(prompts)]


def data_line(group: FinishedGroup) -> str:
    """A group as training data, to the last bit."""
    completions = [
        [one.token_ids, [value.hex() for value in one.logprobs], one.finish_reason, one.versions]
        for one in group.completions
    ]
    return json.dumps([group.request.id, completions, group.failure])


def read_lines(path: Path) -> dict[str, str]:
    """Id → line of a file of `data_line`s; a line that was being written is cut off.

    Raises:
        RuntimeError: a group that is there twice.
    """
    if not path.exists():
        return {}
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(whole) + 1 if whole else 0)
    found: dict[str, str] = {}
    for line in whole.decode().splitlines():
        name = json.loads(line)[0]
        if name in found:
            raise RuntimeError(f"{name} was consumed twice")
        found[name] = line
    return found


def write_processes(path: Path, client: Any) -> None:
    """The processes of a service, for one who wants to kill them, and how long replacements took."""
    stats = client.service_stats()
    found = {"driver": [os.getpid()], "service": [stats.pid], "worker": [*stats.workers.values()]}
    atomic_write(path, json.dumps({**found, "epoch": stats.epoch, "recovery_seconds": stats.recovery_seconds}))


def kill_one(path: Path, kind: str, chance: random.Random) -> bool:
    """SIGKILL for one process of a kind that `write_processes` named; whether there was one."""
    with suppress(FileNotFoundError, ProcessLookupError, IndexError):
        os.kill(chance.choice(json.loads(path.read_text())[kind]), signal.SIGKILL)
        return True
    return False
