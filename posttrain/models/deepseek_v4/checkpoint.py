"""Checkpoints in the layout of the released models: names, files, and what transformers makes of them.

FP8 and MXFP4 matrices (`export` writes such, and the released models are such) are read as the numbers they stand for.

The released layout has no `model.` prefix, one tensor for each expert's `w1` (gate), `w3` (up) and `w2` (down), and
mHC tensors called `hc_attn_fn` and so on. transformers reads it but saves a mixture (issue notes: keys
keep `model.`, `kv_norm` comes out as `norm`, `hc_head_fn` as `hc_head.hc_fn`); that is read here too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV4Config

from posttrain.kernels.quant.formats import FP4_GROUP
from posttrain.kernels.quant.op import dequantize_fp8, dequantize_mxfp4, pack_rows_mxfp4
from posttrain.models.deepseek_v4.config import bf16_matrices, native_config_dict, precision_of

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

QUANTISED = (torch.float8_e4m3fn, torch.int8, torch.uint8)
"""FP8, and two MXFP4 numbers in a byte; no other tensor of a checkpoint has such a dtype."""

SCALE_SUFFIXES = (".scale", ".weight_scale_inv")
"""Names of a matrix' scales: those of V4's checkpoints, and of V3's."""

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
    if fields.pop("quantization_config", None):  # the weights are read as plain numbers
        for key in ("expert_dtype", "dtype", "torch_dtype"):
            fields.pop(key, None)
    if isinstance(fields.get("rope_parameters"), dict) and "compress" in fields["rope_parameters"]:
        fields.pop("rope_scaling", None)  # says less
    config = DeepseekV4Config.from_dict(fields)
    config.architectures = ["DeepseekV4ForCausalLM"]
    try:
        precision_of(config)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return config


@lru_cache(maxsize=1 << 17)  # teachers come and go, and have the same names
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


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{file}: not a whole safetensors file ({error})") from error


def iterate_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its released name, one at a time, quantised ones as fp32 numbers; `mtp.*` left out."""
    files = _files(directory)
    homes: dict[str, Path] = {}
    for file in files:
        with _opened(file) as tensors:
            homes |= dict.fromkeys(tensors.keys(), file)
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                released = _released_name(name)
                if IGNORED.match(released) or _weight_of(name) in homes:
                    continue
                tensor = tensors.get_tensor(name)
                if tensor.dtype in QUANTISED:
                    tensor = _numbers(name, tensor, homes)
                yield released, tensor


def _weight_of(name: str) -> str | None:
    """The matrix whose scales a tensor of this name holds."""
    for suffix in SCALE_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    return None


def _numbers(name: str, tensor: Tensor, homes: dict[str, Path]) -> Tensor:
    """A quantised matrix as fp32, with the scales that the checkpoint has for it."""
    found = [other for suffix in SCALE_SUFFIXES if (other := name.removesuffix(".weight") + suffix) in homes]
    if not found:
        raise CheckpointError(f"{homes[name]}: tensor {name} is {tensor.dtype} and there is no tensor with its scales")
    with _opened(homes[found[0]]) as tensors:
        scales = tensors.get_tensor(found[0])
    scales = scales.view(torch.uint8) if scales.dtype in (torch.float8_e8m0fnu, torch.int8) else scales
    try:
        if tensor.dtype is torch.float8_e4m3fn:
            return dequantize_fp8(tensor, scales)
        return dequantize_mxfp4(tensor.view(torch.uint8), scales)
    except ValueError as error:
        raise CheckpointError(f"{homes[name]}: tensor {name} with {found[0]}: {error}") from error


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

    Experts whose place is uint8 are a sampler's: they are packed (`PackedExperts`).

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
        if target.dtype is torch.uint8 and tensor.is_floating_point() and not tensor.shape[-1] % FP4_GROUP:
            tensor = pack_rows_mxfp4(tensor)
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
    if dtype is None and bf16_matrices(model.config):
        dtype = torch.bfloat16
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
    """Write `config.json` and the tensors as `write_tensors` does."""
    write_tensors(released_tensors(state_dict), Path(directory))
    write_config(native_config_dict(config), Path(directory))


def write_config(fields: dict[str, Any], directory: Path) -> None:
    """Write `config.json`."""
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def write_tensors(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Write tensors in shards of at most 5 GiB, one in memory at a time, with an index if there are several."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def finish() -> None:
        save_file(shard, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu").contiguous().clone()
        if size and size + tensor.nbytes > SHARD_BYTES:
            finish()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    finish()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
