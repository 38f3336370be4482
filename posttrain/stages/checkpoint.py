"""A checkpoint that the user names: whether it can be used, found out before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Family = Literal["deepseek_v4", "hf"]


def check_checkpoint(path: Path, family: Family) -> PreTrainedTokenizerBase:
    """Look at everything of a checkpoint but the values of its weights; return its tokenizer.

    Raises:
        BadInput: no such directory, no or a damaged config.json, a model of another family, no weights or cut ones,
            no tokenizer, or one with more tokens than the model.
    """
    from posttrain.data.tokenizer import load_tokenizer

    config = _read_config(path)
    check_family(config.get("model_type"), family, f"{path / 'config.json'}: model_type")
    _check_weights(path)
    tokenizer = load_tokenizer(path)
    check_vocabulary(config.get("vocab_size"), tokenizer, str(path))
    return tokenizer


def check_family(model_type: str | None, family: Family, where: str) -> None:
    """Raise BadInput unless a model of `model_type` belongs to the recipe's `model.family`."""
    if family == "deepseek_v4" and model_type != "deepseek_v4":
        raise BadInput(
            f"{where} is {model_type!r}; the recipe's model.family is deepseek_v4, which needs 'deepseek_v4'. "
            "For any other causal language model set model.family: hf"
        )
    if family == "hf" and model_type == "deepseek_v4":
        raise BadInput(f"{where} is 'deepseek_v4'; set the recipe's model.family to deepseek_v4 instead of hf")


def check_vocabulary(model_size: int | None, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise BadInput when the tokenizer has tokens that the model has not. The opposite is common: padded matrices."""
    if model_size is not None and len(tokenizer) > model_size:
        raise BadInput(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary (config.json: vocab_size) "
            f"only {model_size}; they do not belong together"
        )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise BadInput(f"{path}: there is no such checkpoint directory")
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: not a checkpoint directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path / 'config.json'}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path / 'config.json'}: is no mapping of config fields")
    return config


def _check_weights(path: Path) -> None:
    """Every file is there and as long as its header says."""
    from safetensors import SafetensorError, safe_open

    files = set(path.glob("*.safetensors"))
    for index in path.glob("*.safetensors.index.json"):
        files |= {path / name for name in json.loads(index.read_text())["weight_map"].values()}
    if not files:
        raise BadInput(f"{path}: the checkpoint has no weights (*.safetensors)")
    for file in sorted(files):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file}: cannot be read: {error}") from error
