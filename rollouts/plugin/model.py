"""The architecture that vLLM runs: the trainer's backbone and head over paged caches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from posttrain.models.deepseek_v4.checkpoint import FLOAT32
from posttrain.models.deepseek_v4.context import PackedContext
from posttrain.models.deepseek_v4.layers import Linear
from posttrain.models.deepseek_v4.model import DeepseekV4Model
from rollouts.plugin.caches import cache_layers
from rollouts.plugin.paged import PagedContext


class PosttrainDeepseekV4ForCausalLM(nn.Module):
    """Same modules, same ops, same parameter names as `DeepseekV4ForCausalLM`; only the context differs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.v4_config()
        self.model = DeepseekV4Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if FLOAT32.search(name):  # vLLM makes everything in the engine's dtype; trainers keep these in fp32
                parameter.data = parameter.data.float()
        self.caches = cache_layers(config)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token embeddings (vLLM asks for them when it mixes modalities; we never do)."""
        return self.model.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Hidden states `[T, hidden]` of the scheduled tokens."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # Profiling before the caches exist: one sequence of its own.
            whole = torch.tensor([0, len(input_ids)], device=input_ids.device)
            return self.model.forward_packed(input_ids, PackedContext(whole))
        scheduled = int(next(iter(metadata.values())).query_start_R[-1])
        context = PagedContext(positions[:scheduled], metadata, self.caches)
        hidden = self.model.forward_packed(input_ids[:scheduled], context)
        return (
            hidden if scheduled == len(input_ids) else nn.functional.pad(hidden, (0, 0, 0, len(input_ids) - scheduled))
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits of the positions that vLLM samples at."""
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy tensors into parameters and buffers by name.

        Raises:
            KeyError: a name that the model does not have. ValueError: another shape.
        """
        own = self.state_dict()
        loaded = set()
        for name, tensor in weights:
            if name not in own:
                raise KeyError(f"the model has no tensor {name}")
            if own[name].shape != tensor.shape:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
            own[name].copy_(tensor)
            loaded.add(name)
        return loaded
