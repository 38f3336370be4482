"""Weights of vLLM's own models, which fuse matrices and, on the CPU, pack them away behind a function.

A packed matrix is read back through that function: its product with the rows of the identity is the matrix itself, to
the bit (each element is one product by 1 and sums of zeros), so that nothing need be known of the packing. Where that
would cost too much, the product with two random rows is compared instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rollouts.loading import Verification
from rollouts.weights import check_coverage, checksum_of

if TYPE_CHECKING:
    from vllm import LLM

PROBE_ROWS = 2
PROBE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error of a probed product, relative to the product of absolute values: some 100 units of rounding in
fp32, 4 in bf16 and fp16 (whose products are rounded once, after fp32 accumulation)."""

WHOLE_PRODUCTS = 1 << 31
"""Multiplications that reading back one packed matrix may take: about half a second of one core."""

READ_ROWS = 256
"""Rows of the identity that are multiplied at once."""

Place = Callable[[], torch.Tensor]
"""Reads what stands somewhere in the engine."""


Places = dict[str, Place]
Loaded = tuple[Verification, Places]
"""What was found in the engine after a load, and all places where weights stand, by name."""

Loader = Callable[["LLM", Mapping[str, torch.Tensor]], Loaded]
"""Loads complete weights into an engine and compares. Raises RunFailed when they do not fit or do not stand there."""


class VllmWeights:
    """The weights that stand in an engine that runs a model of vLLM's own."""

    def __init__(self, llm: LLM, loader: Loader) -> None:
        self._llm, self._loader = llm, loader
        self._sent: Mapping[str, str] = {}
        self._places: Places = {}
        self._standing: dict[str, str] = {}

    def lacking(self, checksums: Mapping[str, str]) -> set[str]:
        """All, when any has changed: vLLM's reload takes a layer's tensors together."""
        return set() if self._sent == checksums else set(checksums)

    def load(self, weights: Mapping[str, torch.Tensor], checksums: Mapping[str, str]) -> Verification:
        """See `StandingWeights`. Weights that stand already are only audited."""
        if self._sent and not self.lacking(checksums):
            changed = self.audit()
            return Verification(len(self._standing) - len(changed), wrong=changed).accepted()
        self._sent = {}
        result, self._places = self._loader(self._llm, weights)
        self._standing = _checksums(self._places)
        self._sent = dict(checksums)
        return result

    def audit(self) -> list[str]:
        """See `StandingWeights`; the names are the engine's own."""
        changed = [name for name, checksum in _checksums(self._places).items() if checksum != self._standing[name]]
        if changed:
            self._sent = {}
        return changed


def load_vllm(llm: LLM, weights: Mapping[str, torch.Tensor], description: Path) -> Loaded:
    """A `Loader` for weights in the checkpoint names of a transformers model, which `description` describes."""
    expected, tied = checkpoint_shapes(description)
    check_coverage(expected, set(tied), {name: tuple(tensor.shape) for name, tensor in weights.items()})
    # A tied head is sent under its own name as well: on the CPU vLLM packs it separately, and a reload without the
    # name leaves the old packed matrix in use (vLLM 0.32.0), although `lm_head.weight` reads as new.
    complete = {**weights, **{name: weights[source] for name, source in tied.items() if name not in weights}}
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(complete.items())})
    result, places = llm.apply_model(lambda model: verify_vllm(model, complete))[0]
    return result.accepted(), places


@lru_cache(maxsize=8)
def checkpoint_shapes(description: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Name → shape of every weight of the described transformers model, and tied name → the name it is tied to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(description))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, dict(model.all_tied_weights_keys)


@dataclass
class Packed:
    """A matrix that only a function of its module knows."""

    module: torch.nn.Module
    rows: int
    columns: int
    dtype: torch.dtype

    def content(self) -> torch.Tensor | None:
        """The matrix `[rows, columns]`; None where reading it back would cost too much."""
        if self.rows * self.columns**2 > WHOLE_PRODUCTS:
            return None
        units = torch.eye(self.columns, dtype=self.dtype).split(READ_ROWS)
        return torch.cat([self._product(part) for part in units]).T[: self.rows].contiguous()

    def probe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random rows, and their product with the matrix."""
        generator = torch.Generator().manual_seed(0)
        rows_PK = torch.randn(PROBE_ROWS, self.columns, generator=generator).to(self.dtype)
        return rows_PK, self._product(rows_PK)[:, : self.rows]

    def _product(self, rows_PK: torch.Tensor) -> torch.Tensor:
        return self.module.cpu_linear(rows_PK, self.module.weight, None)  # type: ignore[operator]

    def is_made_of(self, source: torch.Tensor) -> bool:
        """Whether it is `source`, as closely as can be told."""
        content = self.content()
        if content is not None:
            return torch.equal(content, source)
        rows_PK, product_PN = self.probe()
        exact_PN = rows_PK.float() @ source.float().T
        scale_PN = rows_PK.float().abs() @ source.float().abs().T
        return bool(((product_PN.float() - exact_PN).abs() <= PROBE_TOLERANCE[source.dtype] * scale_PN).all())

    def reading(self) -> torch.Tensor:
        """The content, or the probed product."""
        content = self.content()
        return self.probe()[1] if content is None else content


def verify_vllm(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Loaded:
    """Compare the parameters of a vLLM model with the checkpoint tensors that they were made of."""
    result = Verification()
    places: Places = {}
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for module_name, module in model.named_modules():
        for buffer_name, _ in module.named_buffers(recurse=False):
            places[f"{module_name}.{buffer_name}"] = partial(getattr, module, buffer_name)
        for parameter_name, _ in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}"
            sources = list(_sources(module_name, parameter_name, fused))
            if not weights.keys() >= set(sources):
                places[name] = partial(getattr, module, parameter_name)
                result.unverified.append(name)
            elif compare(name, module, parameter_name, torch.cat([weights[source] for source in sources]), places):
                result.verified += 1
            else:
                result.wrong.append(name)
    return result, places


def compare(name: str, module: torch.nn.Module, leaf: str, source: torch.Tensor, places: Places) -> bool:
    """Whether a module's parameter or buffer holds `source`, in its own dtype; notes in `places` where it stands.

    vLLM pads vocabularies, so it may have more rows than its source.
    """
    tensor = getattr(module, leaf)
    source = source.to(tensor.dtype)
    if tensor.numel():
        places[name] = partial(getattr, module, leaf)
        if not torch.equal(tensor[: len(source)] if source.ndim else tensor, source):
            return False
    if getattr(module, "cpu_linear", None) is None or leaf != "weight" or source.ndim != 2:
        return tensor.numel() > 0
    packed = Packed(module, source.shape[0], source.shape[1], source.dtype)
    places[f"{name} (packed)"] = packed.reading
    return packed.is_made_of(source)


def _sources(module_name: str, parameter_name: str, fused: Mapping[str, list[str]]) -> Iterator[str]:
    """The checkpoint's names for an engine parameter: `qkv_proj` is made of `q_proj`, `k_proj`, `v_proj`."""
    prefix, _, leaf = module_name.rpartition(".")
    for part in fused.get(leaf, [leaf]):
        yield f"{prefix}.{part}.{parameter_name}" if prefix else f"{part}.{parameter_name}"


def _checksums(places: Places) -> dict[str, str]:
    return {name: checksum_of(place()) for name, place in places.items()}
