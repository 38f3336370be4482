"""The model before any training: random weights of a configuration, or a checkpoint brought along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput
from posttrain.files import atomic_directory
from posttrain.recipe import Recipe
from posttrain.rundir import RunDirectory
from posttrain.stages.checkpoint import check_family, check_vocabulary
from posttrain.trainers.models import distillation_obstacle, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
    import transformers

    path = run.checkpoint_path(INITIAL)
    if path.is_dir():
        return path
    transformers.utils.logging.disable_progress_bar()  # of writing files
    model = _read(recipe, tokenizer) if recipe.model.checkpoint else _random(recipe, tokenizer)
    if recipe.model.precision is not None and recipe.model.family == "deepseek_v4":
        _set_precision(model, recipe.model.precision)
    if recipe.stages.student is not None and (problem := distillation_obstacle(model)):
        raise BadInput(f"stages.student: {problem}")
    with atomic_directory(path) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return path


def _read(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    try:
        model = load_model(recipe.model.family, str(recipe.model.checkpoint))
    except BadInput:
        raise
    except Exception as error:  # each library and format has errors of its own for files that it cannot read
        raise BadInput(f"model.checkpoint: {recipe.model.checkpoint}: {error}") from error
    check_family(model.config.model_type, recipe.model.family, f"model.checkpoint: {recipe.model.checkpoint}: its type")
    check_vocabulary(model.get_input_embeddings().weight.size(0), tokenizer, "model.tokenizer")
    return model


def _set_precision(model: PreTrainedModel, precision: str) -> None:
    """The checkpoint's configuration carries it from here on, to every trainer and engine."""
    from posttrain.models.deepseek_v4.config import precision_of

    model.config.precision = precision
    try:
        precision_of(model.config)
    except ValueError as error:
        raise BadInput(f"model.precision: {error}") from error


def _random(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    transformers.set_seed(recipe.seed)
    try:
        if recipe.model.family == "deepseek_v4":
            from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM, make_config

            preset_or_fields = recipe.model.config or "tiny"
            config = make_config(preset_or_fields, **tokens)
            if isinstance(preset_or_fields, dict):
                _check_fields(preset_or_fields, config, "topk_method")
            return DeepseekV4ForCausalLM(config)
        fields: dict[str, Any] = dict(recipe.model.config)  # type: ignore[arg-type]  # the schema: a mapping for hf
        model_type = fields.pop("model_type")
        check_family(model_type, "hf", "model.config.model_type")
        config = AutoConfig.for_model(model_type, **{**fields, **tokens})
        _check_fields(fields, config)
        return AutoModelForCausalLM.from_config(config)
    except BadInput:
        raise
    except Exception as error:  # whatever a model's constructor makes of numbers that do not fit each other
        raise BadInput(f"model.config: no model can be built from it: {error}") from error


def _check_fields(fields: Mapping[str, Any], config: PreTrainedConfig, *others: str) -> None:
    """Raise BadInput for a field that the configuration class knows under no name: transformers takes any.

    Fields of older layouts (`rope_theta`) are translated, and leave no attribute of their own.
    """
    default = type(config)()
    for name in fields:
        if name in vars(config) and name not in others and not hasattr(default, name):
            known = sorted(key for key in vars(default) if not key.startswith("_"))
            raise BadInput(f"model.config.{name}: unknown field; there are {', '.join(known)}")
