"""Checkpoints in the layout of the released models: names, files, and what transformers makes of them.

The released layout has no `model.` prefix, one tensor for each expert's `w1` (gate), `w3` (up) and `w2` (down), and
mHC tensors called `hc_attn_fn` and so on. transformers reads it but saves a mixture (issue notes: keys
keep `model.`, `kv_norm` comes out as `norm`, `hc_head_fn` as `hc_head.hc_fn`); that is read here too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV4Config

from posttrain.models.deepseek_v4.config import native_config_dict

if TYPE_CHECKING:
    from posttrain.models.deepseek_v4.model import DeepseekV4ForCausalLM

SHARD_BYTES = 5 << 30

FROM_TRANSFORMERS = (
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"^(layers\.\d+\.attn)\.norm\.", r"\1.kv_norm."),
)
"""Applied in order to what transformers saved, after its `model.` prefix is cut."""

TO_MODULES = (
    (r"^head\.", "lm_head."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".hc_\1.\2"),
)
"""Released names that differ from our modules' beyond the experts' stacking."""

EXPERT = re.compile(r"^(layers\.\d+\.ffn\.(?:experts\.(\d+)|shared_experts))\.w([123])\.weight$")

IGNORED = re.compile(r"^mtp\.")
"""Multi-token-prediction layers serve speculative decoding; post-training does not use them."""

FLOAT32 = re.compile(r"(hc_|attn_sink|\.ape$|norm\.weight$|\.gate\.bias$)")
"""Kept in fp32 whatever the model's dtype."""


class CheckpointError(ValueError):
    """A checkpoint does not fit the model, or cannot be read; the message names file and tensor."""


def resolve_directory(name_or_path: str | os.PathLike, **hub: Any) -> Path:
    """The directory of a checkpoint: the path itself, or a hub id's snapshot."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.is_absolute() or str(name_or_path).startswith(".") or str(name_or_path).count("/") != 1:
        raise CheckpointError(f"{path}: no such directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    keys = ("revision", "cache_dir", "token", "local_files_only")
    options = {key: hub[key] for key in keys if hub.get(key) is not None}
    return Path(
        snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.safetensors", "tokenizer*"], **options)
    )


def read_config(directory: Path) -> DeepseekV4Config:
    """The configuration beside the weights."""
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; a checkpoint directory has config.json and *.safetensors")
    fields = json.loads(file.read_text())
    if fields.get("model_type") != "deepseek_v4":
        raise CheckpointError(f"{file}: model_type is {fields.get('model_type')!r}, expected 'deepseek_v4'")
    config = DeepseekV4Config.from_dict(fields)
    config.architectures = ["DeepseekV4ForCausalLM"]
    return config


def _released_name(name: str) -> str:
    if name.startswith("model."):
        name = name.removeprefix("model.")
    for pattern, replacement in FROM_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{directory}: shards named by {index.name} are missing: {', '.join(missing)}")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors files")
    return files


def iterate_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its released name, one at a time, `mtp.*` left out."""
    for file in _files(directory):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    released = _released_name(name)
                    if not IGNORED.match(released):
                        yield released, tensors.get_tensor(name)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise CheckpointError(f"{file}: not a whole safetensors file ({error})") from error


def _place(name: str, parameters: dict[str, Tensor]) -> tuple[str, Tensor | None]:
    """Our name of a released tensor, and the part of our (perhaps stacked) parameter that it fills."""
    expert = EXPERT.match(name)
    if expert:
        number, which = expert.group(2), expert.group(3)
        module = re.sub(r"\.\d+$", "", expert.group(1)) if number is not None else expert.group(1)
        ours = f"model.{module}.{'w2' if which == '2' else 'w13'}"
        target = parameters.get(ours)
        if target is None:
            return ours, None
        if number is not None:
            if int(number) >= target.shape[0]:
                return f"{ours}[{number}]", None
            target = target[int(number)]
        if which != "2":
            inner = target.shape[0] // 2
            target = target[:inner] if which == "1" else target[inner:]
        return ours, target
    for pattern, replacement in TO_MODULES:
        name = re.sub(pattern, replacement, name)
    ours = name if name.startswith("lm_head.") else f"model.{name}"
    return ours, parameters.get(ours)


def load_into(parameters: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]], origin: str) -> None:
    """Copy released tensors into our parameters and buffers, and account for every element.

    Raises:
        CheckpointError: names that have no place, shapes that differ, elements that nothing filled.
    """
    filled = dict.fromkeys(parameters, 0)
    unknown: list[str] = []
    for name, tensor in tensors:
        ours, target = _place(name, parameters)
        if target is None:
            unknown.append(name)
            continue
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{origin}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(target.shape)}"
            )
        target.copy_(tensor)
        filled[ours] += tensor.numel()
    missing = [name for name, count in filled.items() if count != parameters[name].numel()]
    if unknown or missing:
        parts = [f"unknown tensors: {', '.join(unknown[:5])}"] if unknown else []
        parts += [f"missing or incomplete tensors: {', '.join(missing[:5])}"] if missing else []
        raise CheckpointError(f"{origin}: {'; '.join(parts)} ({len(unknown)} unknown, {len(missing)} missing)")


def materialise(model: DeepseekV4ForCausalLM, directory: Path, dtype: torch.dtype | str | None) -> None:
    """Give a model made on the meta device its memory and its weights."""
    if isinstance(dtype, str):
        dtype = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    with torch.no_grad():
        load_into(dict(model.state_dict(keep_vars=False)), iterate_tensors(directory), str(directory))
    if dtype is not None and dtype != torch.float32:
        for name, parameter in model.named_parameters():
            if not FLOAT32.search(name):
                parameter.data = parameter.data.to(dtype)


def released_tensors(state_dict: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our parameters and buffers under their released names, experts taken apart."""
    for name, tensor in state_dict.items():
        short = name.removeprefix("model.")
        short = re.sub(r"^lm_head\.", "head.", short)
        short = re.sub(r"\.hc_(attn|ffn)\.(fn|base|scale)$", r".hc_\1_\2", short)
        stacked = re.match(r"^(layers\.\d+\.ffn\.(?:shared_)?experts)\.(w13|w2)$", short)
        if not stacked:
            yield short, tensor
            continue
        prefix, which = stacked.groups()
        experts = (
            [(f"{prefix}.{number}", part) for number, part in enumerate(tensor)]
            if tensor.dim() == 3
            else [(prefix, tensor)]
        )
        for expert, part in experts:
            if which == "w2":
                yield f"{expert}.w2.weight", part
            else:
                gate, up = part.chunk(2, 0)
                yield f"{expert}.w1.weight", gate
                yield f"{expert}.w3.weight", up


def write(config: DeepseekV4Config, state_dict: dict[str, Tensor], directory: str | os.PathLike) -> None:
    """Write `config.json` and the tensors in shards of at most 5 GiB, with an index if there are several."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in released_tensors(state_dict):
        tensor = tensor.detach().to("cpu").contiguous().clone()
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    (directory / "config.json").write_text(json.dumps(native_config_dict(config), indent=2, sort_keys=True) + "\n")
