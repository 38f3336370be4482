"""Which experts the engine's tokens went to, for a trainer that is to use the same (routing replay).

Our own routers are watched by forward hooks, from the first request on that asks for its routes. A token's routes are
known when the engine reads it: all tokens of a sequence but the last. So each new token brings the routes of what was
read before it was sampled: the first those of the prompt, every other one that of the token before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from rollouts.types import NewTokens

KEY = "posttrain_routes"
"""In a vLLM request's `extra_args`: the sample whose routes are asked for."""

FIELD = "routes"
"""Their name among the per-token fields of the write-ahead log."""

_HEAD = struct.Struct("<HBB")


def route_dtype(experts: int) -> type[np.unsignedinteger]:
    """The smallest type that holds the number of any expert."""
    return np.uint8 if experts <= 256 else np.uint16


@dataclass
class _Step:
    """Tokens of one forward pass, in the order of the batch."""

    counts_R: np.ndarray
    lengths_R: np.ndarray
    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer → experts `[T, k]`."""


class RouteCapture:
    """Watches the routers of our own model in an engine.

    Args:
        model: The engine's.
        runner: vLLM's model runner, which knows whose tokens were in a step.
    """

    def __init__(self, model: torch.nn.Module, runner: Any) -> None:
        from posttrain.models.deepseek_v4.layers import Gate

        self._runner = runner
        self._step: _Step | None = None
        self._known: dict[str, int] = {}
        """Tokens of each sample whose routes were reported."""
        self._pieces: dict[str, list[np.ndarray]] = {}
        gates = [module for module in model.modules() if isinstance(module, Gate)]
        self._dtype = route_dtype(len(gates[0].weight))
        for gate in gates:
            gate.register_forward_hook(self._routed)
        model.register_forward_pre_hook(self._begin)

    def _begin(self, model: torch.nn.Module, arguments: Any) -> None:
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        wanted = any(self._sample(request_id) for request_id in self._runner.input_batch.req_ids)
        if not wanted or not isinstance(metadata, dict):
            self._step = None
            return
        group = next(iter(metadata.values()))
        self._step = _Step(group.counts_R, group.seq_lens_R)

    def _routed(self, gate: Any, arguments: Any, chosen: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._step is not None:
            self._step.experts[gate.layer] = chosen[0]

    def _sample(self, request_id: str) -> str | None:
        extra: Mapping[str, Any] = self._runner.requests[request_id].sampling_params.extra_args or {}
        return extra.get(KEY)

    def collect(self) -> None:
        """Take in what the engine's latest step routed; to be called before its next one."""
        step, self._step = self._step, None
        if step is None:
            return
        import torch

        layers = [step.experts[layer] for layer in sorted(step.experts)]
        experts_TLK = torch.stack(layers, 1).cpu().numpy().astype(self._dtype)
        ends = np.cumsum(step.counts_R)
        for request_id, count, length, end in zip(
            self._runner.input_batch.req_ids, step.counts_R, step.lengths_R, ends, strict=False
        ):
            sample = self._sample(request_id)
            if sample is not None:
                self._add(sample, experts_TLK[end - count : end], int(length))

    def _add(self, sample: str, experts_TLK: np.ndarray, length: int) -> None:
        """Of the tokens up to `length`; those that are known already (read again after a preemption) are left out."""
        new = length - self._known.get(sample, 0)
        if new > 0:
            self._pieces.setdefault(sample, []).append(experts_TLK[-new:])
            self._known[sample] = length

    def take(self, sample: str) -> bytes:
        """Routes of what was read of a sample since the last call, encoded; nothing if it asked for none."""
        pieces = self._pieces.pop(sample, None)
        return encode_routes(np.concatenate(pieces)) if pieces else b""

    def forget(self, samples: Iterable[str]) -> None:
        """Samples that are no longer in the engine."""
        for sample in samples:
            self._known.pop(sample, None)
            self._pieces.pop(sample, None)


def encode_routes(routes_TLK: np.ndarray) -> bytes:
    """As bytes for the log: layers, experts a token and bytes a number, then the numbers."""
    _, layers, k = routes_TLK.shape
    return _HEAD.pack(layers, k, routes_TLK.itemsize) + routes_TLK.astype(f"<u{routes_TLK.itemsize}").tobytes()


def decode_routes(blob: bytes) -> np.ndarray:
    """What `encode_routes` was given."""
    layers, k, size = _HEAD.unpack_from(blob)
    return np.frombuffer(blob, f"<u{size}", offset=_HEAD.size).reshape(-1, layers, k)


def routes_of_tokens(new: NewTokens) -> list[bytes]:
    """A blob for each of the tokens: all of it for the first."""
    return [new.routes, *[b""] * (len(new.token_ids) - 1)]


def joined_routes(blobs: Sequence[bytes], prompt_tokens: int) -> np.ndarray | None:
    """Routes `[prompt + completion - 1, layers, k]` of a sample; None if it has none.

    Args:
        blobs: For each token of the completion the encoded routes of what was read for it, which end before it. Empty
            ones are fine. A sample that went on in another engine was read there again from its start: what was
            known before stays.
        prompt_tokens: Length of the prompt.
    """
    found: list[np.ndarray] = []
    known = 0
    for position, blob in enumerate(blobs):
        if blob:
            routes_TLK, end = decode_routes(blob), prompt_tokens + position
            if len(routes_TLK) < end - known:
                raise ValueError(f"routes of tokens {known} to {end - len(routes_TLK)} are missing")
            found.append(routes_TLK[len(routes_TLK) - (end - known) :])
            known = end
    return np.concatenate(found) if found else None
