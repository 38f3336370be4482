"""Routers in training: frozen, or chosen by an earlier model (docs/auxiliary.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.models.deepseek_v4.layers import Gate
from posttrain.models.deepseek_v4.routing import UNKNOWN, chosen_experts

Batch = dict[str, Any]


@contextmanager
def frozen_router(model: PreTrainedModel, frozen: bool) -> Iterator[None]:
    """With `frozen`, the routers' matrices get no gradient and no update. Enter before the optimizer is built."""
    weights = [module.weight for module in model.modules() if isinstance(module, Gate)] if frozen else []
    weights = [weight for weight in weights if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


class RoutedAhead:
    """Batches with the experts that the model of `steps` updates before chooses for them.

    V4's anticipatory routing (report §5.6): a batch is taken from the data `steps` updates before it is trained on,
    and the experts of its tokens are noted then; the first batches get those of the first model.
    """

    def __init__(self, model: Callable[..., Any], layers: PreTrainedModel, steps: int) -> None:
        self.model = model
        """What the trainer calls for a forward pass."""
        self.layers = layers
        """The model whose routers these are."""
        self.steps = steps
        self._ahead: deque[Batch] = deque()
        self._batches: Iterator[Batch] | None = None
        self._routed: Iterator[Batch] = iter(())

    def of(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of an epoch, which are taken from `batches` earlier; the same iterator while that is the same."""
        if batches is not self._batches:
            self._batches, self._routed = batches, self._route(batches)
        return self._routed

    def state_dict(self) -> dict[str, Any]:
        """For a snapshot, after an update."""
        return {"ahead": list(self._ahead)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned; `of` then expects the batches behind the last one that was trained on."""
        device = self.layers.device
        self._ahead = deque(
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            for batch in state["ahead"]
        )

    def _route(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for _ in self._ahead:  # of a snapshot
            next(batches)
        for batch in batches:
            self._ahead.append({**batch, "routes": self._routes(batch)})
            if len(self._ahead) > self.steps:
                yield self._ahead.popleft()
        while self._ahead:
            yield self._ahead.popleft()

    @torch.no_grad()
    def _routes(self, batch: Batch) -> Tensor:
        """The experts `[B, S, layers, k]` that the model as it is now chooses; `UNKNOWN` on padding."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        with chosen_experts(self.layers.base_model) as experts_by_layer:
            self.model(**inputs, logits_to_keep=1)
        chosen_TLK = torch.stack(experts_by_layer, dim=1)
        tokens_BS = batch["input_ids"]
        routes = chosen_TLK.new_full((tokens_BS.numel(), *chosen_TLK.shape[1:]), UNKNOWN)
        real_BS = inputs.get("attention_mask", torch.ones_like(tokens_BS)).bool()
        routes[real_BS.flatten()] = chosen_TLK
        return routes.view(*tokens_BS.shape, *chosen_TLK.shape[1:])
