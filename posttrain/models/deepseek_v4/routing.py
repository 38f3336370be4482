"""Experts that another pass chose, for this one to use: routing replay ("keep routing", V3.2 report §3.1).

A rollout engine can return the experts of every token it read. Trained on other experts than those that sampled it, a
token's probability jumps, however small the difference that tipped the choice. Under replay a token goes to the given
experts; how much each counts still comes from the trainer's own scores, so gradients reach the router as ever.
Layers that route by token id need no replay and take none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from posttrain.models.deepseek_v4.model import DeepseekV4Model

UNKNOWN = -1
"""Instead of an expert's number: the layer's own choice."""


@dataclass(frozen=True)
class RoutedTokens:
    """Token ids, and the experts that each layer is to use for them. Is sliced like the ids alone."""

    ids_T: Tensor
    experts_TLK: Tensor
    """Any integers; `UNKNOWN` where the layer chooses."""

    def __len__(self) -> int:
        return len(self.ids_T)

    def __getitem__(self, part: slice | Tensor) -> RoutedTokens:
        return RoutedTokens(self.ids_T[part], self.experts_TLK[part])


def token_ids(tokens_T: Tensor | RoutedTokens) -> Tensor:
    """The ids alone."""
    return tokens_T.ids_T if isinstance(tokens_T, RoutedTokens) else tokens_T


def given_experts(tokens_T: Tensor | RoutedTokens, layer: int, own_TK: Tensor) -> Tensor | None:
    """Experts `[T, k]` for a layer, its own choice where none is given; None without replay."""
    if not isinstance(tokens_T, RoutedTokens):
        return None
    given_TK = tokens_T.experts_TLK[:, layer].long()
    return torch.where(given_TK == UNKNOWN, own_TK, given_TK)


def check_routes(routes_BSLK: Tensor, tokens_BS: Tensor, layers: int, k: int, experts: int) -> None:
    """Raise ValueError unless the routes are `[B, S, layers, k]` of experts that exist, or `UNKNOWN`."""
    expected = (*tokens_BS.shape, layers, k)
    if routes_BSLK.shape != expected:
        raise ValueError(f"routes have shape {tuple(routes_BSLK.shape)}; [batch, length, layers, k] is {expected}")
    if routes_BSLK.numel() and not (int(routes_BSLK.min()) >= UNKNOWN and int(routes_BSLK.max()) < experts):
        raise ValueError(f"routes name experts outside 0 to {experts - 1}")


@contextmanager
def chosen_experts(model: DeepseekV4Model) -> Iterator[list[Tensor]]:
    """The experts `[T, k]` that each layer uses in a forward pass, in the layers' order; empty before."""
    chosen: list[Tensor] = []
    hooks = [
        layer.ffn.gate.register_forward_hook(lambda gate, inputs, output: chosen.append(output[0]))
        for layer in model.layers
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()
