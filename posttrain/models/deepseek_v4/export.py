"""Checkpoints for engines: the released layout, in bf16 or in the released formats.

    bf16       matrices in bf16; norms, mHC, sinks and biases in fp32
    fp8_fp4    linears in FP8 with 128 × 128 scales, routed experts in MXFP4, the rest as in bf16

A matrix `X.weight` in FP8 or MXFP4 has UE8M0 scales under `X.scale`; MXFP4 is int8 with two numbers in a byte, the
first in the low half. vLLM's own V4 reads these names (`vllm.models.deepseek_v4`), and `from_pretrained` reads them
back as the numbers that they stand for.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from posttrain.files import atomic_directory
from posttrain.kernels.quant.op import fake_quantize_mxfp4, quantize_fp8, quantize_mxfp4
from posttrain.models.deepseek_v4.checkpoint import (
    FLOAT32,
    CheckpointError,
    iterate_tensors,
    read_config,
    resolve_directory,
    write_config,
    write_tensors,
)
from posttrain.models.deepseek_v4.config import fp4_experts, native_config_dict, rope_dim

Kind = Literal["bf16", "fp8_fp4"]

FP8 = re.compile(r"^layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123])\.weight$")
"""Linears that are FP8 in released checkpoints. Compressors, routers, the indexer's head weights, embedding and head
are not."""

FP4 = re.compile(r"^layers\.\d+\.ffn\.experts\.\d+\.w[123]\.weight$")

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")

WRITTEN_HERE = re.compile(r"(\.safetensors|\.safetensors\.index\.json|^config\.json)$")


def export_checkpoint(checkpoint: str | Path, out: str | Path, kind: Kind) -> list[str]:
    """Read a checkpoint, one tensor at a time, and write it anew; tokenizer and other small files are copied.

    Experts of a model trained under `precision: fp4_experts` keep the numbers that training and sampling met, in
    either format.

    Args:
        checkpoint: a directory or a hub id, in any layout that `from_pretrained` reads.
        out: replaced if it exists.

    Returns:
        Why vLLM's own V4 would not load the result, if it would not.

    Raises:
        CheckpointError: a checkpoint that cannot be read or that the format cannot hold; names the tensor.
    """
    source = resolve_directory(checkpoint)
    config = read_config(source)
    with atomic_directory(out) as directory:
        for file in source.iterdir():
            if file.is_file() and not WRITTEN_HERE.search(file.name):
                shutil.copy(file, directory)
        write_tensors(_converted(source, kind, fp4_experts(config)), directory)
        write_config(released_config_dict(config, kind), directory)
    return engine_obstacles(config)


def _converted(source: Path, kind: Kind, rounded_experts: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in iterate_tensors(source):
        try:
            yield from convert_tensor(name, tensor, kind, rounded_experts)
        except ValueError as error:
            raise CheckpointError(f"{source}: tensor {name}: {error}") from error


def convert_tensor(name: str, tensor: Tensor, kind: Kind, rounded_experts: bool) -> Iterator[tuple[str, Tensor]]:
    """A tensor of a released name as the format has it: itself, rounded, or its quantised form and its scales.

    Args:
        rounded_experts: whether training met the routed experts rounded to MXFP4; bf16 then holds those numbers.

    Raises:
        ValueError: a shape that the format cannot hold.
    """
    scale_name = name.removesuffix("weight") + "scale"
    if kind == "fp8_fp4" and FP4.match(name):
        packed, scales = quantize_mxfp4(tensor)
        yield name, packed.view(torch.int8)
        yield scale_name, scales.view(torch.float8_e8m0fnu)
    elif kind == "fp8_fp4" and FP8.match(name):
        values, scales = quantize_fp8(tensor)
        yield name, values
        yield scale_name, scales.view(torch.float8_e8m0fnu)
    elif FLOAT32.search(name) or not tensor.is_floating_point():
        yield name, tensor
    else:
        numbers = fake_quantize_mxfp4(tensor) if rounded_experts and FP4.match(name) else tensor
        yield name, numbers.to(torch.bfloat16)


def released_config_dict(config: DeepseekV4Config, kind: Kind) -> dict[str, Any]:
    """`config.json` as released models have it: fields that only transformers' class knows are left out.

    vLLM 0.32 refuses `mlp_layer_types`, and takes a flat `rope_scaling` of type yarn (factor 1: no scaling). Models
    whose compression rates are not the released ones keep transformers' fields, which alone can say it.
    """
    fields = native_config_dict(config) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    if "compress_ratios" in fields:
        for key in ("layer_types", "mlp_layer_types", "compress_rates"):
            fields.pop(key)
    fields["rope_scaling"] = _rope_scaling(config)
    if kind == "fp8_fp4":
        fields |= {"quantization_config": QUANTIZATION, "expert_dtype": "fp4"}
    return fields


def _rope_scaling(config: DeepseekV4Config) -> dict[str, Any]:
    own = {key: value for key, value in config.rope_parameters["compress"].items() if key in YARN}
    if config.rope_parameters["compress"].get("rope_type") != "yarn":
        own = {"factor": 1.0, "original_max_position_embeddings": config.max_position_embeddings}
    return {"type": "yarn", "rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, **own}


def engine_obstacles(config: DeepseekV4Config) -> list[str]:
    """What vLLM's own V4 (0.25 to 0.33) would refuse about this model, one line each."""
    demands = [
        ("head_dim", config.head_dim, (512,)),
        ("rotated channels of a head", rope_dim(config), (64,)),
        ("index_head_dim", config.index_head_dim, (128,)),
        ("index_topk", config.index_topk, (512, 1024, 2048)),
    ]
    found = [
        f"{name} is {value}; vLLM's own V4 needs {' or '.join(map(str, allowed))}"
        for name, value, allowed in demands
        if value not in allowed
    ]
    if "compress_ratios" not in native_config_dict(config):
        found.append("compress_rates are not 4 and 128, the only ones of vLLM's own V4")
    return found
