"""Published weights in vLLM's own V4 on one GPU: an engine that was updated against one that read the same export.

`python -m benchmarks.gpu.published [--size small|flash] [--out FILE]` prints JSON. One process has
`rollouts.engine.Engine` of kind `vllm`: random weights A are published to it (made FP8 and MXFP4 in the engine), then
B, then A and B again; after each update it scores the same tokens. Another process has vLLM's in-tree V4 alone, which
reads B's export from the disk by vLLM's own loader, and scores them twice, the second time in another order: what that
changes is the engine's own noise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.decode import in_tree
from benchmarks.gpu.engines import (
    SIZES,
    Place,
    alone,
    config_of,
    describe,
    give,
    random_model,
    random_prompts,
    versions,
    with_engine_environment,
)

NEW = 32
Scores = list[list[float]]


def texts_of(vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Sixteen random prompts of several lengths, and what is scored after each."""
    return random_prompts([16, 40, 100, 300] * 4, vocabulary, 0), random_prompts([NEW] * 16, vocabulary, 1)


def published(size: str, directory: Path) -> dict[str, Any]:
    """Four updates of an engine, and its scores after each."""
    from rollouts.engine import Engine
    from rollouts.settings import EngineSettings

    config, place = config_of(size), Place()
    settings = EngineSettings(
        description=str(describe(config, directory, "vllm")),
        kind="vllm",
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        kv_cache_bytes=4 << 30,
    )
    engine = Engine(settings)
    found: dict[str, Any] = {"versions": versions(), "start_seconds": engine.info.start_seconds, "scores": []}
    for version, seed in enumerate((1, 0, 1, 0)):
        weights = random_model(config, place, seed).engine_state_dict()
        began = time.monotonic()
        verification = engine.load_weights(weights, version)
        found["update"] = {
            "seconds": time.monotonic() - began,
            "verified": verification.verified,
            "unverified": len(verification.unverified),
        }
        del weights
        torch.cuda.empty_cache()
        engine.audit()
        scores = engine.score(*texts_of(config.vocab_size))
        found["scores"].append([row[:-1] for row in scores])
    return found


def loaded(size: str, directory: Path) -> dict[str, Any]:
    """vLLM alone, from the export of B: scores, and scores in another order."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    llm = in_tree(size, directory, False)
    pairs = list(zip(*texts_of(config_of(size).vocab_size), strict=True))
    params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)

    def scores(order: list[int]) -> Scores:
        llm.reset_prefix_cache()
        texts = [TokensPrompt(prompt_token_ids=pairs[at][0] + pairs[at][1][:-1]) for at in order]
        outputs = dict(zip(order, llm.generate(texts, params, use_tqdm=False), strict=True))
        rows = [(outputs[at].prompt_logprobs[len(prompt) :], tokens) for at, (prompt, tokens) in enumerate(pairs)]
        return [[one[token].logprob for one, token in zip(row, tokens[:-1], strict=True)] for row, tokens in rows]

    order = list(range(len(pairs)))
    return {"scores": [scores(order), scores(order[::-1])]}


def distance(ours: Scores, theirs: Scores) -> dict[str, float]:
    """Absolute differences of the log-probabilities of all tokens."""
    one, other = (torch.tensor(rows, dtype=torch.float64).flatten() for rows in (ours, theirs))
    apart = (one - other).abs()
    return {"tokens": len(apart), "mean": apart.mean().item(), "largest": apart.max().item()}


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--one", choices=["published", "loaded"], help="this one, in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.one:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with_engine_environment()
        with tempfile.TemporaryDirectory() as directory:
            results = {"published": published, "loaded": loaded}[options.one](options.size, Path(directory))
    else:
        size = "--size", options.size
        ours, found = (alone("benchmarks.gpu.published", which, *size) for which in ("published", "loaded"))
        for one in (ours, found):
            if "error" in one:
                sys.exit(one["error"])
        theirs = found["scores"]
        first, second, _, again = ours.pop("scores")
        results = ours | {
            "B against its export": distance(second, theirs[0]),
            "the export in another order": distance(theirs[1], theirs[0]),
            "B before and after A": distance(second, again),
            "A against the export of B": distance(first, theirs[0]),
        }
    give(results, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
