"""Our V4's weights into vLLM's own V4: names and formats of the released models, made in the engine.

vLLM's V4 reads released names in bf16 (`quantised=False` of `write_description`) or, as the released models are, in FP8
with MXFP4 experts. What is published are the trainer's own tensors; each engine takes them apart, rounds them and hands
them to vLLM's layer-wise reload. Sampling needs a GPU: `benchmarks.gpu.published` compares an engine that was updated
so with one that read the same export (no difference).

A parameter that vLLM keeps as it read it is compared bit by bit. One that it packed away on the CPU is read back. One
that was quantised may have been laid out anew for a kernel: where it does not read as what was loaded it is reported
as unverified, not as wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import DeepseekV4Config

from posttrain.kernels.quant.op import unpack_rows_mxfp4
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.checkpoint import read_config, released_tensors
from posttrain.models.deepseek_v4.config import fp4_experts
from posttrain.models.deepseek_v4.export import Kind, convert_tensor
from rollouts.loading import Verification
from rollouts.vllm_weights import Loaded, Places, compare
from rollouts.weights import check_coverage

if TYPE_CHECKING:
    from vllm import LLM

FUSED = {
    "gate_up_proj": ("w1", "w3"),
    "down_proj": ("w2",),
    "fused_wqa_wkv": ("wq_a", "wkv"),
    "fused_wkv_wgate": ("wkv", "wgate"),
}
"""Modules of vLLM's → those of the released names whose rows they are made of."""

RENAMED = (
    (r"^model\.embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^model\.", ""),
    (r"\.(gate|experts\.routed_experts)\.e_score_correction_bias$", ".gate.bias"),
)

ROUTED = re.compile(r"^(layers\.\d+\.ffn\.experts)\.routed_experts\.w(13|2)_weight$")


class ReleasedLoader:
    """Loads our model's tensors into the described engine; for `rollouts.vllm_weights.VllmWeights`."""

    def __init__(self, description: Path) -> None:
        fields = json.loads((description / "config.json").read_text())
        self._kind: Kind = "fp8_fp4" if "quantization_config" in fields else "bf16"
        self._config = read_config(description)
        with torch.device("meta"):
            model = DeepseekV4ForCausalLM(self._config)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def __call__(self, llm: LLM, weights: Mapping[str, torch.Tensor]) -> Loaded:
        """See `rollouts.vllm_weights.load_vllm`."""
        weights = unpacked(weights)
        check_coverage(self._shapes, set(), {name: tuple(tensor.shape) for name, tensor in weights.items()})
        released = dict(released_weights(weights, self._config, self._kind))
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(released.items())})

        def finish(model: torch.nn.Module) -> Loaded:
            copy_sinks(model, released)
            return verify_released(model, released)

        result, places = llm.apply_model(finish)[0]
        return result.accepted(), places


def unpacked(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts that trainers of `fp4_experts` send packed, as the numbers that they stand for."""
    return {
        name: unpack_rows_mxfp4(tensor) if tensor.dtype is torch.uint8 else tensor for name, tensor in weights.items()
    }


def released_weights(
    weights: Mapping[str, torch.Tensor], config: DeepseekV4Config, kind: Kind
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our tensors under released names, in bf16 or in FP8 with MXFP4 experts; quantised ones with their scales."""
    for name, tensor in released_tensors(dict(weights)):
        wide = tensor.float() if tensor.is_floating_point() else tensor
        yield from convert_tensor(name, wide, kind, fp4_experts(config))


def copy_sinks(model: torch.nn.Module, released: Mapping[str, torch.Tensor]) -> None:
    """Give the engine its sinks, which vLLM 0.32's reload leaves as they were.

    Its loader copies them straight into the parameter (vllm/models/deepseek_v4/nvidia/model.py:1625 in 0.32.0), past
    the layer-wise reload that then puts the old ones back. Fixed in 0.33 (vLLM issue 57795). The test
    `test_vllms_reload_still_forgets_the_sinks` fails when this can go.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".attn_sink"):
            sink_H = released[_released_name(name)]
            parameter.data[: len(sink_H)].copy_(sink_H)


def verify_released(model: torch.nn.Module, released: Mapping[str, torch.Tensor]) -> Loaded:
    """Compare the parameters of vLLM's V4 with the released tensors that they were made of."""
    result = Verification()
    places: Places = {}
    for module_name, module in model.named_modules():
        for leaf, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            name = f"{module_name}.{leaf}"
            source = _source(name, released)
            if source is None:  # angles of the rotation, scales under names of a kernel's own
                places[name] = partial(getattr, module, leaf)
                result.unverified.append(name)
            elif compare(name, module, leaf, source, places):
                result.verified += 1
            elif source.itemsize == 1:
                result.unverified.append(name)
            else:
                result.wrong.append(name)
    return result, places


def _released_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _source(name: str, released: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What a parameter of vLLM's was made of; None where that is not known."""
    name = _released_name(name)
    if name in released:
        return released[name]
    if routed := ROUTED.match(name):
        prefix, which = routed.groups()
        parts = ("w1", "w3") if which == "13" else ("w2",)
        count = len({key.split(".")[4] for key in released if key.startswith(f"{prefix}.")})
        experts = [[f"{prefix}.{number}.{part}.weight" for part in parts] for number in range(count)]
        return torch.stack([torch.cat([released[key] for key in keys]) for keys in experts])
    module, _, leaf = name.rpartition(".")
    prefix, _, last = module.rpartition(".")
    names = [f"{prefix}.{part}.{leaf}" for part in FUSED.get(last, ())]
    if names and all(key in released for key in names):
        return torch.cat([released[key] for key in names])
    return None
