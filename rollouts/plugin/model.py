"""The architecture that vLLM runs: the trainer's backbone and head over paged caches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from posttrain.models.deepseek_v4.checkpoint import FLOAT32
from posttrain.models.deepseek_v4.config import fp4_experts
from posttrain.models.deepseek_v4.context import PackedContext
from posttrain.models.deepseek_v4.layers import Gate, Linear
from posttrain.models.deepseek_v4.model import DeepseekV4Model
from rollouts.plugin.caches import cache_layers
from rollouts.plugin.graphs import DecodeGraphs, DecodeTapes
from rollouts.plugin.paged import PagedContext


class PosttrainDeepseekV4ForCausalLM(nn.Module):
    """Same modules, same ops, same parameter names as `DeepseekV4ForCausalLM`; only the context differs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config  # vLLM's warm-ups tell models apart by it
        config = self.config.v4_config()
        with no_init_weights():  # all of them come from the publisher
            self.model = DeepseekV4Model(config, packed=fp4_experts(config))
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if FLOAT32.search(name):  # vLLM makes everything in the engine's dtype; trainers keep these in fp32
                parameter.data = parameter.data.float()
        self.gates = [module for module in self.modules() if isinstance(module, Gate)]
        for gate in self.gates:
            if gate.hashed:  # vLLM's trial run needs experts that differ
                numbers = torch.arange(gate.tid2eid.numel()).view_as(gate.tid2eid)
                gate.tid2eid.copy_(numbers % config.n_routed_experts)
        self.longest = vllm_config.model_config.max_model_len
        dtype = torch.float32 if current_platform.is_cpu() else vllm_config.model_config.dtype
        self.caches = cache_layers(config, dtype)
        graphs = DecodeGraphs if current_platform.is_cuda() else DecodeTapes
        self.graphs = graphs(self.model.forward_packed, self.caches)

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
        tokens_T = input_ids.long()
        if not isinstance(metadata, dict):  # Profiling before the caches exist: sequences of their own.
            starts = torch.arange(0, len(tokens_T) + self.longest, self.longest, device=tokens_T.device)
            return self.model.forward_packed(tokens_T, PackedContext(starts.clamp(max=len(tokens_T))))
        # Gates that are watched for their routes are run by Python.
        if not any(gate._forward_hooks for gate in self.gates):
            decoded = self.graphs.run(tokens_T, positions, metadata)
            if decoded is not None:
                return decoded
        scheduled = next(iter(metadata.values())).scheduled
        context = PagedContext(positions[:scheduled], metadata, self.caches)
        hidden = self.model.forward_packed(tokens_T[:scheduled], context)
        return hidden if scheduled == len(tokens_T) else nn.functional.pad(hidden, (0, 0, 0, len(tokens_T) - scheduled))

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits of the positions that vLLM samples at, fp32: numbers of the model's dtype, widened.

        Widened here, because vLLM widens them for sampling but not for `prompt_logprobs`, where its softmax would then
        add in another order.
        """
        return self.lm_head(hidden_states).float()

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
