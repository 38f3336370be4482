"""Weights into a running engine, and the proof that they are what stands there.

The two kinds of engine take weights in two ways. Our own model keeps plain tensors: what changed is copied by name,
then the checksum of every tensor in the engine is compared with that of what was sent. vLLM's own models fuse their
matrices and pack them away on the CPU, so they need vLLM's layer-wise reload (a plain `load_weights` fails), which
only logs a warning when something is missing: coverage is checked by name beforehand, and afterwards each parameter
is read back (`rollouts.vllm_weights`).

Either keeps checksums of what it found, so that an audit later finds a bit that fell over in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.errors import BadInput, RunFailed
from rollouts.weights import check_coverage, checksum_of, iterate_safetensors, shown

if TYPE_CHECKING:
    import torch
    from vllm import LLM

    from rollouts.settings import EngineKind

OnModel = Callable[[Callable[["torch.nn.Module"], Any]], Any]
"""Calls a function with the engine's model, in the engine's process, and returns what it returns."""


@dataclass
class Verification:
    """What was found in the engine after a load."""

    verified: int = 0
    """Tensors whose content was compared."""
    unverified: list[str] = field(default_factory=list)
    """Tensors that have no counterpart by name to compare with (fused in a way not known here)."""
    wrong: list[str] = field(default_factory=list)

    def accepted(self) -> Verification:
        """Itself. Raises RunFailed if anything is wrong."""
        if self.wrong:
            raise RunFailed(f"the engine's weights are not the ones it was sent: {shown(self.wrong)}")
        return self


class StandingWeights(Protocol):
    """The weights that stand in an engine."""

    def lacking(self, checksums: Mapping[str, str]) -> set[str]:
        """Names of the tensors that `load` needs to bring the engine to weights of these checksums."""

    def load(self, weights: Mapping[str, torch.Tensor], checksums: Mapping[str, str]) -> Verification:
        """Load tensors, and compare everything that then stands in the engine with what it should be.

        Args:
            weights: Name → tensor, those that `lacking` names at least.
            checksums: Of all weights.

        Raises:
            RunFailed: names or shapes that do not fit, or tensors in the engine that are not those that were sent.
        """

    def audit(self) -> list[str]:
        """Names of the tensors that have changed since they were loaded and verified; then all are lacking."""


class NativeWeights:
    """Of our own model, whose `load_weights` copies by name into parameters and buffers."""

    def __init__(self, on_model: OnModel) -> None:
        self._on_model = on_model
        self._sent: Mapping[str, str] = {}
        """Checksums of the tensors as they were sent; empty when what stands in the engine is not known."""
        self._standing: dict[str, str] = {}
        """The same tensors as they stand: others than sent where the engine has another dtype."""

    def lacking(self, checksums: Mapping[str, str]) -> set[str]:
        """See `StandingWeights`."""
        return {name for name, checksum in checksums.items() if self._sent.get(name) != checksum}

    def load(self, weights: Mapping[str, torch.Tensor], checksums: Mapping[str, str]) -> Verification:
        """See `StandingWeights`."""
        standing = {name: self._standing[name] for name in checksums if name in self._standing}
        self._standing = {}
        lacking, self._sent = self.lacking(checksums) - weights.keys(), {}
        if lacking:
            raise RunFailed(f"the weights are not complete: {shown(lacking)} neither came nor stand in the engine")
        self._standing, result = self._on_model(lambda model: load_native(model, weights, checksums, standing))
        self._sent = dict(checksums)
        return result

    def audit(self) -> list[str]:
        """See `StandingWeights`."""
        changed = self._on_model(lambda model: _differing(model, self._standing))
        if changed:
            self._sent = {}
        return changed


def load_native(
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    checksums: Mapping[str, str],
    standing: Mapping[str, str],
) -> tuple[dict[str, str], Verification]:
    """Load our own model and compare every tensor of it, bit by bit through checksums.

    Args:
        weights: What changed.
        checksums: Of all weights as they were sent.
        standing: Of what stands in the model and does not change, as it stands.

    Returns:
        Checksums of all weights as they stand now.

    Raises:
        RunFailed: names or shapes that do not fit, or a tensor in the model that is not the one that was sent.
    """
    own = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    sent = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_coverage(shapes, set(), {**{name: shapes[name] for name in standing}, **sent})
    model.load_weights(weights.items())  # type: ignore[operator]
    expected = dict(standing)
    for name, tensor in weights.items():
        same = tensor.dtype == own[name].dtype
        expected[name] = checksums[name] if same else checksum_of(tensor.to(own[name].dtype))
    wrong = _differing(model, expected)
    return expected, Verification(len(expected) - len(wrong), [], wrong).accepted()


def _differing(model: torch.nn.Module, expected: Mapping[str, str]) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if checksum_of(tensor) != expected[name]]


def standing_weights(llm: LLM, kind: EngineKind, description: str | Path) -> StandingWeights:
    """For an engine in this process."""

    def on_model(function: Callable[[torch.nn.Module], Any]) -> Any:
        return llm.apply_model(function)[0]

    if kind == "native":
        return NativeWeights(on_model)
    from rollouts.vllm_weights import VllmWeights, load_vllm

    description = Path(description)
    if is_deepseek_v4(description):
        from rollouts.vllm_deepseek_v4 import ReleasedLoader

        return VllmWeights(llm, ReleasedLoader(description))
    return VllmWeights(llm, partial(load_vllm, description=description))


def is_deepseek_v4(directory: Path) -> bool:
    """Whether the model that is described or stored here is one, in whatever layout."""
    file = directory / "config.json"
    return file.is_file() and json.loads(file.read_text()).get("model_type") == "deepseek_v4"


def read_checkpoint(path: str | Path, kind: EngineKind) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory under the names that an engine of this kind takes.

    Raises:
        BadInput: no checkpoint there, or one that cannot be read.
    """
    path = Path(path)
    if kind == "vllm" and not is_deepseek_v4(path):
        return dict(iterate_safetensors(path))
    from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
    from posttrain.models.deepseek_v4.checkpoint import CheckpointError

    try:
        # Stacks the experts and renames: what engines are given are our model's names, not those in the files.
        return DeepseekV4ForCausalLM.from_pretrained(str(path)).engine_state_dict()
    except CheckpointError as error:
        raise BadInput(str(error)) from error
