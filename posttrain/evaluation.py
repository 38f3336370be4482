"""`posttrain eval`: the accuracy of any checkpoint, measured as a run measures its models, but outside of every run."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from posttrain.cluster import start_cluster
from posttrain.data import load_domains
from posttrain.data.efforts import in_every_effort
from posttrain.data.encoding import encode_prompt
from posttrain.recipe import Recipe
from posttrain.recipe.evaluation import HoldoutEvaluation
from posttrain.session import describe_engine
from posttrain.stages.checkpoint import check_checkpoint
from posttrain.stages.episodes import policy_messages
from posttrain.stages.evaluate import measure_problems
from posttrain.stages.scoring import DomainRewards, check_rewards


def evaluate_checkpoint(recipe: Recipe, checkpoint: Path, n: int | None = None) -> dict[str, dict[str, Any]]:
    """Sample answers to every domain's held-out problems with the recipe's rollout workers, and judge them.

    The checkpoint's own tokenizer is used, and nothing is written.

    Args:
        n: problems of each domain; default: the recipe's, whose last evaluation also says how to sample.

    Returns:
        For each domain `pass@1`, `ci95` (95 % interval) and `n`, and of its modes the same with `mean_length`: what
        the run's report says of the same checkpoint.

    Raises:
        BadInput: a checkpoint that cannot be used; nothing was started then.
    """
    from rollouts.settings import check_prompts

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = check_checkpoint(checkpoint, recipe.model.family)
    config = recipe.holdouts[-1] if recipe.holdouts else HoldoutEvaluation()
    domains = load_domains(recipe)
    check_rewards(recipe, domains)
    distinct = {name: data.holdout[: n or config.n] for name, data in domains.items()}
    problems = {name: in_every_effort(asked, recipe.domains[name].modes) for name, asked in distinct.items()}
    for name, asked in problems.items():
        for effort in recipe.domains[name].efforts:
            in_mode = [one for one in asked if one.effort == effort]
            prompts = [encode_prompt(tokenizer, policy_messages(recipe, one), one.mode) for one in in_mode]
            new_tokens = recipe.domains[name].new_tokens(effort)
            check_prompts(prompts, new_tokens, recipe.rollout.max_model_len, len(tokenizer))
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="posttrain-") as directory:
        engine = Path(directory) / "engine"
        describe_engine(recipe, checkpoint, engine)
        print(f"Starting Ray: {recipe.cluster.rollout_workers} rollout worker(s)", file=sys.stderr, flush=True)
        with start_cluster(_without_dashboard(recipe), engine, run_directory=None) as cluster:
            client = cluster.client()
            client.load_checkpoint(checkpoint.resolve(), 1)
            for name, asked in problems.items():
                rewards = DomainRewards(recipe, str(checkpoint), asked)
                found = measure_problems(recipe, client, tokenizer, asked, rewards, config)
                results[name] = {"pass@1": found.accuracy, "ci95": list(found.interval), "n": len(distinct[name])}
                if found.modes:
                    results[name]["modes"] = found.by_mode()
                if found.reward_errors:
                    print(f"warning: the reward of {name} failed on {found.reward_errors} answers", file=sys.stderr)
    return results


def _without_dashboard(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"dashboard": False})})
