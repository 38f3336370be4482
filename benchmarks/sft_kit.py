"""SFT of a recipe's model in this process, without engines: what the comparisons of trainers' options share."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from posttrain.data import load_domains
from posttrain.data.packing import PackedBatch
from posttrain.data.rows import IGNORED, sft_rows
from posttrain.recipe import Recipe, load_recipe
from posttrain.recipe.stages import SftStage
from posttrain.rundir import RunDirectory
from posttrain.stages.initial import initial_checkpoint, tokenizer_for
from posttrain.trainers.models import load_model
from posttrain.trainers.progress import Progress
from posttrain.trainers.sft import train_sft

Rows = Sequence[Mapping[str, Sequence[int]]]


class Lines:
    """Takes what would go to metrics.jsonl."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def write(self, stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Keep one line."""
        self.lines.append({"step": step, **metrics})


@dataclass
class Setting:
    """A recipe's model and problems. Every run starts from the same weights for the same seed."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    train_rows: Rows
    holdout_rows: Rows
    models: dict[int, PreTrainedModel] = field(default_factory=dict)
    """The initial model for each seed."""

    @classmethod
    def load(cls, recipe_file: Path, domains: Sequence[str] = (), overrides: Sequence[str] = ()) -> Setting:
        """Problems of `domains` in turn (default: of all), and the held-out ones."""
        recipe = load_recipe(recipe_file, list(overrides))
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(prefix="sft-kit-") as directory:
            tokenizer = tokenizer_for(recipe, RunDirectory.create(directory, None, recipe))
        loaded = load_domains(recipe)
        pairs = [(loaded[name].train, loaded[name].holdout) for name in domains or loaded]
        train, holdout = (
            sft_rows(tokenizer, [one for group in zip(*parts, strict=False) for one in group])
            for parts in zip(*pairs, strict=True)
        )
        return cls(recipe, tokenizer, train, holdout)

    def initial(self, seed: int) -> PreTrainedModel:
        """The recipe's model with random weights drawn by `seed`."""
        if seed not in self.models:
            recipe = self.recipe.model_copy(update={"seed": seed})
            with tempfile.TemporaryDirectory(prefix="sft-kit-") as directory:
                run = RunDirectory.create(directory, None, recipe)
                path = initial_checkpoint(recipe, run, tokenizer_for(recipe, run))
                self.models[seed] = load_model(recipe.model.family, path)
        return copy.deepcopy(self.models[seed])

    def train(self, seed: int, start: PreTrainedModel | None = None, **stage: Any) -> tuple[PreTrainedModel, Lines]:
        """One SFT stage, `stage` as in a recipe, on rows drawn by the seed; the model and its metrics lines."""
        config, lines = SftStage(**stage), Lines()
        model = self.initial(seed) if start is None else copy.deepcopy(start)
        count = min(config.steps * config.batch_size, len(self.train_rows))
        rows = Random(seed).sample(self.train_rows, count)
        set_seed(seed)
        train_sft(model, self.tokenizer, rows, config, seed, Progress(lines, "sft", config.steps))  # type: ignore[arg-type]
        return model, lines

    @torch.no_grad()
    def holdout(self, model: PreTrainedModel, count: int = 512) -> tuple[float, float]:
        """Of held-out problems the mean cross-entropy over the answers' tokens, in nats a token, and the share whose
        answer greedy decoding gives: each of its tokens is the likeliest after those before it."""
        rows = self.holdout_rows[:count]
        batch = PackedBatch(None, 0)(rows)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits_TV = model.eval()(**inputs, use_cache=False).logits[0, :-1]
        labels_T = batch["labels"][0, 1:]
        loss = torch.nn.functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED).item()
        wrong_T = (logits_TV.argmax(-1) != labels_T) & (labels_T != IGNORED)
        problem_T = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row["input_ids"]) for row in rows]))[1:]
        return loss, 1 - len(problem_T[wrong_T].unique()) / len(rows)
