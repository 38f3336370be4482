"""Sampling: our engine (continuous batching, log-probabilities of every token) and transformers' `generate`."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Spread, compare, seconds, take_turns
from benchmarks.models import tokens, v4_config, with_experts
from posttrain.files import atomic_write
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.config import native_config_dict
from posttrain.recipe.schema import RolloutConfig
from rollouts.engine import Engine
from rollouts.settings import engine_settings, write_description
from rollouts.types import Sampling
from rollouts.weights import WeightUpdate

PROMPT = 16
"""Tokens of a prompt; all of one length, because transformers' V4 is wrong for left-padded prompts."""

ROLLOUT = RolloutConfig(
    engine="native", max_model_len=128, max_num_seqs=128, max_num_batched_tokens=2048, kv_cache_mib=32
)


def start_engine(threads: int) -> Engine:
    """An engine in this process, without weights; no token ends an answer, so that all have their full length."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, description = Path(directory) / "checkpoint", Path(directory) / "description"
        atomic_write(checkpoint / "config.json", json.dumps(native_config_dict(v4_config())))
        write_description(checkpoint, description, "native")
        atomic_write(description / "generation_config.json", json.dumps({"eos_token_id": []}))
        return Engine(engine_settings(description, "native", ROLLOUT, threads))


class Samplers:
    """Both ways to sample `new` tokens after each of `requests` prompts."""

    def __init__(self, engine: Engine, theirs: nn.Module, requests: int) -> None:
        self.engine, self.theirs = engine, theirs
        self.prompts_BT = tokens(requests, PROMPT)
        self._seeds = itertools.count()

    def ours(self, new: int) -> list[list[Any]]:
        """Groups of one completion."""
        sampling = Sampling(max_tokens=new, temperature=1.0, seed=next(self._seeds))
        return self.engine.generate(self.prompts_BT.tolist(), sampling)

    def transformers(self, new: int) -> torch.Tensor:
        """Rows of prompt and completion."""
        return self.theirs.generate(
            self.prompts_BT,
            attention_mask=torch.ones_like(self.prompts_BT),
            max_new_tokens=new,
            do_sample=True,
            eos_token_id=None,
            pad_token_id=0,
        )


def rollout(engine: Engine, theirs: nn.Module, requests: int, new: int, repeats: int) -> dict[str, Any]:
    """Sampled tokens per second, prefill included, and the time of one decoding step of the whole batch."""
    samplers = Samplers(engine, theirs, requests)
    rates = compare(
        lambda: samplers.ours(new),
        with_experts(theirs, lambda: samplers.transformers(new)),
        repeats,
        requests * new,
    )
    theirs.set_experts_implementation(rates["transformers_experts"])
    return {
        "requests": requests,
        "prompt_tokens": PROMPT,
        "new_tokens": new,
        "repeats": repeats,
        "tokens_per_second": rates,
        "decode_step_seconds": {
            "ours": step_seconds(samplers.ours, new, repeats),
            "transformers": step_seconds(samplers.transformers, new, repeats),
        },
    }


def step_seconds(sample: Any, new: int, repeats: int) -> dict[str, Any]:
    """What each token after the first costs the batch: `(time of new tokens - time of one) / (new - 1)`."""
    times = take_turns({"all": lambda: sample(new), "first": lambda: sample(1)}, repeats)
    return Spread.of([(a - b) / (new - 1) for a, b in zip(times["all"], times["first"], strict=True)]).as_dict()


def publish(engine: Engine, model: DeepseekV4ForCausalLM, repeats: int) -> dict[str, Any]:
    """Weights from the trainer's tensors into the engine, checksums taken, checked and compared on the way."""

    def update() -> None:
        weights = WeightUpdate.pack(model.engine_state_dict(), (engine.version or 0) + 1)
        engine.load_weights(weights.checked_tensors(), weights.version)

    update()
    times = [seconds(update) for _ in range(repeats)]
    size = sum(tensor.nbytes for tensor in model.engine_state_dict().values())
    return {"bytes": size, "repeats": repeats, "seconds": Spread.of(times).as_dict()}


def logprob_difference(engine: Engine, model: DeepseekV4ForCausalLM, requests: int, new: int) -> dict[str, Any]:
    """Largest difference between the sampler's log-probabilities and the trainer's, over all sampled tokens."""
    prompts_BT = tokens(requests, PROMPT)
    groups = engine.generate(prompts_BT.tolist(), Sampling(max_tokens=new, temperature=1.0, seed=0))
    answers_BN = torch.tensor([group[0].token_ids for group in groups])
    sampled_BN = torch.tensor([group[0].logprobs for group in groups])
    with torch.no_grad():
        logits_BNV = model(torch.cat((prompts_BT, answers_BN), 1)).logits[:, PROMPT - 1 : -1]
    trained_BN = torch.log_softmax(logits_BNV, -1).gather(2, answers_BN.unsqueeze(2)).squeeze(2)
    return {"tokens": answers_BN.numel(), "largest": (trained_BN - sampled_BN).abs().max().item()}
