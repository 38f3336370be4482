"""Weights into a running engine, and the proof that they are what stands there.

The two kinds of engine take weights in two ways. Our own model keeps plain tensors: copy by name, then compare
every byte. vLLM's own models fuse and prepack their matrices on the CPU, so they need vLLM's layer-wise reload (a
plain `load_weights` fails), which only logs a warning when something is missing: hence coverage is checked by name
beforehand, and afterwards each matrix is compared where it can be read, or probed where it was packed away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import RunFailed
from rollouts.weights import check_coverage, shown

if TYPE_CHECKING:
    from vllm import LLM

PROBE_ROWS = 2
PROBE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error of a probed product, relative to the product of absolute values: some 100 units of rounding in
fp32, 4 in bf16 and fp16 (whose products are rounded once, after fp32 accumulation)."""


@dataclass
class Verification:
    """What was found in the engine after a load."""

    verified: int = 0
    """Parameters whose content was compared."""
    unverified: list[str] = field(default_factory=list)
    """Parameters that have no counterpart by name to compare with (fused in a way not known here)."""
    wrong: list[str] = field(default_factory=list)


def load_native(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Verification:
    """Load our own model, whose `load_weights` copies by name, and compare every tensor bit by bit.

    Raises:
        RunFailed: names that do not fit, or a tensor in the engine that is not the one that was sent.
    """
    check_coverage({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, set(), weights)
    model.load_weights(weights.items())  # type: ignore[operator]
    result = Verification()
    for name, tensor in model.state_dict().items():
        same = same_bits(tensor, weights[name].to(tensor.device, tensor.dtype))
        result.verified += same
        if not same:
            result.wrong.append(name)
    return _accepted(result)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a device and dtype have the same content, NaN included."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def load_vllm(llm: LLM, description: Path, weights: Mapping[str, torch.Tensor]) -> Verification:
    """Load a model of vLLM's own from weights in their checkpoint names.

    Raises:
        RunFailed: as `load_native`.
    """
    expected, tied = checkpoint_shapes(description)
    check_coverage(expected, set(tied), weights)
    # A tied head is sent under its own name as well: on the CPU vLLM packs it separately, and a reload without the
    # name leaves the old packed matrix in use (vLLM 0.32.0), although `lm_head.weight` reads as new.
    complete = {**weights, **{name: weights[source] for name, source in tied.items() if name not in weights}}
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(complete.items())})
    return _accepted(llm.apply_model(lambda model: verify_vllm(model, complete))[0])


def checkpoint_shapes(description: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Name → shape of every weight of the described transformers model, and tied name → the name it is tied to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(description))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, dict(model.all_tied_weights_keys)


def verify_vllm(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Verification:
    """Compare the parameters of a vLLM model with the checkpoint tensors that they were made of."""
    result = Verification()
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}"
            sources = list(_sources(module_name, parameter_name, packed))
            if not weights.keys() >= set(sources):
                result.unverified.append(name)
            elif _is_made_of(module, parameter, torch.cat([weights[source].to(parameter.dtype) for source in sources])):
                result.verified += 1
            else:
                result.wrong.append(name)
    return result


def _sources(module_name: str, parameter_name: str, packed: Mapping[str, list[str]]) -> Iterator[str]:
    """The checkpoint's names for an engine parameter: `qkv_proj` is made of `q_proj`, `k_proj`, `v_proj`."""
    prefix, _, leaf = module_name.rpartition(".")
    for part in packed.get(leaf, [leaf]):
        yield f"{prefix}.{part}.{parameter_name}" if prefix else f"{part}.{parameter_name}"


def _is_made_of(module: torch.nn.Module, parameter: torch.Tensor, source: torch.Tensor) -> bool:
    """The parameter's content is `source`; of a prepacked matrix, its product with a random input is.

    vLLM pads vocabularies, so a parameter may have more rows than its source.
    """
    if parameter.numel() and not torch.equal(parameter[: source.shape[0]], source):
        return False
    multiply: Any = getattr(module, "cpu_linear", None)
    if multiply is None or source.ndim != 2:
        return parameter.numel() > 0
    generator = torch.Generator().manual_seed(0)
    probe_PK = torch.randn(PROBE_ROWS, source.shape[1], generator=generator).to(source.dtype)
    product_PN = multiply(probe_PK, parameter, None)[:, : source.shape[0]].float()
    exact_PN = probe_PK.float() @ source.float().T
    scale_PN = probe_PK.float().abs() @ source.float().abs().T
    return bool(((product_PN - exact_PN).abs() <= PROBE_TOLERANCE[source.dtype] * scale_PN).all())


def _accepted(result: Verification) -> Verification:
    if result.wrong:
        raise RunFailed(f"the engine's weights are not the ones it was sent: {shown(result.wrong)}")
    return result
