"""The model before any training: random weights of a configuration, or a checkpoint brought along."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput
from posttrain.files import atomic_directory
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INITIAL = "initial"


def tokenizer_for(recipe: Recipe, run: RunDirectory) -> PreTrainedTokenizerBase:
    """The run's tokenizer, kept in the run directory: the recipe's, the checkpoint's, or the character tokenizer."""
    from posttrain.data.tokenizer import build_character_tokenizer, load_tokenizer

    if run.tokenizer_path.is_dir():
        return load_tokenizer(run.tokenizer_path)
    origin = recipe.model.tokenizer or recipe.model.checkpoint
    tokenizer = load_tokenizer(origin) if origin else build_character_tokenizer()
    with atomic_directory(run.tokenizer_path) as directory:
        tokenizer.save_pretrained(directory)
    return tokenizer


def initial_checkpoint(recipe: Recipe, run: RunDirectory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A directory with the weights that the run starts from, tokenizer beside them.

    Raises:
        BadInput: a configuration that no model can be built from, or a checkpoint that cannot be read.
    """
    path = run.checkpoint_path(INITIAL)
    if path.is_dir():
        return path
    model = _read(recipe) if recipe.model.checkpoint else _random(recipe, tokenizer)
    with atomic_directory(path) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return path


def _read(recipe: Recipe) -> PreTrainedModel:
    from posttrain.trainers.models import load_model

    try:
        return load_model(recipe.model.family, str(recipe.model.checkpoint))
    except (ValueError, OSError) as error:
        raise BadInput(f"model.checkpoint: {error}") from error


def _random(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    fields = recipe.model.config
    transformers.set_seed(recipe.seed)
    try:
        if recipe.model.family == "deepseek_v4":
            from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config

            return DeepseekV4ForCausalLM(make_config(fields if fields is not None else "tiny", **tokens))
        if not isinstance(fields, dict):
            raise BadInput("model.config: for family hf give the fields of a transformers config, model_type among them")
        fields = dict(fields)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type", ""), **{**fields, **tokens}))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise BadInput(f"model.config: no model can be built from it: {error}") from error
