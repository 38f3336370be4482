"""Decoding on one GPU: our plugin against vLLM's in-tree V4 with the same random weights, one after the other.

`python -m benchmarks.gpu.decode [--quick] [--size small|flash] [--engines ours,eager,...] [--out FILE]` prints JSON.
Each engine has a process of its own. `ours` and `ours-eager` are our model in bf16 with and without CUDA graphs,
`ours-fp4` has its experts in MXFP4 (`precision: bf16_fp4_experts`) and graphs; `graphs` and `eager` are the in-tree
model (FP8 linears, MXFP4 experts, FP8 cache). Every token comes with its log-probability.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.engines import (
    Place,
    alone,
    config_of,
    give,
    random_model,
    random_prompts,
    start_engine,
    versions,
    with_engine_environment,
)
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.checkpoint import released_tensors, write_config, write_tensors
from posttrain.models.deepseek_v4.export import convert_tensor, released_config_dict
from rollouts.types import Sampling

ENGINES = ("ours", "ours-fp4", "ours-eager", "eager", "graphs")
SEQUENCES = (64, 256, 512)
CACHE_BYTES = 8 << 30

Generate = Callable[[list[list[int]], int], object]
"""Answers of so many tokens to these prompts."""


def timed(generate: Generate, vocabulary: int, sequences: int, quick: bool) -> dict:
    """Tokens/s of `sequences` answers at once, prefill included, and the time of one decoding step of all of them."""
    prompts = random_prompts([6] * sequences, vocabulary, sequences)
    new, few = (64, 8) if quick else (200, 8)
    seconds = {}
    for count in (new, few):
        generate(prompts, count)  # compiles
        begin = time.monotonic()
        generate(prompts, count)
        seconds[count] = time.monotonic() - begin
    step = (seconds[new] - seconds[few]) / (new - few)
    return {
        "sequences": sequences,
        "new_tokens": new,
        "tokens_per_second": sequences * new / seconds[new],
        "step_seconds": step,
        "decode_tokens_per_second": sequences / step,
    }


def in_tree_generator(llm: Any) -> Generate:
    """Sampling at temperature 1 without seeds: with seeds, vLLM draws each request's numbers by a call of its own."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    def generate(prompts: list[list[int]], new: int) -> object:
        params = SamplingParams(max_tokens=new, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)
        return llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)

    return generate


def ours(size: str, directory: Path, graphs: bool, fp4: bool) -> Generate:
    """Our engine with weights, as a run's rollout workers use it: every request has a seed."""
    place, config = Place(), config_of(size, fp4)
    engine = start_engine(
        config,
        directory,
        place,
        max_model_len=2048,
        max_num_seqs=max(SEQUENCES),
        max_num_batched_tokens=2048,
        kv_cache_bytes=CACHE_BYTES,
    )
    model = random_model(config, place)
    engine.load_weights(model.engine_state_dict(), 1)
    model.to("meta")
    torch.cuda.empty_cache()
    if not graphs:
        engine._llm.apply_model(lambda model: setattr(model, "graphs", None))
    return lambda prompts, new: engine.generate(prompts, Sampling(max_tokens=new))


def exported(model: DeepseekV4ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors in the released formats, from the GPU one by one."""
    for name, tensor in released_tensors(model.state_dict()):
        yield from convert_tensor(name, tensor.float() if tensor.is_floating_point() else tensor, "fp8_fp4", False)


def in_tree(size: str, directory: Path, graphs: bool) -> Any:
    """vLLM's own V4 with the same weights, quantised."""
    config = config_of(size)
    model = random_model(config, Place())
    write_tensors(exported(model), directory)
    write_config(released_config_dict(config, "fp8_fp4"), directory)
    model.to("meta")
    torch.cuda.empty_cache()
    from vllm import LLM

    how: dict[str, Any] = {"enforce_eager": True}
    if graphs:
        how = {"compilation_config": {"cudagraph_capture_sizes": list(SEQUENCES)}}
    return LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        generation_config="vllm",
        kv_cache_dtype="fp8",
        max_model_len=2048,
        max_num_seqs=max(SEQUENCES),
        max_num_batched_tokens=1024,
        logprobs_mode="processed_logprobs",
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_flashinfer_autotune=False,
        disable_log_stats=True,
        **how,
    )


def one(which: str, size: str, quick: bool) -> dict[str, Any]:
    """One engine, in this process."""
    with tempfile.TemporaryDirectory() as directory:
        begin = time.monotonic()
        if which.startswith("ours"):
            generate = ours(size, Path(directory), graphs=which != "ours-eager", fp4=which == "ours-fp4")
        else:
            generate = in_tree_generator(in_tree(size, Path(directory), graphs=which == "graphs"))
        start_seconds = time.monotonic() - begin
        print(f"{which} ready after {start_seconds:.0f} s", file=sys.stderr, flush=True)
        vocabulary = config_of(size).vocab_size
        rates = [timed(generate, vocabulary, sequences, quick) for sequences in SEQUENCES]
    return {"versions": versions(), "start_seconds": start_seconds, "rates": rates}


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--size", choices=["small", "flash"], default="small")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--one", choices=ENGINES, help="run this engine in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.one:
        if options.one.startswith("ours"):
            with_engine_environment()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM reads it when the engine begins
        results: dict[str, Any] = one(options.one, options.size, options.quick)
    else:
        results = {"size": options.size}
        for which in options.engines.split(","):
            results[which] = alone("benchmarks.gpu.decode", which, "--size", options.size, *["--quick"] * options.quick)
            print(f"{which}: {json.dumps(results[which])}", file=sys.stderr, flush=True)
    give(results, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
