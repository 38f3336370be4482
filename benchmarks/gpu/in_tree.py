"""What exporting costs: vLLM's in-tree V4 on an exported checkpoint (FP8, MXFP4) against our model, on one GPU.

`python -m benchmarks.gpu.in_tree [--quick] [--size small|flash] [--out FILE]` prints JSON. A random model is exported;
the in-tree engine loads it and samples; our model scores the same tokens, once with the exported numbers (what is left
is the two implementations, and the engine's FP8 activations and cache), once with the numbers before the export.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.decode import in_tree
from benchmarks.gpu.engines import SIZES, Place, config_of, give, packed, random_model, random_prompts, versions
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.context import PackedContext
from rollouts.logprobs import sampler_logprobs


def sampled(llm: Any, prompts: list[list[int]], new: int) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of an answer to each prompt."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=new, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [
        (list(one.token_ids), [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)])
        for one in answers
    ]


@torch.no_grad()
def differences(
    model: DeepseekV4ForCausalLM, prompts: list[list[int]], answers: list[tuple[list[int], list[float]]]
) -> dict[str, float]:
    """Our log-probabilities minus the engine's, of all sampled tokens."""
    ours, theirs = [], []
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        tokens_T, bounds = packed([prompt + tokens], "cuda")
        hidden_TH = model.model.forward_packed(tokens_T, PackedContext(bounds))[len(prompt) - 1 : -1]
        ours.append(sampler_logprobs(model.lm_head(hidden_TH), tokens_T[len(prompt) :]))
        theirs.append(torch.tensor(logprobs, device="cuda"))
    difference = torch.cat(ours).double() - torch.cat(theirs).double()
    return {
        "tokens": len(difference),
        "mean": difference.abs().mean().item(),
        "median": difference.abs().median().item(),
        "largest": difference.abs().max().item(),
        "k3": (difference.exp() - 1 - difference).mean().item(),
    }


def measure(size: str, quick: bool) -> dict[str, Any]:
    """The in-tree engine samples, our models score."""
    config, place = config_of(size), Place()
    prompts = random_prompts([16, 40, 100, 300] * (2 if quick else 8), config.vocab_size, 0)
    with tempfile.TemporaryDirectory() as directory:
        answers = sampled(in_tree(size, Path(directory), False), prompts, 32 if quick else 128)
        exported = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=place.dtype).cuda()
    original = random_model(config, place)
    return {
        "versions": versions(),
        "size": size,
        "same numbers": differences(exported, prompts, answers),
        "numbers before the export": differences(original, prompts, answers),
    }


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM reads it when the engine begins
    give(measure(options.size, options.quick), options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
